"""Rewritten positions: what a method says of the prompt's tokens, and what follows for generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfix.errors import ConflictError, UnsupportedModel
from mmfix.method import Method
from mmfix.spans import TokenSpans


def rewriting(methods: Sequence[Method]) -> Method | None:
    """The method that rewrites positions; two of them cannot act together."""
    found = [m for m in methods if m.rewrites_positions]
    if len(found) > 1:
        names = " and ".join(repr(m.info.name) for m in found)
        raise ConflictError(f"methods {names} both rewrite positions; use one of them")
    return found[0] if found else None


def rewritten(method: Method, spans: TokenSpans, past: int, length: int) -> Tensor:
    """Int64[B, length]: positions of the tokens past: of a batch; those after the prompt count on from its largest one.

    Raises:
        ValueError: the method's answer is not one position per prompt token.
    """
    prompt = method.positions(spans).long()
    if prompt.shape != spans.image.shape:
        raise ValueError(
            f"{method.info.name}.positions gave {tuple(prompt.shape)}, expected one per token, "
            f"{tuple(spans.image.shape)}"
        )
    last = prompt.masked_fill(~spans.valid, -1).amax(-1, keepdim=True)
    steps = torch.arange(1, max(0, past + length - spans.length) + 1, device=prompt.device)
    every = torch.cat([prompt, last + steps[None, :]], dim=1)
    # A slice keeps the strides of the whole, which grow from step to step; a compiled graph would not fit again.
    return every[:, past : past + length].clone(memory_format=torch.contiguous_format)


def with_positions(
    kwargs: dict[str, Any], positions: Tensor, spans: TokenSpans, total: int, name: str
) -> dict[str, Any]:
    """Keyword arguments with rewritten positions, and a mask.

    Without a mask, positions that do not grow would be taken for several sequences packed into one row.
    """
    given = kwargs.get("position_ids")
    if given is not None and given.ndim == 3:
        raise UnsupportedModel(
            f"{name} numbers image tokens along several axes (multi-axis rotary positions), which one position per "
            "token cannot replace; use a method that leaves positions alone"
        )
    kwargs = {**kwargs, "position_ids": positions}
    if kwargs.get("attention_mask") is None:
        valid = torch.ones(positions.shape[0], total, dtype=torch.long, device=positions.device)
        valid[:, : spans.length] = spans.valid[:, :total].long()
        kwargs["attention_mask"] = valid
    return kwargs
