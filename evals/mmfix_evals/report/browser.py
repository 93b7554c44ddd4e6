"""Samples side by side: what the baseline said and what a method said, wins and losses first."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmfix_evals import tasks
from mmfix_evals.errors import EvalError
from mmfix_evals.report.source import Reported
from mmfix_evals.scoring import Answers
from mmfix_evals.tasks import Metric, Task
from mmfix_evals.tasks.dialogue import replies

SHOWN = 60
"""Pairs per task and method."""
KEPT_SAME = 10
"""How many of them are left for pairs without a change."""
THUMBNAIL = 160


class Piece(NamedTuple):
    """A part of a text: plain (""), ``right`` or ``wrong``, and what a person reads on hovering."""

    text: str
    kind: str
    title: str = ""


@dataclass(frozen=True)
class Pair:
    """One document with both answers.

    Attributes:
        change: the method's count of mistakes minus the baseline's; below 0 the method did better.
        outcome: ``win``, ``loss`` or ``same`` (``changed`` where the text differs, but not its score).
    """

    run: str
    task: str
    split: str
    doc_id: str
    method: str
    baseline: str
    prompt: str
    truth: str
    before: list[Piece]
    after: list[Piece]
    change: float
    outcome: str
    picture: str = ""


@dataclass(frozen=True)
class Group:
    """The pairs of one run, task and method.

    Attributes:
        wins, losses, changed, same: numbers of all pairs, not only of those shown.
    """

    run: str
    task: str
    method: str
    baseline: str
    wins: int
    losses: int
    changed: int
    same: int
    pairs: list[Pair] = field(default_factory=list)


def groups(runs: Sequence[Reported], baseline: str = "greedy", pictures: bool = True) -> list[Group]:
    """Every (run, task, method) with samples of both arms; captions first, for they show most."""
    found: list[Group] = []
    for run in runs:
        for name, answers in run.answers.items():
            for method in answers.by_method:
                if method != baseline and baseline in answers.by_method:
                    found.append(_group(run, name, answers, method, baseline, pictures))
    return sorted(found, key=lambda group: "mentions" not in columns_of(group))


def columns_of(group: Group) -> Sequence[str]:
    """The columns that a group's task counts."""
    return tasks.get(group.task).columns


def _group(run: Reported, name: str, answers: Answers, method: str, baseline: str, pictures: bool) -> Group:
    judge = Judge(answers)
    rows: list[tuple[float, str, dict[str, Any], dict[str, Any]]] = []
    for split, found in answers.by_method[method].items():
        for doc_id, sample in found.items():
            other = answers.by_method[baseline].get(split, {}).get(doc_id)
            if other is not None:
                change = judge.mistakes(sample) - judge.mistakes(other)
                rows.append((change, _outcome(change, sample, other), sample, other))
    counted = {outcome: sum(row[1] == outcome for row in rows) for outcome in ("win", "loss", "changed", "same")}
    pairs = [
        Pair(
            run=run.label,
            task=name,
            split=sample["split"],
            doc_id=sample["doc_id"],
            method=method,
            baseline=baseline,
            prompt=sample["prompt"],
            truth=judge.truth(sample),
            before=judge.pieces(other),
            after=judge.pieces(sample),
            change=change,
            outcome=outcome,
            picture=thumbnail(answers.task, sample["image"]) if pictures else "",
        )
        for change, outcome, sample, other in _chosen(rows)
    ]
    return Group(run.label, name, method, baseline, counted["win"], counted["loss"], counted["changed"],
                 counted["same"], pairs)  # fmt: skip


def _outcome(change: float, sample: dict[str, Any], other: dict[str, Any]) -> str:
    if change:
        return "win" if change < 0 else "loss"
    return "same" if sample["response"] == other["response"] else "changed"


Row = tuple[float, str, dict[str, Any], dict[str, Any]]


def _chosen(rows: Iterable[Row]) -> list[Row]:
    """Wins and losses in turn, the largest first, so that neither side hides the other; then the rest."""
    by = {outcome: [row for row in rows if row[1] == outcome] for outcome in ("win", "loss", "changed", "same")}
    for outcome in ("win", "loss"):
        by[outcome].sort(key=lambda row: (-abs(row[0]), row[2]["doc_id"]))
    turns: list[Row] = []
    for n in range(max(len(by["win"]), len(by["loss"]))):
        turns += [side[n] for side in (by["win"], by["loss"]) if n < len(side)]
    rest = by["changed"] + by["same"]
    room = SHOWN - min(KEPT_SAME, len(rest))
    return turns[:room] + rest[: SHOWN - min(len(turns), room)]


class Judge:
    """Marks and counts mistakes of one task's samples by the columns that the task has."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.columns = list(answers.task.columns)
        self.metric = self._outcome_metric(answers.task)

    @staticmethod
    def _outcome_metric(task: Task) -> Metric | None:
        return next((metric for metric in task.metrics if metric.outcome and metric.better), None)

    def mistakes(self, sample: dict[str, Any]) -> float:
        """Hallucinated mentions of a caption; 1 for a wrong answer, 0 for a right one."""
        row = self.answers.row(sample)
        if "hallucinated_mentions" in self.columns:
            return float(row[self.columns.index("hallucinated_mentions")])
        if "correct" in self.columns:
            return float(row[self.columns.index("n")] - row[self.columns.index("correct")])
        if self.metric is None or self.metric.outcome is None:
            return 0.0
        value = float(row[self.columns.index(self.metric.outcome)])
        return value if self.metric.better == "lower" else -value

    def truth(self, sample: dict[str, Any]) -> str:
        """What is in the picture, or the right answer, as text."""
        if "ground_truth" in sample:
            return f"in the picture: {', '.join(sample['ground_truth'])}"
        right = sample.get("label", sample.get("labels"))
        return f"right answer: {', '.join(right) if isinstance(right, list) else right}" if right is not None else ""

    def pieces(self, sample: dict[str, Any]) -> list[Piece]:
        """A response, cut where objects are named; the markup is the page's."""
        text = sample["response"]
        if "mentions" in sample:
            return marked(text, sample["mentions"])
        if isinstance(sample.get("labels"), list):
            return [Piece("\n".join(replies(text)), "")]
        if "correct" in self.columns:
            right = self.mistakes(sample) == 0
            return [Piece(text, "right" if right else "wrong", "counted as right" if right else "counted as wrong")]
        return [Piece(text, "")]


def marked(text: str, mentions: Sequence[dict[str, Any]]) -> list[Piece]:
    """A caption cut at its mentions; places that do not fit the text are left out."""
    found, point = [], 0
    for mention in sorted(mentions, key=lambda one: one["start"]):
        start, end = mention["start"], mention["end"]
        if not point <= start < end <= len(text):
            continue
        if start > point:
            found.append(Piece(text[point:start], ""))
        wrong = mention["hallucinated"]
        found.append(
            Piece(text[start:end], "wrong" if wrong else "right", f"{mention['node']}: {'not ' if wrong else ''}there")
        )
        point = end
    return [*found, Piece(text[point:], "")] if point < len(text) else found


_THUMBNAILS: dict[tuple[str, str], str] = {}


def thumbnail(task: Task, name: str) -> str:
    """A small picture as a data URL; empty where the picture is not here."""
    key = (task.name, name)
    if key not in _THUMBNAILS:
        _THUMBNAILS[key] = ""
        with contextlib.suppress(EvalError, OSError, ValueError, KeyError):
            picture = task.image(name).copy()
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            picture.save(buffer, format="JPEG", quality=80)
            _THUMBNAILS[key] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return _THUMBNAILS[key]
