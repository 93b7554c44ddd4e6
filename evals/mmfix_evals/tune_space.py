"""What of a method can be searched: its declared ranges and choices, as values in and texts out."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError

NEVER = ("seed",)  # a lucky seed is not a better method
DIGITS = 4  # significant digits of a value: more would be noise, and must be typed again by a person


@dataclass(frozen=True)
class Dimension:
    """One parameter that is searched.

    Attributes:
        kind: ``"float"`` and ``"int"`` lie between `low` and `high`, both included; ``"choice"`` is one of `choices`.
    """

    name: str
    kind: Literal["float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()

    def rounded(self, value: Any) -> Any:
        """A suggested value as it is used: few digits, still inside the range."""
        if self.kind != "float":
            return value
        assert self.low is not None
        assert self.high is not None
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in this dimension."""
        if self.kind == "choice":
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        assert self.low is not None
        assert self.high is not None
        return self.low <= value <= self.high

    def describe(self) -> dict[str, Any]:
        """As JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Space:
    """A method with what of it is searched.

    Attributes:
        text: the method as given, ``name`` or ``name:field=value``; what it says is fixed.
        dimensions: what is searched.
    """

    text: str
    dimensions: tuple[Dimension, ...]

    def method(self, values: Mapping[str, Any]) -> str:
        """The method with these values, as ``--methods`` reads it."""
        pairs = ",".join(f"{name}={json.dumps(value)}" for name, value in values.items())
        return f"{self.text}{',' if ':' in self.text else ':'}{pairs}"


def space(text: str, only: Sequence[str] = ()) -> Space:
    """The dimensions of one method: numbers with two bounds, choices, yes and no. Seeds are left alone.

    Args:
        text: ``name`` or ``name:field=value,…``; fields that are given are fixed.
        only: names of the parameters to search; empty for all.

    Raises:
        MethodError: an unknown method or field.
        UsageError: several methods, nothing to search, or a name in `only` that cannot be searched.
    """
    import mmfix
    from mmfix_evals.arms import BASELINE, resolve

    if text == BASELINE:
        raise UsageError(f"{BASELINE} is the absence of methods and has nothing to search; choose a method")
    if len(resolve(text).methods) != 1:
        raise UsageError(f"{text!r}: one method is searched at a time; give a single one")
    info = mmfix.parse(text).info
    given = {piece.partition("=")[0].strip() for piece in text.partition(":")[2].split(",")}
    hints = typing.get_type_hints(info.cls)
    found = {
        name: dimension
        for name, one in info.params.items()
        if name not in given and name not in NEVER
        for dimension in [_dimension(name, hints.get(name), one.low, one.high)]
        if dimension is not None
    }
    for name in only:
        if name not in found:
            raise UsageError(f"--only: {unknown('parameter', name, found)} (of {text})")
    chosen = tuple(found[name] for name in (only or found))
    if not chosen:
        raise UsageError(f"{text!r} has no parameter with a range or choices left to search; nothing to tune")
    return Space(text, chosen)


def _dimension(name: str, hint: Any, low: float | None, high: float | None) -> Dimension | None:
    """None for a parameter that cannot be searched, such as a list of layers."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    literal = [value for part in parts if typing.get_origin(part) is Literal for value in typing.get_args(part)]
    if literal:
        return Dimension(name, "choice", choices=(*literal, *([None] if type(None) in parts else [])))
    if bool in parts:
        return Dimension(name, "choice", choices=(False, True))
    if low is None or high is None or not low < high:
        return None
    if float in parts:
        return Dimension(name, "float", float(low), float(high))
    return Dimension(name, "int", int(low), int(high)) if int in parts else None
