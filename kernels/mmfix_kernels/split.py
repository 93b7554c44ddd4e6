"""A softmax for each of two sets of keys instead of one for all, from scores: the definition for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfix_kernels.edits import SplitSoftmax


def softmax(scores: Tensor) -> Tensor:
    """Softmax over keys, the last axis; a row with no allowed key gets zeros, not NaN."""
    return scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)


def split(
    edit: SplitSoftmax, scores: Tensor, weights: Tensor, member: Tensor, touched: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, L, S] with the rows that `edit` touches split, and Bool[B, H, L, 1] of the rows that changed.

    Args:
        scores: [B, H, L, S], ``-inf`` where a key is hidden.
        weights: their softmax.
        member: Bool[B, S], keys of the edit's group.
        touched: Bool broadcastable to [B, H, L, 1]; None means all rows.
    """
    inside = member[:, None, None, :]
    parts = [softmax(scores.masked_fill(~keys, float("-inf"))) for keys in (inside, ~inside)]
    open_ = scores.isfinite()
    both = (open_ & inside).any(-1, keepdim=True) & (open_ & ~inside).any(-1, keepdim=True)
    changed = both if touched is None else both & touched
    total = parts[0] + parts[1]
    return torch.where(changed, total / 2 if edit.mass == "mean" else total, weights), changed
