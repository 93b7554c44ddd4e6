"""Rows of grouped attention with every edit applied, a chunk of rows at a time: what `sdpa` does where edits act.

At most ``CHUNK`` scores are held at once, so memory stays linear in the sequence. Mass moves become one factor per key
class, ``w·(1 + c_source·1_source + c_target·1_target)``, with both coefficients read off the group masses of the row.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix_kernels.call import AttentionCall, additive_mask
from mmfix_kernels.edits import (
    NUM_LABELS,
    Group,
    HeadSelect,
    KeyGroups,
    MapReplacement,
    MassGate,
    MassMove,
    ScoreEdit,
    SplitSoftmax,
    head_mask,
    membership,
)
from mmfix_kernels.keyed import KeyGain, KeyMove
from mmfix_kernels.maps import count_replaced, replace_rows
from mmfix_kernels.products import by_item, scores_of, values_of
from mmfix_kernels.split import split

CHUNK = 1 << 24  # scores held at once: 64 MiB in float32


def dense_rows(call: AttentionCall, first: int, fired: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows first.. with every edit applied, a chunk of rows at a time."""
    b, h, q_len, _ = call.query.shape
    step = max(1, CHUNK // (b * h * call.keys))
    groups = call.groups
    if groups is None:  # nothing is edited: the labels are not read
        groups = KeyGroups.plain(torch.zeros(b, call.keys, dtype=torch.int8, device=call.query.device))
    member = Members(groups)
    parts = [Chunk(call, groups, member, n, min(q_len, n + step)).attend(fired) for n in range(first, q_len, step)]
    outputs = [output for output, _ in parts]
    masses = [mass for _, mass in parts if mass is not None]
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], torch.cat(masses, 2) if masses else None


class Members:
    """Float memberships [B, S, n] of key groups, made once per call and shared by its mass moves."""

    def __init__(self, groups: KeyGroups) -> None:
        self.groups = groups
        self.columns: dict[tuple[Group, ...], Tensor] = {}

    def __call__(self, *wanted: Group) -> Tensor:
        if wanted not in self.columns:
            known = self.groups.columns
            self.columns[wanted] = membership(self.groups.labels, wanted) if known is None else known(wanted)
        return self.columns[wanted]


