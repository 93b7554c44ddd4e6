"""What a report is made from: run folders, their numbers and their samples side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfix_evals import results, samples
from mmfix_evals.errors import DataError
from mmfix_evals.results import Results, Run
from mmfix_evals.scoring import Answers


@dataclass(frozen=True)
class Reported:
    """One run of a report.

    Attributes:
        label: the folder's name, made unique.
        results: its ``results.json``.
        answers: scored samples by task; empty where the folder holds results only.
    """

    label: str
    results: Results
    answers: dict[str, Answers]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(entry["method"] for entry in self.results["metrics"]))

    def entry(self, task: str, split: str, metric: str, method: str) -> dict[str, Any] | None:
        """One metric with its interval; None if it was not measured."""
        wanted = (task, split, metric, method)
        for found in self.results["metrics"]:
            if (found["task"], found["split"], found["metric"], found["method"]) == wanted:
                return dict(found)
        return None

    def speed(self, task: str, split: str, method: str) -> dict[str, Any] | None:
        wanted = (task, split, method)
        for found in self.results["speed"]:
            if (found["task"], found["split"], found["method"]) == wanted:
                return dict(found)
        return None


def read(folders: Sequence[Path]) -> list[Reported]:
    """The runs of a report, in order.

    Raises:
        DataError: no such run, results of another schema, or a run without any result.
    """
    found: list[Reported] = []
    for folder in folders:
        content = results.read(folder)
        if not content.get("metrics"):
            raise DataError(f"{folder / results.NAME}: holds no results yet; run the same command again to finish it")
        found.append(Reported(_label(folder, [one.label for one in found]), content, _answers(folder)))
    return found


def _answers(folder: Path) -> dict[str, Answers]:
    if not (folder / samples.NAME).is_file():
        return {}
    run: Run = results.open_run(folder)
    return {one.task.name: one for one in run.answers()}


def _label(folder: Path, taken: Sequence[str]) -> str:
    """The folder's name; where that is taken, with the folder above it, and a number at last."""
    path = folder.resolve()
    for label in (path.name, f"{path.parent.name}/{path.name}"):
        if label not in taken:
            return label
    return f"{path.name} ({len(taken) + 1})"
