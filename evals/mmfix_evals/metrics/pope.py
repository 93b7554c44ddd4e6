"""POPE: yes/no questions about objects. Positive class "yes".

precision = TP/(TP+FP), recall = TP/(TP+FN), F1 = 2PR/(P+R), accuracy = (TP+TN)/n, yes ratio = predicted yes/n.
A ratio with an empty denominator is None with a warning. Paper: Li et al. 2023, arXiv:2305.10355.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError
from mmfix_evals.metrics.intervals import Rows, grouped, intervals, macro_intervals, method, units
from mmfix_evals.metrics.parsers import NEVER_UNPARSED, PARSERS, Verdict, is_unparsed, parse
from mmfix_evals.metrics.pope_match import answer_texts, label_of, question_labels

__all__ = ["COUNT_KEYS", "METRICS", "PARSERS", "PopeScore", "counts", "parse", "score", "score_files", "verdicts"]

COUNT_KEYS = ("tp", "fp", "tn", "fn", "n", "n_yes", "n_unparsed", "correct")
"""Order of the columns of a count matrix `[..., 8]`; see `counts`."""

Counts = NDArray[np.float64]


def accuracy(c: Counts) -> Counts:
    """(TP + TN) / n of counts `[..., 8]`; NaN if n = 0."""
    return stats.ratio(c[..., 7], c[..., 4])


def precision(c: Counts) -> Counts:
    """TP / (TP + FP) of counts `[..., 8]`; NaN if nothing is predicted yes."""
    return stats.ratio(c[..., 0], c[..., 0] + c[..., 1])


def recall(c: Counts) -> Counts:
    """TP / (TP + FN) of counts `[..., 8]`; NaN without such answers."""
    return stats.ratio(c[..., 0], c[..., 0] + c[..., 3])


def f1(c: Counts) -> Counts:
    """2PR / (P + R) of counts `[..., 8]`; NaN if P or R is undefined or both are 0."""
    p, r = precision(c), recall(c)
    return stats.ratio(2 * p * r, p + r)


def yes_ratio(c: Counts) -> Counts:
    """Share of answers (not of labels) that are "yes", of counts `[..., 8]`."""
    return stats.ratio(c[..., 5], c[..., 4])


METRICS: dict[str, Callable[[Counts], Counts]] = {
    "accuracy": accuracy,
    "precision": precision,
    "recall": recall,
    "f1": f1,
    "yes_ratio": yes_ratio,
}


@dataclass(frozen=True)
class PopeScore:
    """Scores as unrounded fractions (None: undefined), counts, and what else must be said.

    Attributes:
        n_unparsed: answers without a verdict; for official, opera and vcd, which never say so, the answers in which
            strict3way finds neither or both of yes and no.
        counts: TP, FP, … as in `COUNT_KEYS`.
        rows: the image of every answer (the question itself where images are not stated) and its counts.
        upstream: what the published script of this parser prints, under its own names and with its own faults
            (zeros for undefined ratios, lmms-eval's yes ratio of the labels); None where that script raises.
    """

    accuracy: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float | None
    n: int
    n_unparsed: int
    parser: str = "official"
    warnings: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    upstream: Mapping[str, float | None] = field(default_factory=dict)
    rows: Rows = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the metrics, `n`, `n_unparsed`, `parser`, `warnings`, `counts`, `upstream`, `intervals`."""
        own = {name: getattr(self, name) for name in (*METRICS, "n", "n_unparsed", "parser")}
        said = {"warnings": list(self.warnings), "counts": dict(self.counts), "upstream": dict(self.upstream)}
        return own | said | {"intervals": intervals(grouped(self.rows, COUNT_KEYS), COUNT_KEYS, METRICS, self.n)}


def counts(label: str | int, text: str, parser: str = "official") -> dict[str, int]:
    """Counts of one answer, keys as in `COUNT_KEYS`; sums of them give every metric.

    Unparsed answers are wrong. With label yes they are an FN (except under `lmms`, which leaves them out of recall);
    with label no they are neither TN nor FP. `n_unparsed` is described at `PopeScore`.
    """
    right = label_of(label)
    if right is None:
        raise DataError(f"label {label!r} is neither 'yes' nor 'no'; correct the question")
    verdict = parse(text, parser, right)
    positive = right == "yes"
    correct = verdict == right
    return {
        "tp": int(positive and correct),
        "fp": int(not positive and verdict == "yes"),
        "tn": int(not positive and correct),
        "fn": int(positive and (verdict == "no" or (verdict == "unparsed" and parser != "lmms"))),
        "n": 1,
        "n_yes": int(verdict == "yes"),
        "n_unparsed": int(is_unparsed(text, parser, verdict)),
        "correct": int(correct),
    }


def verdicts(text: str, label: str) -> dict[str, Verdict]:
    """The verdict of every parser for one answer, to be stored beside the raw text."""
    return {name: parse(text, name, label) for name in PARSERS}


def score(
    questions: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], parser: str = "official"
) -> PopeScore:
    """Score the answers to one question file.

    Args:
        questions: records with `label` ("yes" or "no") and, if the answers have one, `question_id`.
        answers: records with the raw answer under `answer`, `text` or `ans`, matched by `question_id`;
            by order if no answer has an id, and then as many as there are questions.
        parser: one of `PARSERS`.

    Raises:
        DataError: missing, repeated or unknown ids, different counts, a bad label or answer; names the place.
        UsageError: unknown parser.
    """
    warnings: list[str] = []
    parse("", parser, "no")  # an unknown parser is refused before the files are looked at
    labels = question_labels(questions)
    texts = answer_texts(questions, answers, warnings)
    drawn = units(questions, "image")
    rows = [(unit, counts(label, text, parser)) for unit, label, text in zip(drawn, labels, texts, strict=True)]
    return _total(rows, labels, parser, warnings)


