# mypy: ignore-errors
"""Join the states that the chunks of a split key axis left behind; the same epilogue as an unsplit stream."""

from __future__ import annotations

import triton
import triton.language as tl

from mmfix_kernels.triton.epilogue import finish, in_columns
from mmfix_kernels.triton.maps import STREAMED
from mmfix_kernels.triton.rows import head_bits, locate_rows, row_bits
from mmfix_kernels.triton.state import join_class, join_map, no_keys, no_map, parts


@triton.jit(do_not_specialize=["splits", "mass_start"])
def merge_kernel(
    p_part_acc, p_part_sum, p_part_seen, p_out, p_rows1, p_rows2, p_rows3, p_heads, p_params, p_count, p_scale,
    p_fired, p_masses, p_stats, p_maps, out_b, out_h, out_l, heads_b, scale_b, H, L, splits, mass_start,
    D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, N_CLASSES: tl.constexpr,
    CLASSES: tl.constexpr, N_BINS: tl.constexpr, N_SCORES: tl.constexpr, N_MOVES: tl.constexpr, MOVE0: tl.constexpr,
    MOVE1: tl.constexpr, ROWS: tl.constexpr, COUNTERS: tl.constexpr, MAPS: tl.constexpr, N_MAPS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, batch × key heads): rows are folded as in `attend_kernel` with FOLD."""
    batch = tl.program_id(1) // (H // GROUP)
    head = tl.program_id(1) % (H // GROUP)
    b_item, b_head, b_row, b_valid = locate_rows(tl.program_id(0), batch, head, 0, L, L, BLOCK_M, GROUP, True, 1)
    b_rows = row_bits(p_rows1, p_rows2, p_rows3, b_item, b_row, b_valid, L)
    b_heads = head_bits(p_heads, b_item, b_head, b_valid, heads_b)
    b_index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_dv = tl.arange(0, BLOCK_V)
    b_mask = b_valid[:, None] & (b_dv < D_V)[None, :]

    b_m0, b_acc0, b_sum, b_seen = no_keys(BLOCK_M, BLOCK_V, N_BINS)
    b_m1, b_m2, b_m3, b_acc1, b_acc2, b_acc3 = b_m0, b_m0, b_m0, b_acc0, b_acc0, b_acc0
    b_kind, b_norm, b_racc, b_rsum, b_total, b_count, b_rbins = no_map(
        p_maps, p_masses, b_heads, b_rows, BLOCK_V, MAPS, N_MAPS
    )

    for split in range(splits):
        b_part = (split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (GROUP * L) + b_index  # [M]
        b_at, b_to = parts(p_part_acc, p_part_sum, b_part, b_dv, D_V, N_CLASSES, MAPS)
        b_seen = b_seen | tl.load(p_part_seen + b_part, mask=b_valid, other=0)
        b_m0, b_acc0, b_old, b_add = join_class(b_at, b_to, b_valid, b_mask, b_m0, b_acc0, 0, D_V)
        if N_BINS == 0:
            b_sum = b_sum * b_old + tl.load(b_at, mask=b_valid, other=0.0) * b_add
        else:
            b_more = tl.load(b_at[:, None] + tl.arange(0, 8)[None, :], mask=b_valid[:, None], other=0.0)
            b_in = in_columns(CLASSES & 255)
            b_new = tl.where(b_in, b_sum * b_old[:, None] + b_more * b_add[:, None], 0.0)
            if N_CLASSES > 1:
                b_m1, b_acc1, b_old, b_add = join_class(b_at, b_to, b_valid, b_mask, b_m1, b_acc1, 1, D_V)
                b_in = in_columns((CLASSES >> 8) & 255)
                b_new = tl.where(b_in, b_sum * b_old[:, None] + b_more * b_add[:, None], b_new)
            if N_CLASSES > 2:
                b_m2, b_acc2, b_old, b_add = join_class(b_at, b_to, b_valid, b_mask, b_m2, b_acc2, 2, D_V)
                b_in = in_columns((CLASSES >> 16) & 255)
                b_new = tl.where(b_in, b_sum * b_old[:, None] + b_more * b_add[:, None], b_new)
            if N_CLASSES > 3:
                b_m3, b_acc3, b_old, b_add = join_class(b_at, b_to, b_valid, b_mask, b_m3, b_acc3, 3, D_V)
                b_in = in_columns((CLASSES >> 24) & 255)
                b_new = tl.where(b_in, b_sum * b_old[:, None] + b_more * b_add[:, None], b_new)
            b_sum = b_new
        if (STREAMED & MAPS) != 0:
            b_racc, b_rsum, b_total, b_count, b_rbins = join_map(
                p_masses, b_at, b_to, b_valid, b_mask, b_racc, b_rsum, b_total, b_count, b_rbins, N_CLASSES, D_V
            )

    finish(
        p_out, p_params, p_count, p_scale, p_fired, p_masses, p_stats,
        b_m0, b_m1, b_m2, b_m3, b_acc0, b_acc1, b_acc2, b_acc3, b_sum, b_seen, b_rows, b_heads, b_head, b_row,
        b_racc, b_rsum, b_total, b_count, b_rbins, b_kind, b_norm,
        batch, out_b, out_h, out_l, scale_b, H, L, mass_start,
        D_V, BLOCK_V, N_CLASSES, CLASSES, N_BINS, N_SCORES, N_MOVES, MOVE0, MOVE1, ROWS, COUNTERS, MAPS, N_MAPS,
    )  # fmt: skip
