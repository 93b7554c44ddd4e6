"""Malformed files of every scorer: one line that names the file, a counted skip, or the same numbers. Never others."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_eval
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfix_evals import files
from mmfix_evals.errors import DataError, EvalError
from mmfix_evals.metrics import amber, chair, hallusionbench, mme, mmhal, pope, vlind
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.rescore import rescore
from mmfix_evals.run import run
from mmfix_evals.tasks import base

Content = dict[str, Any]
"""File name → its text, or its records (written as JSON, or as JSON Lines where the name says so)."""
QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Scorer:
    content: Content
    score: Callable[[Path], Any]


def _mmhal(index: int) -> dict[str, Any]:
    return {
        "question_type": mmhal.TYPES[index % 8],
        "image_id": f"{index:04}",
        "image_content": ["Dog"],
        "question": f"What is {index}?",
        "gt_answer": "A dog.",
        "model_answer": "A cat.",
        "reply": f"Rating: {index % 7}",
    }


def _hallusion(index: int) -> dict[str, Any]:
    return {
        "category": "VD",
        "subcategory": "chart",
        "set_id": "1",
        "figure_id": str(index // 2),
        "question_id": str(index % 2),
        "visual_input": "1" if index < 2 else "2",
        "question": f"Is {index} so?",
        "gt_answer": str(index % 2),
        "gt_answer_details": "so.",
        "model_prediction": "Yes",
    }


VLIND = {
    "global_id": 0,
    "concept": "size",
    "context_id": 0,
    "context": "A mouse is larger than a house.",
    "factual_context": "A mouse is smaller than a house.",
    "true_statement": "The house is smaller.",
    "false_statement": "The mouse is smaller.",
    "existent_noun": "a mouse",
    "non-existent_noun": "a whale",
    "best_img_id": 5,
    "aggregated_human_label_good_images": {str(i): 2 if i in (0, 5) else 1 for i in range(12)},
}
VLIND_ANSWERS = [
    {"global_id": 0, "question": name, "answer": "True" if "1" in name[:2] else "False"}
    for name in ("a1", "a2", "b1", "b2", "c1", "c2", "d1/0", "d2/0", "d1/5", "d2/5")
]
COCO = {
    "instances.json": {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 9, "name": "car"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3}, {"id": 2, "image_id": 2, "category_id": 9}],
    },
    "captions.json": {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "A puppy."}],
    },
}
CAPTIONS = [{"image_id": 1, "caption": "A dog and a car."}, {"image_id": 2, "caption": "A cat in a car."}]
SCORERS = {
    "pope": Scorer(
        {
            "q.jsonl": [
                {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a {i}?", "label": ("yes", "no")[i % 2]}
                for i in range(1, 5)
            ],
            "a.jsonl": [{"question_id": i, "answer": ("Yes", "No, it is", "no")[i % 3]} for i in range(1, 5)],
        },
        lambda folder: pope.score_files(folder / "q.jsonl", folder / "a.jsonl", "strict3way"),
    ),
    "chair": Scorer(
        {"c.jsonl": CAPTIONS, "t.json": {"1": ["dog", "cat"], "2": ["car"]}},
        lambda folder: chair.score_files(folder / "c.jsonl", folder / "t.json"),
    ),
    "coco": Scorer(
        {"c.jsonl": CAPTIONS, **COCO},
        lambda folder: chair.score_files(folder / "c.jsonl", folder),
    ),
    "mme": Scorer(
        {
            "existence.txt": "".join(
                f"{i}.jpg\tIs it {w}?\t{w}\t{a}\n" for i in (1, 2) for w, a in (("Yes", "Yes"), ("No", "yes"))
            )
        },
        lambda folder: mme.score_files(folder),
    ),
    "amber": Scorer(
        {
            "annotations.json": [
                {"id": 1, "type": "discriminative-hallucination", "truth": "no"},
                {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
                {"id": 3, "type": "discriminative-relation", "truth": "yes"},
            ],
            "relation.json": {"sky": [], "dog": ["puppy"]},
            "safe_words.txt": "light\nrange",
            "r.json": [{"id": i, "response": ("Yes", "No", "Yes")[i % 3]} for i in (1, 2, 3)],
        },
        lambda folder: amber.score_files(folder / "r.json", folder, "d"),
    ),
    "vlind": Scorer(
        {"d.json": [VLIND], "a.jsonl": VLIND_ANSWERS},
        lambda folder: vlind.score_files(folder / "d.json", folder / "a.jsonl", prompts="instructblip"),
    ),
    "hallusionbench": Scorer(
        {"h.json": [_hallusion(i) for i in range(4)]}, lambda folder: hallusionbench.score_files(folder / "h.json")
    ),
    "mmhal": Scorer({"m.json": [_mmhal(i) for i in range(4)]}, lambda folder: mmhal.score_files(folder / "m.json")),
}
EVERY = pytest.mark.parametrize("name", SCORERS)


def encoded(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in value).encode()
    return json.dumps(value, indent=1).encode()


def outcome(scorer: Scorer, folder: Path, content: Content, changed: str, data: bytes) -> Any:
    """What is scored with one file changed; a refusal as the error itself, checked to be one good line."""
    for name, value in content.items():
        (folder / name).write_bytes(data if name == changed else encoded(name, value))
    try:
        found = scorer.score(folder)
    except EvalError as problem:
        message = str(problem)
        assert message
        assert len(message) < 4000
        assert "\n" not in message
        return problem
    json.dumps(found, allow_nan=False)  # no number that is none
    return found


def numbers(found: Any) -> Any:
    """A result less its warnings and the hashes of its files."""
    if isinstance(found, dict):
        return {k: numbers(v) for k, v in found.items() if "sha256" not in k and k not in ("warnings", "seconds")}
    return found


def harmless(found: Any, plain: Any) -> bool:
    """Refused, counted aloud, or without effect."""
    if isinstance(found, EvalError):
        return True
    return numbers(found) == numbers(plain) or found["warnings"] != plain["warnings"]


def plain(scorer: Scorer, folder: Path) -> Any:
    found = outcome(scorer, folder, scorer.content, "", b"")
    assert not isinstance(found, EvalError), found
    return found


@EVERY
def test_what_editors_do_to_a_file_changes_no_number(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    whole = plain(scorer, tmp_path)
    for changed, value in scorer.content.items():
        data = encoded(changed, value)
        for other in (b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data + b"\n\n", data.rstrip(b"\n")):
            found = outcome(scorer, tmp_path, scorer.content, changed, other)
            assert numbers(found) == numbers(whole), (changed, found)
        if name != "coco":  # read by the library of COCO, which unpacks nothing
            found = outcome(scorer, tmp_path, scorer.content, changed, gzip.compress(data))
            assert numbers(found) == numbers(whole), (changed, found)


@EVERY
def test_another_encoding_is_named(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    for changed, value in scorer.content.items():
        for data in (encoded(changed, value).decode().encode("utf-16"), encoded(changed, value) + b"\xe9\xff"):
            found = outcome(scorer, tmp_path, scorer.content, changed, data)
            assert isinstance(found, EvalError), (changed, found)
            assert changed in str(found)


@EVERY
@given(data=st.data())
@QUICK
def test_damaged_bytes(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Cut, overwritten, doubled and mixed up: never an exception of another kind, never a number that is none."""
    scorer = SCORERS[name]
    changed = data.draw(st.sampled_from(sorted(scorer.content)))
    raw = encoded(changed, scorer.content[changed])
    place = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(place, min(len(raw), place + 40)))
    pieces = [
        b"",
        b"\0",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"null",
        b'"',
        b"[",
        b"{",
        b"\\ud800",
        b"\xff",
        b"\n",
        b"9" * 5000,
    ]
    middle = data.draw(st.one_of(st.sampled_from(pieces), st.binary(max_size=8)))
    damaged = data.draw(st.sampled_from([raw[:place], raw[:place] + middle + raw[end:], raw + raw[place:]]))
    outcome(scorer, tmp_path, scorer.content, changed, damaged)


