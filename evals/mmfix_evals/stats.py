"""Intervals and tests for metrics that are ratios of sums, with the image as the unit that is drawn.

Several questions about one image are not independent, so whole images (clusters) are resampled. Per-sample counts are
summed per image once; a metric is a function of summed counts `[..., k] -> [...]` (NaN where undefined), applied to
the sums of every resample. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmfix_evals.errors import UsageError

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Floats]

RESAMPLES = 2000
CONFIDENCE = 0.95
CHUNK_ELEMENTS = 2_000_000  # draws held at once (16 MB), whatever the number of images
TIE = 1e-12  # differences below this are rounding, not a difference


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
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None
    n_clusters: int
    undefined: int


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
    stacked = _stack(splits)
    _check(resamples, confidence)
    drawn = _resample(stacked, metric, resamples, seed)
    low, high = _bounds(drawn, confidence, stacked.shape[1])
    return Interval(_macro(stacked, metric), low, high, stacked.shape[1], int(np.isnan(drawn).sum()))


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
    a, b = _stack(splits_a), _stack(splits_b)
    _check(resamples, confidence)
    if a.shape != b.shape:
        raise UsageError(
            f"runs differ in shape: {list(a.shape)} and {list(b.shape)} (splits, images, counts); "
            "compare runs on the same images"
        )
    drawn = _resample(a, metric, resamples, seed) - _resample(b, metric, resamples, seed)
    low, high = _bounds(drawn, confidence, a.shape[1])
    whole_a, whole_b = _macro(a, metric), _macro(b, metric)
    difference = None if whole_a is None or whole_b is None else whole_a - whole_b
    p = None if low is None else _two_sided(drawn[~np.isnan(drawn)], _informative(a, b))
    return Difference(difference, low, high, p, a.shape[1], int(np.isnan(drawn).sum()))


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


def _stack(splits: Sequence[ArrayLike]) -> Floats:
    """Counts `[S, C, k]`."""
    arrays = [np.asarray(split, dtype=np.float64) for split in splits]
    if not arrays or any(array.ndim != 2 or array.shape != arrays[0].shape for array in arrays):
        shapes = ", ".join(str(list(array.shape)) for array in arrays) or "none"
        raise UsageError(f"counts must be one [images, k] per split, all of one shape; got {shapes}")
    return np.stack(arrays)


def _check(resamples: int, confidence: float) -> None:
    if resamples < 1 or not 0 < confidence < 1:
        raise UsageError(f"resamples must be at least 1 and confidence in (0, 1); got {resamples} and {confidence}")


def _macro(stacked: Floats, metric: Metric) -> float | None:
    found = float(np.mean(metric(stacked.sum(axis=1))))
    return None if np.isnan(found) else found


def _weights(n_clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each image is drawn, in chunks `[r, C]`; the chunking does not change the draws."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // max(1, n_clusters))
    share = np.full(n_clusters, 1.0 / n_clusters)
    for start in range(0, resamples, chunk):
        yield rng.multinomial(n_clusters, share, size=min(chunk, resamples - start)).astype(np.float64)


def _resample(stacked: Floats, metric: Metric, resamples: int, seed: int) -> Floats:
    """The macro mean of the metric in every resample, `[resamples]`; NaN where undefined in any split."""
    n_clusters = stacked.shape[1]
    if n_clusters == 0:
        return np.full(resamples, np.nan)
    parts = [metric(weights @ stacked).mean(axis=0) for weights in _weights(n_clusters, resamples, seed)]
    return np.concatenate(parts)


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
