"""Labels of their own for every head, Int8[B, H, S]: heads become batch items, whose keys may differ in their labels.

So every backend serves such a call, with the edits and kernels that it has for labels [B, S]. Key heads are repeated
for grouped queries and a shared prefix for its branches, which costs memory that labels shared by the heads do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mmfix_kernels.call import HEAD_EDITS, Attended, AttentionCall, apply_head_scales
from mmfix_kernels.edits import Edit, HeadSelect, KeyGroups, MapReplacement, ScoreEdit, head_mask
from mmfix_kernels.keyed import KeyGain, KeyMove


def needed(call: AttentionCall) -> bool:
    """Whether every head has labels of its own."""
    return call.groups is not None and call.groups.labels.ndim == 3


def attend(call: AttentionCall, serve: Callable[[AttentionCall], Attended]) -> Attended:
    """Serve the call through `serve`, which gets one head per batch item.

    Raises:
        ValueError: an edit that weighs heads against each other, or numbers that depend on the head.
    """
    b, h, length, _ = call.query.shape
    found = serve(fold(call))
    fired = torch.zeros(len(call.edits), 2, dtype=torch.int64, device=call.query.device)
    fired[[n for n, edit in enumerate(call.edits) if not isinstance(edit, HEAD_EDITS)]] = found.fired
    output = apply_head_scales(call, found.output.view(b, h, length, -1), fired)
    masses = None if found.masses is None else found.masses.view(b, h, -1, found.masses.shape[-1])
    return Attended(output, masses, fired, found.backend, found.reason)


def fold(call: AttentionCall) -> AttentionCall:
    """The call with heads as batch items: item ``b*H + h`` is head h of item b. Edits of finished outputs are left out.

    Raises:
        ValueError: as for :func:`attend`.
    """
    b, h, length, width = call.query.shape
    assert call.groups is not None

    def heads(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(h // tensor.shape[1], dim=1).flatten(0, 1)[:, None]

    mask = call.mask
    if mask is not None:
        mask = mask.expand(b, h, mask.shape[-2], call.keys).flatten(0, 1)[:, None]
    return replace(
        call,
        query=call.query.reshape(b * h, 1, length, width),
        key=heads(call.whole(call.prefix_key, call.key)),
        value=heads(call.whole(call.prefix_value, call.value)),
        prefix_key=None,
        prefix_value=None,
        mask=mask,
        groups=_groups(call.groups, h),
        edits=[_edit(edit, b, h) for edit in call.edits if not isinstance(edit, HEAD_EDITS)],
    )


def _groups(groups: KeyGroups, heads: int) -> KeyGroups:
    return replace(
        groups,
        labels=groups.labels.flatten(0, 1),
        rows={kind: None if rows is None else rows.repeat_interleave(heads, 0) for kind, rows in groups.rows.items()},
        columns=None,
        before=None if groups.before is None else groups.before.repeat_interleave(heads),
    )


def _edit(edit: Edit, batch: int, heads: int) -> Edit:
    """The edit on folded items: its heads are items now."""
    if isinstance(edit, KeyGain):
        return replace(edit, gain=edit.gain.repeat_interleave(heads, 0))
    if isinstance(edit, KeyMove):
        return replace(edit, chosen=edit.chosen.flatten(0, 1)[:, None])
    if isinstance(edit, HeadSelect) or (isinstance(edit, ScoreEdit) and edit.mean_abs_gain):
        raise ValueError(f"{type(edit).__name__} weighs heads against each other, which labels per head do not allow")
    if isinstance(edit, MapReplacement) and edit.kind in ("random", "shuffled"):
        raise ValueError(f"a {edit.kind} map depends on the number of the head, which labels per head do not allow")
    assert not isinstance(edit, HEAD_EDITS)
    if edit.heads is None and edit.batch is None:
        return edit
    items = torch.ones(batch, dtype=torch.bool) if edit.batch is None else edit.batch
    chosen = items.new_ones(heads) if edit.heads is None else head_mask(edit.heads, heads, items.device)
    return replace(edit, heads=None, batch=(items[:, None] & chosen).flatten())
