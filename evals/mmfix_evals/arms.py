"""The methods of a run: ``greedy``, a name, ``name:field=value``, several joined by ``+``; ``@all``, ``@contrast``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mmfix_evals.choices import unknown
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


def members(text: str) -> tuple[str, ...]:
    """The methods that a word with ``@`` stands for; any other word stands for itself.

    ``@all`` is greedy and every registered method; ``@contrast``, ``@score-edit`` and so on are those of one kind.
    """
    import mmfix

    if not text.startswith("@"):
        return (text,)
    kinds: dict[str, list[str]] = {"all": [BASELINE]}
    for name, info in mmfix.methods().items():
        kinds["all"].append(name)
        kinds.setdefault(info.kind.replace(" ", "-"), []).append(name)
    if text[1:] not in kinds:
        raise UsageError(unknown("group of methods", text, [f"@{kind}" for kind in sorted(kinds)]))
    return tuple(kinds[text[1:]])


def expand(texts: Sequence[str]) -> dict[str, bool]:
    """Every method that some words of ``--methods`` stand for, once, and whether it was named itself."""
    found = {name: False for text in texts for name in members(text)}
    return {name: named or name in texts for name, named in found.items()}


def choose(texts: Sequence[str], decoder: Any, supplied: Collection[str] = ()) -> tuple[list[Arm], dict[str, str]]:
    """The arms for a decoder, and the members of groups that cannot run on it with the reason.

    A method that was named itself is never left out: what it lacks is an error when it runs. Nor is one of `supplied`,
    the methods that every task of the run gives what they lack.
    """
    import mmfix
    from mmfix.errors import MmfixError

    model = getattr(decoder, "model", None)
    arms, left_out = [], {}
    for text, named in expand(texts).items():
        arm = resolve(text, model)
        if not named and text not in supplied and model is not None and arm.methods:
            try:
                with mmfix.mitigate(model, list(arm.methods), processor=decoder.processor):
                    pass
            except MmfixError as problem:
                if not any(other.startswith(f"{text}:") for other in texts):  # it runs with parameters of its own
                    left_out[text] = str(problem)
                continue
        arms.append(arm)
    return arms, left_out


def calibrated(arm: Arm, model: Any) -> dict[str, Any]:
    """Method → which of its values are as calibrated for a model, and on what data; empty for none."""
    from mmfix import calibration

    found = {method.info.name: calibration.in_use(model, method) for method in arm.methods}
    return {name: used for name, used in found.items() if used is not None}


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
