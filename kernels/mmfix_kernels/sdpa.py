"""Exact grouped attention on any device: fused SDPA where no edit acts, dense rows in chunks where one does.

Methods edit few rows: the text after the image at prefill, one row at decode. Those rows are computed densely, at
most ``CHUNK`` scores at a time, so memory stays linear in the sequence; every other row goes through
``scaled_dot_product_attention``. Mass moves become one factor per key class, ``w·(1 + c_source·1_source +
c_target·1_target)``, with both coefficients read off the group masses of the row.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix_kernels import closed_forms
from mmfix_kernels.call import Attended, AttentionCall, additive_mask, apply_head_scales
from mmfix_kernels.edits import (
    NUM_LABELS,
    Group,
    HeadScale,
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
from mmfix_kernels.maps import count_replaced, replace_rows
from mmfix_kernels.split import split

CHUNK = 1 << 24  # scores held at once: 64 MiB in float32
FEW = 8  # query rows up to which the shared prefix is read in place, and batch items are not told apart


def why_not(call: AttentionCall) -> str:
    """Why SDPA cannot serve the call; "" when it can."""
    return "SDPA has no soft cap on scores" if call.softcap is not None else ""


def attend(call: AttentionCall) -> Attended:
    """Serve one call."""
    fired = torch.zeros(len(call.edits), 2, dtype=torch.int64, device=call.query.device)
    q_len = call.query.shape[2]
    if call.prefix_key is not None and q_len > FEW:  # many rows are worth a copy of the prefix for the while
        call = replace(
            call,
            key=call.whole(call.prefix_key, call.key),
            value=call.whole(call.prefix_value, call.value),
            prefix_key=None,
            prefix_value=None,
        )
    first = 0 if call.prefix_key is not None else _first_edited_row(call)
    masses: Tensor | None = None
    items = _edited_items(call) if first < q_len else None
    if first >= q_len:
        output = _fused(call, q_len)
    elif any(isinstance(e, MapReplacement) for e in call.edits) and not closed_forms.why_not(call):
        output = closed_forms.attend(call, lambda plain: _fused(plain, q_len), fired)
    elif items is not None:
        output = _fused(call, q_len)
        some = _items(call, items)
        edited, _ = _dense(some, first, fired)
        for n, edit in call.weight_edits:
            if isinstance(edit, MapReplacement):  # looked at in every batch item, changed in some
                fired[n, 1] += (call.query.shape[0] - len(items)) * call.query.shape[1] * (q_len - first)
        output = output.index_copy(0, items, torch.cat([output.index_select(0, items)[:, :, :first], edited], dim=2))
    else:
        output, masses = _dense(call, first, fired)
        if first:
            output = torch.cat([_fused(call, first), output], dim=2)
    for n, edit in call.weight_edits:
        if isinstance(edit, MapReplacement):  # it looks at every row, also at those that were left to SDPA
            fired[n, 1] = math.prod(call.query.shape[:3])
    return Attended(apply_head_scales(call, output, fired), masses, fired, "sdpa")


def _edited_items(call: AttentionCall) -> Tensor | None:
    """Int64[n]: the batch items that edits touch, when they are fewer than all and the rows are worth the selection."""
    chosen = [e.batch for e in call.edits if not isinstance(e, HeadScale)]
    if call.query.shape[2] <= FEW or call.masses != "none" or not chosen or any(one is None for one in chosen):
        return None
    touched = torch.stack([one for one in chosen if one is not None]).any(0)
    return None if bool(touched.all()) else touched.nonzero()[:, 0].to(call.query.device)


def _items(call: AttentionCall, items: Tensor) -> AttentionCall:
    """The call of some batch items."""
    assert call.groups is not None
    size = call.query.shape[0]

    def pick(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.shape[0] != size else tensor.index_select(0, items.to(tensor.device))

    groups = replace(
        call.groups,
        labels=call.groups.labels.index_select(0, items),
        rows={kind: pick(mask) for kind, mask in call.groups.rows.items()},
        columns=None,
        before=pick(call.groups.before),
    )
    edits = [e if isinstance(e, HeadScale) else replace(e, batch=pick(e.batch)) for e in call.edits]
    return replace(
        call,
        query=call.query.index_select(0, items),
        key=call.key.index_select(0, items),
        value=call.value.index_select(0, items),
        mask=pick(call.mask),
        groups=groups,
        edits=edits,
    )


def _first_edited_row(call: AttentionCall) -> int:
    """Rows before this one are plain attention."""
    q_len = call.query.shape[2]
    first = {"none": q_len, "last": q_len - 1, "all": 0}[call.masses]
    if call.groups is not None:
        for edit in call.edits:
            if not isinstance(edit, HeadScale):
                first = min(first, call.groups.first[edit.rows])
    return first


def _fused(call: AttentionCall, rows: int) -> Tensor:
    """Plain attention of the first `rows` rows."""
    q_len = call.query.shape[2]
    query, key, value, mask = call.query, call.key, call.value, call.mask
    causal = mask is None and call.is_causal and q_len > 1
    if rows < q_len:
        query = query[:, :, :rows]
        if causal:
            key, value = key[:, :, :rows], value[:, :, :rows]
        elif mask is not None and mask.shape[-2] != 1:
            mask = mask[..., :rows, :]
    repeats = query.shape[1] // key.shape[1]
    packed = repeats > 1 and mask is not None and query.shape[2] == 1 and mask.shape[1] == 1
    if packed:  # one query row: the heads of a group become the rows
        query = query.reshape(key.shape[0], key.shape[1], repeats, query.shape[-1])
    elif repeats > 1 and mask is not None:
        # A mask together with grouped heads leaves the fused kernels; repeating the heads keeps them.
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=call.factor, enable_gqa=grouped
    )
    return output.reshape(call.query.shape[0], call.query.shape[1], rows, -1) if packed else output


def _dense(call: AttentionCall, first: int, fired: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows first.. with every edit applied, a chunk of rows at a time."""
    b, h, q_len, _ = call.query.shape
    step = max(1, CHUNK // (b * h * call.keys))
    groups = call.groups
    if groups is None:  # nothing is edited: the labels are not read
        groups = KeyGroups.plain(torch.zeros(b, call.keys, dtype=torch.int8, device=call.query.device))
    member = _Members(groups)
    parts = [_Chunk(call, groups, member, n, min(q_len, n + step)).attend(fired) for n in range(first, q_len, step)]
    outputs = [output for output, _ in parts]
    masses = [mass for _, mass in parts if mass is not None]
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], torch.cat(masses, 2) if masses else None


