"""AMBER, one response at a time: which nouns are hallucinated, and whether a yes/no answer is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmfix_evals.metrics import amber_text
from mmfix_evals.metrics.amber_text import Similarity
from mmfix_evals.metrics.amber_truth import Amber
from mmfix_evals.metrics.parsers import strict3way

THRESHOLD = 0.8
PARSERS: dict[str, Callable[[str], str]] = {
    "official": lambda text: {"Yes": "yes", "No": "no"}.get(text, "unparsed"),
    "strict3way": strict3way,
}
"""How a discriminative answer is read; `official` takes exactly "Yes" and "No", so that "No." is wrong."""


def noun_counts(
    nouns: Sequence[str],
    item: Mapping[str, Any],
    amber: Amber,
    similar: Similarity = amber_text.exact,
    threshold: float = THRESHOLD,
) -> dict[str, int]:
    """Counts of one description, keys as in `GENERATIVE_KEYS`; sums of them give every metric.

    A noun that is, or is like, a truth word or an association of one is fine; the first such entry tells which truth
    word it covers, associations coming first. Otherwise it is hallucinated. Unless it is exactly in the truth, it hits
    the hallucination target of the first entry it equals and of the first entry it is like. Globally safe nouns only
    count into the number of nouns; nouns outside the vocabulary do not count at all.

    Args:
        nouns: lemmatised nouns, repeated ones too.
        item: annotation with the word lists `truth` and `hallu`.
        amber: associations and safe words.
        similar: how alike two words are; above `threshold` one is like the other.
    """
    kept = [noun for noun in nouns if noun in amber.vocabulary]
    truth, targets = _owned(item["truth"], amber), _owned(item["hallu"], amber)
    covered: set[int] = set()
    hit: set[int] = set()
    hallucinated = 0
    for noun in kept:
        if noun in amber.safe:
            continue
        named = _owner(truth, noun, amber_text.exact, 0)
        if named:
            covered |= named
            continue
        hit |= _owner(targets, noun, amber_text.exact, 0) | _owner(targets, noun, similar, threshold)
        alike = _owner(truth, noun, similar, threshold)
        covered |= alike
        hallucinated += not alike
    return {
        "hallucinated": hallucinated,
        "nouns": len(kept),
        "covered": len(covered),
        "truth": len(item["truth"]),
        "hallucinated_response": int(hallucinated > 0),
        "responses": 1,
        "hit": len(hit),
        "targets": len(item["hallu"]),
    }


def _owned(words: Sequence[str], amber: Amber) -> list[tuple[str, int]]:
    """The associations of word 0, of word 1, …, then the words, each with the index of the word it stands for."""
    associated = [(other, owner) for owner, word in enumerate(words) for other in amber.associations[word]]
    return associated + [(word, owner) for owner, word in enumerate(words)]


def _owner(entries: list[tuple[str, int]], noun: str, similar: Similarity, threshold: float) -> set[int]:
    """The owner of the first entry that is like `noun`; empty if there is none."""
    return next(({owner} for word, owner in entries if similar(noun, word) > threshold), set())


def answer_counts(truth: str, text: str, parser: str = "official") -> dict[str, int]:
    """Counts of one yes/no answer, keys as in `COUNT_KEYS`; sums of them give every metric.

    Args:
        truth: "yes" or "no".
        text: the raw answer.
        parser: one of `PARSERS`; unparsed answers are wrong.
    """
    verdict = PARSERS[parser](text)
    return {
        "correct": int(verdict == truth),
        "n": 1,
        "right_no": int(verdict == truth == "no"),
        "answered_no": int(verdict == "no"),
        "truth_no": int(truth == "no"),
        "unparsed": int(verdict == "unparsed"),
    }
