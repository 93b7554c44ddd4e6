"""Intervals and tests for metrics that are ratios of sums, with the image as the unit that is drawn.

Several questions about one image are not independent, so whole images (clusters) are resampled. Per-sample counts are
summed per image once; a metric is a function of summed counts `[..., k] -> [...]` (NaN where undefined), applied to
the sums of every resample. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mmfix_evals.draws import RESAMPLES, Draws, Floats, draw
from mmfix_evals.errors import UsageError

Metric = Callable[[Floats], Floats]

CONFIDENCE = 0.95
TIE = 1e-12  # differences below this are rounding, not a difference
POWER = 0.8
Z_TEST, Z_POWER = 1.959964, 0.841621  # normal quantiles of 1 - 0.05 / 2 and of POWER
INFORMATIVE = 10  # images that must differ before a spread says anything about more images


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval.

    Attributes:
        value: the metric of all samples; None if undefined.
        low, high: bounds; None with fewer than two clusters or if every resample is undefined.
        n_clusters: images.
        undefined: resamples in which the metric has an empty denominator; they are left out of the bounds.
    """

    value: float | None
    low: float | None
    high: float | None
    n_clusters: int
    undefined: int


@dataclass(frozen=True)
class Difference:
    """Metric of A minus metric of B on the same images, with percentile interval and two-sided bootstrap p.

    Fields as in `Interval`; p is None where the bounds are.

    Attributes:
        standard_error: spread of the difference over the resamples; None where the bounds are.
        informative: images in which A and B differ at all.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n_clusters: int
    undefined: int
    standard_error: float | None = None
    informative: int = 0

    def images_to_see(self, effect: float) -> int | None:
        """Images needed to find a difference of `effect` with 80 % power at p < 0.05 (two-sided, one test).

        n = C·((z₀.₉₇₅ + z₀.₈)·SE / effect)² with the standard error of these C images, which shrinks with √n. None
        where A and B differ in fewer than 10 images: their spread says nothing yet.
        """
        if not self.standard_error or self.informative < INFORMATIVE:
            return None
        return max(2, math.ceil(self.n_clusters * ((Z_TEST + Z_POWER) * self.standard_error / effect) ** 2))


def interval(draws: Draws, metric: Metric, confidence: float = CONFIDENCE) -> Interval:
    """Value and percentile interval of the plain mean of a metric over splits."""
    found = _over_draws(draws, metric)
    low, high = _bounds(found, confidence, draws.n_clusters)
    return Interval(_macro(draws.whole, metric), low, high, draws.n_clusters, int(np.isnan(found).sum()))


def difference(a: Draws, b: Draws, metric: Metric, confidence: float = CONFIDENCE) -> Difference:
    """A minus B, both drawn with the same seed from the same images; see `paired`."""
    if a.per_image.shape != b.per_image.shape or a.drawn.shape != b.drawn.shape:
        raise UsageError(
            f"runs differ in shape: {list(a.per_image.shape)} and {list(b.per_image.shape)} (splits, images, counts); "
            "compare runs on the same images"
        )
    drawn = _over_draws(a, metric) - _over_draws(b, metric)
    low, high = _bounds(drawn, confidence, a.n_clusters)
    whole_a, whole_b = _macro(a.whole, metric), _macro(b.whole, metric)
    value = None if whole_a is None or whole_b is None else whole_a - whole_b
    informative = _informative(a.per_image, b.per_image)
    defined = drawn[~np.isnan(drawn)]
    p = None if low is None else _two_sided(defined, informative)
    error = None if low is None else float(defined.std())
    return Difference(value, low, high, p, a.n_clusters, int(np.isnan(drawn).sum()), error, informative)


def ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    """`above / below`, elementwise; NaN where `below` is 0."""
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, top / bottom)


def value(metric: Metric, summed: ArrayLike) -> float | None:
    """The metric of one vector of summed counts `[k]`; None if undefined."""
    found = float(metric(np.asarray(summed, dtype=np.float64)))
    return None if np.isnan(found) else found


def by_cluster(clusters: Sequence[str], counts: ArrayLike) -> tuple[list[str], Floats]:
    """Sum per-sample counts `[N, k]` over samples of the same cluster.

    Returns:
        The cluster names, sorted, and their counts `[C, k]` in that order. Two runs over the same images therefore
        get rows that belong together, whatever the order of their samples.
    """
    rows = np.asarray(counts, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(clusters):
        raise UsageError(f"counts must be [{len(clusters)}, k] for {len(clusters)} samples, got {list(rows.shape)}")
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    summed = np.zeros((len(names), rows.shape[1]))
    np.add.at(summed, index, rows)
    return [str(name) for name in names], summed


def bootstrap(
    counts: ArrayLike, metric: Metric, resamples: int = RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval:
    """Percentile interval of `metric` by drawing images with replacement.

    Args:
        counts: per image, `[C, k]`.
        metric: summed counts `[..., k] -> [...]`.
        resamples: number of draws of C images.
        seed: of the generator; the same seed and C give the same draws, for every metric and every run.
        confidence: of the interval.
    """
    return bootstrap_macro([counts], metric, resamples, seed, confidence)


def bootstrap_macro(
    splits: Sequence[ArrayLike],
    metric: Metric,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """`bootstrap` of the plain mean of `metric` over splits that share their images.

    Args:
        splits: one `[C, k]` per split, row i the same image in all of them (zeros where a split lacks it). Images
            are drawn once and the draw is used for all splits.
    """
    _check(resamples, confidence)
    return interval(draw(splits, resamples, seed), metric, confidence)


def paired(
    counts_a: ArrayLike,
    counts_b: ArrayLike,
    metric: Metric,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Metric of A minus metric of B, both on the same drawn images.

    p = min(1, 2·(min(#{d ≤ 0}, #{d ≥ 0}) + 1) / (defined resamples + 1)): never 0, and 1 for identical runs.

    Args:
        counts_a, counts_b: `[C, k]`, row i of both about the same image.

    Raises:
        UsageError: different shapes.
    """
    return paired_macro([counts_a], [counts_b], metric, resamples, seed, confidence)


