# mypy: ignore-errors
# ruff: noqa: SIM102, SIM108 (a branch on a constexpr is taken at compile time; as a statement it reads as one)
"""The streaming kernel: `attend_kernel` walks over keys; `merge.merge_kernel` joins the parts of a split walk.

A program of `attend_kernel` owns BLOCK_M query rows. With FOLD the rows of all query heads of one key head form the
row axis (decode: keys are read once for the whole group); without, a tile lies in one head (prefill). The state per
row is one maximum and one accumulator per key class and one sum per bin, and for a replaced map one more accumulator;
`finish` turns it into output, masses and counters. With SPLIT each program sees one chunk of the keys and leaves its
state for `merge_kernel`; with BRANCHES > 1 the rows of all branches of a prompt share the keys they read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfix_kernels.triton.blocks import LOG2E, NEG_INF, absorb, absorb_some, edit_scores, matmul, see, see_all
from mmfix_kernels.triton.epilogue import finish, touched
from mmfix_kernels.triton.maps import (
    DRAWN,
    GATHERED,
    PADDING,
    RELEASED,
    STREAMED,
    drawn_weights,
    first_words,
    sums_by_label,
)
from mmfix_kernels.triton.rows import head_bits, locate_rows, row_bits
from mmfix_kernels.triton.state import leave_class, leave_map, no_keys, no_map, parts


@triton.jit
def load_tile(p, b_off, b_dim_in, b_col_in, FULL_DIM: tl.constexpr, EDGE: tl.constexpr):
    """A tile of keys or values, zero where there is none; no mask where the tile is whole."""
    if EDGE:
        b_tile = tl.load(p + b_off, mask=b_dim_in & b_col_in, other=0.0)
    elif FULL_DIM:
        b_tile = tl.load(p + b_off)
    else:
        b_tile = tl.load(p + b_off, mask=b_dim_in, other=0.0)
    return b_tile


# Arguments that change from call to call: specialising on their divisibility would recompile in mid-generation.
VARYING = [
    "S", "chunk", "start", "stop", "mass_start", "labels_b", "mask_b", "mask_h", "mask_l", "places_b", "blocks_b",
    "blocks_h", "blocks_t", "split_from", "row_places_b",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    p_q, p_k, p_v, p_out, p_labels, p_mask, p_blocks, p_rows1, p_rows2, p_rows3, p_heads, p_params, p_count, p_scale,
    p_fired, p_masses, p_stats, p_maps, p_places, p_row_places, p_gather, p_part_acc, p_part_sum, p_part_seen,
    q_b, q_h, q_l, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_l, labels_b, mask_b, mask_h, mask_l, mask_s,
    blocks_b, blocks_h, blocks_t, places_b, row_places_b, heads_b, scale_b,
    H, L, S, start, stop, chunk, mass_start, factor, lowest, split_from,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, GROUP: tl.constexpr, BRANCHES: tl.constexpr, FOLD: tl.constexpr, SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, N_CLASSES: tl.constexpr, CLASSES: tl.constexpr, N_BINS: tl.constexpr,
    BINS: tl.constexpr, N_SCORES: tl.constexpr, SCORES: tl.constexpr, N_MOVES: tl.constexpr, MOVE0: tl.constexpr,
    MOVE1: tl.constexpr, N_SEEN: tl.constexpr, SEEN: tl.constexpr, ROWS: tl.constexpr, COUNTERS: tl.constexpr,
    MAPS: tl.constexpr, N_MAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grouped attention of BLOCK_M rows over the keys of one chunk (all keys without SPLIT).

    Grid (row tiles, batch × query heads, or × key heads under FOLD, chunks). MASK: 0 none, 1 bool, 2 additive; with
    `p_blocks` (`masks.summary`) it is read on edge blocks only. Sets of labels are packed as `plan.Plan` describes.
    """
    tile = tl.program_id(0)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile  # the longest rows first
    heads_here = H // GROUP if FOLD else H
    batch = tl.program_id(1) // heads_here
    head = tl.program_id(1) % heads_here
    kv_head = head if FOLD else head // GROUP
    item = batch * BRANCHES  # whose labels the keys bear
    b_item, b_head, b_row, b_valid = locate_rows(tile, batch, head, start, stop, L, BLOCK_M, GROUP, FOLD, BRANCHES)
    b_rows = row_bits(p_rows1, p_rows2, p_rows3, b_item, b_row, b_valid, L)
    b_heads = head_bits(p_heads, b_item, b_head, b_valid, heads_b)

    b_d = tl.arange(0, BLOCK_D)
    b_dv = tl.arange(0, BLOCK_V)
    b_n = tl.arange(0, BLOCK_N)
    b_from = b_item.to(tl.int64) * q_b + b_head.to(tl.int64) * q_h + b_row.to(tl.int64) * q_l  # [M]
    b_q = tl.load(p_q + b_from[:, None] + b_d[None, :], mask=b_valid[:, None] & (b_d < D)[None, :], other=0.0)  # [M, D]
    b_k_off = b_d[:, None] + b_n[None, :] * k_s  # [D, N]
    b_v_off = b_n[:, None] * v_s + b_dv[None, :]  # [N, D_V]

    b_m0, b_acc0, b_sum, b_seen = no_keys(BLOCK_M, BLOCK_V, N_BINS)
    b_m1, b_m2, b_m3, b_acc1, b_acc2, b_acc3 = b_m0, b_m0, b_m0, b_acc0, b_acc0, b_acc0
    if N_SCORES > 0:
        b_touch0 = touched(b_rows, b_heads, 0, ROWS)
        gain0, abs0, bias0 = tl.load(p_params), tl.load(p_params + 1), tl.load(p_params + 2)
    if N_SCORES > 1:
        b_touch1 = touched(b_rows, b_heads, 1, ROWS)
        gain1, abs1, bias1 = tl.load(p_params + 3), tl.load(p_params + 4), tl.load(p_params + 5)

    begin = tl.program_id(2) * chunk  # a multiple of BLOCK_N
    end = tl.minimum(begin + chunk, S)

    b_word = b_seen
    b_kind, b_norm, b_racc, b_rsum, b_total, b_count, b_rbins = no_map(
        p_maps, p_masses, b_heads, b_rows, BLOCK_V, MAPS, N_MAPS
    )
    plain = True  # whether some row needs its scores
    mapped = False
    if (STREAMED & MAPS) != 0:
        mapped = tl.max(b_kind, axis=0) > 0
        if N_MOVES == 0:
            plain = tl.max((b_valid & ((b_kind == 0) | (b_kind > 2))).to(tl.int32), axis=0) > 0
        if (DRAWN & MAPS) != 0:
            p_places += item.to(tl.int64) * places_b
            b_word = first_words(p_maps, p_row_places, b_heads, b_rows, b_head, b_row, b_item, row_places_b)
        if (RELEASED & MAPS) != 0:
            if mapped:  # over all keys, also those that the row may not see
                for first in range(begin, end, BLOCK_N):
                    b_col = first + b_n
                    b_label = tl.load(p_labels + item.to(tl.int64) * labels_b + b_col, mask=b_col < end, other=PADDING)
                    b_r = drawn_weights(b_kind, b_word, p_places, b_col, end, MAPS)
                    b_total += tl.sum(tl.where((b_label != PADDING)[None, :], b_r, 0.0), axis=1)

    whole = end  # keys before this one are visible to every row
    if CAUSAL:
        end = tl.minimum(end, start + (tile + 1) * BLOCK_M)
        whole = tl.minimum(end, start + tile * BLOCK_M + 1)
    edge_begin = tl.maximum(begin, whole // BLOCK_N * BLOCK_N)
    if MASK != 0:
        edge_begin = begin

    for EDGE in tl.static_range(1 if MASK != 0 else 0, 2):
        low = edge_begin if EDGE else begin
        high = end if EDGE else edge_begin
        # 64-bit bases that move with the block, 32-bit offsets inside it
        p_k1 = p_k + batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h + low.to(tl.int64) * k_s
        p_v1 = p_v + batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h + low.to(tl.int64) * v_s
        p_v0 = p_v1
        for first in range(low, high, BLOCK_N):
            b_col = first + b_n
            state = 1  # of the mask on this tile: 0 hidden, 1 mixed, 2 without effect
            if EDGE and MASK != 0 and p_blocks is not None:
                p_block = p_blocks + batch.to(tl.int64) * blocks_b + head.to(tl.int64) * blocks_h
                state = tl.load(p_block + tile * blocks_t + first // BLOCK_N).to(tl.int32)
            if state != 0:
                if EDGE:
                    b_allowed = (b_col < end)[None, :] & b_valid[:, None]
                    if CAUSAL:
                        b_allowed = b_allowed & (b_col[None, :] <= b_row[:, None])
                    if MASK == 2:
                        b_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                    if MASK != 0:
                        if state == 1:
                            b_at = b_head.to(tl.int64) * mask_h + b_row.to(tl.int64) * mask_l  # [M]
                            b_at += b_item.to(tl.int64) * mask_b
                            b_at = b_at[:, None] + b_col.to(tl.int64)[None, :] * mask_s
                            b_mask = tl.load(p_mask + b_at, mask=b_allowed, other=0)  # [M, N]
                            if MASK == 1:
                                b_allowed = b_allowed & (b_mask != 0)
                            else:
                                b_allowed = b_allowed & (b_mask.to(tl.float32) > lowest)
                                b_bias = tl.where(b_allowed, b_mask.to(tl.float32), 0.0) * LOG2E
                b_k_in = b_col < end
                b_bit = tl.full([BLOCK_N], 1, tl.int32)
                b_from_key = b_col
                if (GATHERED & MAPS) != 0:  # the weight of this key goes to another one
                    p_move = p_gather + (batch * H + head).to(tl.int64) * S
                    b_from_key = tl.load(p_move + b_col, mask=b_k_in, other=0)
                    b_count += tl.max((b_from_key != b_col).to(tl.int32) * b_k_in.to(tl.int32), axis=0)
                    b_v_at = (b_from_key - low).to(tl.int64)[:, None] * v_s + b_dv[None, :]
                    b_v = tl.load(p_v0 + b_v_at, mask=b_k_in[:, None] & (b_dv < D_V)[None, :], other=0.0)
                else:
                    b_v = load_tile(p_v1, b_v_off, b_dv[None, :] < D_V, b_k_in[:, None], D_V == BLOCK_V, EDGE)
                if p_labels is not None:
                    b_label = tl.load(p_labels + item.to(tl.int64) * labels_b + b_from_key, mask=b_k_in, other=PADDING)
                    b_bit = b_bit << b_label.to(tl.int32)  # [N]
                if EDGE:
                    b_seen = see(b_seen, b_allowed, b_bit, SEEN, N_SEEN)
                else:
                    b_seen = see_all(b_seen, b_bit, SEEN, N_SEEN)

                if plain:
                    b_k = load_tile(p_k1, b_k_off, b_d[:, None] < D, b_k_in[None, :], D == BLOCK_D, EDGE)  # [D, N]
                    b_s = matmul(b_q, b_k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)  # [M, N]
                    b_s = b_s * factor  # in units of log2
                    if MASK == 2:
                        b_s += b_bias
                    if N_SCORES > 0:
                        b_s = edit_scores(b_s, b_bit, b_touch0, gain0, abs0, bias0, SCORES & 255)
                    if N_SCORES > 1:
                        b_s = edit_scores(b_s, b_bit, b_touch1, gain1, abs1, bias1, (SCORES >> 8) & 255)
                    if EDGE:
                        b_s = tl.where(b_allowed, b_s, NEG_INF)
                    if N_CLASSES == 1:
                        b_m0, b_sum, b_acc0 = absorb(
                            b_s, b_v, b_bit, b_m0, b_sum, b_acc0, CLASSES & 255, BINS, N_BINS, PRECISION
                        )
                    else:
                        b_m0, b_sum, b_acc0 = absorb_some(
                            b_s, b_v, b_bit, b_m0, b_sum, b_acc0, CLASSES & 255, BINS, N_BINS, PRECISION
                        )
                        b_m1, b_sum, b_acc1 = absorb_some(
                            b_s, b_v, b_bit, b_m1, b_sum, b_acc1, (CLASSES >> 8) & 255, BINS, N_BINS, PRECISION
                        )
                    if N_CLASSES > 2:
                        b_m2, b_sum, b_acc2 = absorb_some(
                            b_s, b_v, b_bit, b_m2, b_sum, b_acc2, (CLASSES >> 16) & 255, BINS, N_BINS, PRECISION
                        )
                    if N_CLASSES > 3:
                        b_m3, b_sum, b_acc3 = absorb_some(
                            b_s, b_v, b_bit, b_m3, b_sum, b_acc3, (CLASSES >> 24) & 255, BINS, N_BINS, PRECISION
                        )
                if (STREAMED & MAPS) != 0:
                    if mapped:
                        b_r = drawn_weights(b_kind, b_word, p_places, b_col, end, MAPS)
                        if EDGE:
                            b_r = tl.where(b_allowed, b_r, 0.0)
                        b_count += tl.sum((b_r > 0).to(tl.float32), axis=1)
                        b_rsum += tl.sum(b_r, axis=1)
                        if p_masses is not None:
                            b_rbins += sums_by_label(b_r, b_bit)
                        b_racc = matmul(b_r.to(b_v.dtype), b_v, b_racc, PRECISION)
            p_k1 += BLOCK_N * k_s
            p_v1 += BLOCK_N * v_s

    if SPLIT:
        split = split_from + tl.program_id(2)
        items = tl.num_programs(1) * BRANCHES  # batch rows × key heads
        b_part = (split * items + b_item * heads_here + head).to(tl.int64) * (GROUP * L)
        b_part += (tile * BLOCK_M + tl.arange(0, BLOCK_M)) % (GROUP * L)  # [M]
        tl.store(p_part_seen + b_part, b_seen, mask=b_valid)
        b_at, b_to = parts(p_part_acc, p_part_sum, b_part, b_dv, D_V, N_CLASSES, MAPS)
        b_mask = b_valid[:, None] & (b_dv < D_V)[None, :]
        if N_BINS == 0:
            tl.store(b_at, b_sum, mask=b_valid)
        else:
            tl.store(b_at[:, None] + tl.arange(0, 8)[None, :], b_sum, mask=b_valid[:, None])
        leave_class(b_at, b_to, b_valid, b_mask, b_m0, b_acc0, 0, D_V)
        if N_CLASSES > 1:
            leave_class(b_at, b_to, b_valid, b_mask, b_m1, b_acc1, 1, D_V)
        if N_CLASSES > 2:
            leave_class(b_at, b_to, b_valid, b_mask, b_m2, b_acc2, 2, D_V)
        if N_CLASSES > 3:
            leave_class(b_at, b_to, b_valid, b_mask, b_m3, b_acc3, 3, D_V)
        if (STREAMED & MAPS) != 0:
            leave_map(p_masses, b_at, b_to, b_valid, b_mask, b_racc, b_rsum, b_total, b_count, b_rbins, N_CLASSES, D_V)
    else:
        finish(
            p_out, p_params, p_count, p_scale, p_fired, p_masses, p_stats,
            b_m0, b_m1, b_m2, b_m3, b_acc0, b_acc1, b_acc2, b_acc3, b_sum, b_seen, b_rows, b_heads, b_head, b_row,
            b_racc, b_rsum, b_total, b_count, b_rbins, b_kind, b_norm,
            batch, out_b, out_h, out_l, scale_b, H, L, mass_start,
            D_V, BLOCK_V, N_CLASSES, CLASSES, N_BINS, N_SCORES, N_MOVES, MOVE0, MOVE1, ROWS, COUNTERS, MAPS, N_MAPS,
        )  # fmt: skip
