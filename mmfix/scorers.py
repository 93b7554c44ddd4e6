"""Models of the user's own that a method asks about a picture, by name.

A method is numbers and names, so that it can be written down and read back; a function is neither. It is registered
under a name here, and the method names it::

    @mmfix.scorers.register("blip-itm", kind="map")
    def relevance(pixels, question):  # Float[3, H, W] as the model's processor made it; what is asked about it
        return ...                    # Float[H, W]: how much each pixel matters for the question

    with mmfix.mitigate(model, "agla", scorer="blip-itm", processor=processor):
        ids = model.generate(**inputs)

Nothing is registered by mmfix itself, and a method whose scorer is missing says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mmfix.errors import MethodError, MmfixError

Kind = Literal["map", "boxes", "match"]
KINDS: dict[str, str] = {
    "map": "(pixels [3, H, W], question) → relevance [H, W]",
    "boxes": "(pixels [3, H, W], word) → boxes (left, top, right, bottom), from 0 to 1; None: not a word to look up",
    "match": "(pixels [3, H, W], text) → how well they match, a number",
}


@dataclass(frozen=True)
class Question:
    """What is asked about a picture: the prompt's tokens without image tokens and padding.

    Args:
        ids: token ids.
        text: the same as text; None where no processor was given to ``mitigate()``.
    """

    ids: tuple[int, ...]
    text: str | None = None


Scorer = Callable[..., Any]
F = TypeVar("F", bound=Scorer)
_SCORERS: dict[str, tuple[Kind, Scorer]] = {}


def register(name: str, function: Any = None, *, kind: Kind = "map") -> Any:
    """Make a function known under a name; as a call, or as a decorator. A name that is taken is replaced.

    Args:
        name: words of letters, digits, ``-`` and ``_``.
        function: see :data:`KINDS` for what it is given and returns.
        kind: "map" (AGLA), "boxes" or "match" (HALC).

    Raises:
        MethodError: a malformed name, an unknown kind, or what cannot be called.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise MethodError(f"scorer name {name!r}: use letters, digits, '-' and '_'")
    if kind not in KINDS:
        raise MethodError(f"scorer kind {kind!r}: choose one of {', '.join(KINDS)}")

    def enter(given: F) -> F:
        if not callable(given):
            raise MethodError(f"scorer {name!r}: {given!r} cannot be called; give a function {KINDS[kind]}")
        _SCORERS[name] = kind, given
        return given

    return enter if function is None else enter(function)


def unregister(name: str) -> None:
    """Forget a scorer; nothing happens where there is none."""
    _SCORERS.pop(name, None)


def names(kind: Kind | None = None) -> list[str]:
    """The names that are known, of one kind or all."""
    return sorted(name for name, (of_it, _) in _SCORERS.items() if kind in (None, of_it))


def get(name: str | None, kind: Kind, owner: str, field: str = "scorer") -> Scorer:
    """The function of a name.

    Args:
        owner: the method that asks, and its `field` for the name; for the message.

    Raises:
        MethodError: no name, one that is not registered, or one of another kind.
    """
    way = f"register a function {KINDS[kind]} with mmfix.scorers.register(name, function, kind={kind!r})"
    if name is None:
        known = f" (known: {', '.join(names(kind))})" if names(kind) else ""
        raise MethodError(f"{owner} needs a model of your own: {way} and give {owner}:{field}=name{known}")
    if name not in _SCORERS:
        raise MethodError(f"{owner}.{field}={name!r} is not registered in this process; {way}")
    found, function = _SCORERS[name]
    if found != kind:
        raise MethodError(f"{owner}.{field}={name!r} returns {found}, and {owner} needs {kind}; {way}")
    return function


def relevance(name: str, pixels: Tensor, question: Question, owner: str) -> Tensor:
    """Float32[H, W] of a picture [3, H, W].

    Raises:
        MmfixError: the scorer returned something else.
    """
    found = get(name, "map", owner)(pixels, question)
    if not isinstance(found, Tensor):
        found = torch.as_tensor(found)
    finite = bool(found.isfinite().all())
    if found.shape != pixels.shape[-2:] or not finite:
        raise MmfixError(
            f"scorer {name!r} returned {tuple(found.shape)}{'' if finite else ' with inf or nan'} for a picture of "
            f"{tuple(pixels.shape[-2:])}; return a finite relevance for every pixel"
        )
    return found.detach().to(pixels.device, torch.float32)


Box = tuple[float, float, float, float]


def boxes(name: str, pixels: Tensor, word: str, owner: str) -> list[Box] | None:
    """Boxes (left, top, right, bottom) of a word in a picture [3, H, W], as shares of its width and height.

    None where the word is not one to look up; an empty list where its object is not found.

    Raises:
        MmfixError: the scorer raised an error, or returned something else.
    """
    given = _asked(get(name, "boxes", owner, "detector"), name, pixels, word)
    if given is None:
        return None
    found = []
    for box in given:
        try:
            sides = tuple(float(side) for side in box)
        except (TypeError, ValueError):
            sides = ()
        good = len(sides) == 4 and all(math.isfinite(side) and 0.0 <= side <= 1.0 for side in sides)
        if not good or sides[0] >= sides[2] or sides[1] >= sides[3]:
            raise MmfixError(
                f"scorer {name!r} returned the box {sides} for {word!r}; return left < right and top < bottom, all "
                "from 0 to 1"
            )
        found.append((sides[0], sides[1], sides[2], sides[3]))
    return found


def match(name: str, pixels: Tensor, text: str, owner: str) -> float:
    """How well a text fits a picture [3, H, W]; more is better.

    Raises:
        MmfixError: the scorer raised an error, or returned no finite number.
    """
    found = _asked(get(name, "match", owner), name, pixels, text)
    try:
        number = float(found)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MmfixError(f"scorer {name!r} returned {found!r} for {text!r}; return a finite number")
    return number


def _asked(function: Scorer, name: str, pixels: Tensor, text: str) -> Any:
    """What a scorer says of a text; its own error with the word at which it happened."""
    try:
        return function(pixels, text)
    except Exception as error:
        raise MmfixError(
            f"scorer {name!r} raised {type(error).__name__} for {text!r}: {error}; mend it, or register another"
        ) from error
