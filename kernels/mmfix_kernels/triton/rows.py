# mypy: ignore-errors
"""Which query rows a program owns, and which edits touch them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_rows(
    tile, batch, head, start, stop, L, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr,
    BRANCHES: tl.constexpr,
):  # fmt: skip
    """Batch row, query head, row and validity of a tile, [M] each; `head` is a key head under FOLD, else a query head.

    `batch` counts prompts; the BRANCHES of one prompt are neighbouring batch rows.
    """
    b_index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if FOLD:
        b_inside = b_index % (GROUP * L)
        b_item = batch * BRANCHES + b_index // (GROUP * L)
        b_head = head * GROUP + b_inside // L
        b_row = b_inside % L
        b_valid = b_index < BRANCHES * GROUP * L
    else:
        b_item = batch + b_index * 0
        b_head = head + b_index * 0
        b_row = start + b_index
        b_valid = b_row < stop
    return b_item, b_head, b_row, b_valid


@triton.jit
def row_bits(p_rows1, p_rows2, p_rows3, b_item, b_row, b_valid, L):
    """Bit 0: the row exists; bit k: row mask k touches it. [M]"""
    b_bits = b_valid.to(tl.int32)
    b_at = b_item * L + b_row
    if p_rows1 is not None:
        b_bits = b_bits | (tl.load(p_rows1 + b_at, mask=b_valid, other=0).to(tl.int32) << 1)
    if p_rows2 is not None:
        b_bits = b_bits | (tl.load(p_rows2 + b_at, mask=b_valid, other=0).to(tl.int32) << 2)
    if p_rows3 is not None:
        b_bits = b_bits | (tl.load(p_rows3 + b_at, mask=b_valid, other=0).to(tl.int32) << 3)
    return b_bits


@triton.jit
def head_bits(p_heads, b_item, b_head, b_valid, heads_b):
    """Bit n: the edit in slot n acts on this row's batch row and head; from bit 8 on the number of its map. [M]"""
    if p_heads is not None:
        b_bits = tl.load(p_heads + b_item * heads_b + b_head, mask=b_valid, other=0)
    else:
        b_bits = b_head * 0 + 15
    return b_bits
