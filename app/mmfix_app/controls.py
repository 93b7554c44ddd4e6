"""Controls of a method, generated from the fields of its dataclass: a new method needs no line here."""

from __future__ import annotations

import ast
import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

import mmfix
from mmfix import Method
from mmfix.errors import MethodError

Kind = Literal["number", "whole", "optional", "switch", "choice", "list", "words"]
WIDE = 10_000.0
"""A range wider than this gets a number box, not a slider."""


@dataclass(frozen=True)
class Control:
    """One parameter as a control.

    Args:
        method, name: whose parameter.
        kind: which control.
        help: from the field's metadata.
        low, high: range of numbers.
        choices: of a choice, as shown.
        value: the value in force for the model at hand, as the control shows it.
    """

    method: str
    name: str
    kind: Kind
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    value: Any

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    @property
    def slider(self) -> bool:
        return self.low is not None and self.high is not None and self.high - self.low < WIDE

    @property
    def step(self) -> float:
        if self.kind == "whole":
            return 1
        span = (self.high or 1.0) - (self.low or 0.0)
        return 0.01 if span <= 1 else 0.05 if span <= 10 else 0.5


NONE = "none"


def of(method: Method) -> list[Control]:
    """The controls of a method, in the order of its fields.

    A text has one only if the method gives an example of it: file names and the like are not a visitor's to choose.
    """
    hints = typing.get_type_hints(type(method))
    found = []
    for field in dataclasses.fields(method):
        info = method.info.params[field.name]
        kind, choices = _kind(hints[field.name])
        value = getattr(method, field.name)
        if kind == "words":
            if info.example is None:
                continue
            value = info.example if value is None else value
        shown = _shown(value, kind)
        found.append(Control(method.info.name, field.name, kind, info.help, info.low, info.high, choices, shown))
    return found


def started(model: Any, name: str) -> Method:
    """A method as its controls first show it: calibrated for the model, with the example of what has no default."""
    base = mmfix.calibrated(model, name)
    examples = {c.name: c.value for c in of(base) if c.kind == "words" and getattr(base, c.name) is None}
    return mmfix.calibrated(model, name, **examples) if examples else base


def _kind(hint: Any) -> tuple[Kind, tuple[str, ...]]:
    options = _literals(hint)
    if options:
        return "choice", tuple(NONE if option is None else str(option) for option in options)
    plain = [one for one in (typing.get_args(hint) or (hint,)) if one is not type(None)]
    optional = type(None) in typing.get_args(hint)
    if not optional and plain == [bool]:
        return "switch", ()
    if not optional and plain == [int]:
        return "whole", ()
    if not optional and plain == [float]:
        return "number", ()
    if optional and plain in ([int], [float]):
        return "optional", ()
    return ("words" if plain == [str] else "list"), ()


def _literals(hint: Any) -> list[Any]:
    """The options of ``Literal[...]`` or ``Literal[...] | None``."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    parts = typing.get_args(hint)
    found = [option for part in parts for option in (_literals(part) if part is not type(None) else [])]
    return [*found, None] if found and type(None) in parts else found


def _shown(value: Any, kind: Kind) -> Any:
    if kind == "choice":
        return NONE if value is None else str(value)
    if kind in ("optional", "list", "words"):
        nested = isinstance(value, tuple) and any(isinstance(one, tuple) for one in value)
        shown = str(list(value)) if nested else ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return "" if value is None else shown
    return value


def read(control: Control, given: Any) -> Any:
    """A control's content as the value of the field.

    Raises:
        MethodError: text that is not a number or a list of numbers, with what to write.
    """
    if control.kind == "choice":
        if given not in control.choices:
            raise MethodError(f"{control.label}: choose one of {', '.join(control.choices)}")
        return None if given == NONE else given
    if control.kind == "switch":
        return bool(given)
    if control.kind in ("number", "whole"):
        if not isinstance(given, (int, float)) or isinstance(given, bool):
            raise MethodError(f"{control.label}: give a number")
        if (control.low is not None and given < control.low) or (control.high is not None and given > control.high):
            raise MethodError(f"{control.label}: give a number from {control.low:g} to {control.high:g}")
        if control.kind == "whole":
            if int(given) != given:
                raise MethodError(f"{control.label}: give a whole number")
            return int(given)
        return float(given)
    text = "" if given is None else str(given).strip()
    if len(text) > 200:
        raise MethodError(f"{control.label}: at most 200 characters")
    if not text:
        return None
    if control.kind == "optional":
        return _read_number(control, text)
    return text if control.kind == "words" else _read_list(control, text)


def _read_number(control: Control, text: str) -> float:
    low = -math.inf if control.low is None else control.low
    high = math.inf if control.high is None else control.high
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or math.isinf(value):
        raise MethodError(f"{control.label}: give a number from {low:g} to {high:g}, or nothing")
    return int(value) if value.is_integer() else value


def _read_list(control: Control, text: str) -> Any:
    try:
        value = ast.literal_eval(text if text[0] in "([" else f"({text},)")
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise MethodError(f"{control.label}: write whole numbers with commas, such as 1, 5, 6") from error
    if not isinstance(value, (tuple, list)) or not all(_numbers(one) for one in value):
        raise MethodError(f"{control.label}: write whole numbers with commas, such as 1, 5, 6")
    return tuple(value)


def _numbers(one: Any) -> bool:
    """A whole number, or a tuple of numbers such as (layer, head)."""
    if isinstance(one, tuple):
        return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in one)
    return isinstance(one, int) and not isinstance(one, bool)


def build(model: Any, name: str, given: dict[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The method that a visitor chose, and its parameters that differ from those calibrated for the model.

    Args:
        model: the model, for its calibrated parameters.
        name: a registered name.
        given: field → content of its control; what is absent keeps its value.

    Raises:
        MethodError: unknown name or field, a value out of range.
    """
    base = mmfix.calibrated(model, name)
    known = {control.name: control for control in of(base)}
    for field in given:
        if field not in known:
            raise MethodError(f"method {name!r} has no parameter {field!r}; it has: {', '.join(known) or 'none'}")
    values = {field: read(known[field], content) for field, content in given.items()}
    changed = {field: value for field, value in values.items() if value != getattr(base, field)}
    return mmfix.calibrated(model, name, **changed), changed


def sweepable(method: Method) -> list[Control]:
    """Parameters that a sweep can vary: numbers with a range."""
    return [c for c in of(method) if c.kind in ("number", "whole") and c.slider and c.name != "seed"]
