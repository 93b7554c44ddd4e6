# mypy: ignore-errors
"""Statistics of attention: mass per key from the log-sum-exp of each row, and distances of head outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfix_kernels.call import AttentionCall
from mmfix_kernels.edits import Rows, ScoreEdit
from mmfix_kernels.triton.blocks import LOG2E, NEG_INF, edit_scores, matmul
from mmfix_kernels.triton.epilogue import touched
from mmfix_kernels.triton.rows import head_bits, row_bits


@triton.jit(do_not_specialize=["S", "first", "labels_b", "mask_b", "mask_h", "mask_l"])
def column_kernel(
    p_q, p_k, p_lse, p_out, p_labels, p_mask, p_rows1, p_rows2, p_rows3, p_heads, p_params, p_chosen,
    q_b, q_h, q_l, k_b, k_h, k_s, labels_b, mask_b, mask_h, mask_l, mask_s, heads_b, H, L, S, first, factor, lowest,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, N_SCORES: tl.constexpr, SCORES: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``c_j = sum_i exp(s_ij - LSE_i)`` of BLOCK_N keys over rows `first` and later. Grid (key blocks, batch × heads).

    p_lse holds (LSE, largest weight) per row; p_chosen, where given, says which rows count.
    """
    batch = tl.program_id(1) // H
    head = tl.program_id(1) % H
    b_col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_d = tl.arange(0, BLOCK_D)
    b_in = (b_col < S)[None, :] & (b_d < D)[:, None]
    b_off = b_col.to(tl.int64)[None, :] * k_s + b_d[:, None]
    b_k = tl.load(p_k + batch.to(tl.int64) * k_b + (head // GROUP).to(tl.int64) * k_h + b_off, mask=b_in, other=0.0)
    b_bit = tl.full([BLOCK_N], 1, tl.int32)
    if p_labels is not None:
        b_label = tl.load(p_labels + batch.to(tl.int64) * labels_b + b_col, mask=b_col < S, other=7)
        b_bit = b_bit << b_label.to(tl.int32)
    b_mass = tl.zeros([BLOCK_N], tl.float32)
    begin = first
    if CAUSAL:  # rows before the first key of the block see none of it
        begin = tl.maximum(first, tl.program_id(0) * BLOCK_N)
    for start in range(begin, L, BLOCK_M):
        b_row = start + tl.arange(0, BLOCK_M)
        b_valid = b_row < L
        b_item = b_row * 0 + batch
        b_q_off = b_row.to(tl.int64)[:, None] * q_l + b_d[None, :]
        b_q = tl.load(
            p_q + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + b_q_off,
            mask=b_valid[:, None] & (b_d < D)[None, :],
            other=0.0,
        )  # [M, D]
        b_allowed = b_valid[:, None] & (b_col < S)[None, :]
        if CAUSAL:
            b_allowed = b_allowed & (b_col[None, :] <= b_row[:, None])
        b_s = matmul(b_q, b_k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * factor
        if MASK != 0:
            b_at = b_row.to(tl.int64)[:, None] * mask_l + b_col.to(tl.int64)[None, :] * mask_s
            p_at = p_mask + batch.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
            b_mask = tl.load(p_at + b_at, mask=b_allowed, other=0)
            if MASK == 1:
                b_allowed = b_allowed & (b_mask != 0)
            else:
                b_allowed = b_allowed & (b_mask.to(tl.float32) > lowest)
                b_s += tl.where(b_allowed, b_mask.to(tl.float32), 0.0) * LOG2E
        if N_SCORES > 0:
            b_rows = row_bits(p_rows1, p_rows2, p_rows3, b_item, b_row, b_valid, L)
            b_heads = head_bits(p_heads, b_item, b_row * 0 + head, b_valid, heads_b)
            for n in tl.static_range(N_SCORES):
                p = p_params + 3 * n
                b_touch = touched(b_rows, b_heads, n, ROWS)
                b_s = edit_scores(
                    b_s, b_bit, b_touch, tl.load(p), tl.load(p + 1), tl.load(p + 2), (SCORES >> (8 * n)) & 255
                )
        b_at = (tl.program_id(1).to(tl.int64) * L + b_row) * 2
        b_lse = tl.load(p_lse + b_at, mask=b_valid, other=0.0) * LOG2E
        b_live = b_lse > NEG_INF
        if p_chosen is not None:
            b_live = b_live & (tl.load(p_chosen + batch * L + b_row, mask=b_valid, other=0) != 0)
        b_p = tl.math.exp2(b_s - tl.where(b_live, b_lse, 0.0)[:, None])
        b_mass += tl.sum(tl.where(b_allowed & b_live[:, None], b_p, 0.0), axis=0)
    tl.store(p_out + tl.program_id(1).to(tl.int64) * S + b_col, b_mass, mask=b_col < S)


def column_mass(call: AttentionCall, rows: Rows) -> Tensor:
    """Float32[B, H, S]: see `mmfix_kernels.statistics.column_mass`."""
    from mmfix_kernels.triton import launch, plan_of, tensors

    bare = replace(call, edits=[e for e in call.edits if isinstance(e, ScoreEdit)], masses="none")
    plan = plan_of(bare)
    stats = launch.attend(bare, plan, stats=True)[1]
    made = launch.Launch(bare, plan, False, bare.query.dtype)
    b, h, length, d = call.query.shape
    keys = call.key.shape[2]
    tile = (32, 32) if tensors.power_of_two(d) >= 128 or call.query.dtype == torch.float32 else (64, 64)
    stream = made.stream(plan, 0, length, replace_tile(tile), fold=False)
    names = ("p_labels", "p_mask", "p_rows1", "p_rows2", "p_rows3", "p_heads", "p_params", "labels_b", "mask_b")
    names += ("mask_h", "mask_l", "mask_s", "heads_b", "q_b", "q_h", "q_l", "k_b", "k_h", "k_s", "p_q", "p_k", "H", "L")
    names += ("S", "lowest", "D", "BLOCK_D", "GROUP", "CAUSAL", "MASK", "N_SCORES", "SCORES", "ROWS", "PRECISION")
    chosen = None if call.groups is None else call.groups.rows[rows]
    out = tensors.empty(b, h, keys, like=call.query, dtype=torch.float32)
    with tensors.on_device_of(call.query):
        column_kernel[(triton.cdiv(keys, tile[1]), b * h)](
            **{name: stream[name] for name in names}, p_lse=stats, p_out=out,
            p_chosen=None if chosen is None else chosen.contiguous().view(torch.uint8),
            first=0 if call.groups is None else call.groups.first[rows], factor=call.factor * math.log2(math.e),
            BLOCK_M=tile[0], BLOCK_N=tile[1], num_warps=4,
        )  # fmt: skip
    return out


def replace_tile(tile: tuple[int, int]):
    from mmfix_kernels.triton.plan import Tile

    return Tile(*tile, 4, 2)


@triton.jit
def divergence_kernel(p_a, p_b, p_distance, p_size, a_b, a_h, b_b, b_h, H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head of one batch row per program: ``||a - b||`` and ``||b||^2`` in float32."""
    batch = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    b_d = tl.arange(0, BLOCK_D)
    b_with = tl.load(p_a + batch * a_b + head * a_h + b_d, mask=b_d < D, other=0.0).to(tl.float32)
    b_without = tl.load(p_b + batch * b_b + head * b_h + b_d, mask=b_d < D, other=0.0).to(tl.float32)
    b_apart = b_with - b_without
    tl.store(p_distance + tl.program_id(0), tl.sqrt(tl.sum(b_apart * b_apart, axis=0)))
    tl.store(p_size + tl.program_id(0), tl.sum(b_without * b_without, axis=0))


def head_divergence(heads: Tensor, without: Tensor) -> tuple[Tensor, Tensor]:
    """Float32[B, H] twice: see `mmfix_kernels.statistics.head_divergence`."""
    from mmfix_kernels.triton.tensors import empty, on_device_of, power_of_two, unit_stride

    heads, without = unit_stride(heads), unit_stride(without)
    b, h, d = heads.shape
    distance, size = (empty(b, h, like=heads, dtype=torch.float32) for _ in range(2))
    with on_device_of(heads):
        divergence_kernel[(b * h,)](
            heads, without, distance, size, *heads.stride()[:2], *without.stride()[:2], h,
            D=d, BLOCK_D=power_of_two(d), num_warps=1,
        )  # fmt: skip
    return distance, size
