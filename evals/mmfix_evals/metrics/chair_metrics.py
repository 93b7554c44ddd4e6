"""The metrics of CHAIR as functions of summed counts `[..., 8] -> [...]`, columns in the order of `COUNT_KEYS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import stats
from mmfix_evals.metrics.chair_text import FLAVOUR
from mmfix_evals.metrics.intervals import Rows, grouped, intervals, method

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


@dataclass(frozen=True)
class ChairScore:
    """Corpus values as unrounded fractions (None: undefined); `length` is a mean number of tokens.

    `rows` holds the image and the counts of every caption.
    """

    chair_s: float | None
    chair_i: float | None
    recall: float | None
    precision: float | None
    f1: float | None
    length: float | None
    n: int
    warnings: tuple[str, ...] = ()
    flavour: str = FLAVOUR
    counts: Mapping[str, int] = field(default_factory=dict)
    rows: Rows = field(default=(), repr=False)

    @property
    def len_upstream(self) -> float | None:
        """`Len` as OPERA and PAI compute it: 0.01 · tokens / n, in this order."""
        return 0.01 * self.counts["tokens"] / self.n if self.n else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: metrics, `n`, `flavour`, `len_upstream`, `counts`, `warnings`, `intervals`, `interval_method`."""
        own = {name: getattr(self, name) for name in (*METRICS, "n", "flavour", "len_upstream")}
        images = grouped(self.rows, COUNT_KEYS)
        drawn = {
            "intervals": intervals(images, COUNT_KEYS, METRICS, self.n),
            "interval_method": method("image", images),
        }
        return own | {"counts": dict(self.counts), "warnings": list(self.warnings)} | drawn


def total_score(
    rows: Sequence[tuple[str, dict[str, int]]], unknown: int, strange: Sequence[str], repeated: int, flavour: str
) -> ChairScore:
    """The score of captions, given the image and the counts of each.

    Args:
        rows: image and counts of every caption.
        unknown: number of images without ground truth.
        strange: objects of the ground truth that no word can name.
        repeated: number of images with several captions.
        flavour: of CHAIR.
    """
    summed = {key: sum(row[key] for _, row in rows) for key in COUNT_KEYS}
    vector = np.array([summed[key] for key in COUNT_KEYS], dtype=np.float64)
    values = {name: stats.value(metric, vector) for name, metric in METRICS.items()}
    warnings = [f"{name} is undefined: {UNDEFINED[name]}" for name, found in values.items() if found is None]
    if unknown:
        warnings.append(f"{unknown} images have no ground truth: everything said about them counts as hallucinated")
    if repeated:
        warnings.append(f"{repeated} images have several captions: each of them is counted")
    if strange:
        warnings.append(f"no word can name these objects of the ground truth: {', '.join(strange[:5])}")
    return ChairScore(
        chair_s=values["chair_s"],
        chair_i=values["chair_i"],
        recall=values["recall"],
        precision=values["precision"],
        f1=values["f1"],
        length=values["length"],
        n=summed["captions"],
        warnings=tuple(warnings),
        flavour=flavour,
        counts=summed,
        rows=tuple(rows),
    )
