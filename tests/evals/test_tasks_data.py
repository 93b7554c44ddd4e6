"""Where a run looks for data, and that it looks before a model is loaded."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_eval
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmfix_evals.cli.app import app
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.run import run
from mmfix_evals.tasks import data

PICTURE = "COCO_val2014_000000000001.jpg"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "data"))
    return tmp_path / "data"


def never(config: RunConfig) -> Any:
    raise AssertionError(f"{config.model} was loaded")


@pytest.mark.parametrize("task", ["pope-coco", "chair-coco", "mucr-cue", "grounding-coco"])
def test_missing_data_are_said_before_the_model_is_loaded(root: Path, tmp_path: Path, task: str) -> None:
    config = RunConfig("tiny", ("tinyworld-pope", task), ("greedy",), tmp_path / "out", limit=4)
    with pytest.raises(DataError, match=re.escape(str(root))):
        run(config, ["mmfix"], Reporter(quiet=True), never)
    assert not (tmp_path / "out").exists()


def test_the_data_folder_of_a_run(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    for folder in ("pope/coco", "coco/val2014"):
        (mine / folder).mkdir(parents=True)
    rows = [{"question_id": n, "image": PICTURE, "text": f"Is there a cat? ({n})", "label": "yes"} for n in (1, 2)]
    for split in ("random", "popular", "adversarial"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (mine / f"pope/coco/coco_pope_{split}.json").write_text(text)
    Image.new("RGB", (40, 30), "red").save(mine / "coco/val2014" / PICTURE)
    config = RunConfig("fake", ("pope-coco",), ("greedy",), tmp_path / "out", limit=1, resamples=20)
    with pytest.raises(DataError, match=re.escape(str(root))):
        run(config, ["mmfix"], Reporter(quiet=True), never)
    given = replace(config, data=mine)
    found = run(given, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder())
    assert found["tasks"]["pope-coco"]["n_documents"] == 6
    assert data.root() == root  # as it was before
    os.environ.pop(data.ENVIRONMENT)
    with data.below(mine):
        assert data.root() == mine
    assert data.ENVIRONMENT not in os.environ
    with pytest.raises(UsageError, match=r"--data .*nowhere: no such folder"):
        run(replace(config, data=tmp_path / "nowhere"), ["mmfix"], Reporter(quiet=True), never)


def test_the_data_option(root: Path, tmp_path: Path) -> None:
    words = ["--tasks", "pope-coco", "--limit", "1", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    done = CliRunner().invoke(app, ["eval", "run", *words])
    assert isinstance(done.exception, DataError)
    assert f"files in {tmp_path}: pope/coco" in str(done.exception)
    done = CliRunner().invoke(app, ["eval", "fetch", "pope-coco", "--dry-run", "--data", str(tmp_path / "new")])
    assert str(tmp_path / "new" / "pope/coco/coco_pope_random.json") in done.stdout
