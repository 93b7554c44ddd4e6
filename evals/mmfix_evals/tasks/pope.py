"""Scoring of yes/no questions in the manner of POPE. Subclasses say where questions and pictures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmfix_evals.metrics import pope
from mmfix_evals.tasks import confidence
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

    def generate(
        self, decoder: Any, documents: Sequence[Document], shown: Sequence[Any], **arguments: Any
    ) -> list[Any]:
        return confidence.generate(decoder, [document.prompt for document in documents], shown, **arguments)

    def record(self, document: Document, answer: Any) -> dict[str, Any]:
        """The verdicts, and how sure the model was of its first word where that is known."""
        sure = getattr(answer, "confidence", None)
        known = {} if sure is None else {"confidence": round(sure, 6)}
        return {**self.verdicts(document, answer.text), **known}

    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        return {"verdicts": pope.verdicts(response, document.target["label"])}

    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        return pope.counts(sample["label"], sample["response"], flavour)
