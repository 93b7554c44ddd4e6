# mypy: ignore-errors
"""What a mask tensor does to each tile, so that the prefill kernel reads it on edge tiles only.

Causal, sliding-window, segment and padding masks arrive as one tensor. One byte per (row tile, block of keys) says
whether the mask hides the whole tile (0: skipped), is mixed (1: read), or has no effect there (2: not read).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["mask_b", "mask_h", "mask_l", "start", "stop", "S"])
def summary_kernel(
    p_mask, p_blocks, mask_b, mask_h, mask_l, mask_s, HEADS, start, stop, S, lowest,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, blocks of keys, batch × heads of the mask)."""
    batch = (tl.program_id(2) // HEADS).to(tl.int64)
    head = (tl.program_id(2) % HEADS).to(tl.int64)
    b_row = start + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_in = (b_row < stop)[:, None] & (b_col < S)[None, :]
    b_at = (b_row.to(tl.int64) * mask_l)[:, None] + (b_col.to(tl.int64) * mask_s)[None, :]
    b_mask = tl.load(p_mask + batch * mask_b + head * mask_h + b_at, mask=b_in, other=0)
    if MASK == 1:
        b_shown = b_mask != 0
        b_free = b_shown
    else:
        b_shown = b_mask.to(tl.float32) > lowest
        b_free = b_mask.to(tl.float32) == 0.0
    some = tl.max(tl.max((b_shown & b_in).to(tl.int32), axis=1), axis=0)
    rest = tl.max(tl.max(((b_free == 0) & b_in).to(tl.int32), axis=1), axis=0)
    p_to = p_blocks + (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * tl.num_programs(1)
    tl.store(p_to + tl.program_id(1), (some * (2 - rest)).to(tl.int8))


def summary(
    mask: Tensor, kind: int, lowest: float, strides: tuple[int, int, int, int], span: tuple[int, int, int],
    tile: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Int8[batch, heads, row tiles, blocks of keys] of the mask (batch and heads as it has them, 1 if broadcast).

    Args:
        mask: as the kernel takes it; kind, lowest and strides as `launch.prepared_mask` and `broadcast_strides` say.
        span: first row, row after the last, number of keys.
        tile: rows and keys of a tile.
    """
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    start, stop, keys = span
    tiles, blocks = -(-(stop - start) // tile[0]), -(-keys // tile[1])
    out = torch.empty(sizes[0], sizes[1], tiles, blocks, dtype=torch.int8, device=mask.device)
    if mask.device.type != "meta":
        summary_kernel[(tiles, blocks, sizes[0] * sizes[1])](
            mask, out, *strides, sizes[1], start, stop, keys, lowest,
            MASK=kind, BLOCK_M=tile[0], BLOCK_N=tile[1], num_warps=4,
        )  # fmt: skip
    return out
