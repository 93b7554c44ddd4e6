"""Scoring of captions in the manner of CHAIR. Subclasses say where pictures and ground truth come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from mmfix_evals import stats
from mmfix_evals.metrics import chair
from mmfix_evals.tasks.base import Counts, Document, Metric, Task

LIMIT = "scored_tokens"
"""Key of a sample: how many of the caption's tokens are scored, from the first on; absent: all of them."""
COLUMNS = (
    *chair.COUNT_KEYS,
    "repeated_4grams",
    "4grams",
    "hallucinated_objects",
    "expected_hallucinated_objects",
)


def repeated_fourgrams(caption: str) -> tuple[int, int]:
    """(4-grams that occurred before in the same caption, all 4-grams), over lower-cased words."""
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", caption.lower())
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(grams) - len(set(grams)), len(grams)


def _share(above: str, below: str) -> Callable[[Counts], Counts]:
    top, bottom = COLUMNS.index(above), COLUMNS.index(below)
    return lambda c: stats.ratio(c[..., top], c[..., bottom])


@lru_cache(maxsize=4)
def _chair(flavour: str = chair.FLAVOUR) -> chair.Chair:
    return chair.Chair(flavour=flavour)


class ChairTask(Task):
    """CHAIR_s, CHAIR_i, recall, precision, F1 and length, with what explains them.

    Two additions to the published metric: ``repetition``, the share of 4-grams that repeat one of the same caption,
    and ``prior_share``, the share of hallucinated objects (each once per caption) that the picture's context makes
    likely. The latter needs ``expected``, the expected but absent nodes, in a document's target.
    """

    columns = COLUMNS
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("chair_s", chair.METRICS["chair_s"], headline=True, better="lower", outcome="hallucinated_caption"),
        Metric("chair_i", chair.METRICS["chair_i"], headline=True, better="lower"),
        Metric("recall", chair.METRICS["recall"], headline=True),
        Metric("precision", chair.METRICS["precision"]),
        Metric("f1", chair.METRICS["f1"]),
        Metric("length", chair.METRICS["length"], percent=False, headline=True, better=None),
        Metric("repetition", _share("repeated_4grams", "4grams"), better="lower"),
        Metric("prior_share", _share("expected_hallucinated_objects", "hallucinated_objects"), better=None),
    )
    splits = ()
    flavours = (chair.FLAVOUR,)
    flavour_field = "flavour"
    unit = "captions"
    max_new_tokens = 128

    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        truth = set(document.target["ground_truth"])
        return {
            "mentions": [
                {**mention._asdict(), "hallucinated": mention.node not in truth}
                for mention in _chair().mentions(response)
            ]
        }

    def caption(self, sample: Mapping[str, Any]) -> str:
        """The text of a sample that is scored."""
        text: str = sample["response"]
        return text

    def truth(self, sample: Mapping[str, Any], flavour: str) -> set[str]:
        """The nodes that are in the picture of a sample."""
        return set(sample["ground_truth"])

    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        scorer, text, truth, limit = (
            _chair(flavour),
            self.caption(sample),
            self.truth(sample, flavour),
            sample.get(LIMIT),
        )
        tokens, mentions = scorer.analyse(text, limit)
        scored = text if limit is None else text[: tokens[-1].end if tokens else 0]
        repeated, fourgrams = repeated_fourgrams(scored)
        hallucinated = {mention.node for mention in mentions} - truth
        expected = set(sample.get("expected", ()))
        return {
            **scorer.counts(text, truth, limit),
            "repeated_4grams": repeated,
            "4grams": fourgrams,
            "hallucinated_objects": len(hallucinated),
            "expected_hallucinated_objects": len(hallucinated & expected),
        }
