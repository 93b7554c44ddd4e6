"""Replaced attention maps: the definition, on a block of rows.

Counter-based random numbers: every entry is a hash of (seed, head, row, key), so any block of any backend regenerates
the same map and none is ever held whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfix_kernels.edits import Label, MapReplacement, head_mask

DEGENERATE = 1e-6  # a reversed row with less mass than this is one key, or equal scores


def places(labels: Tensor) -> Tensor:
    """Int64[B, S]: number of each key among the keys of its row that are not padding."""
    return ((labels != int(Label.PADDING)).long().cumsum(-1) - 1).clamp(min=0)


def counter_uniform(seed: int, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Uniform numbers on (0, 1), float32, from integer counters (broadcast together).

    Three rounds of a 32-bit multiply-xorshift mixer over the counters; the same integers give the same number on
    every device.
    """
    mask = 0xFFFFFFFF
    state = torch.full_like(head, (seed * 0x9E3779B1 + 0x85EBCA6B) & mask)
    for counter in (head, row, key):
        state = (state ^ ((counter + 1) * 0x9E3779B1 & mask)) & mask
        state = ((state ^ (state >> 16)) * 0x7FEB352D) & mask
        state = ((state ^ (state >> 15)) * 0x846CA68B) & mask
        state = state ^ (state >> 16)
    return ((state >> 8).to(torch.float32) + 0.5) * 2.0**-24


def replace_rows(
    edit: MapReplacement,
    weights: Tensor,
    allowed: Tensor,
    labels: Tensor,
    rows: Tensor,
    touched: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """The replaced map of a block of rows.

    Args:
        edit: what to put in place.
        weights: [B, H, L, S], softmax of the block.
        allowed: Bool broadcastable to it.
        labels: Int8[B, S].
        rows: Int64[B, L], place (see :func:`places`) of each row among the keys of its batch item.
        touched: Bool[B, L] of the rows that ``edit.rows`` names; None for all.
        before: Int64[B], by how much the places of the keys are moved on (keys that a window has dropped).

    Returns:
        [B, H, L, S]; rows, heads and batch items that the edit does not select are as they were.
    """
    allowed = allowed.expand_as(weights)
    new = _REPLACE[edit.kind](edit, weights, allowed, labels, rows, before)
    chosen = torch.ones(weights.shape[:2], dtype=torch.bool, device=weights.device)
    if edit.heads is not None:
        chosen &= head_mask(edit.heads, weights.shape[1], weights.device)
    if edit.batch is not None:
        chosen &= edit.batch.to(weights.device)[:, None]
    some = allowed.any(-1, keepdim=True)  # a padding row attends to nothing before and after
    if touched is not None:
        some = some & touched[:, None, :, None]
    return torch.where(chosen[:, :, None, None] & some, new, weights)


def count_replaced(before: Tensor, after: Tensor) -> Tensor:
    """Int64[2]: rows (batch, head, row) whose map changed, and rows looked at."""
    changed = (before != after).any(-1)
    return torch.stack([changed.sum(), changed.new_tensor(changed.numel(), dtype=torch.int64)])


def _count(allowed: Tensor, labels: Tensor, normalise: bool) -> Tensor:
    if normalise:
        return allowed.sum(-1, keepdim=True).float()
    return (labels != int(Label.PADDING)).sum(-1).float()[:, None, None, None]


def _uniform(
    edit: MapReplacement, w: Tensor, allowed: Tensor, labels: Tensor, rows: Tensor, before: Tensor | None
) -> Tensor:
    return allowed.float() / _count(allowed, labels, edit.normalise).clamp(min=1)


def _random(
    edit: MapReplacement, w: Tensor, allowed: Tensor, labels: Tensor, rows: Tensor, before: Tensor | None
) -> Tensor:
    h, keys = w.shape[1], places(labels)
    if before is not None:
        keys = keys + before[:, None]
    r = counter_uniform(
        edit.seed,
        torch.arange(h, device=w.device)[None, :, None, None],
        rows[:, None, :, None],
        keys[:, None, None, :],
    )
    real = allowed if edit.normalise else (labels != int(Label.PADDING))[:, None, None, :]
    total = (r * real).sum(-1, keepdim=True)
    return r * allowed / total.clamp(min=1e-12)


def _reversed(
    edit: MapReplacement, w: Tensor, allowed: Tensor, labels: Tensor, rows: Tensor, before: Tensor | None
) -> Tensor:
    largest = w.amax(-1, keepdim=True)
    new = (largest - w) * allowed
    mass = new.sum(-1, keepdim=True)
    degenerate = mass <= DEGENERATE
    if not edit.normalise:
        return new
    return torch.where(degenerate, w, new / mass.clamp(min=DEGENERATE))


def permutation(seed: int, heads: int, labels: Tensor) -> Tensor:
    """Int64[B, heads, S]: key ``j`` takes the weight of key ``permutation[j]``; padding keys stay where they are."""
    b, s_len = labels.shape
    padding = labels == int(Label.PADDING)
    key = counter_uniform(
        seed,
        torch.arange(heads, device=labels.device)[None, :, None],
        torch.zeros(1, 1, 1, dtype=torch.long, device=labels.device),
        places(labels)[:, None, :],
    )
    key = key.masked_fill(padding[:, None, :], 2.0)  # padding stays at the end
    order = key.expand(b, heads, s_len).argsort(dim=-1, stable=True)
    real = (~padding).long().argsort(dim=-1, descending=True, stable=True)  # where real keys stand
    return torch.empty_like(order).scatter_(-1, real[:, None, :].expand_as(order), order)


def _shuffled(
    edit: MapReplacement, w: Tensor, allowed: Tensor, labels: Tensor, rows: Tensor, before: Tensor | None
) -> Tensor:
    """Keys permuted per head, the same permutation for every row."""
    return w.gather(-1, permutation(edit.seed, w.shape[1], labels)[:, :, None, :].expand_as(w))


_REPLACE = {"uniform": _uniform, "random": _random, "reversed": _reversed, "shuffled": _shuffled}
