"""The scoring benchmark measures what it says, on input that is the same everywhere. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmfix_evals import files
from mmfix_evals.cli import bench_scoring
from mmfix_evals.cli.app import app
from mmfix_evals.metrics import chair, pope


def test_the_input_is_fixed_and_names_objects(tmp_path: Path) -> None:
    rows = bench_scoring.captions(20)
    assert rows == bench_scoring.captions(20)
    bench_scoring.annotations(tmp_path, 20)
    score = chair.Chair().score(rows, chair.read_ground_truth(tmp_path))
    assert score.n == 20
    assert score.counts["mentions"] > 100
    assert 0 < score.chair_i < 1
    asked, given = bench_scoring.questions(60)
    found = pope.score(asked, given)
    assert (found.n, {row["category"] for row in asked}) == (60, {"random", "popular", "adversarial"})
    assert 0 < found.accuracy < 1


def test_the_record_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scoring, "captions", lambda real=bench_scoring.captions: real(10))
    monkeypatch.setattr(bench_scoring, "annotations", lambda folder, real=bench_scoring.annotations: real(folder, 10))
    monkeypatch.setattr(bench_scoring, "questions", lambda real=bench_scoring.questions: real(30))
    out = tmp_path / "record.json"
    words = ["bench", "scoring", "--repeats", "2", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    record = files.read_json(out)
    assert json.loads(done.stdout) == record
    for name in ("chair", "pope"):
        times = record["seconds"][name]
        assert len(times["processor"]) == len(times["wall"]) == 2
        assert min(times["processor"]) <= times["median_processor"] <= max(times["processor"])
    assert not files.cache_dir().exists()  # the user's cache is left alone
    assert record["target_processor_seconds"] == {"chair": 2.0, "pope": 0.5}
