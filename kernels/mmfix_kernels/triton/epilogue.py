# mypy: ignore-errors
# ruff: noqa: SIM102 (a branch on a constexpr is taken at compile time)
"""The epilogue: join the key classes, move masses through their gates, scale heads, store.

Column weights ``w`` [M, 8] hold the attention mass of each bin (see `blocks`); a mass move multiplies columns, and the
same factors multiply the class accumulators, so no map is needed: ``out = sum_c f_c * acc_c * exp(m_c - m) / Z``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmfix_kernels.triton.blocks import NEG_INF
from mmfix_kernels.triton.maps import STREAMED, replaced_masses, replaced_output

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # a smaller target would make the gain infinite


@triton.jit
def in_columns(GROUP: tl.constexpr):
    """Bool[1, 8]: the columns whose label is in GROUP."""
    b_bit = (tl.zeros([8], tl.int32) + 1) << tl.arange(0, 8)
    return ((b_bit & GROUP) != 0)[None, :]


@triton.jit
def mass(b_w, GROUP: tl.constexpr):
    """Mass [M] of a group from the column weights b_w [M, 8]."""
    return tl.sum(tl.where(in_columns(GROUP), b_w, 0.0), axis=1)


@triton.jit
def of_class(b_f, CLASSES: tl.constexpr, N: tl.constexpr):
    """The factor [M] that all columns of class N share in b_f [M, 8], read off its lowest label."""
    CLASS: tl.constexpr = (CLASSES >> (8 * N)) & 255
    return mass(b_f, CLASS & -CLASS)


@triton.jit
def touched(b_rows, b_heads, SLOT: tl.constexpr, ROWS: tl.constexpr):
    """Rows [M] that the edit in SLOT may touch. ROWS packs, 4 bits per slot, which bit of b_rows to test."""
    return (b_rows & (b_rows >> ((ROWS >> (4 * SLOT)) & 15)) & (b_heads >> SLOT) & 1) != 0


@triton.jit
def count_fired(p_fired, b_active, b_looked, SLOT: tl.constexpr, COUNTERS: tl.constexpr):
    """Add the numbers of changed and of looked-at rows to the counters of the edit in SLOT."""
    N: tl.constexpr = (COUNTERS >> (4 * SLOT)) & 15
    tl.atomic_add(p_fired + 2 * N, tl.sum(b_active.to(tl.int64), axis=0))
    tl.atomic_add(p_fired + 2 * N + 1, tl.sum(b_looked.to(tl.int64), axis=0))


@triton.jit
def count_changed(p_fired, b_changed, SLOT: tl.constexpr, COUNTERS: tl.constexpr):
    """Add the number of changed rows alone: that a map looks at every row is known before the launch."""
    N: tl.constexpr = (COUNTERS >> (4 * SLOT)) & 15
    tl.atomic_add(p_fired + 2 * N, tl.sum(b_changed.to(tl.int64), axis=0))


@triton.jit
def move_mass(
    p_params, p_count, p_fired, b_w, b_f, b_rows, b_heads, b_seen, batch,
    N: tl.constexpr, MOVE: tl.constexpr, SEEN: tl.constexpr, ROWS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Mass move N on column weights b_w [M, 8] and factors b_f [M, 8]; returns both.

    MOVE packs four label sets: source, target, gate group (0: no gate) and gate part. SEEN is the bit of b_seen that
    says whether the row sees a key of the gate's part.
    """
    SOURCE: tl.constexpr = MOVE & 255
    TARGET: tl.constexpr = (MOVE >> 8) & 255
    GATE: tl.constexpr = (MOVE >> 16) & 255
    PART: tl.constexpr = (MOVE >> 24) & 255
    b_share = tl.zeros_like(b_rows).to(tl.float32) + tl.load(p_params + 6 + 4 * N)  # [M]
    b_looked = touched(b_rows, b_heads, 2 + N, ROWS)
    b_source = mass(b_w, SOURCE)
    b_target = mass(b_w, TARGET)
    b_active = b_looked & (b_source > 0) & (b_target > 0)
    if GATE != 0:
        b_group = mass(b_w, GATE)
        b_limit = b_group
        if p_count is not None:
            b_limit = b_group + tl.load(p_params + 9 + 4 * N) * tl.load(p_count + 2 * batch + N)
        b_active = b_active & (b_group >= tl.load(p_params + 7 + 4 * N)) & (b_group > 0)
        b_active = b_active & (mass(b_w, PART) <= tl.load(p_params + 8 + 4 * N) * b_limit)
        b_active = b_active & (((b_seen >> SEEN) & 1) != 0)
    b_gain = b_share * b_source / tl.maximum(b_target, TINY)
    b_factor = tl.where(in_columns(TARGET), 1.0 + b_gain[:, None], 1.0)
    b_factor = tl.where(in_columns(SOURCE), 1.0 - b_share[:, None], b_factor)
    b_factor = tl.where(b_active[:, None], b_factor, 1.0)
    count_fired(p_fired, b_active & (b_share > 0), b_looked, 2 + N, COUNTERS)
    return b_w * b_factor, b_f * b_factor


