"""How a free-text answer becomes yes, no or unparsed: the rules of five published scorers and a strict one.

Every rule is a function `(text, label) -> "yes" | "no" | "unparsed"`; only `vcd` looks at the label. The published
rules are kept with their faults, because published numbers depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from mmfix_evals.errors import UsageError

Verdict = Literal["yes", "no", "unparsed"]
Parser = Callable[[str, str | None], Verdict]

APOSTROPHES = "'’‘"
NEGATIVE_WORDS = {"No", "not", "no"}
# In this order; deleting or blanking one changes nothing about the test for the next.
VLMEVAL_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
VLMEVAL_COMMA_IN_NUMBER = re.compile(r"\d,\d")
VLMEVAL_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
VLMEVAL_MAX_PERIODS = 32  # upstream passes a flag (32) where `count` belongs


def official(text: str, label: str | None = None) -> Verdict:
    """AoiDragon/POPE `evaluate.py`, LLaVA `eval_pope.py`: "no" if a word of the first sentence is No, not or no.

    Keeps what precedes the first ".", deletes ",", splits at single spaces. Everything unmatched is "yes":
    the empty answer, "NO", "Nope", "isn't", "no!".
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if NEGATIVE_WORDS.intersection(words) else "yes"


def opera(text: str, label: str | None = None) -> Verdict:
    """The recorder of OPERA and PAI: all "." and "," deleted; "no" if a word is No, not, no, NO or ends in n't."""
    words = text.replace(".", "").replace(",", "").split(" ")
    found = any(word in NEGATIVE_WORDS or word == "NO" or word.endswith("n't") for word in words)
    return "no" if found else "yes"


def vcd(text: str, label: str | None = None) -> Verdict:
    """VCD `eval_pope.py`: the answer is right if the label is a substring of it, else it is the opposite of the label.

    So "know" and "snowboard" are a correct no, "yes no" is right for both labels, garbage wrong for both.
    Raises UsageError without a label.
    """
    if label is None:
        raise UsageError(
            "parser 'vcd' needs the label of the question; pass label='yes' or 'no', or use another parser"
        )
    lowered = text.lower().strip()
    if label.lower().strip() == "yes":
        return "yes" if "yes" in lowered else "no"
    return "no" if "no" in lowered else "yes"


def lmms(text: str, label: str | None = None) -> Verdict:
    """lmms-eval: exactly "yes" or "no" after lower-casing and stripping; "Yes." is unparsed and therefore wrong."""
    return _exact(text.lower().strip())


def vlmeval(text: str, label: str | None = None) -> Verdict:
    """VLMEvalKit without a judge: punctuation handled as in VQA scoring, then "yes" or "no" among the words, not both.

    A punctuation character is deleted everywhere if it stands next to a space somewhere, or if the text contains
    digit-comma-digit; otherwise it becomes a space.
    """
    lowered = text.lower()
    has_number = VLMEVAL_COMMA_IN_NUMBER.search(lowered) is not None
    cleaned = lowered
    for mark in VLMEVAL_PUNCTUATION:
        delete = has_number or f"{mark} " in lowered or f" {mark}" in lowered
        cleaned = cleaned.replace(mark, "" if delete else " ")
    return _only_one(VLMEVAL_PERIOD.sub("", cleaned, count=VLMEVAL_MAX_PERIODS).split())


def strict3way(text: str, label: str | None = None) -> Verdict:
    """mmfix: "yes" or "no" as a whole word, and only one of them; everything else is unparsed.

    A word is a run of Unicode letters and apostrophes (plain or typographic), lower-cased.
    """
    return _only_one("".join(c if c.isalpha() or c in APOSTROPHES else " " for c in text.lower()).split())


def _exact(text: str) -> Verdict:
    if text == "yes":
        return "yes"
    return "no" if text == "no" else "unparsed"


def _only_one(words: list[str]) -> Verdict:
    yes, no = "yes" in words, "no" in words
    if yes == no:
        return "unparsed"
    return "yes" if yes else "no"


PARSERS: dict[str, Parser] = {
    "official": official,
    "opera": opera,
    "vcd": vcd,
    "lmms": lmms,
    "vlmeval": vlmeval,
    "strict3way": strict3way,
}
NEVER_UNPARSED = frozenset({"official", "opera", "vcd"})
"""Parsers that turn every answer into yes or no; what strict3way cannot parse is reported for them instead."""


def parse(text: str, parser: str = "official", label: str | None = None) -> Verdict:
    """The verdict of one answer under the named parser.

    Args:
        text: the raw answer.
        parser: one of `PARSERS`.
        label: the right answer, "yes" or "no"; only `vcd` uses it (and needs it).

    Raises:
        UsageError: unknown parser, or `vcd` without a label.
    """
    if parser not in PARSERS:
        raise UsageError(f"unknown parser {parser!r}; choose one of {', '.join(PARSERS)}")
    return PARSERS[parser](text, label)


def is_unparsed(text: str, parser: str, verdict: Verdict) -> bool:
    """Whether an answer counts into `n_unparsed`: by its parser, or by strict3way where that never says so."""
    return (strict3way(text) if parser in NEVER_UNPARSED else verdict) == "unparsed"
