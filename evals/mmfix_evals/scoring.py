"""From sample lines to numbers: metrics with intervals, differences with tests, speed. No model, no torch.

Everything here is a pure function of samples, so that a run, a resumed run and a re-scored run agree to the last digit.
Per-sample counts are summed per picture; pictures are drawn with replacement; every metric is computed from the sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import samples, stats
from mmfix_evals.errors import DataError
from mmfix_evals.samples import Sample
from mmfix_evals.tasks import Metric, Task

Counts = NDArray[np.float64]
Entry = dict[str, Any]
MACRO = "macro"
POINT = 0.01  # one point of a metric that is printed x 100


@dataclass(frozen=True)
class Settings:
    """How intervals are drawn. ``seed`` fixes the drawn pictures; the same draw serves every method."""

    resamples: int = stats.RESAMPLES
    seed: int = 0


@dataclass
class Answers:
    """The scored samples of one task under one flavour: method → split → document id → sample."""

    task: Task
    flavour: str
    data_split: str
    by_method: dict[str, dict[str, dict[str, Sample]]] = field(default_factory=dict)
    _rows: dict[str, Counts] = field(default_factory=dict, repr=False)

    @classmethod
    def collect(cls, task: Task, flavour: str, samples: Iterable[Sample], methods: Sequence[str]) -> Answers:
        """Sort samples by method and split; those with an error are left out, never scored as empty answers."""
        found: dict[str, dict[str, dict[str, Sample]]] = {method: {} for method in methods}
        data_split = ""
        for sample in samples:
            if sample.get("error") is None and sample["method"] in found:
                found[sample["method"]].setdefault(sample["split"], {})[sample["doc_id"]] = sample
                data_split = sample["data_split"]
        return cls(task, flavour, data_split, {name: splits for name, splits in found.items() if splits})

    def splits(self) -> list[str]:
        """Splits that occur, in the task's order."""
        found = {split for splits in self.by_method.values() for split in splits}
        return [split for split in (self.task.splits or sorted(found)) if split in found]

    def row(self, sample: Sample) -> Counts:
        """The columns of one sample, computed once."""
        if sample["key"] not in self._rows:
            try:
                counts = self.task.counts(sample, self.flavour)
            except (DataError, KeyError, TypeError, AttributeError) as problem:
                raise DataError(
                    f"{samples.NAME}: the sample of {sample['task']} {sample['doc_id']} ({sample['method']}) cannot be "
                    f"scored ({problem!r}): delete its line and run the same command again"
                ) from None
            self._rows[sample["key"]] = np.array([counts[name] for name in self.task.columns], dtype=np.float64)
        return self._rows[sample["key"]]


def matrix(answers: Answers, samples: Iterable[Sample], images: Sequence[str]) -> Counts:
    """Counts per picture, ``[len(images), columns]``; zeros for a picture without samples."""
    place = {name: i for i, name in enumerate(images)}
    total = np.zeros((len(images), len(answers.task.columns)))
    for sample in samples:
        total[place[sample["image"]]] += answers.row(sample)
    return total


def images_of(groups: Iterable[Iterable[Sample]]) -> list[str]:
    """The pictures of some samples, sorted: the order in which the bootstrap numbers them."""
    return sorted({sample["image"] for samples in groups for sample in samples})


def metric_entries(answers: Answers, settings: Settings) -> list[Entry]:
    """One entry per (split, method, metric), and the mean over splits of the task's macro metrics."""
    entries = []
    for split, group, metrics in _groups(answers):
        for method, splits in answers.by_method.items():
            parts = [list(splits.get(name, {}).values()) for name in group]
            if all(parts):
                entries += _metrics_of(answers, split, method, metrics, parts, settings)
    return entries


def _groups(answers: Answers) -> list[tuple[str, tuple[str, ...], Sequence[Metric]]]:
    """What is reported: every split by itself, and the mean over all of them for the macro metrics."""
    task = answers.task
    groups: list[tuple[str, tuple[str, ...], Sequence[Metric]]] = [
        (split, (split,), task.metrics) for split in answers.splits()
    ]
    if task.macro and len(groups) == len(task.splits):
        groups.append((MACRO, task.splits, [task.metric(name) for name in task.macro]))
    return groups


