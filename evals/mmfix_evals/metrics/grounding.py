"""Does attention to the image lie on the object that is being named? Two measures on arrays.

Share: Σ a·m / Σ a over image patches, with a the attention and m in [0, 1] the part of each patch that the object's
mask covers. Chance level: the mask's share of the picture. Pointing game (Zhang et al. 2016, arXiv:1608.00507): a hit
if the patch with most attention touches the mask; chance level: the share of patches that touch it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmfix_evals.errors import UsageError


class Grounding(NamedTuple):
    """One named object.

    Attributes:
        share: attention inside the mask / attention on the image, in [0, 1].
        area: mask's share of the picture: what evenly spread attention would give.
        hit: 1 if the patch with most attention touches the mask, else 0.
        hit_chance: share of patches that touch the mask.
    """

    share: float
    area: float
    hit: int
    hit_chance: float


def ground(attention: ArrayLike, cover: ArrayLike) -> Grounding | None:
    """Both measures.

    Args:
        attention: [h, w], not negative.
        cover: [h, w], the covered part of every patch, in [0, 1].

    Returns:
        None where there is nothing to measure: no attention on the image, or a mask outside the picture.

    Raises:
        UsageError: shapes that differ, or values out of range.
    """
    a, m = np.asarray(attention, dtype=np.float64), np.asarray(cover, dtype=np.float64)
    if a.shape != m.shape or a.ndim != 2:
        raise UsageError(f"attention {list(a.shape)} and mask {list(m.shape)} must be two grids of one shape")
    if not (np.isfinite(a).all() and (a >= 0).all() and ((m >= 0) & (m <= 1)).all()):
        raise UsageError("attention must be finite and not negative, the mask's cover in [0, 1]")
    if not a.sum() or not m.sum():
        return None
    best = np.unravel_index(int(a.argmax()), a.shape)
    return Grounding(
        share=float((a * m).sum() / a.sum()),
        area=float(m.mean()),
        hit=int(m[best] > 0),
        hit_chance=float((m > 0).mean()),
    )


def cover_of(mask: ArrayLike, grid: tuple[int, int]) -> NDArray[np.float64]:
    """The covered part of every patch.

    Args:
        mask: [H, W] in [0, 1], H and W multiples of the grid's sides.
        grid: (h, w), patches.
    """
    full = np.asarray(mask, dtype=np.float64)
    (height, width), (h, w) = full.shape, grid
    if height % h or width % w:
        raise UsageError(f"a mask of {height} x {width} pixels does not divide into {h} x {w} patches")
    found: NDArray[np.float64] = full.reshape(h, height // h, w, width // w).mean(axis=(1, 3))
    return found
