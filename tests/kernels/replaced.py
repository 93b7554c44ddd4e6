"""Replaced maps from their equations, in float64 and with Python's integers. Shares no code with the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PADDING = 7


def noise(seed: int, *counters: int) -> float:
    """The counter generator: one 32-bit word is mixed with each counter in turn."""
    word = (seed * 0x9E3779B1 + 0x85EBCA6B) % 2**32
    for counter in counters:
        word ^= (counter + 1) * 0x9E3779B1 % 2**32
        word ^= word >> 16
        word = word * 0x7FEB352D % 2**32
        word ^= word >> 15
        word = word * 0x846CA68B % 2**32
        word ^= word >> 16
    return float(np.float32((word >> 8) + 0.5) * np.float32(2.0**-24))


def places(labels: list[int]) -> list[int]:
    """Number of each key among those that are not padding."""
    out, count = [], 0
    for label in labels:
        count += label != PADDING
        out.append(max(0, count - 1))
    return out


def one_row(edit: Any, w: Tensor, seen: Tensor, labels: list[int], head: int, row: int) -> Tensor:
    """The new weights [S] of one row; `row` is the place of the row."""
    at, real = places(labels), torch.tensor([label != PADDING for label in labels])
    if edit.kind == "uniform":
        return seen.double() / (seen.sum() if edit.normalise else real.sum())
    if edit.kind == "random":
        r = torch.tensor([noise(edit.seed, head, row, place) for place in at], dtype=torch.float64)
        return r * seen / (r * (seen if edit.normalise else real)).sum()
    if edit.kind == "reversed":
        new = (w.max() - w) * seen
        if not edit.normalise:
            return new
        return w if new.sum() < 1e-6 else new / new.sum()
    keys = [j for j in range(len(labels)) if real[j]]
    order = sorted(keys, key=lambda j: noise(edit.seed, head, 0, at[j]))
    new = w.clone()
    for place, source in zip(keys, order, strict=True):
        new[place] = w[source]
    return new


def replaced(call: Any, edit: Any, weights: Tensor, allowed: Tensor) -> tuple[Tensor, list[int]]:
    """Float64[B, H, L, S] after the edit, and how many rows changed and were looked at."""
    b, h, length, keys = weights.shape
    out, changed = weights.clone(), 0
    offset = keys - length if call.groups.offset is None else call.groups.offset
    decoding = length == 1 and call.groups.offset is None and call.mask is not None
    rows = call.groups.rows[edit.rows]
    for n in range(b):
        labels = call.groups.labels[n].tolist()
        at = places(labels)
        for head in range(h):
            if (edit.batch is not None and not edit.batch[n]) or (edit.heads is not None and head not in edit.heads):
                continue
            for row in range(length):
                seen = allowed[n, head, row]
                if not seen.any() or (rows is not None and not rows[n, row]):
                    continue
                place = at[offset + row]
                if decoding:  # behind a static cache: the newest key is the last one that is seen
                    place = (
                        sum(label != PADDING for label, open_ in zip(labels, seen.tolist(), strict=True) if open_) - 1
                    )
                out[n, head, row] = one_row(edit, weights[n, head, row], seen, labels, head, place)
                changed += bool(((out[n, head, row] - weights[n, head, row]).abs() > 1e-9).any())
    return out, [changed, b * h * length]
