"""Replaced attention maps: their definition with the whole map, and closed forms that never hold one.

With the allowed keys of row i (n of them, value sum C_i), its weights w, output o and largest weight Mx = max_j w_j:

=====================  ===============================  =========================
map                    on allowed keys                  closed form
=====================  ===============================  =========================
uniform                1/n                              C / n
uniform, unnormalised  1/K, K = keys of the last row    C / K
reversed, normalised   (Mx - w) / (n*Mx - 1)            (Mx*C - o) / (n*Mx - 1)
reversed               Mx - w                           Mx*C - o
random                 r_ij / sum of allowed r_ij       streamed, r from a counter
=====================  ===============================  =========================

A row whose weights are all equal has no reversed map (0/0): it keeps its ordinary output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfix_kernels.call import AttentionCall, additive_mask

Kind = Literal["uniform", "reversed", "random"]
KINDS: tuple[Kind, ...] = ("uniform", "reversed", "random")
DEGENERATE = 1e-5  # below this n*Mx - 1 is rounding: float32 sums of a few thousand weights


@dataclass(frozen=True)
class MapKind:
    """Which map replaces attention.

    Args:
        kind: uniform, reversed or random.
        normalise: rows sum to one; else as in the table above (random is always normalised).
        seed: of the random map; rows and heads differ, batch items do not.
    """

    kind: Kind
    normalise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"map {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.kind == "random" and not self.normalise:
            raise ValueError("the random map has normalised rows only")


def allowed_keys(call: AttentionCall) -> Tensor:
    """Bool[B or 1, H or 1, L, S]: which keys a row may see."""
    mask = additive_mask(call)
    if mask is None:
        return torch.ones(1, 1, call.query.shape[2], call.key.shape[2], dtype=torch.bool, device=call.query.device)
    return (mask > float("-inf")).expand(*mask.shape[:2], call.query.shape[2], call.key.shape[2])


def dense_weights(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Plain attention weights [B, H, L, S] in float32, zero where hidden, and the allowed keys."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key = call.key.float().repeat_interleave(repeats, dim=1)
    scores = call.query.float() @ key.transpose(-1, -2) * call.factor
    mask = additive_mask(call)
    allowed = allowed_keys(call).expand_as(scores)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).nan_to_num(0.0), allowed


def replace_reference(call: AttentionCall, new: MapKind) -> Tensor:
    """The definition: the whole map in float32. Returns Float32[B, H, L, D]."""
    weights, allowed = dense_weights(call)
    count = allowed.sum(-1, keepdim=True).float()
    if new.kind == "uniform":
        total = count if new.normalise else count.amax(-2, keepdim=True)
        replaced = allowed / total.clamp(min=1.0)
    elif new.kind == "reversed":
        peak = weights.amax(-1, keepdim=True)
        rest = count * peak - 1.0
        replaced = torch.where(allowed, peak - weights, 0.0)
        if new.normalise:
            replaced = replaced / rest.clamp(min=DEGENERATE)
        replaced = torch.where(rest > DEGENERATE, replaced, weights)
    else:
        _, h, rows, keys = weights.shape
        noise = counter_random(new.seed, h, rows, keys, weights.device) * allowed
        replaced = noise / noise.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    repeats = call.query.shape[1] // call.key.shape[1]
    return replaced @ call.value.float().repeat_interleave(repeats, dim=1)


def replace(call: AttentionCall, new: MapKind) -> Tensor:
    """`replace_reference` without a map of its own where the device has a kernel for it, else in closed form.

    Row statistics come from the Triton kernel on CUDA and from dense weights elsewhere.
    """
    from mmfix_kernels import triton as backend

    served = not backend.why_not(call)
    if new.kind == "random":
        if served:
            from mmfix_kernels.triton.random_map import random_map

            return random_map(call, new.seed)
        return replace_reference(call, new)
    sums, count = value_sums(call)
    if new.kind == "uniform":
        total = count if new.normalise else count.amax(-2, keepdim=True)
        return sums / total.clamp(min=1.0)
    output, peak = backend.attend_with_peak(call) if served else dense_peak(call)
    rest = count * peak - 1.0
    replaced = peak * sums - output
    if new.normalise:
        replaced = replaced / rest.clamp(min=DEGENERATE)
    return torch.where(rest > DEGENERATE, replaced, output)


def dense_peak(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Float32 output [B, H, L, D] and largest weight [B, H, L, 1] from dense weights."""
    weights, _ = dense_weights(call)
    repeats = call.query.shape[1] // call.key.shape[1]
    return weights @ call.value.float().repeat_interleave(repeats, dim=1), weights.amax(-1, keepdim=True)


def value_sums(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Sum of the allowed values [B, H, L, D] and their number [B or 1, H or 1, L, 1], in float32."""
    repeats = call.query.shape[1] // call.key.shape[1]
    rows, value = call.query.shape[2], call.value.float()
    if call.mask is None:
        if call.is_causal and rows > 1:
            count = torch.arange(1, rows + 1, device=value.device).float()[None, None, :, None]
            return value.cumsum(2).repeat_interleave(repeats, dim=1), count
        count = torch.full((1, 1, rows, 1), float(value.shape[2]), device=value.device)
        return value.sum(2, keepdim=True).expand(-1, -1, rows, -1).repeat_interleave(repeats, dim=1), count
    allowed = allowed_keys(call)
    if allowed.shape[1] == 1:  # one mask for all heads: sum once per key head
        return (allowed.float() @ value).repeat_interleave(repeats, dim=1), allowed.sum(-1, keepdim=True).float()
    return allowed.float() @ value.repeat_interleave(repeats, dim=1), allowed.sum(-1, keepdim=True).float()


def counter_random(seed: int, heads: int, rows: int, keys: int, device: torch.device) -> Tensor:
    """Float32[H, L, S] in (0, 1): a hash of (seed, head, row, key), the same on every device and in the kernel."""
    head = torch.arange(heads, device=device)[:, None, None]
    row = torch.arange(rows, device=device)[None, :, None]
    key = torch.arange(keys, device=device)[None, None, :]
    start = _scramble(head * 0x9E3779B1 + seed)
    word = _scramble(_scramble(start + row * 0x85EBCA6B) + key * 0xC2B2AE35)
    return ((word >> 8).float() + 0.5) * 2.0**-24


def _scramble(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit depends on every other (the finaliser of MurmurHash3)."""
    word = word & 0xFFFFFFFF
    word = (word ^ (word >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ (word >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ (word >> 16)
