# mypy: ignore-errors
"""Building blocks of replaced maps: which map a row takes, its weights drawn tile by tile, and its output.

The rows of `p_maps` are (kind, normalised, first word of the counter generator, bit of the row mask), one per map;
`p_heads` says per batch row and head which one. Definition: `mmfix_kernels.maps`; closed forms: `closed_forms`.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIFORM: tl.constexpr = tl.constexpr(1)
RANDOM: tl.constexpr = tl.constexpr(2)
REVERSED: tl.constexpr = tl.constexpr(3)
# Bits of the constexpr MAPS.
STREAMED: tl.constexpr = tl.constexpr(1)  # a map with weights of its own: uniform, random, reversed
DRAWN: tl.constexpr = tl.constexpr(2)  # random
TURNED: tl.constexpr = tl.constexpr(4)  # reversed
RELEASED: tl.constexpr = tl.constexpr(8)  # uniform or random over all keys that are not padding
GATHERED: tl.constexpr = tl.constexpr(16)  # shuffled
PADDING: tl.constexpr = tl.constexpr(7)
DEGENERATE: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def mix(b_word, b_counter):
    """One round of the counter generator on uint32."""
    b_word = b_word ^ ((b_counter.to(tl.uint32) + 1) * 0x9E3779B1)
    b_word = (b_word ^ (b_word >> 16)) * 0x7FEB352D
    b_word = (b_word ^ (b_word >> 15)) * 0x846CA68B
    return b_word ^ (b_word >> 16)


@triton.jit
def kind_of_rows(p_maps, b_heads, b_rows, COLUMN: tl.constexpr):
    """Column of `p_maps` for each row [M]; 0 where the row keeps its map."""
    b_map = (b_heads >> 8) & 255  # [M], from 1; 0: none
    b_at = p_maps + (b_map - 1) * 4
    b_bit = tl.load(b_at + 3, mask=b_map > 0, other=0)
    b_mine = (b_map > 0) & (((b_rows & (b_rows >> b_bit)) & 1) != 0)
    return tl.load(b_at + COLUMN, mask=b_mine, other=0)


@triton.jit
def first_words(p_maps, p_row_places, b_heads, b_rows, b_head, b_row, b_item, row_places_b):
    """State [M] of the generator after seed, head and row."""
    b_word = kind_of_rows(p_maps, b_heads, b_rows, 2).to(tl.uint32)
    b_place = tl.load(p_row_places + b_item * row_places_b + b_row, mask=(b_rows & 1) != 0, other=0)
    return mix(mix(b_word, b_head), b_place)


@triton.jit
def drawn_weights(b_kind, b_word, p_places, b_col, end, MAPS: tl.constexpr):
    """New weights [M, N] before any division: a random number where the map is random, else 1."""
    b_one = (b_kind > 0).to(tl.float32)[:, None] + tl.zeros_like(b_col).to(tl.float32)[None, :]
    if (DRAWN & MAPS) != 0:
        b_place = tl.load(p_places + b_col, mask=b_col < end, other=0)
        b_bits = mix(b_word[:, None] + tl.zeros_like(b_col).to(tl.uint32)[None, :], b_place[None, :])
        b_draw = ((b_bits >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08
        b_one = tl.where((b_kind == RANDOM)[:, None], b_draw, b_one)
    return b_one


@triton.jit
def sums_by_label(b_r, b_bit):
    """Sums of b_r [M, N] over the keys of each label, [M, 8]."""
    b_column = (tl.zeros([8], tl.int32) + 1) << tl.arange(0, 8)
    b_out = tl.zeros([b_r.shape[0], 8], tl.float32)
    for k in tl.static_range(8):
        b_part = tl.sum(tl.where((b_bit == (1 << k))[None, :], b_r, 0.0), axis=1)  # [M]
        b_out = tl.where((b_column == (1 << k))[None, :], b_part[:, None], b_out)
    return b_out


@triton.jit
def replaced_output(
    b_out, b_peak, b_racc, b_rsum, b_total, b_count, b_kind, b_norm, MAPS: tl.constexpr
):  # fmt: skip
    """Output [M, D] with the maps of the selected rows replaced; b_out is the output before.

    Returns the output, the divisor [M] of the new weights, and whether the row's map changed [M].
    """
    b_div = b_rsum
    if (RELEASED & MAPS) != 0:
        b_div = tl.where(b_norm != 0, b_rsum, b_total)
    b_safe = tl.where(b_div > 0, b_div, 1.0)
    b_new = b_racc / b_safe[:, None]
    b_changed = (b_count > 1) | (b_div != b_rsum)
    if (TURNED & MAPS) != 0:
        b_rest = b_count * b_peak - 1.0
        b_equal = (b_rest <= DEGENERATE) & (b_norm != 0)  # equal weights, or one key: nothing to turn around
        b_by = tl.where((b_norm != 0) & (b_rest > DEGENERATE), b_rest, 1.0)
        b_turned = (b_peak[:, None] * b_racc - b_out) / b_by[:, None]
        b_turned = tl.where(b_equal[:, None], b_out, b_turned)
        b_new = tl.where((b_kind == REVERSED)[:, None], b_turned, b_new)
        b_changed = tl.where(b_kind == REVERSED, (b_equal == 0), b_changed)
        b_safe = tl.where(b_kind == REVERSED, tl.where(b_equal, -1.0, b_by), b_safe)
    b_mine = (b_kind > 0) & (b_count > 0)
    return tl.where(b_mine[:, None], b_new, b_out), b_safe, b_changed & b_mine


@triton.jit
def replaced_masses(b_w, b_peak, b_rbins, b_count, b_div, b_kind, MAPS: tl.constexpr):
    """Masses per label [M, 8] of the replaced maps; b_w are those before, b_div is `replaced_output`'s divisor."""
    b_new = b_rbins / tl.where(b_div > 0, b_div, 1.0)[:, None]
    if (TURNED & MAPS) != 0:
        b_turned = (b_peak[:, None] * b_rbins - b_w) / tl.where(b_div > 0, b_div, 1.0)[:, None]
        b_turned = tl.where((b_div < 0)[:, None], b_w, b_turned)
        b_new = tl.where((b_kind == REVERSED)[:, None], b_turned, b_new)
    return tl.where(((b_kind > 0) & (b_count > 0))[:, None], b_new, b_w)


@triton.jit
def places_kernel(p_labels, p_places, labels_b, S, BLOCK: tl.constexpr):
    """Number of each key among those of its batch row that are not padding. Grid (batch rows)."""
    batch = tl.program_id(0).to(tl.int64)
    before = 0
    for first in range(0, S, BLOCK):
        b_col = first + tl.arange(0, BLOCK)
        b_label = tl.load(p_labels + batch * labels_b + b_col, mask=b_col < S, other=7).to(tl.int32)
        b_real = (b_label != PADDING).to(tl.int32)
        b_place = before + tl.cumsum(b_real, axis=0) - 1
        tl.store(p_places + batch * S + b_col, tl.maximum(b_place, 0), mask=b_col < S)
        before += tl.sum(b_real, axis=0)
