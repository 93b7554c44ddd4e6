"""Edits that name single keys instead of groups of them, and one that mixes heads; data, like the rest of the edits.

A method that ranks keys by number (PAINT) or per head (ACT) has more classes of keys than there are labels. What it
names are the first keys of the call; later ones, which were generated since, are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from mmfix_kernels.edits import KeyGroups, Rows


def spread(values: Tensor, keys: int) -> Tensor:
    """[…, P] → […, keys]: zero (or False) on keys beyond the first P."""
    return F.pad(values, (0, keys - values.shape[-1])) if values.shape[-1] < keys else values[..., :keys]


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyGain:
    """Change scores before the softmax by a share of their magnitude, key by key: ``s'_j = s_j + gain_j |s_j|``.

    Args:
        gain: Float[B, P] of the first P keys; zero leaves a key alone.
        rows: query rows that are touched.
    """

    gain: Tensor
    rows: Rows
    heads: ClassVar[None] = None
    batch: ClassVar[None] = None
    mean_abs_gain: ClassVar[float] = 0.0

    def keys(self, groups: KeyGroups) -> Tensor:
        """Bool[B, 1, 1, S]: the keys whose scores change."""
        return (spread(self.gain, groups.labels.shape[1]) != 0)[:, None, None, :]

    def __call__(self, scores: Tensor) -> Tensor:
        """[B, H, L, S] → the same shape."""
        return scores + spread(self.gain, scores.shape[-1])[:, None, None, :].to(scores.dtype) * scores.abs()

    def behind(self, offset: int) -> KeyGain:
        """The edit for a call that has lost its first `offset` keys (a sliding window)."""
        return replace(self, gain=self.gain[:, offset:])

    def of(self, chosen: Tensor) -> KeyGain:
        """The edit on the batch rows of `chosen`, Bool[B]."""
        return replace(self, gain=torch.where(chosen[:, None], self.gain, 0.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyMove:
    """After the softmax, move `share` of the mass of single keys, head by head, to all other keys.

    With W the mass of the chosen keys C of a row, ``w_j <- (1 - share) w_j`` for j in C and
    ``w_j <- w_j (1 + share W / (1 - W))`` for the others: every row still sums to one. A row whose chosen keys have
    all of its mass, or none, is left as it is.

    Args:
        chosen: Bool[B, H, P] of the first P keys.
        share: of their mass that is moved, 0 to 1.
        rows: query rows that are touched.
    """

    chosen: Tensor
    share: float
    rows: Rows
    heads: ClassVar[None] = None
    batch: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"KeyMove.share={self.share}: a share of attention lies in [0, 1]")

    def moved(self, weights: Tensor, touched: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [B, H, L, S] after the move, and Bool[B, H, L, 1] of the rows that it changed."""
        chosen = spread(self.chosen, weights.shape[-1])[:, :, None, :]
        mass = weights.masked_fill(~chosen, 0.0).sum(-1, keepdim=True)
        rest = weights.masked_fill(chosen, 0.0).sum(-1, keepdim=True)
        active = (mass > 0) & (rest > 0)
        if touched is not None:
            active = active & touched
        gain = 1.0 + self.share * mass / torch.where(rest > 0, rest, 1.0)
        return torch.where(active, weights * torch.where(chosen, 1.0 - self.share, gain), weights), active

    def behind(self, offset: int) -> KeyMove:
        """The edit for a call that has lost its first `offset` keys (a sliding window)."""
        return replace(self, chosen=self.chosen[..., offset:])

    def of(self, rows: Tensor) -> KeyMove:
        """The edit on some batch rows, Bool[B]."""
        return replace(self, chosen=self.chosen & rows[:, None, None])


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadMean:
    """Put the mean of the other heads in place of a head's output, after ``A·V`` and before heads are scaled.

    Args:
        heads: Bool[H] or Bool[B, H], the query heads that are replaced; the mean is that of all other heads as they
            are, replaced ones included.
    """

    heads: Tensor

    def __call__(self, output: Tensor) -> Tensor:
        """[B, H, L, D] → the same shape."""
        b, h = output.shape[:2]
        if self.heads.shape not in ((h,), (b, h)) or h < 2:
            raise ValueError(f"HeadMean.heads {tuple(self.heads.shape)}: expected [{h}] or [{b}, {h}], of two or more")
        whole = output.float()
        others = (whole.sum(1, keepdim=True) - whole) / (h - 1)
        heads = self.heads.to(output.device).expand(b, h)[:, :, None, None]
        return torch.where(heads, others.to(output.dtype), output)

    def of(self, rows: Tensor) -> HeadMean:
        """The edit on some batch rows, Bool[B]."""
        return HeadMean(heads=self.heads & rows[:, None])


KEYED = (KeyGain, KeyMove, HeadMean)