def _total(rows: Rows, labels: list[str], parser: str, warnings: list[str]) -> PopeScore:
    summed = {key: int(sum(row[key] for _, row in rows)) for key in COUNT_KEYS}
    vector = np.array([summed[key] for key in COUNT_KEYS], dtype=np.float64)
    values = {name: stats.value(metric, vector) for name, metric in METRICS.items()}
    warnings += [f"{name} is undefined: {UNDEFINED[name]}" for name, value in values.items() if value is None]
    if summed["n_unparsed"]:
        warnings.append(_unparsed_warning(rows, summed, parser))
    return PopeScore(
        **values,
        n=summed["n"],
        n_unparsed=summed["n_unparsed"],
        parser=parser,
        warnings=tuple(warnings),
        counts=summed,
        upstream=upstream(values, summed, labels, parser),
        rows=tuple(rows),
    )


UNDEFINED = {
    "accuracy": "there are no answers",
    "precision": "no answer was counted as yes",
    "recall": "no question with label yes was answered",
    "f1": "precision or recall is undefined, or both are 0",
    "yes_ratio": "there are no answers",
}


def _unparsed_warning(rows: Rows, summed: Mapping[str, int], parser: str) -> str:
    start = f"{summed['n_unparsed']} of {summed['n']} answers do not contain exactly one of the words yes and no"
    if parser in NEVER_UNPARSED:
        silent = int(sum(row["n_unparsed"] and row["n_yes"] for _, row in rows))
        return f"{start}; parser {parser} counts {silent} of them as yes"
    return f"{summed['n_unparsed']} of {summed['n']} answers could not be parsed and count as wrong"


def upstream(
    values: Mapping[str, float | None], summed: Mapping[str, int], labels: Sequence[str], parser: str
) -> dict[str, float | None]:
    """What the published script of `parser` prints for these counts (see `PopeScore.upstream`)."""
    p, r, f, a, y = (values[name] for name in ("precision", "recall", "f1", "accuracy", "yes_ratio"))
    if parser in ("official", "opera"):
        return {"Accuracy": a, "Precision": p, "Recall": r, "F1 score": f, "Yes ratio": y}
    if parser == "vcd":
        return {"Precision": p, "Recall": r, "F1": f, "Accuracy": a, "yes": y, "unknow": 0.0 if labels else None}
    zero = {"p": p or 0.0, "r": r or 0.0, "f": f or 0.0, "a": a or 0.0}
    if parser == "lmms":
        of_labels = labels.count("yes") / len(labels) if labels else 0.0
        return {
            "accuracy": zero["a"],
            "precision": zero["p"],
            "recall": zero["r"],
            "f1": zero["f"],
            "yes_ratio_of_labels": of_labels,
        }
    if parser == "vlmeval":
        names = {"Overall": "f", "acc": "a", "precision": "p", "recall": "r"}
        return {name: zero[key] * 100 for name, key in names.items()}
    return {}