def paired_macro(
    splits_a: Sequence[ArrayLike],
    splits_b: Sequence[ArrayLike],
    metric: Metric,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Difference:
    """`paired` for the plain mean of `metric` over splits that share their images (see `bootstrap_macro`)."""
    _check(resamples, confidence)
    return difference(draw(splits_a, resamples, seed), draw(splits_b, resamples, seed), metric, confidence)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided McNemar test of `b` and `c` discordant pairs.

    p = min(1, 2·Σ_{k ≤ min(b, c)} C(m, k) / 2^m) with m = b + c, in whole numbers; m = 0 gives 1. It ignores that
    questions about one image belong together; a clustered interval should stand beside it.
    """
    if b < 0 or c < 0 or b != int(b) or c != int(c):
        raise UsageError(f"McNemar's test needs two whole numbers of pairs, got {b} and {c}")
    fewer, m = int(min(b, c)), int(b + c)
    if 2 * fewer >= m - 1:
        return 1.0
    term = total = 1
    for k in range(1, fewer + 1):
        term = term * (m - k + 1) // k
        total += term
    return min(1.0, 2 * total / (1 << m))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction of a family of p values, in the order given.

    Sorted ascending, the i-th of m becomes max over j ≤ i of min(1, (m − j + 1)·p_j).
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def _check(resamples: int, confidence: float) -> None:
    if resamples < 1 or not 0 < confidence < 1:
        raise UsageError(f"resamples must be at least 1 and confidence in (0, 1); got {resamples} and {confidence}")


def _macro(whole: Floats, metric: Metric) -> float | None:
    found = float(np.mean(metric(whole)))
    return None if np.isnan(found) else found


def _over_draws(draws: Draws, metric: Metric) -> Floats:
    """The macro mean of the metric in every resample, `[resamples]`; NaN where undefined in any split."""
    if draws.n_clusters == 0:
        return np.full(draws.drawn.shape[1], np.nan)
    found: Floats = metric(draws.drawn).mean(axis=0)
    return found


def _bounds(drawn: Floats, confidence: float, n_clusters: int) -> tuple[float | None, float | None]:
    defined = drawn[~np.isnan(drawn)]
    if n_clusters < 2 or defined.size == 0:
        return None, None
    tail = 50 * (1 - confidence)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def _informative(a: Floats, b: Floats) -> int:
    """Clusters in which the two arms differ at all: only these speak for a difference."""
    differs = (a != b).any(axis=-1)
    return int(differs.any(axis=0).sum() if differs.ndim > 1 else differs.sum())


def _two_sided(differences: Floats, informative: int) -> float:
    """Twice the smaller tail. n clusters that differ can agree in sign by chance with probability 2**(1 - n), so no
    number of resamples makes p smaller than that."""
    floor = 2.0 ** (1 - informative) if informative else 1.0
    smaller = min(int((differences <= TIE).sum()), int((differences >= -TIE).sum()))
    return min(1.0, max(floor, 2 * (smaller + 1) / (differences.size + 1)))
