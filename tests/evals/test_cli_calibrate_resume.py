"""``mmfix calibrate sinks`` and ``vti``: stopped in the middle, they go on there and end in the same values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmfix import calibration, directions, sinksearch
from mmfix.families import describe
from mmfix_decoding import Decoder
from mmfix_evals.arms import resolve

Call = Callable[..., tuple[int, str, str]]
PICTURES = 5
# Command, and (module, its function that runs the model, calls of that for one picture).
SINKS = (("calibrate", "sinks", "--limit", PICTURES, "--batch-size", 1), (sinksearch, "attention_received", 1))
VTI = (("calibrate", "vti", "--limit", PICTURES, "--trials", 2), (directions, "outputs", 3))


class Stopping:
    """Counts the calls of a function, and stops the run at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls, self.last, self.real = 0, 10**9, getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args: Any) -> Any:
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        return self.real(*args)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch, bundled: Decoder) -> Callable[..., Stopping]:
    monkeypatch.setattr(Decoder, "from_pretrained", lambda *args, **kwargs: bundled)
    return lambda module, name: Stopping(monkeypatch, module, name)


def parts() -> list[Path]:
    return sorted(calibration.cache_folder().glob("*.partial/*.safetensors"))


@pytest.mark.parametrize(("words", "work"), [SINKS, VTI], ids=["sinks", "vti"])
def test_a_stopped_calibration_goes_on(
    call: Call, stopping: Callable[..., Stopping], words: Any, work: Any, tmp_path: Path
) -> None:
    module, name, each = work
    runs = stopping(module, name)
    assert call(*words, "--save-to", tmp_path / "whole", "--quiet")[0] == 0
    total, runs.calls = runs.calls, 0
    assert not parts(), "nothing stays of a calibration that is complete"
    runs.last = total - each - 1  # the last call for the last picture but one
    code, _, errors = call(*words, "--save-to", tmp_path / "resumed", "--quiet")
    assert (code, not list(tmp_path.glob("resumed/*"))) == (130, True)
    done = len(parts())
    assert done == (PICTURES - 2 if words is SINKS[0] else 2 * PICTURES - 2)
    runs.calls, runs.last = 0, 10**9
    code, _, errors = call(*words, "--save-to", tmp_path / "resumed")
    assert (code, runs.calls) == (0, 2 * each), "pictures that were done are not computed again"
    assert f"{done} of the " in errors
    (whole,), (resumed,) = (list((tmp_path / folder).iterdir()) for folder in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()
    assert not parts()


def test_parts_that_cannot_be_used_are_computed_again(
    call: Call, stopping: Callable[..., Stopping], tmp_path: Path
) -> None:
    words, (module, name, _) = SINKS
    runs = stopping(module, name)
    assert call(*words, "--save-to", tmp_path / "whole", "--quiet")[0] == 0
    runs.calls, runs.last = 0, 4
    other = [*words[:-1], 2]  # other batches: nothing of it serves the first command
    assert call(*other, "--prompt", "What is this?", "--quiet", "--save-to", tmp_path / "other")[0] == 0
    assert runs.calls == 3
    runs.calls, runs.last = 0, 4
    assert call(*words, "--quiet")[0] == 130
    torn, foreign, *_ = found = parts()
    assert len(found) == 4
    torn.write_bytes(torn.read_bytes()[:-7])
    whole = foreign.read_bytes()
    foreign.write_bytes(whole.replace(whole[whole.index(b'"mmfix":"') + 9 :][:64], b"0" * 64))
    runs.calls, runs.last = 0, 10**9
    code, _, errors = call(*words, "--save-to", tmp_path / "resumed", "--quiet")
    assert (code, runs.calls, len(errors.splitlines())) == (0, 3, 2)
    assert f"{torn} is not readable" in errors
    assert f"{foreign} belongs to another model, other data or other parameters; that part is computed again" in errors
    kept = [(tmp_path / folder / calibration.FILE).read_bytes() for folder in ("whole", "resumed")]
    assert kept[0] == kept[1]


def test_answers_with_other_directions_are_other_answers(bundled: Decoder, tmp_path: Path) -> None:
    """Directions found again lie under the same name; what was answered with the old ones is not taken for theirs."""
    own = directions.load(describe(bundled.model))
    arms = []
    for factor in (1, 2, 1):
        assert own.text is not None
        path = directions.save(bundled.model, replace(own, text=own.text * factor), tmp_path)
        arms.append(resolve(f"vti:directions={path}", bundled.model))
    assert arms[0].spec == arms[2].spec != arms[1].spec
    assert "directions" in arms[0].spec[0]["measured"]
    assert "measured" not in resolve("vhr", bundled.model).spec[0]


def test_what_cannot_be_written_is_refused_before_the_work(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Decoder, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    file = tmp_path / "file"
    file.write_text("")
    for name in ("sinks", "var", "act", "sofa", "positional-hidden", "vti"):
        code, _, errors = call("calibrate", name, "--save-to", file / "model")
        assert (code, errors.count("\n"), "choose a writable folder" in errors) == (1, 1, True), name
    for words in (("heads",), ("sinks",)):
        assert call(*words, "--plot", tmp_path / "map.png")[0] == 2
        assert call(*words, "--out", file / "map.json")[0] == 1
    code, _, errors = call("calibrate", "sinks", "--data", tmp_path / "none")
    assert (code, "no such folder" in errors) == (1, True)