def _metrics_of(
    answers: Answers,
    split: str,
    method: str,
    metrics: Sequence[Metric],
    parts: Sequence[list[Sample]],
    settings: Settings,
) -> list[Entry]:
    images = images_of(parts)
    draws = stats.draw([matrix(answers, part, images) for part in parts], settings.resamples, settings.seed)
    entries = []
    for metric in metrics:
        found = stats.interval(draws, metric.formula)
        value = int(found.value) if metric.integer and found.value is not None else found.value
        entries.append(
            {
                "task": answers.task.name,
                "data_split": answers.data_split,
                "split": split,
                "method": method,
                "metric": metric.name,
                "value": value,
                "ci_low": found.low,
                "ci_high": found.high,
                "n": sum(map(len, parts)),
                "n_images": found.n_clusters,
                "undefined_resamples": found.undefined,
            }
        )
    return entries


def difference_entries(a: Answers, b: Answers, pairs: Sequence[tuple[str, str]], settings: Settings) -> list[Entry]:
    """Paired differences ``b − a`` for pairs of (method in a, method in b), over the documents both answered."""
    entries = []
    for one, other in pairs:
        mine, theirs = a.by_method[one], b.by_method[other]
        for split, group, metrics in _groups(a):
            common = {s: [doc for doc in mine.get(s, {}) if doc in theirs.get(s, {})] for s in group}
            if all(common.values()):
                left = [[mine[s][doc] for doc in docs] for s, docs in common.items()]
                right = [[theirs[s][doc] for doc in docs] for s, docs in common.items()]
                named = {"split": split, "method": other, "baseline": one}
                entries += _differences(a, b, named, metrics, (left, right), settings)
    return entries


def _differences(
    a: Answers,
    b: Answers,
    named: Mapping[str, str],
    metrics: Sequence[Metric],
    sides: tuple[list[list[Sample]], list[list[Sample]]],
    settings: Settings,
) -> list[Entry]:
    left, right = sides
    for one, other in ((x, y) for parts in zip(left, right, strict=True) for x, y in zip(*parts, strict=True)):
        if one["image"] != other["image"]:
            raise DataError(
                f"{samples.NAME}: {one['task']} {one['doc_id']} is about {one['image']} for {one['method']}, but about "
                f"{other['image']} for {other['method']}: delete the line that is wrong and run the same command again"
            )
    images = images_of(left)
    before = stats.draw([matrix(a, part, images) for part in left], settings.resamples, settings.seed)
    after = stats.draw([matrix(b, part, images) for part in right], settings.resamples, settings.seed)
    entries = []
    for metric in metrics:
        found = stats.difference(after, before, metric.formula)
        entry: Entry = {
            "task": a.task.name,
            "data_split": a.data_split,
            "split": named["split"],
            "metric": metric.name,
            "method": named["method"],
            "baseline": named["baseline"],
            "difference": found.value,
            "ci_low": found.low,
            "ci_high": found.high,
            "p": found.p,
            "standard_error": found.standard_error,
            "images_for_1_point": found.images_to_see(POINT) if metric.percent else None,
            "n": sum(map(len, left)),
            "n_images": found.n_clusters,
        }
        if metric.outcome and len(left) == 1:
            entry["mcnemar"] = _mcnemar(a, b, left[0], right[0], metric.outcome)
        entries.append(entry)
    return entries


def _mcnemar(a: Answers, b: Answers, left: Sequence[Sample], right: Sequence[Sample], outcome: str) -> Entry:
    """``b``: documents where only the baseline has the outcome; ``c``: only the method has it."""
    column = list(a.task.columns).index(outcome)
    first = [bool(a.row(sample)[column]) for sample in left]
    second = [bool(b.row(sample)[column]) for sample in right]
    only_a = sum(x and not y for x, y in zip(first, second, strict=True))
    only_b = sum(y and not x for x, y in zip(first, second, strict=True))
    return {"outcome": outcome, "b": only_a, "c": only_b, "p": stats.mcnemar(only_a, only_b)}


def holm(entries: list[Entry]) -> list[Entry]:
    """Add ``p_holm``. A family: all tests of one task and metric, over splits, methods and runs.

    The mean over splits is made of the same answers and is a family of its own. Undefined tests are left out.
    """
    families: dict[tuple[str, str, bool], list[Entry]] = {}
    for entry in entries:
        entry["p_holm"] = None
        if entry["p"] is not None:
            families.setdefault((entry["task"], entry["metric"], entry["split"] == MACRO), []).append(entry)
    for family in families.values():
        for entry, adjusted in zip(family, stats.holm([entry["p"] for entry in family]), strict=True):
            entry["p_holm"] = adjusted
    return entries
