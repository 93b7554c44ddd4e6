"""Facts of one forward pass: what kind it is, and which of its rows each kind of edit touches."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmfix.spans import TokenSpans
from mmfix_kernels import Rows

# A first prompt; a further piece of it, or a further turn, on the same cache; generated tokens; the last pass without a
# cache again, one token longer.
Kind = Literal["prompt", "piece", "step", "again"]


@dataclass
class StepRows:
    """Rows of a step of one new token, by kind; None is all of them. They are made once per prompt."""

    rows: dict[Rows, Tensor | None] = field(default_factory=dict)
    first: dict[Rows, int] = field(default_factory=dict)


@dataclass
class Pass:
    """Facts of the forward pass at hand, shared by all layers."""

    prefill: bool = False
    past: int = 0  # keys before this pass
    total: int = 0  # keys after it
    length: int = 0  # prompt tokens of this pass; what follows them is generated
    at_prompt: bool = False  # it begins with the first token of the prompt
    single: bool = False  # one generated token per row
    rows: dict[Rows, Tensor | None] = field(default_factory=dict)
    first: dict[Rows, int] = field(default_factory=dict)


def step_rows(has_image: Tensor) -> StepRows:
    """A new token is after the image and the newest: only prompts without an image, Bool[B], differ."""
    with_image = None if bool(has_image.all()) else has_image[:, None]
    after = 0 if bool(has_image.any()) else 1
    return StepRows(
        {Rows.ALL: None, Rows.LAST: None, Rows.GENERATED: None, Rows.AFTER_IMAGE: with_image},
        {Rows.ALL: 0, Rows.LAST: 0, Rows.GENERATED: 0, Rows.AFTER_IMAGE: after},
    )


def read_rows(current: Pass, spans: TokenSpans, batch: int, q_len: int) -> None:
    """Note which rows of a pass of several tokens each kind of :class:`Rows` touches."""
    positions = torch.arange(current.past, current.total, device=spans.image.device)
    valid = torch.ones(batch, current.total, dtype=torch.bool, device=positions.device)
    valid[:, : spans.length] = spans.valid[:, : current.total]
    valid = valid[:, current.past :]
    for kind, start in spans.starts.items():
        mask = (positions[None, :] >= start[:, None]) & valid
        anywhere = mask.any(0)
        current.first[kind] = int(anywhere.int().argmax()) if bool(anywhere.any()) else q_len
        current.rows[kind] = mask


def bound(model: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of ``forward`` by name."""
    found: Any = inspect.signature(model.forward).bind_partial(*args)
    return dict(found.arguments)


def capacity(cache: Any) -> int:
    """Keys that a cache of fixed size holds; 0 for one that grows."""
    if cache is None or not getattr(cache, "is_compileable", False):
        return 0
    longest = getattr(cache, "get_max_length", None) or cache.get_max_cache_shape
    return max(0, int(longest()))
