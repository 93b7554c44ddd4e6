"""Where the newest token looks, step by step, under whatever method is in force."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmfix.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    import mmfix


class AttentionRecord:
    """What :func:`record_steps` gives.

    Attributes:
        steps: one Float32[B, T_k] per forward pass: attention of the newest row to all keys so far, after every edit,
            mean over layers and heads. Element k belongs to the position that chose the k-th generated token.
        image: Bool[B, T], the image tokens of the prompt; None before the first pass.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.image: Tensor | None = None


@contextmanager
def record_steps(model: Any, fix: mmfix.Mitigation) -> Iterator[AttentionRecord]:
    """Record attention rows inside ``mitigate(model, …, telemetry=True)``, without changing what is computed.

    One prompt per recording; decode greedily or by sampling, for the rows of a beam search change places.

    Raises:
        UsageError: a second prompt.
    """
    from mmfix.recording import record_attention

    record = AttentionRecord()

    with record_attention(model) as recorder:

        def passed(*_: Any) -> None:
            weights = recorder.weights()
            if weights is None:
                return
            row = weights.mean((0, 2))[:: fix.rows_per_prompt]
            if record.steps and row.shape[1] <= record.steps[-1].shape[1]:
                raise UsageError("a second prompt in one recording; open a new one for it")
            record.steps.append(row)
            if record.image is None:
                record.image = fix.image_tokens

        handle = _driver(model).register_forward_hook(passed)
        try:
            yield record
        finally:
            handle.remove()


def _driver(model: Any) -> Any:
    """The module whose forward pass runs once per token."""
    from mmfix.families import describe

    return describe(model).model
