"""One way to say "unknown name": what was given, the choices, and what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, given: str, choices: Iterable[str]) -> str:
    """``unknown task 'tinyworld-pop': did you mean tinyworld-pope? Choose one of …``"""
    options = sorted(choices)
    close = get_close_matches(given, options, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown {kind} {given!r}: {hint}Choose one of: {', '.join(options)}"
