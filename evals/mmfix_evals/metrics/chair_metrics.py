"""The metrics of CHAIR as functions of summed counts `[..., 8] -> [...]`, columns in the order of `COUNT_KEYS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import stats

COUNT_KEYS = (
    "hallucinated_caption",
    "captions",
    "hallucinated_mentions",
    "mentions",
    "covered",
    "gt_objects",
    "named_objects",
    "tokens",
)
"""Order of the columns of a count matrix `[..., 8]`; see `chair.Chair.counts`."""

Counts = NDArray[np.float64]


def chair_s(c: Counts) -> Counts:
    """Share of captions with a hallucinated mention, of counts `[..., 8]`."""
    return stats.ratio(c[..., 0], c[..., 1])


def chair_i(c: Counts) -> Counts:
    """Share of mentions that are hallucinated, of counts `[..., 8]`; NaN without mentions."""
    return stats.ratio(c[..., 2], c[..., 3])


def recall(c: Counts) -> Counts:
    """Share of ground-truth objects that are named, of counts `[..., 8]`; NaN without ground truth."""
    return stats.ratio(c[..., 4], c[..., 5])


def precision(c: Counts) -> Counts:
    """Share of named objects that are in the ground truth, of counts `[..., 8]`; NaN if nothing is named."""
    return stats.ratio(c[..., 4], c[..., 6])


def f1(c: Counts) -> Counts:
    """2·(recall·precision)/(precision + recall) of counts `[..., 8]`; NaN if either is undefined or both are 0."""
    r, p = recall(c), precision(c)
    return stats.ratio(2 * (r * p), p + r)


def length(c: Counts) -> Counts:
    """Mean number of tokens of a caption, double words merged and punctuation included, of counts `[..., 8]`."""
    return stats.ratio(c[..., 7], c[..., 1])


METRICS: dict[str, Callable[[Counts], Counts]] = {
    "chair_s": chair_s,
    "chair_i": chair_i,
    "recall": recall,
    "precision": precision,
    "f1": f1,
    "length": length,
}
UNDEFINED = {
    "chair_s": "there are no captions",
    "chair_i": "no caption mentions any object",
    "recall": "the ground truth of these images is empty",
    "precision": "no caption mentions any object",
    "f1": "recall or precision is undefined, or both are 0",
    "length": "there are no captions",
}
