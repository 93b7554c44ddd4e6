"""Encoded pictures for models whose ``forward`` takes pixels only (transformers before ``mm_encoder_outputs``).

Branches see pictures that were encoded beforehand. Where ``forward`` has no argument for them it is given one here: the
pictures wait until ``forward`` asks ``get_image_features``, which then returns them instead of encoding anything.
"""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mmfix.families import Family
from mmfix.restore import override

ARGUMENT = "mm_encoder_outputs"


def install(family: Family, stack: ExitStack) -> None:
    """Give ``forward`` the argument where it lacks it; undone by `stack`."""
    model, base = family.model, family.model.base_model
    lacking = ARGUMENT not in inspect.signature(model.forward).parameters and hasattr(base, "get_image_features")
    if not lacking or family.cross_layers or family.outer is not None:
        return
    waiting: list[Any] = []
    tokens = 0  # of a picture, where all have as many and the model keeps pictures apart
    encode, forward = base.get_image_features, model.forward

    @functools.wraps(encode)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        nonlocal tokens
        if waiting:
            return _apart(waiting[-1], tokens)
        output = encode(*args, **kwargs)
        pooled = getattr(output, "pooler_output", None)
        tokens = pooled.shape[1] if isinstance(pooled, Tensor) and pooled.ndim == 3 else 0
        return output

    @functools.wraps(forward)
    def with_encoded(*args: Any, **kwargs: Any) -> Any:
        encoded = (kwargs.pop(ARGUMENT, None) or {}).get("image")
        if encoded is None:
            return forward(*args, **kwargs)
        waiting.append(encoded)
        try:
            return forward(*args, **{**kwargs, "pixel_values": torch.zeros(1)})  # that there is a picture, no more
        finally:
            waiting.pop()

    override(base, "get_image_features", get_image_features, stack)
    override(model, "forward", with_encoded, stack)


def _apart(encoded: Any, tokens: int) -> Any:
    """Features [n, hidden] of all pictures as [pictures, tokens, hidden], where these were their shape."""
    flat = encoded.pooler_output
    if not tokens or not isinstance(flat, Tensor) or flat.ndim != 2 or flat.shape[0] % tokens:
        return encoded
    found = copy.copy(encoded)
    found.pooler_output = flat.view(-1, tokens, flat.shape[-1])
    return found
