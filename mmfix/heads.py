"""Layer × head maps: a score for every head of a model, kept as JSON, and the heads that methods choose by it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmfix.errors import DataError, MethodError
from mmfix.families import Family
from mmfix.spans import TokenSpans
from mmfix.storage import write_json

# What methods call `heads`: a file of a head map, or heads themselves, each (layer, head) or (layer, head, score).
Heads: TypeAlias = str | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeadMap:
    """One score per head of one model.

    Args:
        score: what was measured, such as ``"vhd"``.
        model: name of the model.
        revision: commit of a hub model, or hash of a local folder; None when unknown.
        data_sha256: hash of the pictures and texts that were looked at.
        prompts: how many they were.
        values: per layer, the score of each query head; larger means more.
        settings: what else was chosen for the measurement.
        also: further numbers per head or of the whole measurement, by name.
    """

    score: str
    model: str
    revision: str | None
    data_sha256: str
    prompts: int
    values: tuple[tuple[float, ...], ...]
    settings: dict[str, Any] = field(default_factory=dict)
    also: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, query heads)."""
        return len(self.values), len(self.values[0])

    def ranked(self) -> list[tuple[int, int, float]]:
        """(layer, head, score) of every head, the largest score first; of equal ones the lowest layer and head."""
        found = [(n, h, value) for n, row in enumerate(self.values) for h, value in enumerate(row)]
        return sorted(found, key=lambda one: (-one[2], one[0], one[1]))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the map as JSON, whole or not at all."""
        return write_json(Path(path), asdict(self))

    @staticmethod
    def read(path: str | os.PathLike[str]) -> HeadMap:
        """Read what :meth:`write` wrote.

        Raises:
            DataError: no such file, or not a head map.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; make the file with `mmfix heads --out {path}`") from None
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); make it again with `mmfix heads`") from None
        try:
            rows = tuple(tuple(float(value) for value in row) for row in content["values"])
            known = {name: content[name] for name in ("score", "model", "revision", "data_sha256", "prompts")}
        except (KeyError, TypeError, ValueError):
            rows, known = (), {}
        if not rows or not rows[0] or any(len(r) != len(rows[0]) or not all(map(math.isfinite, r)) for r in rows):
            raise DataError(f"{path}: not a head map (score, model, data and one number per layer and head); make it "
                            "again with `mmfix heads`")  # fmt: skip
        return HeadMap(values=rows, settings=content.get("settings", {}), also=content.get("also", {}), **known)


def chosen(heads: Heads | None, top: float, where: str) -> tuple[tuple[float, ...], ...] | None:
    """What a method's `heads` names: the best heads of a file, or the heads given.

    Args:
        heads: a file of a head map, (layer, head) or (layer, head, score) tuples, or None.
        top: of a file: below 1 the share of all heads that is taken (at least one), from 1 on their number; more than
            there are takes all.
        where: what to call it in messages, such as ``"vhr"``.

    Returns:
        (layer, head, score) from a file, or the tuples as given.

    Raises:
        DataError: the file is missing or no head map.
        MethodError: tuples that are no heads, or `top` out of range.
    """
    if heads is None:
        return None
    if isinstance(heads, (str, os.PathLike)):
        ranked = HeadMap.read(heads).ranked()
        if not top > 0.0:
            raise MethodError(f"{where}.top={top!r}: give a share of the heads between 0 and 1, or their number")
        count = max(1, round(top * len(ranked))) if top < 1 else int(min(top, len(ranked)))
        return tuple(sorted(ranked[:count]))
    named = tuple(_head(one, where) for one in heads)
    if len({one[:2] for one in named}) != len(named):
        raise MethodError(f"{where}.heads: names a head twice; name each (layer, head) once")
    return named


def some(heads: tuple[tuple[float, ...], ...] | None, where: str) -> tuple[tuple[float, ...], ...] | None:
    """The same heads, or None for a choice that is left open; ``MethodError`` for a choice of none."""
    if heads == ():
        raise MethodError(
            f"{where}.heads: no head is named, so nothing would change; name at least one, or leave the method out"
        )
    return heads


def _head(one: Any, where: str) -> tuple[float, ...]:
    fine = isinstance(one, (tuple, list)) and len(one) in (2, 3) and all(isinstance(v, (int, float)) for v in one)
    if not fine or any(int(v) != v or v < 0 for v in one[:2]) or not all(map(math.isfinite, one)):
        raise MethodError(f"{where}.heads: {one!r} is not (layer, head) with numbers from 0; give pairs or a file")
    return (int(one[0]), int(one[1]), *(float(v) for v in one[2:]))


def fit(heads: Sequence[tuple[float, ...]], family: Family, where: str) -> None:
    """Raise ``MethodError`` for a head that the model does not have."""
    for layer, head, *_ in heads:
        if layer >= family.num_layers or head >= family.num_heads:
            raise MethodError(
                f"{where}.heads: layer {layer:g}, head {head:g} is none of this model's ({family.num_layers} layers "
                f"of {family.num_heads} heads); measure the heads of this model with `mmfix heads`"
            )


def of_layer(heads: Sequence[tuple[float, ...]] | Heads | None, layer: int) -> tuple[int, ...]:
    """The heads of one layer, ascending."""
    return tuple(sorted(int(one[1]) for one in heads or () if not isinstance(one, str) and one[0] == layer))


def factors(spans: TokenSpans, count: int, by_head: dict[int, float]) -> Tensor:
    """Float32[B, H]: factors of some heads, in the prompts that hold an image."""
    scale = torch.ones(count, device=spans.image.device)
    for head, factor in by_head.items():
        scale[head] = factor
    return torch.where(spans.has_image[:, None], scale, 1.0)
