"""Replaced attention maps without the map, for the kinds of :class:`mmfix_kernels.edits.MapReplacement`.

`mmfix_kernels.maps` is the definition. With the allowed keys of row i (n of them, value sum C_i), its weights w,
output o and largest weight Mx = max_j w_j:

=======================  ===============================  =========================
map                      on allowed keys                  closed form
=======================  ===============================  =========================
uniform                  1/n                              C / n
uniform, not normalised  1/K, K = keys but padding        C / K
reversed                 (Mx - w) / (n*Mx - 1)            (Mx*C - o) / (n*Mx - 1)
reversed, not norm.      Mx - w                           Mx*C - o
shuffled                 w with its keys permuted         o of permuted values
=======================  ===============================  =========================

A row whose weights are all equal has no normalised reversed map (0/0) and keeps its output; a row that sees nothing
keeps its zeros. A random map has no closed form: a kernel draws it tile by tile, `replaced_rows` a chunk at a time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mmfix_kernels.call import AttentionCall, additive_mask
from mmfix_kernels.edits import HeadScale, Label, MapReplacement, head_mask
from mmfix_kernels.maps import DEGENERATE, permutation, replace_rows

CHUNK = 1 << 24  # mask entries or scores held at once
_READ: dict[int, tuple[weakref.ref[Tensor], tuple[bool, ...]]] = {}


def chosen_items(batch: Tensor | None, count: int) -> tuple[bool, ...]:
    """Which of `count` batch rows an edit selects, known to the host; a tensor is read once in its life."""
    if batch is None:
        return (True,) * count
    known = _READ.get(id(batch))
    if known is None or known[0]() is not batch:
        at = id(batch)
        known = (weakref.ref(batch, lambda _: _READ.pop(at, None)), tuple(batch.tolist()))
        _READ[at] = known
    return known[1]


def why_not(call: AttentionCall) -> str:
    """Why `attend` leaves the call to the whole map; "" when it serves it."""
    if call.query.shape[2] == 1 or call.masses != "none" or call.softcap is not None or call.prefix_key is not None:
        return "one row, group masses, a soft cap or a shared prefix"
    if any(not isinstance(edit, (MapReplacement, HeadScale)) for edit in call.edits):
        return "edits on scores or masses in the same call"
    taken = [0] * call.query.shape[0]
    for edit in replacements(call):
        if edit.kind == "shuffled" and (call.mask is not None or call.is_causal):
            return "a shuffled map under a mask: weights move to hidden keys"
        for n, chosen in enumerate(chosen_items(edit.batch, len(taken))):
            taken[n] += chosen
    return "two replacements of one map" if max(taken) > 1 else ""


def replacements(call: AttentionCall) -> list[MapReplacement]:
    return [edit for _, edit in call.weight_edits if isinstance(edit, MapReplacement)]


def attend(call: AttentionCall, plain: Callable[[AttentionCall], Tensor], fired: Tensor) -> Tensor:
    """A prefill call with replaced maps: batch rows that no edit selects stay with `plain`, uniform maps are sums.

    Args:
        call: one for which `why_not` is silent.
        plain: fused attention [B, H, L, D] of a call without edits.
        fired: Int64[len(edits), 2], counters that are added to.

    Returns:
        [B, H, L, D] before head scales.
    """
    b, h, length, _ = call.query.shape
    output = torch.empty(b, h, length, call.value.shape[3], dtype=call.query.dtype, device=call.query.device)
    left = [True] * b
    for number, edit in call.weight_edits:
        assert isinstance(edit, MapReplacement)
        items = [n for n, chosen in enumerate(chosen_items(edit.batch, b)) if chosen]
        if not items:
            continue
        some = pick(call, items)
        new, changed = replaced_rows(some, edit)
        chosen = touched(some, edit)
        if chosen is not None:
            new = torch.where(chosen[..., None], new, plain(some).float())
            changed = changed & chosen
        output[items] = new.to(output.dtype)
        fired[number, 0] += changed.expand(len(items), h, length).sum()
        for n in items:
            left[n] = False
    items = [n for n in range(b) if left[n]]
    if items:
        output[items] = plain(pick(call, items))
    return output


def touched(call: AttentionCall, edit: MapReplacement) -> Tensor | None:
    """Bool broadcastable to [B, H, L] of the heads and rows that the edit selects; None means all."""
    assert call.groups is not None
    rows = call.groups.rows[edit.rows]
    chosen = None if rows is None else rows[:, None]
    if edit.heads is not None:
        heads = head_mask(edit.heads, call.query.shape[1], call.query.device)[None, :, None]
        chosen = heads if chosen is None else chosen & heads
    return chosen


def pick(call: AttentionCall, items: list[int]) -> AttentionCall:
    """The plain call of some batch rows, with their labels."""
    if len(items) == call.query.shape[0]:
        return replace(call, edits=())
    mask = call.mask if call.mask is None or call.mask.dim() < 4 or call.mask.shape[0] == 1 else call.mask[items]
    groups = call.groups
    if groups is not None:
        rows = {kind: None if chosen is None else chosen[items] for kind, chosen in groups.rows.items()}
        before = None if groups.before is None else groups.before[items]
        groups = replace(groups, labels=groups.labels[items], rows=rows, columns=None, before=before)
    tensors = {name: getattr(call, name)[items] for name in ("query", "key", "value")}
    return replace(call, mask=mask, groups=groups, edits=(), **tensors)


def replaced_rows(call: AttentionCall, edit: MapReplacement) -> tuple[Tensor, Tensor]:
    """Every row with its map replaced: Float32[B, H, L, D], and Bool[B, H or 1, L] of the rows that changed."""
    assert call.groups is not None
    if edit.kind == "uniform":
        sums, count = value_sums(call)
        total = count
        if not edit.normalise:
            real = (call.groups.labels != int(Label.PADDING)).sum(-1).float()[:, None, None, None]
            total = real + torch.zeros_like(count)
        changed = (count > 0) & ((count > 1) | (total != count))
        return sums / total.clamp(min=1.0), changed[..., 0]
    if edit.kind == "reversed":
        sums, count = value_sums(call)
        output, peak = output_and_peak(call)
        rest = count * peak - 1.0
        turned = peak * sums - output
        if edit.normalise:
            turned = torch.where(rest > DEGENERATE, turned / rest.clamp(min=DEGENERATE), output)
            return turned, (rest > DEGENERATE)[..., 0]
        return torch.where(count > 0, turned, 0.0), (count > 0).expand_as(rest)[..., 0]
    if edit.kind == "shuffled":
        order = permutation(edit.seed, call.query.shape[1], call.groups.labels)
        value = repeated(call).gather(2, order.argsort(-1)[..., None].expand(-1, -1, -1, call.value.shape[3]))
        output, peak = output_and_peak(replace(call, value=value, key=repeated(call, call.key)))
        moved = (order != torch.arange(order.shape[-1], device=order.device)).any(-1)
        return output, moved[..., None].expand(peak.shape[:3])
    return _in_chunks(call, edit)


def repeated(call: AttentionCall, of: Tensor | None = None) -> Tensor:
    """Values (or keys) [B, H, S, D] in float32, one per query head."""
    tensor = call.value if of is None else of
    return tensor.float().repeat_interleave(call.query.shape[1] // tensor.shape[1], dim=1)


def _spans(call: AttentionCall) -> list[tuple[int, int]]:
    """Row ranges of which a chunk of scores is held at once."""
    b, h, length, _ = call.query.shape
    step = max(1, CHUNK // (b * h * call.key.shape[2]))
    return [(start, min(length, start + step)) for start in range(0, length, step)]


def plain_weights(call: AttentionCall, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Plain attention weights [B, H, rows, S] of rows start:stop in float32, and Bool of the allowed keys."""
    scores = call.query[:, :, start:stop].float() @ repeated(call, call.key).transpose(-1, -2) * call.factor
    mask = additive_mask(call, start, stop)
    if mask is None:
        return scores.softmax(-1), torch.ones((), dtype=torch.bool, device=scores.device).expand_as(scores)
    scores = scores + mask
    weights = scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)
    return weights, (mask > -math.inf).expand_as(scores)


