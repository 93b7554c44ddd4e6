"""Grouped attention as its equations, in float64, one edit after the other: what the kernels are measured against."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from replaced import replaced
from support.eager import eager
from support.eager import visible_keys as visible

from mmfix_kernels import AttentionCall, Group, HeadScale, MapReplacement, MassMove, ScoreEdit

CPU = torch.device("cpu")


@dataclass
class Exact:
    """output [B, H, L, D] and masses [B, H, L, 8] in float64; fired as the backends count it; lse [B, H, L]."""

    output: Tensor
    masses: Tensor
    fired: list[list[int]]
    lse: Tensor
    weights: Tensor


def whole(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Keys and values with the shared prefix repeated in front."""
    if call.prefix_key is None or call.prefix_value is None:
        return call.key, call.value
    times = call.key.shape[0] // call.prefix_key.shape[0]
    before = (t.repeat_interleave(times, 0) for t in (call.prefix_key, call.prefix_value))
    key, value = (torch.cat([a, b], 2) for a, b in zip(before, (call.key, call.value), strict=True))
    return key, value


def of(call: AttentionCall, group: Group) -> Tensor:
    """Bool[B, 1, 1, S]: keys of the group."""
    assert call.groups is not None
    labels = call.groups.labels.long()
    return (torch.tensor(int(group)) >> labels & 1).bool()[:, None, None]


def may_touch(call: AttentionCall, edit: ScoreEdit | MassMove) -> Tensor:
    """Bool[B, H, L, 1]"""
    assert call.groups is not None
    rows, heads = edit.rows, edit.heads
    b, h, length, _ = call.query.shape
    touched = torch.ones(b, h, length, 1, dtype=torch.bool)
    mask = call.groups.rows[rows]
    if mask is not None:
        touched &= mask[:, None, :, None]
    if heads is not None:
        touched &= torch.tensor([n in heads for n in range(h)])[None, :, None, None]
    if edit.batch is not None:
        touched &= edit.batch[:, None, None, None]
    return touched


def exact(call: AttentionCall) -> Exact:
    """The definition."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key, value = (t.double().repeat_interleave(repeats, 1) for t in whole(call))
    allowed, bias = visible(call)
    scores = call.query.double() @ key.transpose(2, 3) * call.factor + bias
    fired = [[0, 0] for _ in call.edits]
    for n, edit in enumerate(call.edits):
        if isinstance(edit, ScoreEdit):
            touched, member = may_touch(call, edit), of(call, edit.group)
            changed = edit.gain * scores + edit.abs_gain * scores.abs() + edit.bias
            scores = torch.where(touched & member, changed, scores)
            seen = (member & allowed).any(-1, keepdim=True)
            fired[n] = [int((touched & seen).sum()), int(touched.sum())]
    scores = scores.masked_fill(~allowed, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    for n, edit in enumerate(call.edits):
        if isinstance(edit, MassMove):
            weights, fired[n] = moved(call, edit, weights, allowed)
        elif isinstance(edit, MapReplacement):
            weights, fired[n] = replaced(call, edit, weights, allowed)
    output = weights @ value
    for n, edit in enumerate(call.edits):
        if isinstance(edit, HeadScale):
            scale = edit.scale.double().expand(call.query.shape[:2])
            output = output * scale[..., None, None]
            length = call.query.shape[2]
            fired[n] = [int((scale != 1).sum()) * length, scale.numel() * length]
    masses = weights
    if call.groups is not None:
        masses = torch.stack([(weights * of(call, Group(1 << n))).sum(-1) for n in range(8)], -1)
    return Exact(output, masses, fired, lse, weights)


def moved(call: AttentionCall, move: MassMove, weights: Tensor, allowed: Tensor) -> tuple[Tensor, list[int]]:
    source, target = of(call, move.source), of(call, move.target)
    source_mass, target_mass = ((weights * g).sum(-1, keepdim=True) for g in (source, target))
    touched = may_touch(call, move)
    active = touched & (source_mass > 0) & (target_mass > 0)
    if (gate := move.gate) is not None:
        group, part = of(call, gate.group), of(call, gate.part)
        group_mass, part_mass = ((weights * g).sum(-1, keepdim=True) for g in (group, part))
        count = group.sum(-1, keepdim=True)
        active &= (group_mass >= gate.min_mass) & (part & allowed).any(-1, keepdim=True)
        active &= part_mass / (group_mass + gate.slack * count) <= gate.max_share
    factor = torch.where(source, 1 - move.share, 1.0)
    factor = torch.where(target, 1 + move.share * source_mass / target_mass.clamp(min=1e-300), factor)
    count = int(active.sum()) if move.share > 0 else 0
    return torch.where(active, weights * factor, weights), [count, int(touched.sum())]


def allowance(call: AttentionCall, largest: float, device: torch.device = CPU, draws: int = 5) -> float:
    """Twice the error of eager attention in the same dtype, relative to the largest value.

    The error of a few rows is chance, so it is the largest over the call's own tensors and some fresh ones of the same
    shape, here and on the device that the kernels run on; and never less than the rounding of the largest value, to
    which a GPU adds that of its division and of its exponential.
    """
    worst = torch.finfo(call.query.dtype).eps * (1 if device.type == "cpu" else 2)
    for draw in range(draws):
        tensors = dict(zip(("query", "key", "value"), (call.query, *whole(call)), strict=True))
        if draw:
            random = torch.Generator().manual_seed(draw)
            tensors = {k: torch.randn(t.shape, generator=random).to(t.dtype) for k, t in tensors.items()}
        plain = AttentionCall(**tensors, mask=call.mask, is_causal=call.is_causal, scale=call.factor)
        wide = replace(plain, **{name: tensor.double() for name, tensor in tensors.items()})
        want = exact(wide).output
        size = float(want.abs().max())
        if not draw:
            largest = max(largest, size)
        for on in {CPU, device}:
            mask = None if call.mask is None else call.mask.to(on)
            there = replace(plain, mask=mask, **{name: tensor.to(on) for name, tensor in tensors.items()})
            error = float((eager(there).cpu().double() - want).abs().max())
            worst = max(worst, error / max(size, 1e-30))
    return 2 * worst * largest