def _group_matmul(rows: Tensor, shared: Tensor) -> Tensor:
    """``rows @ shared`` with the query heads of one key head folded into the row axis (no repeated heads)."""
    b, h, q_len, k = rows.shape
    h_kv = shared.shape[1]
    if h == h_kv:
        return torch.matmul(rows, shared)
    folded = rows.reshape(b, h_kv, h // h_kv * q_len, k)
    return torch.matmul(folded, shared).reshape(b, h, q_len, shared.shape[-1])


def _fold(tensor: Tensor, prefix: Tensor, repeats: int) -> Tensor:
    """[B*R, H, L, K] → [B, H_kv, R*G*L, K]: branches and head groups folded into the rows of a shared prefix."""
    batch, h_kv = prefix.shape[:2]
    _, _, q_len, width = tensor.shape
    folded = tensor.reshape(batch, -1, h_kv, repeats * q_len, width)
    return folded.transpose(1, 2).reshape(batch, h_kv, -1, width)


def _unfold(tensor: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`_fold`, to [B*R, H, L, K]."""
    rows, heads, q_len = shape
    batch, h_kv, _, width = tensor.shape
    wide = tensor.reshape(batch, h_kv, rows // batch, -1, width).transpose(1, 2)
    return wide.reshape(rows, heads, q_len, width)


def _scores(call: AttentionCall, query: Tensor) -> Tensor:
    """``query @ key^T`` over all keys, the shared prefix read once for its branches."""
    scores = _group_matmul(query, call.key.transpose(-1, -2))
    if call.prefix_key is None:
        return scores
    folded = _fold(query, call.prefix_key, query.shape[1] // call.key.shape[1])
    before = torch.matmul(folded, call.prefix_key.transpose(-1, -2))
    return torch.cat([_unfold(before, (query.shape[0], query.shape[1], query.shape[2])), scores], dim=-1)


def _values(call: AttentionCall, weights: Tensor) -> Tensor:
    """``weights @ value`` over all keys."""
    weights = weights.to(call.value.dtype)
    if call.prefix_value is None:
        return _group_matmul(weights, call.value)
    shared = call.prefix_value.shape[2]
    folded = _fold(weights[..., :shared], call.prefix_value, weights.shape[1] // call.value.shape[1])
    before = _unfold(torch.matmul(folded, call.prefix_value), (weights.shape[0], weights.shape[1], weights.shape[2]))
    return before + _group_matmul(weights[..., shared:], call.value)


def _by_item(rows: Tensor, shared: Tensor) -> Tensor:
    """``rows @ shared`` for [B, H, L, K] and [B, K, N]: one product per batch item, not one per head."""
    b, h, q_len, width = rows.shape
    return torch.bmm(rows.reshape(b, h * q_len, width), shared).view(b, h, q_len, -1)


class _Members:
    """Float memberships [B, S, n] of key groups, made once per call and shared by its mass moves."""

    def __init__(self, groups: KeyGroups) -> None:
        self.groups = groups
        self.columns: dict[tuple[Group, ...], Tensor] = {}

    def __call__(self, *wanted: Group) -> Tensor:
        if wanted not in self.columns:
            known = self.groups.columns
            self.columns[wanted] = membership(self.groups.labels, wanted) if known is None else known(wanted)
        return self.columns[wanted]


class _Chunk:
    """Rows start:stop of one call, computed densely."""

    def __init__(self, call: AttentionCall, groups: KeyGroups, member: _Members, start: int, stop: int) -> None:
        self.call, self.groups, self.member = call, groups, member
        self.start, self.stop = start, stop
        self.shape = (*call.query.shape[:2], stop - start)  # [B, H, rows]
        self.mask = additive_mask(call, start, stop)

    def attend(self, fired: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, rows, D] and the group masses that were asked for."""
        call = self.call
        query = call.query[:, :, self.start : self.stop]
        scores = _scores(call, query).float() * call.factor
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
            else:
                weights = self.replace_map(edit, weights, fired[n])
        output = _values(call, weights)
        for n, select in call.head_selects:
            output = output * self.select_heads(select, scores, weights, fired[n]).to(output.dtype)
        return output, self.masses(weights)

    def masses(self, weights: Tensor) -> Tensor | None:
        last = self.call.masses == "last" and self.stop == self.call.query.shape[2]
        if self.call.masses != "all" and not last:
            return None
        one_hot = F.one_hot(self.groups.labels.long(), NUM_LABELS).to(weights.dtype)
        return _by_item(weights[:, :, -1:] if last else weights, one_hot)

    def touched(self, edit: ScoreEdit | SplitSoftmax | MassMove | HeadSelect) -> Tensor | None:
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

    def edit_scores(self, edit: ScoreEdit, scores: Tensor, fired: Tensor) -> Tensor:
        touched = self.touched(edit)
        places = self.groups.member(edit.group)[:, None, None, :]
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
        mass = _by_item(weights, columns)  # [B, H, rows, 2 or 4]
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
        factor = _by_item(torch.stack([down, up], dim=-1), columns[..., :2].transpose(-1, -2))
        return weights * (1.0 + factor)

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