class Chunk:
    """Rows start:stop of one call, computed densely."""

    def __init__(self, call: AttentionCall, groups: KeyGroups, member: Members, start: int, stop: int) -> None:
        self.call, self.groups, self.member = call, groups, member
        self.start, self.stop = start, stop
        self.shape = (*call.query.shape[:2], stop - start)  # [B, H, rows]
        self.mask = additive_mask(call, start, stop)

    def attend(self, fired: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, rows, D] and the group masses that were asked for."""
        call = self.call
        query = call.query[:, :, self.start : self.stop]
        scores = scores_of(call, query).float() * call.factor
        hidden = None
        if self.mask is not None and call.score_edits:  # edits see a finite bias, and never an infinity
            hidden = self.mask.isneginf()
            scores = scores + self.mask.masked_fill(hidden, 0.0)
        elif self.mask is not None:
            scores = scores + self.mask
        for n, score_edit in call.score_edits:
            scores = self.edit_scores(score_edit, scores, fired[n])
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if self.mask is not None or call.score_edits:  # a row with no allowed key (padding) attends to nothing
            weights = weights.masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)
        for n, part in call.splits:
            weights = self.split(part, scores, weights, fired[n])
        for n, edit in call.weight_edits:
            if isinstance(edit, MassMove):
                weights = self.move_mass(edit, weights, fired[n])
            elif isinstance(edit, KeyMove):
                weights = self.move_keys(edit, weights, fired[n])
            else:
                weights = self.replace_map(edit, weights, fired[n])
        output = values_of(call, weights)
        for n, select in call.head_selects:
            output = output * self.select_heads(select, scores, weights, fired[n]).to(output.dtype)
        return output, self.masses(weights)

    def masses(self, weights: Tensor) -> Tensor | None:
        last = self.call.masses == "last" and self.stop == self.call.query.shape[2]
        if self.call.masses != "all" and not last:
            return None
        one_hot = F.one_hot(self.groups.labels.long(), NUM_LABELS).to(weights.dtype)
        return by_item(weights[:, :, -1:] if last else weights, one_hot)

    def touched(self, edit: ScoreEdit | KeyGain | SplitSoftmax | MassMove | KeyMove | HeadSelect) -> Tensor | None:
        """Bool broadcastable to [B, H, rows] of the rows and heads that an edit may touch; None means all of them."""
        row_mask = self.groups.rows[edit.rows]
        touched = None if row_mask is None else row_mask[:, None, self.start : self.stop]
        if not isinstance(edit, HeadSelect) and edit.heads is not None:
            chosen = head_mask(edit.heads, self.shape[1], self.call.query.device)[None, :, None]
            touched = chosen if touched is None else touched & chosen
        if edit.batch is not None:
            items = edit.batch.to(self.call.query.device)[:, None, None]
            touched = items if touched is None else touched & items
        return touched

    def count(self, touched: Tensor | None) -> Tensor | int:
        return math.prod(self.shape) if touched is None else touched.expand(self.shape).sum()

    def edit_scores(self, edit: ScoreEdit | KeyGain, scores: Tensor, fired: Tensor) -> Tensor:
        touched = self.touched(edit)
        places = edit.keys(self.groups)
        if touched is not None:
            places = places & touched[..., None]
        visible = places if self.mask is None else places & ~self.mask.isneginf()
        fired[0] += visible.any(-1).expand(self.shape).sum()
        fired[1] += self.count(touched)
        return torch.where(places & ~scores.isneginf(), edit(scores), scores)  # what is hidden stays hidden

    def split(self, edit: SplitSoftmax, scores: Tensor, weights: Tensor, fired: Tensor) -> Tensor:
        touched = self.touched(edit)
        places = None if touched is None else touched[..., None]
        weights, changed = split(edit, scores, weights, self.groups.member(edit.group), places)
        fired[0] += changed.expand(*self.shape, 1).sum()
        fired[1] += self.count(touched)
        return weights

    def select_heads(self, edit: HeadSelect, scores: Tensor, weights: Tensor, fired: Tensor) -> Tensor:
        """[B, H, rows, 1]: factors of the heads."""
        touched = self.touched(edit)
        seen = self.groups.member(edit.group)[:, None, None, :]
        if self.mask is not None:
            seen = seen & ~self.mask.isneginf()
        factors = edit.factors(scores, weights, seen)
        if touched is not None:
            factors = torch.where(touched[..., None], factors, 1.0)
        fired[0] += (factors != 1).sum()
        fired[1] += self.count(touched)
        return factors

    def move_mass(self, move: MassMove, weights: Tensor, fired: Tensor) -> Tensor:
        gate, touched = move.gate, self.touched(move)
        wanted = (move.source, move.target) if gate is None else (move.source, move.target, gate.group, gate.part)
        columns = self.member(*wanted)  # [B, S, 2 or 4]
        mass = by_item(weights, columns)  # [B, H, rows, 2 or 4]
        active = (mass[..., 0] > 0) & (mass[..., 1] > 0)
        if gate is not None:
            active &= self.gate_open(gate, columns, mass[..., 2], mass[..., 3])
        if touched is not None:
            active &= touched
        if move.share > 0:
            fired[0] += active.sum()
        fired[1] += self.count(touched)
        gain = move.share * mass[..., 0] / mass[..., 1].clamp(min=torch.finfo(torch.float32).tiny)
        down, up = active * -move.share, torch.where(active, gain, 0.0)
        factor = by_item(torch.stack([down, up], dim=-1), columns[..., :2].transpose(-1, -2))
        return weights * (1.0 + factor)

    def move_keys(self, move: KeyMove, weights: Tensor, fired: Tensor) -> Tensor:
        touched = self.touched(move)
        weights, active = move.moved(weights, None if touched is None else touched[..., None])
        if move.share:
            fired[0] += active.sum()
        fired[1] += self.count(touched)
        return weights

    def replace_map(self, edit: MapReplacement, weights: Tensor, fired: Tensor) -> Tensor:
        shape = weights.shape
        allowed = (
            torch.ones((), dtype=torch.bool, device=weights.device) if self.mask is None else ~self.mask.isneginf()
        )
        row_mask = self.groups.rows[edit.rows]
        new = replace_rows(
            edit,
            weights,
            allowed.expand(shape),
            self.groups.labels,
            self.call.row_places(self.start, self.stop),
            None if row_mask is None else row_mask[:, self.start : self.stop],
            self.groups.before,
        )
        fired += count_replaced(weights, new)
        return new

    def gate_open(self, gate: MassGate, columns: Tensor, group_mass: Tensor, part_mass: Tensor) -> Tensor:
        limit = group_mass
        if gate.slack:
            limit = group_mass + gate.slack * columns[..., 2].sum(-1)[:, None, None]
        part = columns[..., 3] > 0  # [B, S]
        if self.mask is None:
            sees_part = part.any(-1)[:, None, None]
        else:
            sees_part = (part[:, None, None, :] & ~self.mask.isneginf()).any(-1)
        return (group_mass >= gate.min_mass) & (part_mass <= gate.max_share * limit) & (group_mass > 0) & sees_part
