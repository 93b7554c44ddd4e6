"""Small tensors that kernels read: numbers of the edits, and which heads, batch rows and maps they act on.

Each is made once and kept on the device: a decode step must not copy from the host.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mmfix_kernels.call import HEAD_EDITS, AttentionCall
from mmfix_kernels.closed_forms import chosen_items
from mmfix_kernels.edits import Rows
from mmfix_kernels.triton.plan import MAP_KIND, MAP_SLOT, ROW_BIT, MapSlot, Plan

# First bit of the slot, or the number of the map shifted by eight; heads; batch rows. None means all.
Selected = tuple[int, tuple[int, ...] | None, tuple[bool, ...] | None]


@lru_cache(maxsize=256)
def number_tensor(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers on the device, kept: a decode step must not copy from the host."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float32, device=device)


def selected(call: AttentionCall, plan: Plan) -> tuple[Selected, ...]:
    """For each slot and each map, the heads and batch rows that it acts on."""
    edits = dict(enumerate(call.edits))
    number = dict(plan.counters)
    count = call.query.shape[0]

    def items(slot: int) -> tuple[bool, ...] | None:
        edit = edits[number[slot]] if slot in number else None
        batch = None if edit is None or isinstance(edit, HEAD_EDITS) else edit.batch
        return None if batch is None else chosen_items(batch, count)

    slots = [(1 << slot, heads, items(slot)) for slot, heads in plan.heads]
    maps = [(n + 1 << 8, one.heads, items(MAP_SLOT + n)) for n, one in enumerate(plan.maps)]
    return tuple(slots + maps)


@lru_cache(maxsize=256)
def head_tensor(chosen: tuple[Selected, ...], items: int, heads: int, device: torch.device) -> Tensor | None:
    """Int32[items or 1, heads] of `selected`; None when every edit acts on all heads and none replaces a map."""
    if all(which is None and rows is None and bits < 256 for bits, which, rows in chosen):
        return None
    count = items if any(rows is not None for _, _, rows in chosen) else 1
    table = [[0] * heads for _ in range(count)]
    for bits, which, rows in chosen:
        for item in range(count):
            if rows is None or rows[item]:
                for head in range(heads) if which is None else which:
                    if head >= heads:
                        raise ValueError(f"heads={which}: this layer has query heads 0..{heads - 1}")
                    table[item][head] |= bits
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def map_tensor(maps: tuple[MapSlot, ...], row_masks: frozenset[Rows], device: torch.device) -> Tensor:
    """Int32[maps, 4]: kind, normalised, the generator's first word, bit of the row mask."""
    table = []
    for one in maps:
        word = (one.seed * 0x9E3779B1 + 0x85EBCA6B) & 0xFFFFFFFF
        bit = ROW_BIT[one.rows] if one.rows in row_masks else 0
        table.append([MAP_KIND[one.kind], int(one.normalise), word - (1 << 32) * (word >= 1 << 31), bit])
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def counters(edits: int, maps: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """Int64[edits, 2] to start counting from: a replaced map looks at every row."""
    with torch.inference_mode(False):
        return torch.tensor([[0, rows * (n in maps)] for n in range(edits)], dtype=torch.int64).view(-1, 2).to(device)
