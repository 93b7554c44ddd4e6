"""The further scorers from the command line give what their modules give, and refuse what is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmfix_evals.cli.app import app
from mmfix_evals.errors import UsageError
from mmfix_evals.metrics import mme

RUNNER = CliRunner()


def test_mme_folder(shared: Path) -> None:
    folder = shared / "evaldata/oracle/mme/results_dir"
    done = RUNNER.invoke(app, ["eval", "score", "mme", str(folder), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout) == json.loads(json.dumps(mme.score_files(folder)))


@pytest.mark.parametrize("scorer", ["mme", "vlind", "amber", "hallusionbench", "mmhal"])
def test_every_scorer_has_help_with_an_example(scorer: str) -> None:
    done = RUNNER.invoke(app, ["eval", "score", scorer, "--help"])
    assert done.exit_code == 0
    assert f"Example: mmfix eval score {scorer}" in " ".join(done.stdout.split())


def test_an_unknown_variant_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="official"):
        RUNNER.invoke(app, ["eval", "score", "mme", str(tmp_path), "--variant", "oficial"], catch_exceptions=False)
