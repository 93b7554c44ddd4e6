"""From a caption to normalised tokens with positions: the data-free recipe of CHAIR flavour "pattern".

Equals `nltk.word_tokenize` followed by `pattern.en.singularize` on every token of the lower-cased caption, without
NLTK data and without CLiPS Pattern, neither of which can be installed by pip alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from mmfix_evals.errors import MissingDependency
from mmfix_evals.metrics.abbreviations import ABBREVIATIONS
from mmfix_evals.metrics.coco_words import DOUBLE_WORDS

# A run of non-space characters that holds a possible end of sentence; possessive, so linear in the text.
RUN_WITH_END = re.compile(r"(?<!\S)[^\s.?!]*+[.?!]\S*")
SPACE = re.compile(r"\s*")
NUMBER = re.compile(r"-?[.,]?\d[\d,.\-]*")
CLOSING = ")]}\"'»”’"
OPENING = "(\"'[{`“‘"
DOUBLE_QUOTES = ("``", "''")

# Sentences for which NLTK's thirty substitutions come down to splitting off commas and the last period. They are
# most of a caption and five times faster this way; a test compares both ways. Words that NLTK cuts are excluded.
PLAIN_SENTENCE = re.compile(
    r"(?!.*\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b)(?:[a-z]++(?:-[a-z]++)*+,?+ )*+[a-z]++(?:-[a-z]++)*+\.?+"
)
PLAIN_TOKEN = re.compile(r"[a-z-]+|[,.]")
# The same with semicolons and English contractions; NLTK cuts "gonna" in "gonnan't" too. Looking ahead for "n't" is
# slower, so plain sentences keep their pattern.
_WORD = r"[a-z]++(?:-[a-z]++)*+(?:(?<=[a-z]n)'t|'(?:s|m|d|ll|re|ve))?+"
CONTRACTED_SENTENCE = re.compile(rf"(?!.*\b(?:cannot|gimme|gonna|gotta|lemme|wanna))(?:{_WORD}[,;]?+ )*+{_WORD}\.?+")
CONTRACTED_TOKEN = re.compile(r"n't|'[a-z]+|[a-z-]+?(?=n't)|[a-z-]+|[,;.]")

FLAVOUR = "pattern"
UNCHANGED_ENDINGS = ("collies", "doggies", "cookies", "veggies")  # Pattern's "-ie" words + s
BUS_ENDINGS = ("minibuses", "airbuses")
FIRST_WORDS = frozenset(pair.split(" ")[0] for pair in DOUBLE_WORDS)
# Where textblob and Pattern disagree about a whole word.
PATTERN_WORDS = {"as": "as", "christmas": "christmas", "jeans": "jean"}


class Token(NamedTuple):
    """A normalised word and the part of the caption it stands for, `caption[start:end]`."""

    word: str
    start: int
    end: int


@lru_cache(maxsize=8192)
def tokens(caption: str) -> tuple[Token, ...]:
    """The tokens of a caption, lower-cased and in the singular, with positions in the caption as given.

    Raises MissingDependency if nltk or textblob is not installed.
    """
    lowered = caption.lower()
    back = positions(caption, lowered)
    found = [
        Token(singular(word), start + first, start + last)
        for start, end in sentences(lowered)
        for word, first, last in sentence_tokens(lowered[start:end])
    ]
    if back is not None:
        found = [Token(word, back[start], back[end - 1] + 1) for word, start, end in found]
    return tuple(found)


@lru_cache(maxsize=8192)
def words(caption: str) -> tuple[str, ...]:
    """The words of `tokens(caption)`, which are all that counting needs: positions cost half of the time."""
    lowered = caption.lower()
    return tuple(singular(word) for start, end in sentences(lowered) for word in sentence_words(lowered[start:end]))


def merge_double_words(single: Sequence[Token]) -> list[Token]:
    """Join consecutive tokens that form one word, from left to right, each token used once."""
    joined = _joined([token.word for token in single])
    if not joined:
        return list(single)
    return [
        Token(joined[i], token.start, single[i + 1].end) if i in joined else token
        for i, token in enumerate(single)
        if i - 1 not in joined
    ]


def merge_words(single: Sequence[str]) -> Sequence[str]:
    """`merge_double_words` of words without positions."""
    joined = _joined(single)
    if not joined:
        return single
    return [joined.get(i, word) for i, word in enumerate(single) if i - 1 not in joined]


def _joined(single: Sequence[str]) -> dict[int, str]:
    """Place of the first half of every double word → the double word."""
    found: dict[int, str] = {}
    for i, word in enumerate(single[:-1]):
        if word in FIRST_WORDS and i - 1 not in found:
            double = DOUBLE_WORDS.get(f"{word} {single[i + 1]}")
            if double is not None:
                found[i] = double
    return found


def positions(caption: str, lowered: str) -> list[int] | None:
    """Caption index of every lower-cased character; None if lower-casing kept the length (it never shrinks)."""
    if len(lowered) == len(caption):
        return None
    return [index for index, character in enumerate(caption) for _ in character.lower()]


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of every sentence of a lower-cased text.

    A sentence ends with a run of non-space characters that ends in ".", "?" or "!" (closing quotes and brackets
    aside), unless the run is an abbreviation, an initial, a number or ends in "..".
    """
    start = SPACE.match(text).end()  # type: ignore[union-attr]
    for run in RUN_WITH_END.finditer(text):
        if _closes(run.group()):
            yield start, run.end()
            start = SPACE.match(text, run.end()).end()  # type: ignore[union-attr]
    rest = text[start:].rstrip()
    if rest:
        yield start, start + len(rest)


