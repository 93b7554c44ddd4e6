"""Exact grouped attention on any device: fused SDPA where no edit acts, dense rows in chunks where one does.

Methods edit few rows: the text after the image at prefill, one row at decode. Those rows are computed by
:mod:`mmfix_kernels.dense`; every other row goes through ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix_kernels import closed_forms
from mmfix_kernels.call import HEAD_EDITS, Attended, AttentionCall, apply_head_scales
from mmfix_kernels.dense import dense_rows
from mmfix_kernels.edits import MapReplacement
from mmfix_kernels.keyed import KeyGain, KeyMove

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
        edited, _ = dense_rows(some, first, fired)
        for n, edit in call.weight_edits:
            if isinstance(edit, MapReplacement):  # looked at in every batch item, changed in some
                fired[n, 1] += (call.query.shape[0] - len(items)) * call.query.shape[1] * (q_len - first)
        output = output.index_copy(0, items, torch.cat([output.index_select(0, items)[:, :, :first], edited], dim=2))
    else:
        output, masses = dense_rows(call, first, fired)
        if first:
            output = torch.cat([_fused(call, first), output], dim=2)
    for n, edit in call.weight_edits:
        if isinstance(edit, MapReplacement):  # it looks at every row, also at those that were left to SDPA
            fired[n, 1] = math.prod(call.query.shape[:3])
    return Attended(apply_head_scales(call, output, fired), masses, fired, "sdpa")


def _edited_items(call: AttentionCall) -> Tensor | None:
    """Int64[n]: the batch items that edits touch, when they are fewer than all and the rows are worth the selection."""
    chosen = [e.batch for e in call.edits if not isinstance(e, HEAD_EDITS)]
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
    whole = (*HEAD_EDITS, KeyGain, KeyMove)  # they name no batch rows
    edits = [e if isinstance(e, whole) else replace(e, batch=pick(e.batch)) for e in call.edits]
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
            if not isinstance(edit, HEAD_EDITS):
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
