# mypy: ignore-errors
# ruff: noqa: SIM108 (a branch on a constexpr is taken at compile time; as a statement it reads as one)
"""Attention with a random map: every tile draws its own weights from a counter, so no map is held."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfix_kernels.call import AttentionCall
from mmfix_kernels.triton.blocks import matmul
from mmfix_kernels.triton.launch import broadcast_strides, empty, power_of_two, prepared_mask, unit_stride


@triton.jit
def scramble(word):
    """The 32-bit finaliser of `mmfix_kernels.closed_forms`; word is uint32."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit(do_not_specialize=["seed"])
def random_kernel(
    p_v, p_out, p_mask, v_b, v_h, v_s, out_b, out_h, out_l, mask_b, mask_h, mask_l, mask_s, H, L, S, seed, lowest,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """``out_i = sum_j r_ij v_j / sum_j r_ij`` over the allowed keys. Grid (row tiles, batch × query heads)."""
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = tl.program_id(1) % H
    b_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_d = tl.arange(0, BLOCK_D)
    b_valid = b_row < L
    b_head = scramble((head + b_row * 0).to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32))  # [M]
    b_start = scramble(b_head + b_row.to(tl.uint32) * 0x85EBCA6B)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, (tl.program_id(0) + 1) * BLOCK_M)
    for first in range(0, end, BLOCK_N):
        b_col = first + tl.arange(0, BLOCK_N)
        b_allowed = b_valid[:, None] & (b_col < S)[None, :]
        if CAUSAL:
            b_allowed = b_allowed & (b_col[None, :] <= b_row[:, None])
        if MASK != 0:
            b_at = head.to(tl.int64) * mask_h + b_row.to(tl.int64) * mask_l  # [M]
            b_at = b_at[:, None] + b_col.to(tl.int64)[None, :] * mask_s
            b_mask = tl.load(p_mask + batch * mask_b + b_at, mask=b_allowed, other=0)
            if MASK == 1:
                b_allowed = b_allowed & (b_mask != 0)
            else:
                b_allowed = b_allowed & (b_mask.to(tl.float32) > lowest)
        b_word = scramble(b_start[:, None] + b_col.to(tl.uint32)[None, :] * 0xC2B2AE35)  # [M, N]
        b_r = ((b_word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        b_r = tl.where(b_allowed, b_r, 0.0)
        b_from = (head // GROUP).to(tl.int64) * v_h + b_col.to(tl.int64)[:, None] * v_s + b_d[None, :]
        b_v = tl.load(p_v + batch * v_b + b_from, mask=(b_col < S)[:, None] & (b_d < D)[None, :], other=0.0)
        b_sum += tl.sum(b_r, axis=1)
        b_acc = matmul(b_r, b_v.to(tl.float32), b_acc, "ieee")
    b_out = b_acc / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    b_to = batch * out_b + head.to(tl.int64) * out_h + b_row.to(tl.int64) * out_l
    tl.store(p_out + b_to[:, None] + b_d[None, :], b_out, mask=b_valid[:, None] & (b_d < D)[None, :])


def random_map(call: AttentionCall, seed: int) -> Tensor:
    """Float32[B, H, L, D]: see `mmfix_kernels.closed_forms`."""
    b, h, rows, _ = call.query.shape
    value, width = unit_stride(call.value), call.value.shape[3]
    out = empty(b, rows, h, width, like=value, dtype=torch.float32).transpose(1, 2)
    mask, kind, lowest = prepared_mask(call)
    block = 32 if power_of_two(width) >= 128 else 64
    with torch.cuda.device_of(value):
        random_kernel[(triton.cdiv(rows, block), b * h)](
            value, out, mask, *value.stride()[:3], *out.stride()[:3], *broadcast_strides(mask), h, rows,
            call.key.shape[2], seed, lowest,
            D=width, BLOCK_M=block, BLOCK_N=32, BLOCK_D=power_of_two(width), GROUP=h // call.key.shape[1],
            CAUSAL=mask is None and call.is_causal and rows > 1, MASK=kind, num_warps=4,
        )  # fmt: skip
    return out