def output_and_peak(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Plain output [B, H, L, D] and largest weight [B, H, L, 1] of every row, a chunk of rows at a time."""
    value, outputs, peaks = repeated(call), [], []
    for start, stop in _spans(call):
        weights, _ = plain_weights(call, start, stop)
        outputs.append(weights @ value)
        peaks.append(weights.amax(-1, keepdim=True))
    return torch.cat(outputs, 2), torch.cat(peaks, 2)


def _in_chunks(call: AttentionCall, edit: MapReplacement) -> tuple[Tensor, Tensor]:
    """The definition, a chunk of rows at a time."""
    assert call.groups is not None
    whole = replace(edit, batch=None, heads=None)  # rows are chosen by `touched`
    value, outputs, changes = repeated(call), [], []
    for start, stop in _spans(call):
        weights, allowed = plain_weights(call, start, stop)
        rows = call.row_places(start, stop)
        new = replace_rows(whole, weights, allowed, call.groups.labels, rows, before=call.groups.before)
        outputs.append(new @ value)
        changes.append((new != weights).any(-1))
    return torch.cat(outputs, 2), torch.cat(changes, 2)


def value_sums(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Sum of the allowed values [B, H, L, D] and their number [B or 1, H or 1, L, 1], in float32."""
    repeats = call.query.shape[1] // call.key.shape[1]
    length, value = call.query.shape[2], call.value.float()
    if call.mask is None:
        if call.is_causal and length > 1:
            count = torch.arange(1, length + 1, device=value.device).float()[None, None, :, None]
            return value.cumsum(2).repeat_interleave(repeats, dim=1), count
        count = torch.full((1, 1, length, 1), float(value.shape[2]), device=value.device)
        return value.sum(2, keepdim=True).expand(-1, -1, length, -1).repeat_interleave(repeats, dim=1), count
    sums, counts = [], []
    for start, stop in _spans(call):
        mask = additive_mask(call, start, stop)
        assert mask is not None
        allowed = (mask > -math.inf).expand(*mask.shape[:2], stop - start, value.shape[2]).float()
        each = value if allowed.shape[1] == 1 else value.repeat_interleave(repeats, dim=1)
        part = allowed @ each  # one mask for all heads: sum once per key head
        sums.append(part.repeat_interleave(repeats, dim=1) if allowed.shape[1] == 1 else part)
        counts.append(allowed.sum(-1, keepdim=True))
    return torch.cat(sums, 2), torch.cat(counts, 2)
