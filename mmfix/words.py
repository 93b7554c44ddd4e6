"""Words of an answer: which one a token ends, and which tokens it is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\w+")  # letters, digits and underscores
_LAST = re.compile(r"\w+\Z")


@dataclass(frozen=True)
class Word:
    """A word of an answer: its text, and the number of tokens before those that it is made of."""

    text: str
    start: int


def ended(decode: Callable[[Sequence[int]], str], said: Sequence[int], token: int, last: bool) -> Word | None:
    """The word at the end of what was said, if the next token ends it; None where it goes on or there is none.

    Args:
        decode: token ids → text without special tokens.
        said: tokens up to now.
        token: the next one; last: whether the answer ends with it.
    """
    text = decode(said)
    word = _LAST.search(text)
    if word is None:
        return None
    longer = decode([*said, token])
    now = _WORD.match(longer, word.start())
    if now is None or now.group() != word.group() or (longer == text and not last):
        return None
    start = len(said) - 1
    while start > 0 and len(decode(said[:start])) > word.start():
        start -= 1
    return Word(word.group(), start)
