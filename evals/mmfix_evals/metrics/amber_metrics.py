"""The metrics of AMBER as functions of summed counts, and what the published script prints for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import stats

GENERATIVE_KEYS = (
    "hallucinated",
    "nouns",
    "covered",
    "truth",
    "hallucinated_response",
    "responses",
    "hit",
    "targets",
)
"""Order of the columns of a generative count matrix `[..., 8]`; see `amber.noun_counts`."""
COUNT_KEYS = ("correct", "n", "right_no", "answered_no", "truth_no", "unparsed")
"""Order of the columns of a discriminative count matrix `[..., 6]`; see `amber.answer_counts`."""

Counts = NDArray[np.float64]

BLOCKS: dict[str, tuple[str, ...]] = {
    "discriminative": ("existence", "state", "number", "action", "relation"),
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "state": ("state",),
    "number": ("number",),
    "action": ("action",),
    "relation": ("relation",),
}
"""Block of questions → the kinds of questions whose counts are added."""
TYPES: dict[str, tuple[str, ...]] = {
    "a": ("generative", *BLOCKS),
    "g": ("generative",),
    "d": tuple(BLOCKS),
    "de": ("existence",),
    "da": ("attribute", "state", "number", "action"),
    "dr": ("relation",),
}
"""Evaluation type of the published script → what it prints."""
EXISTENCE_REMARK = "every existence question has the answer no: precision is 1 by construction"

START = 0.001  # the published script starts its denominators here
EPSILON = {"existence": 0.001}  # in the denominator of F1
OTHER_EPSILON = 0.0001


def _ratio(c: Counts, keys: tuple[str, ...], above: str, below: str) -> Counts:
    return stats.ratio(c[..., keys.index(above)], c[..., keys.index(below)])


_GENERATIVE = {
    "chair": ("hallucinated", "nouns"),
    "cover": ("covered", "truth"),
    "hal": ("hallucinated_response", "responses"),
    "cog": ("hit", "targets"),
}
_DISCRIMINATIVE = {
    "accuracy": ("correct", "n"),
    "precision": ("right_no", "answered_no"),
    "recall": ("right_no", "truth_no"),
}
GENERATIVE_METRICS: dict[str, Callable[[Counts], Counts]] = {
    name: partial(_ratio, keys=GENERATIVE_KEYS, above=above, below=below)
    for name, (above, below) in _GENERATIVE.items()
}
"""chair, cover, hal and cog of summed counts `[..., 8]`; NaN where the denominator is empty."""


def f1(c: Counts) -> Counts:
    """2PR/(P + R), positive class "no", of counts `[..., 6]`; NaN if P or R is undefined or both are 0."""
    p, r = (_ratio(c, COUNT_KEYS, *_DISCRIMINATIVE[name]) for name in ("precision", "recall"))
    return stats.ratio(2 * p * r, p + r)


METRICS: dict[str, Callable[[Counts], Counts]] = {
    **{
        name: partial(_ratio, keys=COUNT_KEYS, above=above, below=below)
        for name, (above, below) in _DISCRIMINATIVE.items()
    },
    "f1": f1,
}
"""accuracy, precision, recall and F1 (positive class "no") of summed counts `[..., 6]`; NaN where undefined."""

UNDEFINED = {
    "chair": "no response names an object of the vocabulary",
    "cover": "there are no responses",
    "hal": "there are no responses",
    "cog": "there are no hallucination targets",
    "accuracy": "there are no answers",
    "precision": "no answer was counted as no",
    "recall": "no question has the answer no",
    "f1": "precision or recall is undefined, or both are 0",
}


def values(block: str, total: Mapping[str, int]) -> dict[str, float | None]:
    """The unrounded metrics of one block; None where undefined."""
    keys = GENERATIVE_KEYS if block == "generative" else COUNT_KEYS
    metrics = GENERATIVE_METRICS if block == "generative" else METRICS
    return {name: stats.value(metric, [total[key] for key in keys]) for name, metric in metrics.items()}


def official(block: str, total: Mapping[str, int]) -> dict[str, float]:
    """The rounded percentages that the published script prints for a block; 0 for undefined ratios, as there.

    Denominators start at 0.001 (three times that for "attribute", which adds three of them); F1 is computed from the
    rounded precision p and recall r as round(100·2pr/(p + r + 0.0001), 1), with 0.001 for existence.
    """
    if block == "generative":
        chair, cover, cog = (_percent(total, *_GENERATIVE[name]) for name in ("chair", "cover", "cog"))
        fine = (total["responses"] - total["hallucinated_response"]) / (total["responses"] + START)
        return {"CHAIR": chair, "Cover": cover, "Hal": round(100 - fine * 100, 1), "Cog": cog}
    start = START * len(BLOCKS[block]) if block == "attribute" else START
    accuracy, precision, recall = (_percent(total, *names, start) for names in _DISCRIMINATIVE.values())
    p, r = precision / 100, recall / 100
    harmonic = round(2 * p * r / (p + r + EPSILON.get(block, OTHER_EPSILON)) * 100, 1)
    return {"Accuracy": accuracy, "Precision": precision, "Recall": recall, "F1": harmonic}


def _percent(total: Mapping[str, int], above: str, below: str, start: float = START) -> float:
    return round(total[above] / (total[below] + start) * 100, 1)


def amber_score(chair: float | None, harmonic: float | None) -> float | None:
    """((1 − CHAIR) + F1) / 2 as a fraction; as described for AMBER, but not computed by its published script."""
    return None if chair is None or harmonic is None else ((1 - chair) + harmonic) / 2


def amber_score_of(c: Counts) -> Counts:
    """`amber_score` of summed counts `[..., 14]`: the generative columns, then the discriminative ones."""
    split = len(GENERATIVE_KEYS)
    found: Counts = ((1 - GENERATIVE_METRICS["chair"](c[..., :split])) + f1(c[..., split:])) / 2
    return found
