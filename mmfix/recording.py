"""The attention weights of the newest token, key by key, as the layers really used them.

Group masses come for free with ``telemetry=True``; where *in the picture* a token looked needs the row of weights
itself. The recorder repeats the newest row of every language-model attention call, edits included, with the reference
backend and the identity as values, so that the output *is* the row. It is exact and costs one row per layer.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from mmfix.families import describe
from mmfix_kernels import AttentionCall, HeadMean, HeadScale, HeadSelect, KeyGroups
from mmfix_kernels import reference as definition
from mmfix_kernels.attention import observed


class AttentionRecorder:
    """Rows of the latest forward pass; made by :func:`record_attention`."""

    def __init__(self, num_layers: int) -> None:
        self._rows: list[Tensor | None] = [None] * num_layers
        self._layer: int | None = None
        self._thread = threading.get_ident()

    def weights(self) -> Tensor | None:
        """Float32[layers, batch, heads, keys]: the newest token's attention over all keys, after every edit.

        None before the first forward pass, or when a layer's attention was not seen. Head scales change a head's
        output, not where it looks, and are left out. Batch rows of contrast branches are included as they ran.
        """
        if any(row is None for row in self._rows):
            return None
        width = max(row.shape[-1] for row in self._rows if row is not None)
        # A sliding-window layer keeps the tail of the keys; what it dropped has no weight.
        return torch.stack([torch.nn.functional.pad(r, (width - r.shape[-1], 0)) for r in self._rows if r is not None])

    def _enter(self, layer: int) -> None:
        self._layer = layer

    def _clear(self) -> None:
        self._rows = [None] * len(self._rows)

    def _leave(self) -> None:
        self._layer = None

    def _see(self, call: AttentionCall) -> None:
        # A text-only prefill and a vision tower run without key groups; another thread has a model of its own.
        if self._layer is None or call.groups is None or threading.get_ident() != self._thread:
            return
        self._rows[self._layer] = last_row(call)


def last_row(call: AttentionCall) -> Tensor:
    """Float32[batch, heads, keys]: attention weights of the last query row of a call, after its edits."""
    q_len, s_len = call.query.shape[2], call.keys
    mask = call.mask if call.mask is None or call.mask.shape[-2] == 1 else call.mask[..., -1:, :]
    identity = torch.eye(s_len, device=call.key.device)
    row = dataclasses.replace(
        call,
        query=call.query[:, :, -1:].float(),
        key=call.whole(call.prefix_key, call.key).float(),
        value=identity.expand(*call.key.shape[:2], s_len, s_len),
        prefix_key=None,
        prefix_value=None,
        mask=mask,
        groups=None if call.groups is None else _last_groups(call.groups, q_len, s_len),
        edits=[edit for edit in call.edits if not isinstance(edit, (HeadScale, HeadSelect, HeadMean))],
        masses="none",
    )
    return definition.attend(row).output[:, :, 0].detach()


def _last_groups(groups: KeyGroups, q_len: int, s_len: int) -> KeyGroups:
    offset = s_len - q_len if groups.offset is None else groups.offset
    return KeyGroups(
        labels=groups.labels,
        rows={kind: None if mask is None else mask[:, -1:] for kind, mask in groups.rows.items()},
        first={kind: int(first >= q_len) for kind, first in groups.first.items()},
        offset=offset + q_len - 1,
        before=groups.before,
    )


@contextmanager
def record_attention(model: Any) -> Iterator[AttentionRecorder]:
    """Record the newest token's attention weights of every layer, inside ``mitigate(model, …, telemetry=True)``.

    Args:
        model: the model that is being mitigated (``mitigate(model, None, telemetry=True)`` for the plain model).

    Yields:
        An :class:`AttentionRecorder`, to be asked after a forward pass by the thread that entered.
    """
    family = describe(model)
    recorder = AttentionRecorder(family.num_layers)
    with ExitStack() as stack:
        handle = family.model.register_forward_pre_hook(lambda module, args: recorder._clear())
        stack.callback(handle.remove)
        for layer, module in enumerate(family.attentions):
            for hook in (
                module.register_forward_pre_hook(_entering(recorder, layer)),
                module.register_forward_hook(lambda module, args, output: recorder._leave(), always_call=True),
            ):
                stack.callback(hook.remove)
        stack.enter_context(observed(recorder._see))
        yield recorder


def _entering(recorder: AttentionRecorder, layer: int) -> Any:
    return lambda module, args: recorder._enter(layer)
