"""A tokenizer for the tiny models that makes words of several tokens: it can only decode."""

from __future__ import annotations

from collections.abc import Sequence

STOPS = (7, 8, 9)  # tokens that are punctuation


def starts(token: int) -> bool:
    """Whether a token begins a word (with a space before it)."""
    return token % 4 != 0 and token not in STOPS


class Speech:
    """Token ids as text: `` w5`` begins a word, ``x8`` continues one, ``.`` is between words; some may be special."""

    def __init__(self, special: Sequence[int] = ()) -> None:
        self.special = special

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        said = [token for token in ids if not (skip_special_tokens and token in self.special)]
        parts = (f" w{t}" if starts(t) else "." if t in STOPS else f"x{t}" for t in said)
        return "".join(parts).lstrip()
