"""A plain forward pass whose attention weights a test decides: float64, dense, no cache, nothing of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import vlm
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Weights = Callable[[Tensor, int], Tensor]


def softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Weights over allowed keys; zero in rows without any."""
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


def causal(inputs: dict[str, Any]) -> Tensor:
    """Bool[B, 1, T, T]: keys that are not padding and not later."""
    valid = inputs["attention_mask"].bool()
    return torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool).tril() & valid[:, None, None, :]


def logits(model: Any, inputs: dict[str, Any], weights: Weights, **extra: Any) -> Tensor:
    """Logits [B, T, V] with attention weights ``weights(scores [B, H, T, T], layer)`` in the language model."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(repeats, 1) for x in (key, value))
        given = weights(query.double() @ key.transpose(-1, -2) * scaling, module.layer_idx)
        return (given @ value).to(query.dtype).transpose(1, 2), None

    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ALL_ATTENTION_FUNCTIONS.register("decided-by-a-test", attend)
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation_internal = "decided-by-a-test"
    try:
        return vlm.logits(model, {"position_ids": positions, **inputs, **extra})
    finally:
        config._attn_implementation_internal = before


def greedy(model: Any, inputs: dict[str, Any], steps: int, one: Callable[[dict[str, Any]], Tensor]) -> list[Tensor]:
    """Logits [B, V] of each step, every step computed from scratch by ``one(inputs) -> [B, T, V]``."""
    found = []
    for _ in range(steps):
        found.append(one(inputs)[:, -1])
        token = found[-1].argmax(-1, keepdim=True)
        ids = torch.cat([inputs["input_ids"], token], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": mask}
    return found
