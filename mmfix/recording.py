"""Which keys the newest token attends to, after every edit: recorded while a model generates.

The group masses of ``mitigate(..., telemetry=True)`` say *how much* attention the image gets; this says *where* in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmfix.engine import Mitigation
from mmfix.errors import MmfixError, UsageError
from mmfix.hooks import LayerState
from mmfix_kernels import AttentionCall
from mmfix_kernels.reference import attend as reference_attend


class AttentionRecord:
    """What :func:`record_attention` gives.

    Attributes:
        steps: one Float32[B, T_k] per forward pass: attention of the newest row to all keys so far, mean over layers
            and heads. Element k belongs to the position that chose the k-th generated token. Head factors are part of
            it, so that a row may sum to another number than 1.
        image: Bool[B, T], the image tokens of the prompt; None before the first pass.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.image: Tensor | None = None
        self._layers = 0

    def add(self, first: bool, weights: Tensor) -> None:
        """One layer's row, Float32[B, T]; ``first`` opens a new pass."""
        if first:
            self.steps.append(weights)
            self._layers = 1
            return
        self._layers += 1
        self.steps[-1] = self.steps[-1] + (weights - self.steps[-1]) / self._layers


@contextmanager
def record_attention(fix: Mitigation) -> Iterator[AttentionRecord]:
    """Record attention rows inside a ``mitigate()`` block, without changing anything that is computed.

    The edited map is read off the definition itself: attention with the identity in place of the values is the map
    (edits, moves and head factors included). That costs one more attention of the slow reference per layer and pass.
    Rows of contrast branches are left out. One generation per block; decode greedily or by sampling, for the rows of a
    beam search are beams that change places.

    Args:
        fix: what ``mmfix.mitigate(...)`` gave.

    Raises:
        UsageError: a second prompt, or a second recording at the same time.

    Example:
        >>> with mmfix.mitigate(model, "vhr") as fix, record_attention(fix) as record:
        ...     model.generate(**inputs)
        >>> record.steps[0][0, record.image[0]]  # over the image tokens, when the first token was chosen
    """
    session = fix._session
    if "attend" in vars(session):
        raise UsageError("attention of this block is being recorded already")
    original, record = session.attend, AttentionRecord()

    def attend(state: LayerState, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        result = original(state, inputs)
        if not session.aside:
            _record(session, record, state, inputs)
        return result

    session.attend = attend  # type: ignore[method-assign]
    try:
        yield record
    finally:
        del session.attend


def _record(session: Any, record: AttentionRecord, state: LayerState, inputs: dict[str, Any]) -> None:
    key = inputs["key"]
    size = key.shape[2]
    if session.forward.prefill and state.layer == 0 and record.steps:
        raise UsageError("a second prompt in one recording; open a new mitigate() block for it")
    identity = torch.eye(size, dtype=torch.float32, device=key.device).expand(*key.shape[:2], size, size)
    call = AttentionCall(
        **{**inputs, "query": inputs["query"].float(), "key": key.float(), "value": identity},
        groups=session._groups(state, size),
        edits=state.edits,
    )
    weights = reference_attend(call).output[:, :, -1].mean(1)  # [B, S]
    rows = session.expander.rows.count if session.expander is not None and session.expanding else 1
    weights = weights[::rows]
    total = session.forward.total
    if size < total:  # a sliding window keeps the tail
        weights = torch.nn.functional.pad(weights, (total - size, 0))
    spans = session.spans
    if spans is None:
        raise MmfixError("attention is recorded from the prompt on; open the block before the model is called")
    if record.image is None:
        record.image = spans.image[::rows]
    record.add(state.layer == 0, weights[:, :total])
