"""Intervals beside the scores of answer files: a percentile bootstrap of whole images.

Answers about one image belong together, so what is drawn with replacement is the image with all of its answers; the
metric is computed from the summed counts of every resample. Where a file does not say which image an answer is about,
the answer itself is drawn, and the record says so: such an interval is too narrow where answers share an image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import stats
from mmfix_evals.draws import RESAMPLES

Counts = NDArray[np.float64]
Rows = Sequence[tuple[str, Mapping[str, float]]]
"""Counts of single answers, each with the unit that it belongs to."""
SEED = 0
ALONE = "\0"  # starts the name of a record without an image; no image is called so


def units(records: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """What is drawn for every record: its image, named under ``key``; the record itself if one of them names none."""
    if all(isinstance(record.get(key), (str, int)) for record in records):
        return [str(record[key]) for record in records]
    return [f"{ALONE}{index}" for index in range(len(records))]


def method(unit: str, drawn: Collection[str], alone: str = "answer") -> dict[str, Any]:
    """How the intervals were drawn, for a result's ``interval_method``.

    Args:
        unit: what the units are called.
        drawn: the units; may be listed repeatedly.
        alone: what they are called if `units` found no images.
    """
    known = not any(name.startswith(ALONE) for name in drawn)
    return {
        "name": "percentile bootstrap",
        "unit": unit if known else alone,
        "n_units": len(set(drawn)),
        "resamples": RESAMPLES,
        "seed": SEED,
        "confidence": stats.CONFIDENCE,
    }


def grouped(rows: Iterable[tuple[str, Mapping[str, float]]], keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Unit → sums of the counts of its answers, in the order of first use."""
    found: dict[str, dict[str, Any]] = {}
    for unit, row in rows:
        total = found.setdefault(unit, dict.fromkeys(keys, 0))
        for key in keys:
            total[key] += row[key]
    return found


def intervals(
    per_unit: Mapping[str, Mapping[str, float]],
    keys: Sequence[str],
    metrics: Mapping[str, Callable[[Counts], Counts]],
    n: int,
) -> dict[str, dict[str, Any]]:
    """Metric → ``ci_low``, ``ci_high``, ``n`` (answers), ``n_units`` and ``undefined_resamples``.

    Args:
        per_unit: unit → counts.
        keys: order of the columns that the metrics expect.
        metrics: functions of summed counts ``[..., len(keys)] -> [...]``.
        n: number of answers.
    """
    return macro_intervals([per_unit], keys, metrics, n)


def macro_intervals(
    splits: Sequence[Mapping[str, Mapping[str, float]]],
    keys: Sequence[str],
    metrics: Mapping[str, Callable[[Counts], Counts]],
    n: int,
) -> dict[str, dict[str, Any]]:
    """`intervals` of the plain mean of the metrics over splits: units are drawn once for all of them."""
    units = sorted(set().union(*splits))
    none = dict.fromkeys(keys, 0)
    counts = [[[part.get(unit, none)[key] for key in keys] for unit in units] for part in splits]
    shaped = np.array(counts, dtype=np.float64).reshape(len(splits), len(units), len(keys))
    draws = stats.draw(list(shaped), RESAMPLES, SEED)
    found = {}
    for name, metric in metrics.items():
        one = stats.interval(draws, metric)
        bounds = {"ci_low": one.low, "ci_high": one.high}
        found[name] = bounds | {"n": n, "n_units": one.n_clusters, "undefined_resamples": one.undefined}
    return found
