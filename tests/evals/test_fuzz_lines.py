"""Bad lines are named by their number; a damaged file of samples is refused, or its torn last line dropped."""

from __future__ import annotations

import json
from pathlib import Path

import fake_eval
import pytest
from fuzzing import QUICK
from hypothesis import given
from hypothesis import strategies as st

from mmfix_evals import files
from mmfix_evals.errors import DataError, EvalError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.rescore import rescore
from mmfix_evals.run import run


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
    fake_eval.register(monkeypatch, fake_eval.FakePope(), fake_eval.FakeChair())
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig("fake", ("fake-pope", "fake-chair"), ("greedy", "var"), folder, limit=2, resamples=10)
    run(config, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder())
    return folder, (folder / "samples.jsonl").read_bytes()