WRONG = [None, True, -1, 7.5, 10**30, "", "\0", "NaN", "maybe", "x" * 300_000, [], {}, [[]], ["yes"], {"a": None}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = new
    return value


@EVERY
@given(data=st.data())
@QUICK
def test_wrong_types_anywhere(name: str, data: st.DataObject, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    changed = data.draw(st.sampled_from(sorted(n for n, v in scorer.content.items() if not isinstance(v, str)) or [""]))
    if not changed:
        return
    value = scorer.content[changed]
    path = data.draw(st.sampled_from(places(value)[1:]))
    new = replaced(value, path, data.draw(st.sampled_from(WRONG)))
    outcome(scorer, tmp_path, scorer.content, changed, encoded(changed, new))


@EVERY
def test_doubled_records_are_refused_counted_or_without_effect(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    whole = plain(scorer, tmp_path)
    for changed, value in scorer.content.items():
        lists = [path for path in places(value) if isinstance(_at(value, path), list) and _at(value, path)]
        for path in lists:
            old = _at(value, path)
            for new in ([*old, old[0]], [old[-1], *old]):
                found = outcome(scorer, tmp_path, scorer.content, changed, encoded(changed, replaced(value, path, new)))
                assert harmless(found, whole), (changed, path)
        if isinstance(value, str) and "\t" in value:
            lines = value.splitlines(keepends=True)
            found = outcome(scorer, tmp_path, scorer.content, changed, "".join([*lines, lines[0]]).encode())
            assert harmless(found, whole)


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@EVERY
def test_a_name_that_stands_twice_in_one_object_is_refused(name: str, tmp_path: Path) -> None:
    scorer = SCORERS[name]
    for changed, value in scorer.content.items():
        text = encoded(changed, value).decode()
        if not isinstance(value, str) and '": ' in text:
            first = text[text.index('"') : text.index('": ') + 3]
            doubled = text.replace(first, f"{first}0, {first}", 1)
            found = outcome(scorer, tmp_path, scorer.content, changed, doubled.encode())
            assert isinstance(found, DataError), (changed, found)
            assert changed in str(found)
            assert "occurs twice" in str(found)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "1e999 is too large"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": "\0"}', "control character"),
        ('{"a": ' + "9" * 5000 + "}", "digit"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "' + "x" * 2_000_000, "Unterminated string"),
        ("3", "expected a JSON object"),
    ],
)
def test_a_bad_line_is_named_with_its_number(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 0}\n\n' + line + "\n")
    with pytest.raises(DataError, match=reason) as caught:
        files.read_rows(path)
    assert "rows.jsonl, line 3" in str(caught.value)
    assert len(str(caught.value)) < 4000


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert files.read_rows(tmp_path / "a.jsonl") == [{"a": "😀"}]


@given(data=st.data())
@QUICK
def test_damaged_samples_of_a_run(data: st.DataObject, sampled: tuple[Path, bytes], tmp_path: Path) -> None:
    """Every line is whole, refused by its number, or the last one, torn and dropped with a warning."""
    folder, raw = sampled
    place = data.draw(st.integers(1, len(raw) - 1))
    end = data.draw(st.integers(place, min(len(raw), place + 30)))
    middle = data.draw(st.sampled_from([b"", b"\0", b"\xff", b"NaN", b"{", b"\n", b"[]\n", b"null\n", b"\\ud800"]))
    torn = data.draw(st.booleans())
    (folder / "samples.jsonl").write_bytes(raw[:place] if torn else raw[:place] + middle + raw[end:])
    problem = None
    try:
        json.dumps(rescore(folder), allow_nan=False)
    except EvalError as error:
        problem = str(error)
    assert problem is None or "samples.jsonl" in problem


@pytest.fixture
def sampled(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes]:
    extra = {"fake-pope": fake_eval.FakePope(), "fake-chair": fake_eval.FakeChair()}
    monkeypatch.setattr(base, "_TASKS", {**base._TASKS, **extra})
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig("fake", ("fake-pope", "fake-chair"), ("greedy", "var"), folder, limit=2, resamples=10)
    run(config, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder())
    return folder, (folder / "samples.jsonl").read_bytes()
