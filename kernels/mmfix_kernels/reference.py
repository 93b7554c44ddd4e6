"""The definition: grouped attention with the whole map in float32. Written to be read, not to be fast."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfix_kernels.call import Attended, AttentionCall, additive_mask, apply_head_scales
from mmfix_kernels.edits import (
    NUM_LABELS,
    Group,
    HeadSelect,
    KeyGroups,
    MassGate,
    MassMove,
    ScoreEdit,
    SplitSoftmax,
    head_mask,
)
from mmfix_kernels.keyed import KeyGain, KeyMove
from mmfix_kernels.maps import count_replaced, replace_rows
from mmfix_kernels.split import softmax, split


def why_not(call: AttentionCall) -> str:
    """The reference serves every call."""
    return ""


def attend(call: AttentionCall) -> Attended:
    """Scores, score edits, softmax, mass moves, ``A·V``, head scales: each step as its equation, in float32."""
    fired = torch.zeros(len(call.edits), 2, dtype=torch.int64, device=call.query.device)
    repeats = call.query.shape[1] // call.key.shape[1]
    key = call.whole(call.prefix_key, call.key).float().repeat_interleave(repeats, dim=1)
    value = call.whole(call.prefix_value, call.value).float().repeat_interleave(repeats, dim=1)

    scores = call.query.float() @ key.transpose(-1, -2) * call.factor
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    mask = additive_mask(call)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        allowed = (mask > float("-inf")).expand_as(scores)
        scores = scores + mask.clamp(min=torch.finfo(torch.float32).min)  # finite, so that 0*s stays a number
    for n, edit in call.score_edits:
        assert call.groups is not None
        scores = _edit_scores(call.groups, edit, scores, allowed, fired[n])
    scores = scores.masked_fill(~allowed, float("-inf"))

    weights = softmax(scores)
    for n, part in call.splits:
        assert call.groups is not None
        touched = _touched(call.groups, part, scores)
        weights, changed = split(part, scores, weights, call.groups.member(part.group), touched)
        fired[n, 0], fired[n, 1] = changed.sum(), touched.sum()
    for n, weight_edit in call.weight_edits:
        assert call.groups is not None
        if isinstance(weight_edit, MassMove):
            weights = _move_mass(call.groups, weight_edit, weights, allowed, fired[n])
        elif isinstance(weight_edit, KeyMove):
            touched = _touched(call.groups, weight_edit, weights)
            weights, active = weight_edit.moved(weights, touched)
            fired[n, 0], fired[n, 1] = active.sum() if weight_edit.share else 0, touched.sum()
        else:
            before = weights
            weights = replace_rows(
                weight_edit,
                weights,
                allowed,
                call.groups.labels,
                call.row_places(),
                call.groups.rows[weight_edit.rows],
                call.groups.before,
            )
            fired[n] += count_replaced(before, weights)

    masses = None
    if call.groups is not None and call.masses != "none":
        one_hot = torch.nn.functional.one_hot(call.groups.labels.long(), NUM_LABELS).float()
        rows = weights if call.masses == "all" else weights[:, :, -1:]
        masses = rows @ one_hot[:, None]
    output = weights @ value
    for n, select in call.head_selects:
        assert call.groups is not None
        output = output * _selected(call.groups, select, scores, weights, allowed, fired[n])
    output = apply_head_scales(call, output.to(call.query.dtype), fired)
    return Attended(output, masses, fired, "reference")


def _touched(
    groups: KeyGroups, edit: ScoreEdit | KeyGain | SplitSoftmax | MassMove | KeyMove | HeadSelect, like: Tensor
) -> Tensor:
    """Bool[B, H, L, 1]: the batch items, rows and heads that an edit may touch."""
    b, h, q_len, _ = like.shape
    touched = torch.ones(b, h, q_len, 1, dtype=torch.bool, device=like.device)
    row_mask = groups.rows[edit.rows]
    if row_mask is not None:
        touched &= row_mask[:, None, :, None]
    if not isinstance(edit, HeadSelect) and edit.heads is not None:
        touched &= head_mask(edit.heads, h, like.device)[None, :, None, None]
    if edit.batch is not None:
        touched &= edit.batch.to(like.device)[:, None, None, None]
    return touched


def _edit_scores(
    groups: KeyGroups, edit: ScoreEdit | KeyGain, scores: Tensor, allowed: Tensor, fired: Tensor
) -> Tensor:
    touched = _touched(groups, edit, scores)
    keys = edit.keys(groups) & allowed
    fired[0] = (touched & keys.any(-1, keepdim=True)).sum()
    fired[1] = touched.sum()
    return torch.where(touched & keys & ~scores.isneginf(), edit(scores), scores)  # what is hidden stays hidden


def _selected(
    groups: KeyGroups, edit: HeadSelect, scores: Tensor, weights: Tensor, allowed: Tensor, fired: Tensor
) -> Tensor:
    """Float32[B, H, L, 1]: factors of the heads."""
    touched = _touched(groups, edit, weights)
    seen = groups.member(edit.group)[:, None, None, :] & allowed
    factors = torch.where(touched, edit.factors(scores, weights, seen), 1.0)
    fired[0], fired[1] = (factors != 1).sum(), touched.sum()
    return factors


def _mass(groups: KeyGroups, group: Group, weights: Tensor) -> Tensor:
    """[B, H, L, 1]: attention mass on a group of keys."""
    member = groups.member(group)
    return (weights * member[:, None, None, :]).sum(-1, keepdim=True)


def _gate(groups: KeyGroups, gate: MassGate, weights: Tensor, allowed: Tensor) -> Tensor:
    group_mass, part_mass = _mass(groups, gate.group, weights), _mass(groups, gate.part, weights)
    count = groups.member(gate.group).sum(-1).float()[:, None, None, None]
    has_part = (groups.member(gate.part)[:, None, None, :] & allowed).any(-1, keepdim=True)
    small = part_mass <= gate.max_share * (group_mass + gate.slack * count)
    return (group_mass >= gate.min_mass) & small & has_part & (group_mass > 0)


def _move_mass(groups: KeyGroups, move: MassMove, weights: Tensor, allowed: Tensor, fired: Tensor) -> Tensor:
    touched = _touched(groups, move, weights)
    fired[1] = touched.sum()
    source_mass, target_mass = _mass(groups, move.source, weights), _mass(groups, move.target, weights)
    active = touched & (target_mass > 0) & (source_mass > 0)
    if move.gate is not None:
        active &= _gate(groups, move.gate, weights, allowed)
    fired[0] = active.sum() if move.share > 0 else 0
    source, target = groups.member(move.source)[:, None, None, :], groups.member(move.target)[:, None, None, :]
    gain = move.share * source_mass / target_mass.clamp(min=torch.finfo(torch.float32).tiny)  # finite in any case
    factor = torch.ones_like(weights)
    factor = torch.where(source, 1.0 - move.share, factor)
    factor = torch.where(target, 1.0 + gain, factor)
    return torch.where(active, weights * factor, weights)
