"""``mmfix calibrate act`` and ``sofa``: on a few dev questions, resumed, written down, and picked up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mmfix
from mmfix import calibration
from mmfix.methods import ACT, SoFA
from mmfix_decoding import Decoder
from mmfix_evals import calibrating, headdata

Call = Callable[..., tuple[int, str, str]]


def test_act_keeps_heads_that_help(bundled: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers made up, the chosen heads are those with more right answers than the plain model."""
    right = {(2, 1): 5, (3, 4): 7, (4, 0): 6}

    def answers(model: Any, made: Any, method: Any) -> dict[str, Any]:
        heads = () if method is None else method.heads
        return {
            "right": right.get(heads[0], 3) if len(heads) == 1 else 5 if not heads else 8,
            "p_right": 0.5,
            "fired": 1,
        }

    monkeypatch.setattr(calibrating, "_answers", answers)
    found = calibrating.act(bundled, headdata.questions(None, None, 8), {"rule": "relative", "alpha": 1.5})
    assert found.values == {"heads": [[3, 4], [4, 0]], "rule": "relative", "alpha": 1.5}
    assert found.record["scores"]["gain"]["3,4"] == pytest.approx(2 / 8)
    assert found.record["scores"]["gain"]["2,0"] == pytest.approx(-2 / 8)
    assert len(found.record["scores"]["gain"]) == 3 * 6  # layers 2 to 4 of six
    assert found.record["scores"]["chosen"] == 1.0


def test_an_interrupted_calibration_goes_on(bundled: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, done = headdata.questions(None, None, 4), []

    def answers(model: Any, made: Any, method: Any) -> dict[str, Any]:
        if len(done) == 5:
            done.append(None)
            raise KeyboardInterrupt
        done.append(method)
        return {"right": 2, "p_right": 0.5, "fired": 1}

    monkeypatch.setattr(calibrating, "_answers", answers)
    with pytest.raises(KeyboardInterrupt):
        calibrating.act(bundled, asked, {})
    (file,) = (calibration.cache_folder()).glob("act-*.partial.jsonl")
    file.write_text(file.read_text() + '{"setting": "2,4", "ri')  # a line that was cut
    calibrating.act(bundled, asked, {})
    assert len(done) == 6 + (1 + 18 + 1) - 5
    assert not list(calibration.cache_folder().glob("*.partial.jsonl"))


def test_act_is_measured_written_and_used(call: Call, bundled: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "candidates", lambda decoder: [(2, 4), (3, 0)])
    code, printed, _ = call(
        "calibrate", "act", "--limit", 6, "--options", "rule=relative,alpha=1.2", "--json", "--quiet"
    )
    assert code == 0
    found = json.loads(printed)
    assert found["data"] == "TinyWorld dev"
    assert found["data_sha256"] == headdata.digest(headdata.questions(None, None, 6))
    assert found["revision"]
    assert found["fired"] > 0
    assert 0 <= found["scores"]["plain"] <= 1
    heads = tuple(tuple(head) for head in found["values"]["heads"])
    used = mmfix.calibrated(bundled.model, "act")
    assert used == ACT(heads=heads, rule="relative", alpha=1.2)
    assert mmfix.calibrated(bundled.model, "var").sink_dims  # type: ignore[attr-defined]  # what was known stays
    with mmfix.mitigate(bundled.model, used) as fix:
        report = fix.report().to_dict()["calibrated"]
    assert report["act"]["values"]["alpha"] == 1.2
    assert report["act"]["data"] == "TinyWorld dev"
    code, _, errors = call("calibrate", "act", "--options", "heads=all", "--quiet")
    assert (code, errors.count("\n")) == (2, 1)


def test_sofa_chooses_by_accuracy_and_tells_consistency(call: Call, bundled: Decoder, tmp_path: Path) -> None:
    code, printed, _ = call("calibrate", "sofa", "--limit", 4, "--step", 0.5, "--json", "--quiet")
    assert code == 0
    found = json.loads(printed)
    assert [row["sigma"] for row in found["scores"]] == [0.0, 0.5, 1.0]
    best = max(row["accuracy"] for row in found["scores"])
    (chosen,) = (row for row in found["scores"] if row["sigma"] == found["values"]["sigma"])
    assert chosen["accuracy"] == best
    assert mmfix.calibrated(bundled.model, "sofa") == SoFA(sigma=chosen["sigma"])
    assert found["scores"][0]["fired"] == 0
    # The plain model's row is what its own first words say, in both orders.
    from mmfix_evals import tasks

    task = tasks.get("tinyworld-position")
    documents = task.documents("dev", 4, 0)
    said = [bundled.generate([task.show(one)], [one.prompt], max_new_tokens=1)[0].text.lower() for one in documents]
    assert set(said) <= {"yes", "no"}, "the first word is no verdict: the comparison shows nothing"
    same = [a == b for a, b in zip(said[::2], said[1::2], strict=True)]
    assert found["scores"][0]["consistency"] == pytest.approx(sum(same) / len(same))
    right = [word == one.target["label"] for word, one in zip(said, documents, strict=True)]
    assert found["scores"][0]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_sofa_on_the_users_own_pairs(call: Call, tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (96, 96), (80 * n, 200, 90)).save(tmp_path / f"{n}.png")
    file = tmp_path / "pairs.jsonl"
    row = {"images": ["0.png", "2.png"], "text": "Is there a dog in any picture?", "label": "No"}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "images": ["1.png", "0.png"]}))
    words = ["calibrate", "sofa", "--images", tmp_path, "--questions", file, "--step", 1, "--quiet"]
    code, printed, errors = call(*words, "--json")
    assert (code, errors) == (0, "")
    found = json.loads(printed)
    assert (found["data"], [one["pairs"] for one in found["scores"]]) == ("own pictures", [2, 2])
    assert found["scores"][1]["fired"] > 0  # the pictures touch, and are told apart by their number of tokens
    asked = headdata.pair_questions(tmp_path, file, 64)
    assert [[one.getpixel((0, 0))[0] for one in pictures] for pictures, _, _ in asked] == [  # type: ignore[index]
        [0, 160], [160, 0], [80, 0], [0, 80]]  # fmt: skip
    assert call(*words[:4])[0] == 2
    for wrong in ({"images": ["0.png"]}, {"label": "maybe"}, {"images": ["0.png", "../1.png"]}):
        file.write_text(json.dumps({**row, **wrong}))
        code, _, errors = call(*words)
        assert (code, "line 1" in errors) == (1, True)


def test_ties_go_to_the_consistent_and_then_to_the_small(bundled: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"0": (0.7, 0.8), "0.5": (0.8, 0.6), "0.75": (0.8, 0.9), "1": (0.8, 0.9)}
    made = {name: {"accuracy": a, "consistency": c, "pairs": 2, "fired": 1} for name, (a, c) in rows.items()}
    monkeypatch.setattr(calibrating.Partial, "get", lambda self, setting, compute: made[setting])
    assert calibrating.sofa(bundled, 2, [0, 0.5, 0.75, 1.0]).values["sigma"] == 0.75
    assert calibrating.grid(0.25) == [0, 0.25, 0.5, 0.75, 1.0]
