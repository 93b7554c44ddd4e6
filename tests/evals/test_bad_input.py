"""Malformed files: one clear error that names the file, or a sound result. Never another exception, never NaN."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfix_evals import pope_build
from mmfix_evals.coco_scenes import scenes_from_coco
from mmfix_evals.errors import EvalError
from mmfix_evals.metrics import amber, chair, hallusionbench, mme, mmhal, pope, vlind

ORACLE = json.loads((Path(__file__).parent / "oracle.json").read_text())
WRONG: list[Any] = [
    None,
    True,
    -1,
    3.5,
    10**30,
    "",
    "maybe",
    [],
    {},
    [[]],
    {"a": 1},
    "\ud800",
    float("nan"),
    float("inf"),
]

SCENES = {"s.jsonl": [{"image": "a.jpg", "objects": ["cat", "dog"]}, {"image": "b.jpg", "objects": ["cup"]}]}
COCO = {
    "instances_val2014.json": {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3}],
    },
    "captions_val2014.json": {"annotations": [{"id": 1, "image_id": 1, "caption": "A cup."}]},
}
SCORERS: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "pope": (ORACLE["pope"]["files"], lambda f: pope.score_files(f / "q.jsonl", f / "a.jsonl", "strict3way")),
    "chair": (ORACLE["chair"]["files"], lambda f: chair.score_files(f / "c.jsonl", f / "gt.json")),
    "mme": (ORACLE["mme"]["files"], lambda f: mme.score_files(f / "r")),
    "amber": (ORACLE["amber"]["files"], lambda f: amber.score_files(f / "r.json", f / "data")),
    "vlind": (ORACLE["vlind"]["files"], lambda f: vlind.score_files(f / "d.json", f / "a.jsonl")),
    "hallusionbench": (ORACLE["hallusionbench"]["files"], lambda f: hallusionbench.score_files(f / "r.json")),
    "mmhal": (ORACLE["mmhal"]["files"], lambda f: mmhal.score_files(f / "r.json", f / "j.json")),
    "objects": (SCENES, lambda f: [scene.objects for scene in pope_build.read_scenes(f / "s.jsonl")]),
    "coco": (COCO, lambda f: [scene.objects for scene in scenes_from_coco(f)]),
}


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and isinstance(content[0], list):
        return json.dumps(content[0])
    if isinstance(content, list):
        return "".join(json.dumps(row) + "\n" for row in content)
    return json.dumps(content)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place of a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def changed(content: Any, path: tuple, new: Any) -> Any:
    copy = json.loads(json.dumps(content))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return copy


@st.composite
def damaged(draw: st.DrawFn, files: dict[str, Any]) -> dict[str, bytes]:
    """The files with one of them damaged in one way."""
    name = draw(st.sampled_from(sorted(files)))
    how = draw(
        st.sampled_from(["value", "value", "value", "torn", "byte", "doubled", "dropped", "encoding", "long", "empty"])
    )
    written = {other: text_of(content).encode() for other, content in files.items()}
    content, data = files[name], written[name]
    if how == "value" and not isinstance(content, str):
        content = changed(content, draw(st.sampled_from(places(content))), draw(st.sampled_from(WRONG)))
        data = text_of(content).encode("utf-8", "surrogatepass")
    elif how in ("torn", "value"):
        data = data[: draw(st.integers(0, len(data)))]
    elif how == "byte":
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
    elif how in ("doubled", "dropped"):
        lines = data.split(b"\n")
        n = draw(st.integers(0, len(lines) - 1))
        data = b"\n".join([*lines[:n], *([lines[n]] * (2 if how == "doubled" else 0)), *lines[n + 1 :]])
    elif how == "encoding":
        data = (data.decode() + "ä").encode(draw(st.sampled_from(["utf-16", "latin-1", "utf-8-sig"])))
    elif how == "long":
        data = data + b"x" * 300_000
    else:
        data = b""
    return {**written, name: data}


def sound(value: Any) -> None:
    json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        for name in (
            "accuracy",
            "precision",
            "recall",
            "f1",
            "chair_s",
            "chair_i",
            "aAcc",
            "s_ck",
            "hallucination_rate",
        ):
            assert value.get(name) is None or 0 <= value[name] <= 1


@pytest.mark.parametrize("name", SCORERS)
def test_one_clear_error_or_a_sound_result(name: str) -> None:
    contents, score = SCORERS[name]

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged(contents))
    def check(written: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for file, data in written.items():
                path = folder / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            try:
                found = score(folder)
            except EvalError as problem:
                text = str(problem)
                assert text.strip()
                assert len(text) < 1500
                assert str(folder) in text or any(Path(file).name in text for file in written), text
            else:
                sound(found)

    check()
