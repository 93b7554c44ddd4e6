"""The methods of a run: ``greedy``, a name, ``name:field=value``, several joined by ``+``; ``@all``, ``@contrast``.

``beam-5`` is no method but the control of one that searches: plain beam search of that width, which is what such a
method must be compared with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError

if TYPE_CHECKING:
    from mmfix import Method

BASELINE = "greedy"
BEAMS = 5  # of the control ``beam``


@dataclass(frozen=True)
class Arm:
    """One column of a comparison: nothing, one method, or several composed.

    Attributes:
        name: as displayed and as stored in every sample.
        methods: resolved methods with every parameter; empty for greedy and plain beam search.
        spec: the same as JSON.
        generation: arguments of ``generate`` that this arm alone has.
    """

    name: str
    methods: tuple[Any, ...]
    spec: tuple[dict[str, Any], ...]
    generation: dict[str, Any] = field(default_factory=dict)


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


def width(text: str) -> int | None:
    """Beams of ``beam`` and ``beam-5``; None for anything else.

    Raises:
        UsageError: a width that is no beam search.
    """
    found = re.fullmatch(r"beam(?:-(\d+))?", text)
    if found is None:
        return None
    count = int(found[1] or BEAMS)
    if not 2 <= count <= 1000:
        raise UsageError(f"{text!r}: give a beam search 2 to 1000 beams; with one it is {BASELINE}")
    return count


def controls() -> dict[str, set[str]]:
    """Plain beam searches, by name → the methods whose control each is: those that search as wide."""
    import mmfix

    found: dict[str, set[str]] = {}
    for name, info in mmfix.methods().items():
        beams = info.params["beams"].default if info.kind == "search" and "beams" in info.params else 0
        if beams > 1:
            found.setdefault(f"beam-{beams}", set()).add(name)
    return dict(sorted(found.items(), key=lambda pair: width(pair[0]) or 0))


def resolve(text: str, model: Any = None, *, evaluated: bool = False) -> Arm:
    """Build the methods of one arm. What the text leaves open is as calibrated for ``model``, else the default.

    Args:
        evaluated: whether plain beam search may be one, as in an evaluation.

    Raises:
        mmfix.errors.MethodError: an unknown method or field; lists the choices.
        UsageError: ``greedy`` or plain beam search joined with a method, or the latter where it is none.
    """
    import mmfix

    if text == BASELINE:
        return Arm(BASELINE, (), ())
    beams = width(text)
    if beams is not None and not evaluated:
        raise UsageError(f"{text!r} is a control of `mmfix eval run`, not a method; give generate() num_beams={beams}")
    if beams is not None:
        return Arm(text, (), (), {"num_beams": beams, "do_sample": False})
    parts = [part for part in re.split(r"\+(?=\s*[A-Za-z])", text) if part]
    if BASELINE in parts:
        raise UsageError(f"{text!r}: greedy is the absence of methods and cannot be joined with one")
    if any(width(part) for part in parts):
        raise UsageError(f"{text!r}: plain beam search is a control and cannot be joined; use --gen-kwargs num_beams=5")
    methods = []
    for part in parts:
        parsed = mmfix.parse(part)
        if model is not None:
            given = re.findall(r"[:,]\s*([A-Za-z_]\w*)\s*=", part)
            parsed = mmfix.calibrated(model, parsed.info.name, **{name: getattr(parsed, name) for name in given})
        methods.append(parsed)
    return Arm(text, tuple(methods), tuple(_spec(method, model) for method in methods))


def _spec(method: Method, model: Any) -> dict[str, Any]:
    """As :func:`mmfix.spec`, with what the method reads from a file: answers with another file are other answers."""
    import mmfix

    measured = None if model is None else method.measured(mmfix.describe(model))
    return mmfix.spec(method) | ({} if measured is None else {"measured": measured["values"]})


def members(text: str) -> tuple[str, ...]:
    """The methods that a word with ``@`` stands for; any other word stands for itself.

    ``@all`` is greedy and every registered method; ``@contrast``, ``@score-edit`` and so on are those of one kind.
    Methods that search bring plain beam search of their width with them.
    """
    import mmfix

    if not text.startswith("@"):
        return (text,)
    kinds: dict[str, list[str]] = {"all": [BASELINE, *controls()], "search": list(controls())}
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
    the methods that every task of the run gives what they lack. The control of methods that search goes with the last
    of them.
    """
    import mmfix
    from mmfix.errors import MmfixError

    model = getattr(decoder, "model", None)
    arms, left_out = [], {}
    for text, named in expand(texts).items():
        arm = resolve(text, model, evaluated=True)
        if not named and text not in supplied and model is not None and arm.methods:
            try:
                with mmfix.mitigate(model, list(arm.methods), processor=decoder.processor):
                    pass
            except MmfixError as problem:
                if not any(other.startswith(f"{text}:") for other in texts):  # it runs with parameters of its own
                    left_out[text] = str(problem)
                continue
        arms.append(arm)
    idle = {text for text, owners in controls().items() if owners <= set(left_out) and text not in texts}
    return [arm for arm in arms if arm.name not in idle], left_out


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