def macro_mean(scores: Mapping[str, PopeScore], metric: str = "f1") -> float | None:
    """Plain mean of one metric over splits (LLaVA's "POPE 85.9"); None if a split's value is undefined."""
    found = [getattr(score, metric) for score in scores.values()]
    return None if not found or None in found else sum(found) / len(found)


def score_files(
    questions_path: str | os.PathLike[str], answers_path: str | os.PathLike[str], parser: str = "official"
) -> dict[str, Any]:
    """Score an answers file against a question file (JSON Lines, gzip allowed).

    If the questions carry a `category` with several values, each category is scored too (`splits`) together with
    the macro mean of F1 over them (`macro_f1`), because one mixed number hides the splits.

    Returns:
        `PopeScore.to_dict()` with `questions_sha256`, `answers_sha256`, `interval_method`, and `splits` and `macro_f1`
        as said.
    """
    questions, answers = flat(files.read_rows(questions_path)), files.read_rows(answers_path)
    if not questions:
        raise DataError(f"{questions_path}: contains no questions; give a POPE question file")
    total = score(questions, answers, parser)
    result = total.to_dict()
    result["questions_sha256"] = files.sha256(questions_path)
    result["answers_sha256"] = files.sha256(answers_path)
    result["interval_method"] = method("image", units(questions, "image"), "question")
    misspelt = sum("imange" in str(question.get("text", "")) for question in questions)
    if misspelt:
        result["warnings"].append(
            f"{misspelt} questions contain 'imange': an older POPE version, not comparable with the current one"
        )
    categories = sorted({str(question["category"]) for question in questions if "category" in question})
    if len(categories) > 1:
        splits = _by_category(questions, total, categories)
        result["splits"] = {name: part.to_dict() for name, part in splits.items()}
        result["macro_f1"] = macro_mean(splits)
        result["intervals"] |= _macro_interval(splits, total.n)
        result["warnings"].append(f"the total mixes the splits {', '.join(categories)}; see their own scores")
    return result


def _macro_interval(splits: Mapping[str, PopeScore], n: int) -> dict[str, Any]:
    parts = [grouped(part.rows, COUNT_KEYS) for part in splits.values()]
    return macro_intervals(parts, COUNT_KEYS, {"macro_f1": f1}, n)


def flat(rows: files.Rows) -> files.Rows:
    """PAI's conversations `{"text": [questions], "label": [labels]}` as single questions, in the order of asking.

    Other rows are returned as they are. PAI's answer files hold one line per answer without an id, in that order.
    """
    if not any(isinstance(row.get("text"), list) for row in rows):
        return rows
    found, lines = [], []
    for index, row in enumerate(rows):
        texts, labels = row.get("text"), row.get("label")
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise DataError(f"{rows.place(index)}: a conversation needs a list of questions and one label for each")
        for turn, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
            single = {"question_id": f"{row.get('chat_id', index + 1)}/{turn}", "text": text, "label": label}
            found.append({**row, **single})
            lines.append(rows.lines[index])
    return files.Rows(found, rows.path, lines, rows.unit)


def _by_category(
    questions: Sequence[Mapping[str, Any]], total: PopeScore, names: Sequence[str]
) -> dict[str, PopeScore]:
    labels, found = question_labels(questions), {}
    for name in names:
        chosen = [i for i, question in enumerate(questions) if str(question.get("category")) == name]
        found[name] = _total([total.rows[i] for i in chosen], [labels[i] for i in chosen], total.parser, [])
    return found
