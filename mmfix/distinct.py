"""Equal pictures of one batch are encoded once: many questions about one picture need one pass of the vision tower.

Evaluations ask several questions about every picture, and one picture may go with a list of prompts. Pictures are
compared as pixels, so a branch that changes them (noise per sample, a blank picture) gets what it changed.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mmfix.restore import override

PROBES = 64  # pixels of a picture that are looked at before all of them are

_ORDER: ContextVar[Tensor | None] = ContextVar("order", default=None)


@contextmanager
def encoding_once(model: Any) -> Iterator[None]:
    """Inside, a call of the model's ``get_image_features`` encodes every distinct picture [C, H, W] of it once.

    Features are those of the model, each laid where its picture stands. Calls that come with more than one tensor
    (sizes of tiles, grids of packed patches), and models without such a method, are left alone. Enter it before
    ``mitigate()``.
    """
    base = getattr(model, "base_model", model)
    with ExitStack() as stack:
        if hasattr(base, "get_image_features"):
            override(base, "get_image_features", _once(base.get_image_features), stack)
        yield


def spread(values: Tensor) -> Tensor:
    """[P, …] of all pictures from [U, …] of those that the tower is encoding."""
    order = _ORDER.get()
    return values if order is None else values[order.to(values.device)]


def _once(encode: Any) -> Any:
    first = next(iter(inspect.signature(encode).parameters))
    unknown = False  # whether an output came whose pictures cannot be told apart

    @functools.wraps(encode)
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        nonlocal unknown
        pixels = args[0] if args else kwargs.get(first)
        others = [*args[1:], *(value for name, value in kwargs.items() if name != first)]
        sized = any(isinstance(one, Tensor) for one in others)
        if unknown or sized or not isinstance(pixels, Tensor) or pixels.ndim != 4:
            return encode(*args, **kwargs)
        chosen, order = distinct(pixels)
        if len(chosen) == len(order):
            return encode(*args, **kwargs)
        token = _ORDER.set(torch.tensor(order))
        try:
            output = encode(pixels[chosen], *args[1:], **{k: v for k, v in kwargs.items() if k != first})
        finally:
            _ORDER.reset(token)
        found = _laid(output, len(chosen), order)
        unknown = found is None
        return encode(*args, **kwargs) if unknown else found

    return get_image_features


def distinct(pixels: Tensor) -> tuple[list[int], list[int]]:
    """Which of the pictures [P, C, H, W] differ from all before them, and for every picture its place among those."""
    flat = pixels.flatten(1)
    probes = flat[:, :: max(1, flat.shape[1] // PROBES)].tolist()
    known: dict[tuple[float, ...], list[int]] = {}
    chosen: list[int] = []
    order: list[int] = []
    for n, probe in enumerate(probes):
        alike = known.setdefault(tuple(probe), [])
        place = next((place for place in alike if torch.equal(flat[chosen[place]], flat[n])), None)
        if place is None:
            place = len(chosen)
            chosen.append(n)
            alike.append(place)
        order.append(place)
    return chosen, order


def _laid(output: Any, count: int, order: list[int]) -> Any:
    """An encoder's output for `count` pictures, laid out in `order`; None where its pictures cannot be told apart."""
    if not hasattr(output, "pooler_output"):
        return None
    found = copy.copy(output)
    for name, value in list(output.items()):
        laid = _rows(value, count, order)
        if laid is None:
            return None
        setattr(found, name, laid)
    return found


def _rows(value: Any, count: int, order: list[int]) -> Any:
    if isinstance(value, Tensor):
        places = torch.tensor(order, device=value.device)
        if value.ndim > 2 and len(value) == count:
            return value[places]
        if value.ndim == 2 and len(value) > count and len(value) % count == 0:  # tokens of all pictures in a row
            return value.view(count, -1, value.shape[1])[places].flatten(0, 1)
        return None
    if not isinstance(value, (list, tuple)):
        return None
    if len(value) == count and all(isinstance(one, Tensor) and one.ndim == 2 for one in value):
        return [value[place] for place in order]  # features per picture
    rows = [None if one is None else _rows(one, count, order) for one in value]  # states or maps per layer, or none
    lost = any(row is None and one is not None for row, one in zip(rows, value, strict=True))
    return None if lost else tuple(rows)
