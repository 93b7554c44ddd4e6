"""Scoring of yes/no questions in the manner of POPE. Subclasses say where questions and pictures come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmfix_evals.metrics import pope
from mmfix_evals.tasks.base import Counts, Document, Metric, Task


def _n_unparsed(c: Counts) -> Counts:
    return c[..., pope.COUNT_KEYS.index("n_unparsed")]


class PopeTask(Task):
    """Accuracy, precision, recall, F1 and yes ratio with "yes" as the positive class; every parser's verdict kept."""

    columns = pope.COUNT_KEYS
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", pope.METRICS["accuracy"], headline=True, outcome="correct"),
        Metric("precision", pope.METRICS["precision"]),
        Metric("recall", pope.METRICS["recall"]),
        Metric("f1", pope.METRICS["f1"], headline=True),
        Metric("yes_ratio", pope.METRICS["yes_ratio"], headline=True, better=None),
        Metric("n_unparsed", _n_unparsed, percent=False, integer=True, better="lower"),
    )
    macro = ("accuracy", "f1")
    splits = ("random", "popular", "adversarial")
    flavours = tuple(pope.PARSERS)
    flavour_field = "parser"
    unit = "questions"
    max_new_tokens = 10
    prompt_is_data = True

    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        return {"verdicts": pope.verdicts(response, document.target["label"])}

    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        return pope.counts(sample["label"], sample["response"], flavour)
