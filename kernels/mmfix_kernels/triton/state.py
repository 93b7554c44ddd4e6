# mypy: ignore-errors
# ruff: noqa: SIM108 (a branch on a constexpr is taken at compile time; as a statement it reads as one)
"""The state of a row while keys stream by: where it begins, how a chunk of keys leaves it behind, how two are joined.

Per key class one maximum ``m`` and one accumulator ``acc``, per bin one sum, and for a replaced map one accumulator
more, the sum of its weights, their sum over all keys, the number of its keys and sums per label. Left behind it is
``accumulators`` rows of values and ``plan.Plan.state`` floats: 8 sums, 4 maxima, then those of a replaced map.

``m = max m_i``, ``sum = Σ sum_i·exp(m_i - m)``, ``acc = Σ acc_i·exp(m_i - m)`` for each key class: the triple is
associative, so any split of the keys gives the same state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfix_kernels.triton.blocks import NEG_INF
from mmfix_kernels.triton.maps import STREAMED, kind_of_rows


@triton.jit
def no_keys(BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, N_BINS: tl.constexpr):
    """Before the first key: maximum [M], accumulator [M, D_V], sums ([M, 8], or [M] without bins), groups seen [M]."""
    b_m = tl.full([BLOCK_M], NEG_INF, tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if N_BINS == 0:
        b_sum = tl.zeros([BLOCK_M], tl.float32)
    else:
        b_sum = tl.zeros([BLOCK_M, 8], tl.float32)
    return b_m, b_acc, b_sum, tl.zeros([BLOCK_M], tl.int32)


@triton.jit
def no_map(p_maps, p_masses, b_heads, b_rows, BLOCK_V: tl.constexpr, MAPS: tl.constexpr, N_MAPS: tl.constexpr):
    """Kind and normalisation of each row's map [M], and its state before the first key.

    That is accumulator [M, D_V], sum of weights, sum over all keys, number of keys [M], sums per label [M, 8]; what
    the maps of a call do not need is a placeholder of shape [M].
    """
    b_kind = b_heads * 0
    b_norm = b_kind
    b_rsum = tl.zeros(b_heads.shape, tl.float32)
    b_total, b_count = b_rsum, b_rsum
    b_racc, b_rbins = b_rsum, b_rsum
    if N_MAPS > 0:
        b_kind = kind_of_rows(p_maps, b_heads, b_rows, 0)
        b_norm = kind_of_rows(p_maps, b_heads, b_rows, 1)
    if (STREAMED & MAPS) != 0:
        b_racc = tl.zeros([b_heads.shape[0], BLOCK_V], tl.float32)
        if p_masses is not None:
            b_rbins = tl.zeros([b_heads.shape[0], 8], tl.float32)
    return b_kind, b_norm, b_racc, b_rsum, b_total, b_count, b_rbins


@triton.jit
def parts(p_part_acc, p_part_sum, b_part, b_dv, D_V: tl.constexpr, N_CLASSES: tl.constexpr, MAPS: tl.constexpr):
    """Where the state of each part stands: pointers to its floats [M] and to its accumulators [M, D_V]."""
    STATE: tl.constexpr = 24 if (STREAMED & MAPS) != 0 else 12
    N_ACC: tl.constexpr = N_CLASSES + (1 if (STREAMED & MAPS) != 0 else 0)
    return p_part_sum + b_part * STATE, p_part_acc + (b_part * N_ACC * D_V)[:, None] + b_dv[None, :]


@triton.jit
def leave_class(b_at, b_to, b_valid, b_mask, b_m, b_acc, N: tl.constexpr, D_V: tl.constexpr):
    """Store maximum and accumulator of class N."""
    tl.store(b_at + 8 + N, b_m, mask=b_valid)
    tl.store(b_to + N * D_V, b_acc, mask=b_mask)


@triton.jit
def join_class(b_at, b_to, b_valid, b_mask, b_m, b_acc, N: tl.constexpr, D_V: tl.constexpr):
    """Class N of one chunk into (b_m [M], b_acc [M, D_V]); returns both and the two rescaling factors [M]."""
    b_part = tl.load(b_at + 8 + N, mask=b_valid, other=NEG_INF)
    b_new = tl.maximum(b_m, b_part)
    b_safe = tl.where(b_new == NEG_INF, 0.0, b_new)
    b_old = tl.math.exp2(b_m - b_safe)
    b_add = tl.math.exp2(b_part - b_safe)
    b_more = tl.load(b_to + N * D_V, mask=b_mask, other=0.0)
    return b_new, b_acc * b_old[:, None] + b_more * b_add[:, None], b_old, b_add


@triton.jit
def leave_map(
    p_masses, b_at, b_to, b_valid, b_mask, b_racc, b_rsum, b_total, b_count, b_rbins,
    N_CLASSES: tl.constexpr, D_V: tl.constexpr,
):  # fmt: skip
    """Store the state of a replaced map."""
    tl.store(b_to + N_CLASSES * D_V, b_racc, mask=b_mask)
    tl.store(b_at + 12, b_count, mask=b_valid)
    tl.store(b_at + 13, b_rsum, mask=b_valid)
    tl.store(b_at + 14, b_total, mask=b_valid)
    if p_masses is not None:
        tl.store(b_at[:, None] + 16 + tl.arange(0, 8)[None, :], b_rbins, mask=b_valid[:, None])


@triton.jit
def join_map(
    p_masses, b_at, b_to, b_valid, b_mask, b_racc, b_rsum, b_total, b_count, b_rbins,
    N_CLASSES: tl.constexpr, D_V: tl.constexpr,
):  # fmt: skip
    """Add the state of a replaced map that one chunk left behind: its weights need no common maximum."""
    b_racc += tl.load(b_to + N_CLASSES * D_V, mask=b_mask, other=0.0)
    b_count += tl.load(b_at + 12, mask=b_valid, other=0.0)
    b_rsum += tl.load(b_at + 13, mask=b_valid, other=0.0)
    b_total += tl.load(b_at + 14, mask=b_valid, other=0.0)
    if p_masses is not None:
        b_rbins += tl.load(b_at[:, None] + 16 + tl.arange(0, 8)[None, :], mask=b_valid[:, None], other=0.0)
    return b_racc, b_rsum, b_total, b_count, b_rbins
