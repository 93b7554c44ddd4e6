"""Drawing images with replacement: one drawing serves every metric, method and split about the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmfix_evals.errors import UsageError

Floats = NDArray[np.float64]

RESAMPLES = 2000
CHUNK_ELEMENTS = 2_000_000  # draws held at once (16 MB), whatever the number of images
KEPT_ELEMENTS = 4_000_000  # draws kept for the next drawing (32 MB)


@dataclass(frozen=True)
class Draws:
    """Counts of all images, `[S, k]`, and of every resample, `[S, resamples, k]`: one drawing for all metrics."""

    whole: Floats
    drawn: Floats
    per_image: Floats

    @property
    def n_clusters(self) -> int:
        return int(self.per_image.shape[1])


def draw(splits: Sequence[ArrayLike], resamples: int = RESAMPLES, seed: int = 0) -> Draws:
    """Draw images with replacement and sum their counts; see `bootstrap_macro` for the arguments."""
    stacked = _stack(splits)
    if resamples < 1:
        raise UsageError(f"resamples must be at least 1, got {resamples}")
    if stacked.shape[1] == 0:
        drawn = np.zeros((stacked.shape[0], resamples, stacked.shape[2]))
    else:
        parts = [weights @ stacked for weights in _weights(stacked.shape[1], resamples, seed)]
        drawn = np.concatenate(parts, axis=1)
    return Draws(stacked.sum(axis=1), drawn, stacked)


def _stack(splits: Sequence[ArrayLike]) -> Floats:
    """Counts `[S, C, k]`."""
    arrays = [np.asarray(split, dtype=np.float64) for split in splits]
    if not arrays or any(array.ndim != 2 or array.shape != arrays[0].shape for array in arrays):
        shapes = ", ".join(str(list(array.shape)) for array in arrays) or "none"
        raise UsageError(f"counts must be one [images, k] per split, all of one shape; got {shapes}")
    return np.stack(arrays)


def _weights(n_clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each image is drawn, in chunks `[r, C]`; the chunking does not change the draws."""
    if n_clusters * resamples <= KEPT_ELEMENTS:
        yield from _kept_weights(n_clusters, resamples, seed)
    else:
        yield from _new_weights(n_clusters, resamples, seed)


@lru_cache(maxsize=2)
def _kept_weights(n_clusters: int, resamples: int, seed: int) -> list[Floats]:
    """Kept, because every method and split about the same number of images uses the same draws."""
    return list(_new_weights(n_clusters, resamples, seed))


def _new_weights(n_clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // max(1, n_clusters))
    share = np.full(n_clusters, 1.0 / n_clusters)
    for start in range(0, resamples, chunk):
        yield rng.multinomial(n_clusters, share, size=min(chunk, resamples - start)).astype(np.float64)