def _closes(run: str) -> bool:
    core = run.rstrip(CLOSING)
    if not core.endswith((".", "?", "!")):
        return False
    if not core.endswith(".") or "?" in core or "!" in core:
        return True
    word = core[:-1].lstrip(OPENING)
    return not (
        word in ABBREVIATIONS
        or word.rpartition("-")[2] in ABBREVIATIONS
        or (len(word) == 1 and "a" <= word <= "z")
        or NUMBER.fullmatch(word)
        or core.endswith("..")
    )


def sentence_tokens(sentence: str) -> Iterable[tuple[str, int, int]]:
    """NLTK's tokens of one lower-cased sentence with their positions in it."""
    pattern = _token_pattern(sentence)
    if pattern is None:
        return _library_tokens(sentence)
    return [(match.group(), *match.span()) for match in pattern.finditer(sentence)]


def sentence_words(sentence: str) -> list[str]:
    """`sentence_tokens` without the positions."""
    pattern = _token_pattern(sentence)
    found: list[str] = _tokenizer().tokenize(sentence) if pattern is None else pattern.findall(sentence)
    return found


def _token_pattern(sentence: str) -> re.Pattern[str] | None:
    """What finds the tokens of a sentence in one pass; None: it takes the library's substitutions."""
    if PLAIN_SENTENCE.fullmatch(sentence):
        return PLAIN_TOKEN
    return CONTRACTED_TOKEN if CONTRACTED_SENTENCE.fullmatch(sentence) else None


def _library_tokens(sentence: str) -> Iterator[tuple[str, int, int]]:
    """The library only inserts spaces and rewrites double quotes: a token begins at the next non-space character."""
    point = 0
    for token in _tokenizer().tokenize(sentence):
        point = SPACE.match(sentence, point).end()  # type: ignore[union-attr]
        if not sentence.startswith(token, point) and token in DOUBLE_QUOTES:
            end = point + (1 if sentence[point] == '"' else 2)
        else:
            end = point + len(token)
        yield token, point, end
        point = end


@lru_cache(maxsize=65536)
def singular(token: str) -> str:
    """`pattern.en.singularize` of a lower-cased token, by way of textblob's copy of it and the known differences.

    Its blind spots are part of the metric: "bus" becomes "bu", "glass" "glas", "tennis" "tenni".
    """
    if token.endswith(UNCHANGED_ENDINGS):
        return token
    if token.endswith(BUS_ENDINGS):
        return token.removesuffix("es")
    return PATTERN_WORDS.get(token) or _singularize()(token)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    try:
        from nltk.tokenize.destructive import NLTKWordTokenizer
    except ImportError as error:
        raise MissingDependency(
            f"CHAIR needs the tokeniser of nltk, which cannot be imported ({error}); run: pip install 'nltk>=3.9'"
        ) from None
    return NLTKWordTokenizer()


@lru_cache(maxsize=1)
def _singularize() -> Callable[[str], str]:
    try:
        from textblob.en.inflect import singularize
    except ImportError as error:
        raise MissingDependency(
            f"CHAIR needs textblob, which cannot be imported ({error}); run: pip install 'textblob>=0.19'"
        ) from None
    return singularize  # type: ignore[no-any-return]
