"""The one number that a search of parameters is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmfix_evals import results
from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError
from mmfix_evals.scoring import MACRO
from mmfix_evals.tasks import Metric, Task

PREFERRED = ("accuracy", "f1")  # CHAIR's own rates are best for a caption that says nothing


@dataclass(frozen=True)
class Objective:
    """The one number that is searched for.

    Attributes:
        split: part of the task, or ``macro`` for the mean over all of them; None for the data split itself.
    """

    task: str
    metric: Metric
    split: str | None

    @property
    def direction(self) -> str:
        return "maximize" if self.metric.better == "higher" else "minimize"

    def better(self, one: float, other: float) -> bool:
        return one > other if self.metric.better == "higher" else one < other

    def __str__(self) -> str:
        where = "" if self.split is None else " (mean over splits)" if self.split == MACRO else f" ({self.split})"
        return f"{self.metric.name} of {self.task}{where}, {self.metric.better} is better"

    def entry(self, found: results.Results, method: str) -> dict[str, Any] | None:
        """The objective of one method in the results of a run."""
        return _first(found["metrics"], method, self)

    def difference(self, found: results.Results, method: str) -> dict[str, Any] | None:
        """Its paired difference to greedy."""
        return _first(found["comparisons"], method, self)


def _first(entries: Sequence[dict[str, Any]], method: str, objective: Objective) -> dict[str, Any] | None:
    wanted = (objective.task, objective.metric.name, method)
    of_it = (e for e in entries if (e["task"], e["metric"], e["method"]) == wanted)
    return next((e for e in of_it if e["split"] == (objective.split or e["data_split"])), None)


def objective(task: Task, metric: str | None = None) -> Objective:
    """The given metric of a task, or the default one: accuracy, else F1, else the first in its table.

    Raises:
        UsageError: an unknown metric, one without a direction, or one that has no mean over the task's splits.
    """
    usable = {m.name: m for m in task.metrics if m.better and (len(task.splits) <= 1 or m.name in task.macro)}
    if metric is not None and metric not in usable:
        raise UsageError(f"--metric: {unknown('objective', metric, usable)} (of {task.name})")
    names = [name for name in PREFERRED if name in usable]
    names += [m.name for m in usable.values() if m.headline] or list(usable)
    chosen = metric or next(iter(names), None)
    if chosen is None:
        raise UsageError(f"task {task.name} has no metric that could be searched for; choose another task")
    split = MACRO if len(task.splits) > 1 else next(iter(task.splits), None)
    return Objective(task.name, usable[chosen], split)
