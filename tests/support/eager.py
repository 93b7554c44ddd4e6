"""Plain attention as models write it, the yardstick for errors of rounding, and masks of padded batches."""

from __future__ import annotations

from typing import Any

import torch
from support.dense import visible
from torch import Tensor


def padded(rows: int, keys: int, pad: int) -> Tensor:
    """Bool[2, 1, rows, keys]: causal, the second item padded on the left; its first rows see nothing."""
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).repeat(2, 1, 1, 1)
    mask[1, :, :, :pad] = False
    return mask


def additive(mask: Tensor, hidden: float = float("-inf")) -> Tensor:
    """A mask of numbers: `hidden` where it is False, else zero."""
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


def visible_keys(call: Any) -> tuple[Tensor, Tensor]:
    """Bool[B, H, L, S] of the keys a row may see, and the finite part of the mask in float64."""
    return visible(call.mask, call.is_causal, (*call.query.shape[:3], call.keys))


def eager(call: Any) -> Tensor:
    """Plain attention of a call without a shared prefix, its edits left out, in the dtype of the call."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(repeats, 1) for t in (call.key, call.value))
    allowed, bias = (t.to(call.query.device) for t in visible_keys(call))
    scores = call.query @ key.transpose(2, 3) * call.factor + bias.to(call.query.dtype)
    weights = scores.masked_fill(~allowed, float("-inf"))
    weights = weights.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).nan_to_num(0.0)
    return weights.to(call.query.dtype) @ value
