"""The methods of a run: ``greedy``, a name, ``name:field=value,…``, several joined by ``+``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mmfix_evals.errors import UsageError

BASELINE = "greedy"


@dataclass(frozen=True)
class Arm:
    """One column of a comparison: nothing, one method, or several composed.

    Attributes:
        name: as displayed and as stored in every sample.
        methods: resolved methods with every parameter; empty for greedy.
        spec: the same as JSON.
    """

    name: str
    methods: tuple[Any, ...]
    spec: tuple[dict[str, Any], ...]


def split_methods(text: str) -> list[str]:
    """``"greedy,var:move=0.4,tau=4,vhr"`` → ``["greedy", "var:move=0.4,tau=4", "vhr"]``.

    A comma inside brackets belongs to a value; a piece that is ``field=value`` belongs to the method before it.
    """
    found: list[str] = []
    for piece in _split(text, ","):
        if re.match(r"[\w-]+\s*=", piece) and found:
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    if not found:
        raise UsageError("no method given: use for instance --methods greedy,var,vhr")
    doubled = sorted({name for name in found if found.count(name) > 1})
    if doubled:
        raise UsageError(f"--methods names {doubled[0]!r} twice: name each method once")
    return found


def resolve(text: str, model: Any = None) -> Arm:
    """Build the methods of one arm. What the text leaves open is as calibrated for ``model``, else the default.

    Raises:
        mmfix.errors.MethodError: an unknown method or field; lists the choices.
        UsageError: ``greedy`` joined with a method.
    """
    import mmfix

    if text == BASELINE:
        return Arm(BASELINE, (), ())
    parts = [part for part in re.split(r"\+(?=\s*[A-Za-z])", text) if part]
    if BASELINE in parts:
        raise UsageError(f"{text!r}: greedy is the absence of methods and cannot be joined with one")
    methods = []
    for part in parts:
        parsed = mmfix.parse(part)
        if model is not None:
            given = re.findall(r"[:,]\s*([A-Za-z_]\w*)\s*=", part)
            parsed = mmfix.calibrated(model, parsed.info.name, **{name: getattr(parsed, name) for name in given})
        methods.append(parsed)
    return Arm(text, tuple(methods), tuple(mmfix.spec(method) for method in methods))


def parse_arguments(text: str | None) -> dict[str, Any]:
    """``"do_sample=true,temperature=0.7"`` → a dict; values are JSON where they can be, else text."""
    import json

    values: dict[str, Any] = {}
    for piece in _split(text or "", ","):
        name, equals, value = piece.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"--gen-kwargs: {piece!r} is not name=value; write num_beams=3,do_sample=false")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = {"True": True, "False": False, "None": None}.get(value.strip(), value.strip())
    return values


def _split(text: str, separator: str) -> list[str]:
    """Split outside brackets."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "[({") - (letter in "])}")
        if letter == separator and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]
