# mypy: ignore-errors
"""The contrast step in one launch: one program per batch row streams over the vocabulary twice.

The first pass finds the largest plain logit, which the cut needs; it reads row 0 only, and the second pass then finds
it in the cache. No mixed row is materialised unless it is asked for.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
NEG_INF: tl.constexpr = tl.constexpr(float("-inf"))


@triton.jit
def mix_kernel(
    p_x, p_weights, p_out, p_best, x_b, x_r, V, log_beta, R: tl.constexpr, CUT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Row b: out[b] [V] and best[b]. x [B, R, V] with unit stride along V."""
    batch = tl.program_id(0).to(tl.int64)
    p_row = p_x + batch * x_b
    b_v = tl.arange(0, BLOCK_V)

    b_top = tl.full([BLOCK_V], NEG_INF, tl.float32)
    if CUT:
        for first in range(0, V, BLOCK_V):
            b_x = tl.load(p_row + first + b_v, mask=first + b_v < V, other=NEG_INF).to(tl.float32)
            b_top = tl.maximum(b_top, b_x)
    least = tl.max(b_top, axis=0) + log_beta

    b_best = tl.full([BLOCK_V], NEG_INF, tl.float32)  # per lane: the best value so far and where it was
    b_at = tl.zeros([BLOCK_V], tl.int32) + b_v
    for first in range(0, V, BLOCK_V):
        b_in = first + b_v < V
        b_plain = tl.load(p_row + first + b_v, mask=b_in, other=NEG_INF).to(tl.float32)
        b_dead = b_plain == NEG_INF
        b_mix = tl.load(p_weights) * tl.where(b_dead, 0.0, b_plain)
        for r in tl.static_range(1, R):
            b_x = tl.load(p_row + r * x_r + first + b_v, mask=b_in, other=NEG_INF).to(tl.float32)
            b_dead = b_dead | (b_x == NEG_INF)
            b_mix += tl.load(p_weights + r) * tl.where(b_x == NEG_INF, 0.0, b_x)
        if CUT:
            b_dead = b_dead | (b_plain < least)
        b_mix = tl.where(b_dead, NEG_INF, b_mix)
        if p_out is not None:
            tl.store(p_out + batch * V + first + b_v, b_mix, mask=b_in)
        b_more = b_mix > b_best  # strictly: the first of equal values stays
        b_best = tl.where(b_more, b_mix, b_best)
        b_at = tl.where(b_more, first + b_v, b_at)
    top = tl.max(b_best, axis=0)
    b_at = tl.where(b_best == top, b_at, 2147483647)
    tl.store(p_best + batch, tl.min(b_at, axis=0).to(tl.int64))


@lru_cache(maxsize=64)
def weight_tensor(weights: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.float32, device=device)


def mix(logits: Tensor, weights: tuple[float, ...], beta: float, want_logits: bool) -> tuple[Tensor | None, Tensor]:
    """See `mmfix_kernels.contrast.mix`; logits [B, R, V]."""
    b, rows, size = logits.shape
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    out = torch.empty(b, size, dtype=torch.float32, device=logits.device) if want_logits else None
    best = torch.empty(b, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        mix_kernel[(b,)](
            logits, weight_tensor(weights, logits.device), out, best, logits.stride(0), logits.stride(1), size,
            math.log(beta) if beta > 0 else 0.0, R=rows, CUT=beta > 0, BLOCK_V=BLOCK, num_warps=8,
        )  # fmt: skip
    return out, best
