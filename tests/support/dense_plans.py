"""Dense attention with a plan per module, registered under a name of its own, and the replaced maps by definition."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "family-oracle"
Edit = Callable[[Tensor, Tensor], Tensor]  # (weights, allowed), both [B, H, L, S] → weights
Opening = Callable[[Tensor, int | None], Tensor]  # (allowed, sliding window) → allowed


@dataclass
class Plan:
    """What one attention module does differently, and what is noted of it."""

    weights: Edit | None = None
    allow: Opening | None = None
    scale: Tensor | None = None  # [B, H], on head outputs
    heads: Tensor | None = None  # noted: head outputs [B, H, L, D] before the scale


@dataclass
class Plans:
    """Plans of the pass at hand, by attention module."""

    by_module: dict[Any, Plan] = field(default_factory=dict)


_NOW = Plans()


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    is_causal: bool | None = None, sliding_window: int | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Dense attention in float64 with the plan of `module`."""
    q_len, s_len, repeats = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, 1) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if attention_mask is not None:
        mask = attention_mask[..., :s_len]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    elif is_causal if is_causal is not None else getattr(module, "is_causal", True):
        allowed = torch.ones(q_len, s_len, dtype=torch.bool).tril(s_len - q_len)
    else:
        allowed = torch.ones(q_len, s_len, dtype=torch.bool)
    allowed = allowed.expand_as(scores)
    plan = _NOW.by_module.get(module, Plan())
    if plan.allow is not None:
        allowed = plan.allow(allowed, sliding_window)
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    if plan.weights is not None:
        weights = plan.weights(weights, allowed)
    plan.heads = weights @ value
    output = plan.heads if plan.scale is None else plan.heads * plan.scale[:, :, None, None]
    return output.to(query.dtype).transpose(1, 2), None


@contextlib.contextmanager
def oracle_attention(model: Any, plans: dict[Any, Plan]) -> Iterator[None]:
    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    _NOW.by_module = plans
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        _NOW.by_module = {}
        for config, setting in before:
            config._attn_implementation_internal = setting


def uniform_numbers(seed: int, head: Any, row: Any, key: Any) -> Any:
    """The counter-based numbers on (0, 1) that random maps are defined by (broadcast NumPy integers)."""
    m32 = np.uint64(0xFFFFFFFF)
    head, row, key = np.broadcast_arrays(*(np.asarray(x, dtype=np.uint64) for x in (head, row, key)))
    state = np.full(key.shape, (seed * 0x9E3779B1 + 0x85EBCA6B) & 0xFFFFFFFF, dtype=np.uint64)
    for counter in (head, row, key):
        state ^= (counter + np.uint64(1)) * np.uint64(0x9E3779B1) & m32
        state = (state ^ (state >> np.uint64(16))) * np.uint64(0x7FEB352D) & m32
        state = (state ^ (state >> np.uint64(15))) * np.uint64(0x846CA68B) & m32
        state ^= state >> np.uint64(16)
    return ((state >> np.uint64(8)).astype(np.float32) + 0.5) * 2.0**-24


def random_map(valid: Tensor, seed: int = 0) -> Edit:
    """Rows ``r_j / sum r`` over the allowed keys; places of rows and keys count tokens that are not padding [B, S]."""

    def edit(weights: Tensor, allowed: Tensor) -> Tensor:
        new = weights.clone()
        for b in range(weights.shape[0]):
            places = np.maximum(np.cumsum(valid[b].numpy()) - 1, 0)
            for h in range(weights.shape[1]):
                r = torch.from_numpy(uniform_numbers(seed, h, places[:, None], places[None, :])).double()
                r = r * allowed[b, h]
                mass = r.sum(-1, keepdim=True)
                new[b, h] = torch.where(mass > 0, r / mass.clamp(min=1e-30), new[b, h])
        return new

    return edit


def shuffled_map(weights: Tensor, allowed: Tensor, seed: int = 0) -> Tensor:
    """Keys of one picture permuted, one permutation per head; keys that a row may not see are another picture's."""
    new = weights.clone()
    for b in range(weights.shape[0]):
        for row in range(weights.shape[2]):
            if not allowed[b, 0, row, row]:
                continue  # filler
            seen = allowed[b, 0, row].nonzero().flatten()
            for h in range(weights.shape[1]):
                order = np.argsort(uniform_numbers(seed, h, 0, np.arange(len(seen))), kind="stable")
                new[b, h, row, seen] = weights[b, h, row, seen[torch.from_numpy(order)]]
    return new
