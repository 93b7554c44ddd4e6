"""Numbers of a report that stand in no results file: computed from the samples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmfix_evals.report.source import Reported
from mmfix_evals.scoring import MACRO, Answers

BINS = 10
STATES = {
    "clear": "#009E73",
    "parsers disagree": "#E69F00",
    "no verdict": "#D55E00",
    "empty": "#CC79A7",
    "cut at the token limit": "#56B4E9",
    "failed": "#000000",
}
"""What an answer may be, and its colour; the first that applies, from the bottom up."""
STATES_NOTE = (
    "No verdict: neither or both of yes and no as words. Parsers disagree: one of the published parsers reads the "
    "answer differently. Failed answers are never scored."
)
_OBJECT = re.compile(r"\bthere an? (.+?) in th(?:e|is) ", re.IGNORECASE)


class Bin(NamedTuple):
    """Answers of similar confidence: mean confidence, share of right ones, how many."""

    confidence: float
    accuracy: float
    n: int


def main_split(run: Reported, task: str, metric: str, method: str) -> str | None:
    """The split that stands for a task: the mean of the splits where there is one, else the first."""
    splits = [
        e["split"] for e in run.results["metrics"] if (e["task"], e["metric"], e["method"]) == (task, metric, method)
    ]
    return MACRO if MACRO in splits else splits[0] if splits else None


def tokens_per_second(run: Reported, task: str, method: str) -> float | None:
    """Tokens of all splits over their seconds."""
    found = [e for e in run.results["speed"] if (e["task"], e["method"]) == (task, method)]
    seconds = sum(e["seconds"] for e in found)
    return sum(e["tokens"] for e in found) / seconds if seconds else None


def samples_of(answers: Answers | None, method: str) -> Iterator[dict[str, Any]]:
    """Every sample of a method, all splits."""
    for found in (answers.by_method.get(method, {}) if answers else {}).values():
        yield from found.values()


def hallucinated_by_category(run: Reported, task: str, method: str) -> dict[str, float]:
    """Category → share of captions that invent it; for yes/no questions, share of absent ones that are affirmed."""
    wrong: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    n = 0
    answers = run.answers.get(task)
    for sample in samples_of(answers, method):
        n += 1
        if "mentions" in sample:
            wrong.update({mention["node"] for mention in sample["mentions"] if mention["hallucinated"]})
        elif sample.get("label") == "no" and "verdicts" in sample and answers is not None:
            named = _OBJECT.search(sample["prompt"])
            if named:
                asked[named[1]] += 1
                wrong[named[1]] += sample["verdicts"].get(answers.flavour) == "yes"
    if asked:
        return {name: wrong[name] / asked[name] for name in asked if asked[name] >= 3 and wrong[name]}
    return {name: count / n for name, count in wrong.items()} if n else {}


def hallucination_unit(task: str) -> str:
    """What the shares of :func:`hallucinated_by_category` are shares of."""
    from mmfix_evals import tasks

    columns = tasks.get(task).columns
    if "mentions" in columns:
        return "Share of the captions that name it although it is not there."
    return "Share of the questions about it, where it is not there, that are answered yes (asked at least three times)."


def reliability(run: Reported, task: str, method: str) -> list[Bin]:
    """Bins of answers by confidence; empty where none was recorded."""
    answers = run.answers.get(task)
    if answers is None or "correct" not in answers.task.columns:
        return []
    place = list(answers.task.columns).index("correct")
    found: dict[int, list[tuple[float, float]]] = {}
    for sample in samples_of(answers, method):
        sure = sample.get("confidence")
        if isinstance(sure, float) and 0 <= sure <= 1:
            right = float(answers.row(sample)[place])
            found.setdefault(min(BINS - 1, int(sure * BINS)), []).append((sure, right))
    return [
        Bin(sum(c for c, _ in pairs) / len(pairs), sum(r for _, r in pairs) / len(pairs), len(pairs))
        for _, pairs in sorted(found.items())
    ]


def calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: mean distance between confidence and accuracy, weighted by answers."""
    total = sum(one.n for one in bins)
    return sum(one.n * abs(one.confidence - one.accuracy) for one in bins) / total if total else 0.0


def answer_states(run: Reported, task: str, method: str) -> dict[str, float]:
    """State of :data:`STATES` → share of the answers."""
    counted: Counter[str] = Counter(_state(sample) for sample in samples_of(run.answers.get(task), method))
    counted["failed"] += sum((e["task"], e["method"]) == (task, method) for e in run.results.get("errors", ()))
    total = sum(counted.values())
    return {state: count / total for state, count in counted.items() if count} if total else {}


def _state(sample: dict[str, Any]) -> str:
    text = sample.get("response") or ""
    verdicts = sample.get("verdicts")
    read = list(verdicts) if isinstance(verdicts, list) else [verdicts] if isinstance(verdicts, dict) else []
    if not text.strip():
        return "empty"
    if any(one.get("strict3way") == "unparsed" for one in read):
        return "no verdict"
    # lmms wants the bare word: what it alone cannot read is no disagreement about the answer.
    if any(len(set(one.values()) - {"unparsed"}) > 1 for one in read):
        return "parsers disagree"
    return "cut at the token limit" if sample.get("finish_reason") == "length" else "clear"
