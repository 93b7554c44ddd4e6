"""The two matrix products of attention without repeated heads or prefixes: rows are folded, keys are read in place."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfix_kernels.call import AttentionCall


def group_matmul(rows: Tensor, shared: Tensor) -> Tensor:
    """``rows @ shared`` with the query heads of one key head folded into the row axis (no repeated heads)."""
    b, h, q_len, k = rows.shape
    h_kv = shared.shape[1]
    if h == h_kv:
        return torch.matmul(rows, shared)
    folded = rows.reshape(b, h_kv, h // h_kv * q_len, k)
    return torch.matmul(folded, shared).reshape(b, h, q_len, shared.shape[-1])


def _fold(tensor: Tensor, prefix: Tensor, repeats: int) -> Tensor:
    """[B*R, H, L, K] → [B, H_kv, R*G*L, K]: branches and head groups folded into the rows of a shared prefix."""
    batch, h_kv = prefix.shape[:2]
    _, _, q_len, width = tensor.shape
    folded = tensor.reshape(batch, -1, h_kv, repeats * q_len, width)
    return folded.transpose(1, 2).reshape(batch, h_kv, -1, width)


def _unfold(tensor: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`_fold`, to [B*R, H, L, K]."""
    rows, heads, q_len = shape
    batch, h_kv, _, width = tensor.shape
    wide = tensor.reshape(batch, h_kv, rows // batch, -1, width).transpose(1, 2)
    return wide.reshape(rows, heads, q_len, width)


def scores_of(call: AttentionCall, query: Tensor) -> Tensor:
    """``query @ key^T`` over all keys, the shared prefix read once for its branches."""
    scores = group_matmul(query, call.key.transpose(-1, -2))
    if call.prefix_key is None:
        return scores
    folded = _fold(query, call.prefix_key, query.shape[1] // call.key.shape[1])
    before = torch.matmul(folded, call.prefix_key.transpose(-1, -2))
    return torch.cat([_unfold(before, (query.shape[0], query.shape[1], query.shape[2])), scores], dim=-1)


def values_of(call: AttentionCall, weights: Tensor) -> Tensor:
    """``weights @ value`` over all keys."""
    weights = weights.to(call.value.dtype)
    if call.prefix_value is None:
        return group_matmul(weights, call.value)
    shared = call.prefix_value.shape[2]
    folded = _fold(weights[..., :shared], call.prefix_value, weights.shape[1] // call.value.shape[1])
    before = _unfold(torch.matmul(folded, call.prefix_value), (weights.shape[0], weights.shape[1], weights.shape[2]))
    return before + group_matmul(weights[..., shared:], call.value)


def by_item(rows: Tensor, shared: Tensor) -> Tensor:
    """``rows @ shared`` for [B, H, L, K] and [B, K, N]: one product per batch item, not one per head."""
    b, h, q_len, width = rows.shape
    return torch.bmm(rows.reshape(b, h * q_len, width), shared).view(b, h, q_len, -1)
