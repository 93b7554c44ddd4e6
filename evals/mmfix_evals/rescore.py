"""Scoring a run folder again, from its samples alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmfix_evals.arms import BASELINE
from mmfix_evals.results import merge, open_run, score


def rescore(folder: Path, parser: str | None = None) -> dict[str, Any]:
    """``metrics``, ``comparisons``, ``length_matched`` and ``speed`` as in ``results.json``, to the same digits.

    Args:
        folder: run directory.
        parser: another rule for turning texts into yes and no; default: that of the run.
    """
    run = open_run(folder)
    answers = run.answers(parser)
    settings = run.settings()
    return {
        **merge([score(one, settings, BASELINE) for one in answers]),
        "scored_with": {one.task.name: {one.task.flavour_field: one.flavour} for one in answers},
        "bootstrap": {"resamples": settings.resamples, "seed": settings.seed},
        "warnings": [run.warning] if run.warning else [],
    }
