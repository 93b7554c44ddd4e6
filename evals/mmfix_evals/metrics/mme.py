"""MME: two yes/no questions per picture, 14 tasks. Positive class "yes".

acc = right answers / questions, acc+ = pictures with both answers right / pictures, task score = 100·acc + 100·acc+
(at most 200). Perception = sum over its 10 tasks (at most 2000), cognition = sum over its 4 (at most 800),
hallucination = existence + count + position + color (at most 800). precision = TP/(TP+FP) and recall = TP/(TP+FN)
leave unparsed answers out. Paper: Fu et al. 2023, arXiv:2306.13394.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmfix_evals import stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.files import place
from mmfix_evals.metrics.intervals import intervals, method
from mmfix_evals.metrics.mme_files import Records, pictures, read_folder
from mmfix_evals.metrics.mme_metrics import COUNT_KEYS, GROUPS, KEYS, METRICS, TASKS, Counts, column, formulas
from mmfix_evals.metrics.parsers import Verdict
from mmfix_evals.metrics.parsers import vlmeval as vlmeval_parser
from mmfix_evals.metrics.pope_match import label_of

__all__ = [
    "COUNT_KEYS",
    "GROUPS",
    "METRICS",
    "TASKS",
    "VARIANTS",
    "counts",
    "parse",
    "per_image",
    "score",
    "score_files",
]

PREFIX = 4  # characters of the answer in which yes or no is looked for


def _prefix(text: str) -> Verdict:
    if text in ("yes", "no"):
        return "yes" if text == "yes" else "no"
    start = text[:PREFIX]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "unparsed"


def official(text: str) -> Verdict:
    """The evaluation kit's rule: lower case, **not** stripped, the line break of the result file included.

    Exactly yes or no; else "yes" in the first four characters, else "no" in them, else unparsed (wrong). So "nope",
    "noisy" and "none" are no; "i know", "a: yes" and "  yes" are unparsed.
    """
    return _prefix(f"{text}\n".lower())


def clean(text: str) -> Verdict:
    """The official rule on the stripped answer."""
    return _prefix(text.strip().lower())


def lmms(text: str) -> Verdict:
    """lmms-eval: stripped, "." deleted, the single letters y and n accepted, then the official rule."""
    word = text.lower().strip().replace(".", "")
    if word in ("y", "n"):
        return "yes" if word == "y" else "no"
    return _prefix(word)


def vlmeval(text: str) -> Verdict:
    """VLMEvalKit without a judge: exactly one of the words yes and no."""
    return vlmeval_parser(text)


VARIANTS: dict[str, Callable[[str], Verdict]] = {
    "official": official,
    "clean": clean,
    "lmms": lmms,
    "vlmeval": vlmeval,
}


def parse(text: str, variant: str = "official") -> Verdict:
    """The verdict of one answer. Raises UsageError for an unknown variant."""
    if variant not in VARIANTS:
        raise UsageError(f"unknown MME variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[variant](text)


def counts(task: str, pair: Sequence[Mapping[str, Any]], variant: str = "official") -> dict[str, int]:
    """Counts of the two questions about one picture, keys as in `KEYS`; sums of them give every metric.

    Args:
        task: one of `TASKS`.
        pair: two records with `gt` (yes or no, any case) and `pred` (the raw answer).
        variant: one of `VARIANTS`.

    Raises:
        DataError: not two records, or a bad `gt` or `pred`.
    """
    _known(task)
    if len(pair) != 2:
        raise DataError(f"MME task {task}: {len(pair)} questions about one picture; there must be two")
    found = dict.fromkeys(KEYS, 0)
    for index, record in enumerate(pair):
        label, text = label_of(record.get("gt")), record.get("pred")
        if label is None or not isinstance(text, str):
            what = "gt" if label is None else "pred"
            raise DataError(f"MME task {task}: {place(pair, index, 'question')}: {what!r} is {record.get(what)!r}")
        verdict = parse(text, variant)
        found["questions"] += 1
        found["correct"] += verdict == label
        found["unparsed"] += verdict == "unparsed"
        if verdict != "unparsed":
            found[("tp" if label == "yes" else "fp") if verdict == "yes" else ("tn" if label == "no" else "fn")] += 1
    return found | {"images": 1, "both": int(found["correct"] == 2)}


def per_image(data: Mapping[str, Records], variant: str = "official") -> dict[str, dict[str, int]]:
    """Picture (`task/image`) → counts, keys as in `COUNT_KEYS` with zeros for the other tasks, for `stats`."""
    found = {}
    for task, records in data.items():
        for image, pair in pictures(task, records, adjacent=variant == "official").items():
            own = {f"{task}.{key}": value for key, value in counts(task, pair, variant).items()}
            found[f"{task}/{image}"] = dict.fromkeys(COUNT_KEYS, 0) | own
    return found


def score(data: Mapping[str, Records], variant: str = "official") -> dict[str, Any]:
    """Score records `{"image", "question", "gt", "pred"}` per task.

    Args:
        data: task → records. Two records belong to a picture: under `official` they must be neighbours, otherwise
            they may stand anywhere in the task.
        variant: one of `VARIANTS`. `official` equals the evaluation kit, whose rule sees the line break after the
            answer; `clean` strips the answer first.

    Returns:
        `perception`, `cognition`, `hallucination` and its two halves (None unless all their tasks are there),
        `splits` (per task `score`, `accuracy`, `accuracy_plus`, `precision`, `recall` and counts), `n`, `n_images`,
        `n_unparsed`, `variant`, `positive_class`, `intervals` (also per task), `interval_method`, `warnings`.
        Scores are points, accuracies fractions.

    Raises:
        DataError: unknown task, lines of different pictures paired, a bad label.
        UsageError: unknown variant.
    """
    parse("", variant)
    summed, images = np.zeros(len(COUNT_KEYS)), per_image(data, variant)
    for row in images.values():
        summed += np.array([row[key] for key in COUNT_KEYS], dtype=np.float64)
    tasks = {task: _task(summed, task) for task in TASKS if task in data}
    for task, part in tasks.items():
        mine = {image: row for image, row in images.items() if row[f"{task}.questions"]}
        part["intervals"] = intervals(mine, COUNT_KEYS, formulas(task), part["questions"])
    total = sum(part["questions"] for part in tasks.values())
    warnings = _warnings(tasks, variant)
    return {
        **{name: stats.value(METRICS[name], summed) for name in GROUPS},
        "n": total,
        "n_images": sum(part["images"] for part in tasks.values()),
        "n_unparsed": sum(part["unparsed"] for part in tasks.values()),
        "variant": variant,
        "positive_class": "yes",
        "splits": tasks,
        "intervals": intervals(images, COUNT_KEYS, {name: METRICS[name] for name in GROUPS}, total),
        "interval_method": method("image", images),
        "warnings": warnings,
    }


def _task(summed: Counts, task: str) -> dict[str, Any]:
    values: dict[str, Any] = {name: stats.value(formula, summed) for name, formula in formulas(task).items()}
    return values | {key: int(column(summed, task, key)) for key in KEYS}


def _warnings(tasks: Mapping[str, Mapping[str, Any]], variant: str) -> list[str]:
    warnings = []
    for name, members in GROUPS.items():
        missing = [task for task in members if task not in tasks or tasks[task]["score"] is None]
        if missing:
            warnings.append(f"{name} is undefined: no questions of {', '.join(missing)}")
    for task, part in tasks.items():
        if part["questions"] and part["precision"] is None:
            warnings.append(f"precision of {task} is undefined: no answer was counted as yes")
        if part["questions"] and part["recall"] is None:
            warnings.append(f"recall of {task} is undefined: no question with answer yes got a yes or a no")
    partly = [f"{task} {tasks[task]['questions']} of {n}" for task, n in TASKS.items() if _partly(tasks, task, n)]
    if partly:
        warnings.append(f"not the whole benchmark: {', '.join(partly)} questions")
    unparsed, total = (sum(part[key] for part in tasks.values()) for key in ("unparsed", "questions"))
    if unparsed:
        warnings.append(f"{unparsed} of {total} answers are neither yes nor no under variant {variant}; they are wrong")
    return warnings


def _partly(tasks: Mapping[str, Mapping[str, Any]], task: str, expected: int) -> bool:
    return task in tasks and tasks[task]["questions"] != expected


def _known(task: str) -> None:
    if task not in TASKS:
        raise DataError(f"unknown MME task {task!r}; the tasks are {', '.join(TASKS)}")


def score_files(folder: str | os.PathLike[str], variant: str = "official") -> dict[str, Any]:
    """Score a folder of the evaluation kit: `<task>.txt` with lines `image\\tquestion\\tgt\\tpred`.

    Returns:
        What `score` returns, and `sha256` (task → hash of its file).

    Raises:
        DataError: no such file, a line without four fields, a bad label, lines of different pictures paired.
    """
    data, hashes = read_folder(folder, tuple(TASKS))
    return score(data, variant) | {"sha256": hashes}
