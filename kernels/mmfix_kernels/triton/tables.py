"""Small tensors that kernels read: numbers of the edits, and which heads, batch rows and maps they act on.

Each is made once and kept on the device: a decode step must not copy from the host, and in a compiled graph each is a
constant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmfix_kernels.call import HEAD_EDITS, AttentionCall
from mmfix_kernels.closed_forms import chosen_items
from mmfix_kernels.edits import Rows
from mmfix_kernels.triton.plan import MAP_KIND, MAP_SLOT, ROW_BIT, MapSlot, Plan

# First bit of the slot, or the number of the map shifted by eight; heads; batch rows. None means all.
Selected = tuple[int, tuple[int, ...] | None, tuple[bool, ...] | None]


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """A function of plain numbers whose result a compiled graph keeps, instead of tracing how it was made."""
    marked: Function = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return marked


@lru_cache(maxsize=256)
@constant_in_graphs
def number_tensor(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers on the device, kept: a decode step must not copy from the host."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float32, device=device)


def selected(call: AttentionCall, plan: Plan) -> list[tuple[int, tuple[int, ...] | None, Tensor | None]]:
    """For each slot and each map: its bits in the table, the heads and the batch rows, Bool[B], that it acts on."""
    edits = dict(enumerate(call.edits))
    number = dict(plan.counters)

    def items(slot: int) -> Tensor | None:
        edit = edits[number[slot]] if slot in number else None
        return None if edit is None or isinstance(edit, HEAD_EDITS) else edit.batch

    slots = [(1 << slot, heads, items(slot)) for slot, heads in plan.heads]
    maps = [(n + 1 << 8, one.heads, items(MAP_SLOT + n)) for n, one in enumerate(plan.maps)]
    return slots + maps


def heads_of(call: AttentionCall, plan: Plan) -> Tensor | None:
    """Int32[B or 1, H]: which edits act on which batch row and head; None when every edit acts on all heads."""
    count, heads = call.query.shape[:2]
    device, chosen = call.query.device, selected(call, plan)
    if torch.compiler.is_compiling() and any(batch is not None for _, _, batch in chosen):
        table = torch.zeros(count, heads, dtype=torch.int32, device=device)
        for bits, which, batch in chosen:  # inside a graph no tensor is read
            row = head_row(bits, which, heads, device)
            table = table + (row if batch is None else torch.where(batch.to(device)[:, None], row, 0))
        return table
    known = tuple((bits, which, None if batch is None else chosen_items(batch, count)) for bits, which, batch in chosen)
    return head_tensor(known, count, heads, device)


@lru_cache(maxsize=256)
@constant_in_graphs
def head_row(bits: int, which: tuple[int, ...] | None, heads: int, device: torch.device) -> Tensor:
    """Int32[1, heads]: `bits` on some heads."""
    row = [bits if which is None or head in which else 0 for head in range(heads)]
    with torch.inference_mode(False):
        return torch.tensor([row], dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
@constant_in_graphs
def head_tensor(chosen: tuple[Selected, ...], items: int, heads: int, device: torch.device) -> Tensor | None:
    """The table of `heads_of`, [items or 1, heads]; None when every edit acts on all heads and none replaces a map."""
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
@constant_in_graphs
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
@constant_in_graphs
def counters(edits: int, maps: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """Int64[edits, 2] to start counting from: a replaced map looks at every row."""
    with torch.inference_mode(False):
        return torch.tensor([[0, rows * (n in maps)] for n in range(edits)], dtype=torch.int64).view(-1, 2).to(device)
