"""``mmfix calibrate positional``: chosen by held-out answers, resumed, written down, and picked up."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mmfix
from mmfix import calibration, positional_search
from mmfix.methods import PositionalHidden
from mmfix_decoding import Decoder
from mmfix_evals import calibrating, headdata
from mmfix_evals.calibrating_positional import positional
from mmfix_evals.cli import main
from mmfix_evals.errors import DataError


def test_it_keeps_what_helps_most_and_goes_on_where_it_was(bundled: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = headdata.questions(None, None, 2)
    tried: list[Any] = []

    def answers(model: Any, made: Any, method: Any) -> dict[str, Any]:
        if len(tried) == 3:
            tried.append(None)
            raise KeyboardInterrupt
        tried.append(method)
        likely = {None: 0.5, (7, 0.0): 0.4, (7, -1.0): 0.6, (3, 0.0): 0.7, (3, -1.0): 0.1}
        return {"right": 1, "p_right": likely[None if method is None else (method.dims[0], method.factor)]}

    monkeypatch.setattr(calibrating, "_answers", answers)
    monkeypatch.setattr(positional_search, "mean_states", lambda *args: None)
    monkeypatch.setattr(positional_search, "candidates", lambda states, top: [7, 3])
    with pytest.raises(KeyboardInterrupt):
        positional(bundled, asked)
    done: list[int] = []
    found = positional(bundled, asked, progress=done.append)
    assert found.values == {"dims": [3], "factor": 0.0}
    assert found.record["scores"]["plain"]["p_right"] == 0.5
    assert len(found.record["scores"]["tried"]) == 4
    assert len([one for one in tried if one is not None]) == 4, "the plain model and four settings, each once"
    assert sum(done) == 6
    assert not list(calibration.cache_folder().glob("*.partial.jsonl"))
    monkeypatch.setattr(calibrating, "_answers", lambda model, made, method: {"right": 1, "p_right": 0.5})
    assert positional(bundled, asked).values["factor"] == 1.0, "where nothing helps, the method changes nothing"
    with pytest.raises(DataError, match="at least one"):
        positional(bundled, [])


def test_it_is_measured_written_and_used(bundled: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["calibrate", "positional", "--limit", "2", "--texts", "2", "--tokens", "64", "--top", "1", "--json"]
    assert main([*words, "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == "TinyWorld dev"
    assert found["data_sha256"] == headdata.digest(headdata.questions(None, None, 2))
    assert 0 <= found["scores"]["plain"]["p_right"] <= 1
    used = mmfix.calibrated(bundled.model, "positional-hidden")
    assert used == PositionalHidden(dims=tuple(found["values"]["dims"]), factor=found["values"]["factor"])
    with mmfix.mitigate(bundled.model, "positional-hidden") as fix:
        assert fix.methods[0].dims == tuple(found["values"]["dims"])  # type: ignore[attr-defined]
        assert "positional-hidden" in fix.report().to_dict()["calibrated"]
