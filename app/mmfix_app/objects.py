"""Objects named in an answer, and what may be said of each.

``supported``: the picture is known to hold it. ``contradicted``: the picture's contents are known and do not hold it.
``unknown``: nothing is known of the picture. Words are found as CHAIR finds them, over COCO's 80 objects.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mmfix_evals.metrics.chair import Chair

Verdict = Literal["supported", "contradicted", "unknown"]
WORDS: dict[str, str] = {
    "supported": "in the picture",
    "contradicted": "not in the picture",
    "unknown": "not checked: nothing is known about this picture",
}


@dataclass(frozen=True)
class Named:
    """One object named in a text, ``text[start:end]``."""

    name: str
    start: int
    end: int
    verdict: Verdict


@lru_cache(maxsize=1)
def _chair() -> Chair:
    return Chair()


def named(text: str, contents: Collection[str] | None) -> list[Named]:
    """The objects of a text in order; `contents` are the known ones of the picture, or None."""
    found = []
    for mention in _chair().mentions(text):
        verdict: Verdict = "unknown"
        if contents is not None:
            verdict = "supported" if mention.node in contents else "contradicted"
        found.append(Named(mention.node, mention.start, mention.end, verdict))
    return found


def by_verdict(text: str, contents: Collection[str] | None) -> dict[str, list[str]]:
    """Verdict → the distinct objects of a text, in the order in which they are first named."""
    found: dict[str, list[str]] = {"supported": [], "contradicted": [], "unknown": []}
    for one in named(text, contents):
        if one.name not in found[one.verdict]:
            found[one.verdict].append(one.name)
    return found
