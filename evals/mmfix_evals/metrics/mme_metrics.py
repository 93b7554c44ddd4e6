"""The tasks of MME, and its metrics as functions of summed counts `[..., 126] -> [...]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import stats

PERCEPTION = {
    "existence": 60,
    "count": 60,
    "position": 60,
    "color": 60,
    "posters": 294,
    "celebrity": 340,
    "scene": 400,
    "landmark": 400,
    "artwork": 400,
    "OCR": 40,
}
COGNITION = {"commonsense_reasoning": 140, "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40}
TASKS = {**PERCEPTION, **COGNITION}
"""Task → number of questions in the benchmark."""
GROUPS: dict[str, tuple[str, ...]] = {
    "perception": tuple(PERCEPTION),
    "cognition": tuple(COGNITION),
    "hallucination": ("existence", "count", "position", "color"),
    "hallucination_object": ("existence", "count"),
    "hallucination_attribute": ("position", "color"),
}
"""Total → the tasks whose scores are added; the hallucination subset is that of VCD, HALC and OPERA-style papers."""

KEYS = ("questions", "correct", "images", "both", "tp", "fp", "tn", "fn", "unparsed")
COUNT_KEYS = tuple(f"{task}.{key}" for task in TASKS for key in KEYS)
"""Order of the columns of a count matrix `[..., 126]`: nine counts of each task; see `counts`."""

Counts = NDArray[np.float64]


def column(c: Counts, task: str, key: str) -> Counts:
    """One of the nine counts of a task, of counts `[..., 126]`."""
    return c[..., COUNT_KEYS.index(f"{task}.{key}")]


def accuracy(c: Counts, task: str) -> Counts:
    """Right answers / questions of a task, of counts `[..., 126]`; NaN without questions."""
    return stats.ratio(column(c, task, "correct"), column(c, task, "questions"))


def accuracy_plus(c: Counts, task: str) -> Counts:
    """Pictures with both answers right / pictures of a task, of counts `[..., 126]`; NaN without pictures."""
    return stats.ratio(column(c, task, "both"), column(c, task, "images"))


def precision(c: Counts, task: str) -> Counts:
    """TP / (TP + FP) of a task, of counts `[..., 126]`; NaN if nothing is answered yes."""
    return stats.ratio(column(c, task, "tp"), column(c, task, "tp") + column(c, task, "fp"))


def recall(c: Counts, task: str) -> Counts:
    """TP / (TP + FN) of a task, of counts `[..., 126]`; NaN without such answers."""
    return stats.ratio(column(c, task, "tp"), column(c, task, "tp") + column(c, task, "fn"))


def task_score(c: Counts, task: str) -> Counts:
    """100·acc + 100·acc+ of a task, of counts `[..., 126]`; NaN without questions."""
    return accuracy(c, task) * 100 + accuracy_plus(c, task) * 100


def group_score(c: Counts, tasks: Sequence[str]) -> Counts:
    """Sum of task scores, of counts `[..., 126]`; NaN if one of them is undefined."""
    total = np.zeros(c.shape[:-1])
    for task in tasks:
        total = total + task_score(c, task)
    return total


METRICS: dict[str, Callable[[Counts], Counts]] = {
    **{name: partial(group_score, tasks=tasks) for name, tasks in GROUPS.items()},
    **{task: partial(task_score, task=task) for task in TASKS},
}
"""Totals and task scores of summed counts `[..., 126]`; a total is NaN unless all of its tasks have questions."""


FORMULAS = {
    "score": task_score,
    "accuracy": accuracy,
    "accuracy_plus": accuracy_plus,
    "precision": precision,
    "recall": recall,
}


def formulas(task: str) -> dict[str, Callable[[Counts], Counts]]:
    """Score, accuracy, accuracy+, precision and recall of one task, of summed counts `[..., 126]`."""
    return {name: partial(formula, task=task) for name, formula in FORMULAS.items()}