@triton.jit
def finish(
    p_out, p_params, p_count, p_scale, p_fired, p_masses, p_stats,
    b_m0, b_m1, b_m2, b_m3, b_acc0, b_acc1, b_acc2, b_acc3, b_sum, b_seen, b_rows, b_heads, b_head, b_row,
    b_racc, b_rsum, b_total, b_count, b_rbins, b_kind, b_norm,
    batch, out_b, out_h, out_l, scale_b, H, L, mass_start,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, N_CLASSES: tl.constexpr, CLASSES: tl.constexpr, N_BINS: tl.constexpr,
    N_SCORES: tl.constexpr, N_MOVES: tl.constexpr, MOVE0: tl.constexpr, MOVE1: tl.constexpr, ROWS: tl.constexpr,
    COUNTERS: tl.constexpr, MAPS: tl.constexpr, N_MAPS: tl.constexpr,
):  # fmt: skip
    """From the state of a row to its output, masses, statistics (LSE, largest weight) and counters.

    Classes beyond N_CLASSES are placeholders and are not read; so is the state of replaced maps where MAPS is 0.
    """
    b_valid = (b_rows & 1) != 0
    b_max = b_m0
    if N_CLASSES > 1:
        b_max = tl.maximum(b_max, b_m1)
    if N_CLASSES > 2:
        b_max = tl.maximum(b_max, b_m2)
    if N_CLASSES > 3:
        b_max = tl.maximum(b_max, b_m3)
    b_safe = tl.where(b_max == NEG_INF, 0.0, b_max)

    b_c0 = tl.math.exp2(b_m0 - b_safe)  # common scale of the classes; 0 for an empty one
    if N_BINS == 0:
        b_z = b_sum * b_c0
        b_inv = tl.where(b_z > 0, 1.0 / tl.where(b_z > 0, b_z, 1.0), 0.0)
        b_out = b_acc0 * (b_c0 * b_inv)[:, None]
        b_peak = b_inv
    else:
        b_w = tl.where(in_columns(CLASSES & 255), b_sum * b_c0[:, None], 0.0)  # [M, 8]
        if N_CLASSES > 1:
            b_c1 = tl.math.exp2(b_m1 - b_safe)
            b_w = tl.where(in_columns((CLASSES >> 8) & 255), b_sum * b_c1[:, None], b_w)
        if N_CLASSES > 2:
            b_c2 = tl.math.exp2(b_m2 - b_safe)
            b_w = tl.where(in_columns((CLASSES >> 16) & 255), b_sum * b_c2[:, None], b_w)
        if N_CLASSES > 3:
            b_c3 = tl.math.exp2(b_m3 - b_safe)
            b_w = tl.where(in_columns((CLASSES >> 24) & 255), b_sum * b_c3[:, None], b_w)
        b_z = tl.sum(b_w, axis=1)
        b_inv = tl.where(b_z > 0, 1.0 / tl.where(b_z > 0, b_z, 1.0), 0.0)
        b_w = b_w * b_inv[:, None]
        b_f = tl.full(b_w.shape, 1.0, tl.float32)
        if N_MOVES > 0:
            b_w, b_f = move_mass(
                p_params, p_count, p_fired, b_w, b_f, b_rows, b_heads, b_seen, batch,
                0, MOVE0, N_SCORES, ROWS, COUNTERS,
            )  # fmt: skip
        if N_MOVES > 1:
            b_w, b_f = move_mass(
                p_params, p_count, p_fired, b_w, b_f, b_rows, b_heads, b_seen, batch,
                1, MOVE1, N_SCORES + 1, ROWS, COUNTERS,
            )  # fmt: skip
        b_out = b_acc0 * (b_c0 * b_inv * of_class(b_f, CLASSES, 0))[:, None]
        if N_CLASSES > 1:
            b_out += b_acc1 * (b_c1 * b_inv * of_class(b_f, CLASSES, 1))[:, None]
        if N_CLASSES > 2:
            b_out += b_acc2 * (b_c2 * b_inv * of_class(b_f, CLASSES, 2))[:, None]
        if N_CLASSES > 3:
            b_out += b_acc3 * (b_c3 * b_inv * of_class(b_f, CLASSES, 3))[:, None]
        b_peak = b_c0 * b_inv * of_class(b_f, CLASSES, 0)  # the largest weight after the moves
        if N_CLASSES > 1:
            b_peak = tl.maximum(b_peak, b_c1 * b_inv * of_class(b_f, CLASSES, 1))
        if N_CLASSES > 2:
            b_peak = tl.maximum(b_peak, b_c2 * b_inv * of_class(b_f, CLASSES, 2))
        if N_CLASSES > 3:
            b_peak = tl.maximum(b_peak, b_c3 * b_inv * of_class(b_f, CLASSES, 3))
    if (STREAMED & MAPS) != 0:
        b_out, b_div, b_changed = replaced_output(b_out, b_peak, b_racc, b_rsum, b_total, b_count, b_kind, b_norm, MAPS)
        if p_masses is not None:
            b_w = replaced_masses(b_w, b_peak, b_rbins, b_count, b_div, b_kind, MAPS)
    else:
        b_changed = (b_kind > 0) & (b_count > 0) & (b_z > 0)
    for n in tl.static_range(N_MAPS):
        count_changed(p_fired, b_valid & b_changed & (((b_heads >> 8) & 255) == n + 1), 5 + n, COUNTERS)
    if N_BINS != 0:
        if p_masses is not None:
            b_at = ((batch * H + b_head).to(tl.int64) * (L - mass_start) + b_row - mass_start) * 8
            b_wanted = b_valid & (b_row >= mass_start)
            tl.store(p_masses + b_at[:, None] + tl.arange(0, 8)[None, :], b_w, mask=b_wanted[:, None])

    if N_SCORES > 0:
        b_looked = touched(b_rows, b_heads, 0, ROWS)
        count_fired(p_fired, b_looked & ((b_seen & 1) != 0), b_looked, 0, COUNTERS)
    if N_SCORES > 1:
        b_looked = touched(b_rows, b_heads, 1, ROWS)
        count_fired(p_fired, b_looked & ((b_seen & 2) != 0), b_looked, 1, COUNTERS)
    if p_scale is not None:
        b_scale = tl.load(p_scale + batch * scale_b + b_head, mask=b_valid, other=1.0).to(tl.float32)
        b_out = b_out * b_scale[:, None]
        count_fired(p_fired, b_valid & (b_scale != 1.0), b_valid, 4, COUNTERS)
    if p_stats is not None:
        b_at = ((batch * H + b_head).to(tl.int64) * L + b_row) * 2
        tl.store(p_stats + b_at, (b_max + tl.math.log2(b_z)) * LN2, mask=b_valid)
        tl.store(p_stats + b_at + 1, b_inv, mask=b_valid)

    b_dim = tl.arange(0, BLOCK_V)
    b_to = batch.to(tl.int64) * out_b + b_head.to(tl.int64) * out_h + b_row.to(tl.int64) * out_l  # [M]
    b_mask = b_valid[:, None] & (b_dim < D_V)[None, :]
    tl.store(p_out + b_to[:, None] + b_dim[None, :], b_out.to(p_out.dtype.element_ty), mask=b_mask)
