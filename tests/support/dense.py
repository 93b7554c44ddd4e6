"""Grouped attention from its equations, in float64, one (batch, head, row) at a time. Shares no code with mmfix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


@dataclass
class Dense:
    """output [B, H, L, D], masses [B, H, L, 8] and fired (changed, considered) per edit."""

    output: Tensor
    masses: Tensor
    fired: list[list[int]] = field(default_factory=list)


def visible(mask: Tensor | None, causal: bool, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Bool and additive float64, both [B, H, L, S]."""
    q_len, s_len = shape[2:]
    bias = torch.zeros(shape, dtype=torch.float64)
    if mask is None:
        seen = torch.ones(shape, dtype=torch.bool)
        if causal and q_len > 1:
            seen &= torch.arange(s_len) <= torch.arange(q_len)[:, None]
        return seen, bias
    if mask.dtype == torch.bool:
        return mask.expand(shape), bias
    seen = (mask > torch.finfo(mask.dtype).min).expand(shape)
    return seen, torch.where(seen, mask.double().expand(shape), 0.0)


def dense(call: Any) -> Dense:
    """The value of an :class:`mmfix_kernels.AttentionCall`, straight from the definitions of its edits."""
    b, h, q_len, d = call.query.shape
    h_kv, s_len = call.key.shape[1:3]
    factor = d**-0.5 if call.scale is None else call.scale
    seen, bias = (t.numpy() for t in visible(call.mask, call.is_causal, (b, h, q_len, s_len)))
    q, k, v = (t.double().numpy() for t in (call.query, call.key, call.value))
    labels = call.groups.labels.numpy() if call.groups is not None else np.zeros((b, s_len), np.int8)
    output, masses = np.zeros((b, h, q_len, v.shape[-1])), np.zeros((b, h, q_len, 8))
    fired = [[0, 0] for _ in call.edits]
    for n in range(b):
        for head in range(h):
            keys, values = k[n, head * h_kv // h], v[n, head * h_kv // h]
            for row in range(q_len):
                scores = keys @ q[n, head, row] * factor
                if call.softcap is not None:
                    scores = call.softcap * np.tanh(scores / call.softcap)
                place = _Place(call, n, head, row, labels[n], seen[n, head, row], fired)
                weights = _softmax(_edited(place, scores + bias[n, head, row]), place.open)
                weights = _moved(place, weights)
                masses[n, head, row] = [weights[labels[n] == label].sum() for label in range(8)]
                output[n, head, row] = weights @ values * _scaled(place)
    return Dense(torch.from_numpy(output), torch.from_numpy(masses), fired)


class _Place(NamedTuple):
    """One row of one head, and where to count."""

    call: Any
    batch: int
    head: int
    row: int
    labels: Array
    open: Array
    fired: list[list[int]]

    def touches(self, edit: Any) -> bool:
        rows = self.call.groups.rows[edit.rows]
        return (rows is None or bool(rows[self.batch, self.row])) and (edit.heads is None or self.head in edit.heads)

    def inside(self, group: Any) -> Array:
        return np.array([bool(int(group) & (1 << int(label))) for label in self.labels])


def _edited(place: _Place, scores: Array) -> Array:
    for i, edit in enumerate(place.call.edits):
        if type(edit).__name__ != "ScoreEdit" or not place.touches(edit):
            continue
        changed = place.inside(edit.group) & place.open
        place.fired[i][1] += 1
        place.fired[i][0] += bool(changed.any())
        scores = np.where(changed, edit.gain * scores + edit.abs_gain * np.abs(scores) + edit.bias, scores)
    return scores


def _softmax(scores: Array, seen: Array) -> Array:
    seen = seen & (scores > -np.inf)
    weights = np.zeros_like(scores)
    if seen.any():
        weights[seen] = np.exp(scores[seen] - scores[seen].max())
        weights /= weights.sum()
    return weights


def _moved(place: _Place, weights: Array) -> Array:
    for i, edit in enumerate(place.call.edits):
        if type(edit).__name__ != "MassMove" or not place.touches(edit):
            continue
        place.fired[i][1] += 1
        source, target = place.inside(edit.source), place.inside(edit.target)
        given, taken = weights[source].sum(), weights[target].sum()
        if not (given > 0 and taken > 0):
            continue
        if edit.gate is not None:
            group, part = place.inside(edit.gate.group), place.inside(edit.gate.part)
            total = weights[group].sum()
            if not (part & place.open).any() or total <= 0 or total < edit.gate.min_mass:
                continue
            if weights[part].sum() / (total + edit.gate.slack * group.sum()) > edit.gate.max_share:
                continue
        place.fired[i][0] += edit.share > 0
        weights = weights.copy()
        weights[source] *= 1 - edit.share
        weights[target] *= 1 + edit.share * given / taken
    return weights


def _scaled(place: _Place) -> float:
    factor = 1.0
    for i, edit in enumerate(place.call.edits):
        if type(edit).__name__ == "HeadScale":
            one = float(edit.scale[place.head] if edit.scale.ndim == 1 else edit.scale[place.batch, place.head])
            place.fired[i][1] += 1
            place.fired[i][0] += one != 1
            factor *= one
    return factor
