"""The one place where methods are registered, built by name, and written down."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

from mmfix.errors import MethodError
from mmfix.method import Kind, Method, MethodInfo, Param

M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, MethodInfo] = {}


def param(
    default: Any, help: str, low: float | None = None, high: float | None = None, *, example: str | None = None
) -> Any:
    """A dataclass field with what :class:`Param` tells of it, from which controls and documentation are generated."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "example": example})


def register(
    name: str, *, title: str, paper: str, kind: Kind, passes: float = 1.0, trained_in_paper: bool = False
) -> Callable[[M], M]:
    """Class decorator that enters a method into the registry.

    Raises:
        MethodError: the name is taken or malformed, or the class is not a frozen ``Method`` dataclass.
    """

    def enter(cls: M) -> M:
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name == "greedy":
            raise MethodError(f"method name {name!r}: use lower-case words joined by '-' ('greedy' means no method)")
        if name in _REGISTRY:
            raise MethodError(f"method name {name!r} is taken by {_REGISTRY[name].cls.__name__}; choose another")
        if not (issubclass(cls, Method) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise MethodError(f"{cls.__name__}: a method is a frozen dataclass that derives from mmfix.Method")
        params = {f.name: Param(f.default, **f.metadata) for f in dataclasses.fields(cls)}
        cls.info = MethodInfo(name, title, paper, kind, passes, trained_in_paper, params, cls)
        _REGISTRY[name] = cls.info
        return cls

    return enter


def methods() -> dict[str, MethodInfo]:
    """All registered methods: name → :class:`MethodInfo`, sorted by name."""
    return dict(sorted(_REGISTRY.items()))


def method(name: str, **params: Any) -> Method:
    """Build a method by name.

    Raises:
        MethodError: unknown name or parameter (the choices are listed), or a value out of range.
    """
    known = methods()
    if name not in known:
        raise MethodError(f"unknown method {name!r}{_hint(name, known)}; choose one of: {', '.join(known)}")
    info = known[name]
    for given in params:
        if given not in info.params:
            choices = ", ".join(info.params) or "none"
            raise MethodError(
                f"method {name!r} has no parameter {given!r}{_hint(given, info.params)}; its parameters: {choices}"
            )
    try:
        return info.cls(**params)
    except (TypeError, ValueError) as error:
        raise MethodError(f"method {name!r}: {error}") from error


def parse(text: str) -> Method:
    """Build a method from ``name`` or ``name:field=value,field=value`` (values are JSON, else text).

    Lists may hold commas: ``var:sink_dims=[5,11],tau=4``.
    """
    name, colon, rest = text.partition(":")
    params: dict[str, Any] = {}
    for part in _outside_brackets(rest) if colon else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise MethodError(f"method {text!r}: {part!r} is not field=value; write {name}:field=value,field=value")
        try:
            params[key.strip()] = frozen(json.loads(value))
        except json.JSONDecodeError:
            params[key.strip()] = value.strip()
    return method(name.strip(), **params)


def _outside_brackets(text: str) -> list[str]:
    """`text` split at the commas that stand in no bracket."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def spec(method: Method) -> dict[str, Any]:
    """A JSON-able description: ``{"name": …, "params": {…}}``; :func:`from_spec` reads it back."""
    return {
        "name": method.info.name,
        "params": {f.name: _plain(getattr(method, f.name)) for f in dataclasses.fields(method)},
    }


def from_spec(description: dict[str, Any]) -> Method:
    """The method that :func:`spec` described."""
    return method(description["name"], **{k: frozen(v) for k, v in description.get("params", {}).items()})


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def frozen(value: Any) -> Any:
    """A value read from JSON as a field holds it: lists as tuples."""
    return tuple(frozen(v) for v in value) if isinstance(value, list) else value


def _hint(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
