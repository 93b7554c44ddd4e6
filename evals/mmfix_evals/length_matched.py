"""CHAIR at equal length: a method that says less hallucinates less; here nobody says less.

Of the two captions of a picture, one by the baseline and one by a method, the longer is cut to the length of the
shorter: with k = min(tokens of one, tokens of the other), the first k tokens of each are scored again. Tokens are those
of CHAIR's ``length``: the words and punctuation marks of the caption's flavour, a double word ("hot dog", "fire
hydrant") counting once, so that no cut falls inside a named object. Both sides then have the same mean length, and
differ in what they say in it. Each pair of methods has cuts of its own; "seat" beside "toilet" is judged anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmfix_evals.errors import UsageError
from mmfix_evals.samples import Sample
from mmfix_evals.scoring import Answers, Settings, difference_entries, metric_entries
from mmfix_evals.tasks.chair import LIMIT, ChairTask

Entry = dict[str, Any]
METRICS = ("chair_s", "chair_i", "recall", "length")


def matches(answers: Answers) -> bool:
    """Whether a task's answers are captions that CHAIR scores."""
    return isinstance(answers.task, ChairTask)


def matched_entries(a: Answers, b: Answers, pairs: Sequence[tuple[str, str]], settings: Settings) -> list[Entry]:
    """Paired differences at equal length, for pairs of (method in a, method in b).

    Returns:
        Per pair, split and metric of :data:`METRICS` an entry as of :func:`difference_entries`, and in it:
        ``value`` and ``baseline_value`` on the cut captions, with their intervals ``…_low`` and ``…_high``;
        ``n_cut`` and ``baseline_n_cut``, the captions that were cut; ``uncut_difference`` of the captions as they were.

    Raises:
        UsageError: the answers are no captions.
        DataError: as of :func:`difference_entries`.
    """
    if not (matches(a) and matches(b)):
        raise UsageError(f"task {a.task.name} has no captions: lengths are matched where CHAIR is scored")
    entries = []
    for one, other in pairs:
        left, right = cut(a, b, one, other)
        uncut = {(e["split"], e["metric"]): e["difference"] for e in difference_entries(a, b, [(one, other)], settings)}
        sides = {"value": _values(right, settings), "baseline_value": _values(left, settings)}
        for entry in difference_entries(left, right, [(one, other)], settings):
            place = (entry["split"], entry["metric"])
            if entry["metric"] in METRICS:
                for name, values in sides.items():
                    found = values[place]
                    entry |= {name: found["value"], f"{name}_low": found["ci_low"], f"{name}_high": found["ci_high"]}
                entry["n_cut"] = _count_cut(b, right, other, entry["split"])
                entry["baseline_n_cut"] = _count_cut(a, left, one, entry["split"])
                entry["uncut_difference"] = uncut[place]
                entries.append(entry)
    return entries


def cut(a: Answers, b: Answers, one: str, other: str) -> tuple[Answers, Answers]:
    """The captions of method ``one`` in a and ``other`` in b that are about the same documents, cut to equal length."""
    left: dict[str, dict[str, Sample]] = {}
    right: dict[str, dict[str, Sample]] = {}
    for split, mine in a.by_method[one].items():
        theirs = b.by_method[other].get(split, {})
        for doc in mine:
            if doc in theirs:
                limit = min(_tokens(a, mine[doc]), _tokens(b, theirs[doc]))
                left.setdefault(split, {})[doc] = {**mine[doc], LIMIT: limit}
                right.setdefault(split, {})[doc] = {**theirs[doc], LIMIT: limit}
    return (
        Answers(a.task, a.flavour, a.data_split, {one: left}),
        Answers(b.task, b.flavour, b.data_split, {other: right}),
    )


def _tokens(answers: Answers, sample: Sample) -> int:
    return int(answers.row(sample)[list(answers.task.columns).index("tokens")])


def _values(answers: Answers, settings: Settings) -> dict[tuple[str, str], Entry]:
    return {(entry["split"], entry["metric"]): entry for entry in metric_entries(answers, settings)}


def _count_cut(whole: Answers, shortened: Answers, method: str, split: str) -> int:
    """How many captions have more tokens than are scored."""
    full, found = whole.by_method[method][split], shortened.by_method[method][split]
    return sum(_tokens(whole, full[doc]) > sample[LIMIT] for doc, sample in found.items())
