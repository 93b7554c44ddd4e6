"""How much attention each key of a prompt receives, head by head: what methods that look for attention sinks ask.

It needs the whole prompt at once, since a key's share comes from every row that sees it, and it is asked once: what a
method makes of it stays for the generation, like everything that depends on the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfix_kernels import AttentionCall, Rows, column_mass
from mmfix_kernels.call import additive_mask

if TYPE_CHECKING:
    from mmfix.layers import LayerState


def received(call: AttentionCall, rows: Tensor) -> Tensor:
    """Float32[B, H, S]: mean attention that each key receives from the rows that may see it; 0 where none may.

    ``m_k = sum_q A_qk / #{q : q sees k}`` over the chosen rows, A the plain attention of the layer.

    Args:
        call: with groups; its edits are left out.
        rows: Bool[B, L], rows of the prompt without padding.
    """
    assert call.groups is not None
    first = int(rows.any(0).int().argmax())
    groups = replace(
        call.groups, rows={**call.groups.rows, Rows.ALL: rows}, first={**call.groups.first, Rows.ALL: first}
    )
    plain = replace(call, groups=groups, edits=(), masses="none")
    mask = additive_mask(plain)
    if mask is None:
        seen = rows.sum(-1)[:, None, None].expand(-1, 1, call.keys).float()
    else:
        seen = ((mask > float("-inf")) & rows[:, None, :, None]).sum(2).float()  # [B, 1 or H, S]
    return column_mass(plain, Rows.ALL, backend="reference" if call.softcap is not None else None).mass / seen.clamp(
        min=1.0
    )


def ask(state: LayerState, call: AttentionCall) -> None:
    """At the prompt, before its attention: give each method that wants it what the keys receive, and keep its edits."""
    session = state.session
    spans, current = session.spans, session.current
    assert spans is not None
    places = torch.arange(current.past, current.total, device=spans.valid.device)
    inside = places < spans.length  # candidates of assisted decoding follow the prompt in the same pass
    rows = spans.valid[:, places.clamp(max=spans.length - 1)] & inside
    mass = received(call, rows)[..., : spans.length]
    for owner, one in enumerate(session.methods):
        if one.wants_received(state.layer, session.family.num_layers):
            for edit in one.received(state.site(spans), mass):
                state.edits.append(edit)
                state.owners.append(owner)
                state.frozen.append((edit, owner))
    state.reserve()
