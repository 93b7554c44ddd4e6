"""From a caption to normalised tokens with positions: the recipe of CHAIR flavour "wordnet" (OPERA, PAI, HALC).

NLTK's word_tokenize of the lower-cased caption, its tagger over the whole caption as one list, its WordNet lemmatiser
with the tag's part of speech. It lemmatises verbs: "seated" is a seat and thereby a chair. Numbers of this flavour are
not comparable with those of flavour "pattern".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from mmfix_evals.metrics import nltk_data
from mmfix_evals.metrics.chair_text import DOUBLE_QUOTES, SPACE, Token, positions

PARTS_OF_SPEECH = {"J": "a", "V": "v", "N": "n", "R": "r"}
"""First letter of a tag → WordNet's part of speech; anything else counts as a noun."""


class Toolkit(NamedTuple):
    """The two steps that need NLTK's data."""

    tokenize: Callable[[str], Sequence[str]]
    lemmas: Callable[[Sequence[str]], Sequence[str]]


@lru_cache(maxsize=1)
def toolkit() -> Toolkit:
    """NLTK's own. Raises MissingDependency naming the three data packages if one is missing."""
    nltk_data.require("CHAIR flavour 'wordnet'", "; flavour 'pattern' needs no data")
    import nltk

    lemmatizer = nltk.stem.WordNetLemmatizer()

    def lemmas(words: Sequence[str]) -> list[str]:
        tagged = nltk.pos_tag(list(words))
        return [str(lemmatizer.lemmatize(word, PARTS_OF_SPEECH.get(tag[:1], "n"))) for word, tag in tagged]

    return Toolkit(nltk.word_tokenize, lemmas)


@lru_cache(maxsize=8192)
def tokens(caption: str) -> tuple[Token, ...]:
    """The tokens of a caption, lower-cased and lemmatised, with positions in the caption as given.

    Raises MissingDependency if NLTK or its data are not there.
    """
    tools = toolkit()
    lowered = caption.lower()
    words = list(tools.tokenize(lowered))
    back = positions(caption, lowered)
    found = zip(tools.lemmas(words), _places(lowered, words), strict=True)
    if back is None:
        return tuple(Token(word, start, end) for word, (start, end) in found)
    return tuple(Token(word, back[start], back[end - 1] + 1) for word, (start, end) in found)


def _places(text: str, words: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where each token stands: the tokeniser drops blanks only, and rewrites double quotes."""
    point = 0
    for word in words:
        point = SPACE.match(text, point).end()  # type: ignore[union-attr]
        if not text.startswith(word, point) and word in DOUBLE_QUOTES:
            end = point + (1 if text[point : point + 1] == '"' else 2)
        else:
            end = point + len(word)
        yield point, end
        point = end
