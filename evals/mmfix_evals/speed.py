"""How fast each method answered and how often it acted, from the same sample lines as the scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mmfix_evals import stats
from mmfix_evals.samples import Sample
from mmfix_evals.scoring import Answers, Counts, Settings, images_of

Entry = dict[str, Any]


def speed_entries(answers: Answers, baseline: str, settings: Settings | None = None) -> list[Entry]:
    """One entry per (split, method): tokens per second, relative to the baseline, fired share, passes per token.

    Methods take turns on every batch, so a machine that slows down slows all of them. Only documents that both the
    method and the baseline answered enter ``relative_speed``. Intervals: bootstrap of pictures, paired for the latter.
    """
    chosen = settings or Settings()
    entries = []
    for split in answers.splits():
        reference = answers.by_method.get(baseline, {}).get(split, {})
        for method, splits in answers.by_method.items():
            samples = splits.get(split, {})
            if samples:
                common = [doc for doc in samples if doc in reference]
                own = tokens_per_second(samples[doc] for doc in common)
                base = tokens_per_second(reference[doc] for doc in common)
                entries.append(
                    {
                        "task": answers.task.name,
                        "data_split": answers.data_split,
                        "split": split,
                        "method": method,
                        "seconds": _sum(s["seconds"] for s in samples.values()),
                        "tokens": sum(s["tokens"] for s in samples.values()),
                        "tokens_per_second": tokens_per_second(samples.values()),
                        **_bounds("tokens_per_second", list(samples.values()), None, chosen),
                        "relative_speed": own / base if own and base else None,
                        **_bounds("relative_speed", *_pair(samples, reference, common), chosen),
                        **_fired(samples.values()),
                        "passes_per_token": _mean([s.get("passes_per_token") for s in samples.values()]),
                    }
                )
    return entries


def _pair(
    samples: dict[str, Sample], reference: dict[str, Sample], common: list[str]
) -> tuple[list[Sample], list[Sample]]:
    return [samples[doc] for doc in common], [reference[doc] for doc in common]


def _bounds(name: str, own: list[Sample], base: list[Sample] | None, settings: Settings) -> Entry:
    """``NAME_low`` and ``NAME_high``: rates are ratios of sums, so whole pictures are drawn as for any other metric."""
    images = images_of([own])
    place = {image: i for i, image in enumerate(images)}
    counts = np.zeros((len(images), 4))
    for column, samples in ((0, own), (2, own if base is None else base)):
        for sample in samples:
            counts[place[sample["image"]], column : column + 2] += (sample["tokens"], sample["seconds"])
    found = stats.interval(
        stats.draw([counts], settings.resamples, settings.seed), _rate if base is None else _relative
    )
    return {f"{name}_low": found.low, f"{name}_high": found.high}


def _rate(c: Counts) -> Counts:
    return stats.ratio(c[..., 0], c[..., 1])


def _relative(c: Counts) -> Counts:
    return stats.ratio(_rate(c), stats.ratio(c[..., 2], c[..., 3]))


def tokens_per_second(samples: Iterable[Sample]) -> float | None:
    """Generated tokens over wall time, prompt processing included."""
    listed = list(samples)
    seconds = _sum(sample["seconds"] for sample in listed)
    return sum(sample["tokens"] for sample in listed) / seconds if seconds else None


def _fired(samples: Iterable[Sample]) -> Entry:
    """Per composed method: how often its edit was considered and how often it acted; and the share over all."""
    pairs: dict[str, list[list[float]]] = {}
    for sample in samples:
        for name, pair in (sample.get("fired") or {}).items():
            pairs.setdefault(name, []).append(pair)
    counted = {name: (_total(found, 0), _total(found, 1)) for name, found in pairs.items()}
    return {
        "fired": {name: {"fired": f, "considered": c, "share": _share([(f, c)])} for name, (f, c) in counted.items()},
        "fired_share": _share(counted.values()),
    }


def _total(pairs: Iterable[list[float]], place: int) -> float:
    """Whole numbers per batch, carried as equal shares by its samples: the rounding of the shares is taken out."""
    return round(_sum(pair[place] for pair in pairs), 6)


def _share(counted: Iterable[tuple[float, float]]) -> float | None:
    listed = list(counted)
    considered = _sum(pair[1] for pair in listed)
    return _sum(pair[0] for pair in listed) / considered if considered else None


def _sum(values: Iterable[float]) -> float:
    return math.fsum(values)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _sum(known) / len(known) if known else None
