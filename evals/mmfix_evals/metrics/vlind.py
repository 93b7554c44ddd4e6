"""VLind-Bench: does a model follow a counterfactual picture, given that it knows, sees and understands the rest?

Every stage asks two True/False questions and is passed if the first is answered True and the second False:
a common sense (factual picture), b perception (counterfactual picture), c context in words, d counterfactual picture.
With D_i the mean of d over the good pictures of instance i, and N instances with a good picture:

S_CK = Σa/N, S_VP = Σb/N, S_CB = Σ(a·c)/Σa, S_LP = Σ(D·a·b·c)/Σ(a·b·c), acc CB = Σc/N, acc LP = ΣD/N.

S_CB and S_LP are conditional on the stages before; item accuracies are something else. arXiv:2406.08702.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.files import place
from mmfix_evals.metrics.intervals import grouped, intervals, method
from mmfix_evals.metrics.vlind_prompts import PROMPTS, STYLES, VOTES, good_images, parse, questions

__all__ = [
    "COUNT_KEYS",
    "METRICS",
    "PROMPTS",
    "STYLES",
    "counts",
    "official",
    "parse",
    "per_image",
    "questions",
    "score",
    "score_files",
]

COUNT_KEYS = ("instances", "a", "b", "c", "c_pass", "bc_pass", "d", "d_pass", "images", "answers", "true", "unparsed")
"""Order of the columns of a count matrix `[..., 12]`; `d` and `d_pass` are means over the pictures of an instance."""
RATIOS = {
    "s_ck": ("a", "instances"),
    "s_vp": ("b", "instances"),
    "s_cb": ("c_pass", "a"),
    "s_lp": ("d_pass", "bc_pass"),
    "acc_cb": ("c", "instances"),
    "acc_lp": ("d", "instances"),
    "true_ratio": ("true", "answers"),
}
SIX = tuple(RATIOS)[:6]
UNDEFINED = {
    "s_cb": "no instance passes stage a",
    "s_lp": "no instance passes the stages a, b and c",
}
PREDICTION = re.compile(r"(.*)_pred_a1_image")

Counts = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]


def _ratio(c: Counts, above: str, below: str) -> Counts:
    return stats.ratio(c[..., COUNT_KEYS.index(above)], c[..., COUNT_KEYS.index(below)])


METRICS: dict[str, Callable[[Counts], Counts]] = {
    name: partial(_ratio, above=above, below=below) for name, (above, below) in RATIOS.items()
}
"""The six indicators and the share of answers "True", of summed counts `[..., 12]`; NaN where undefined."""


def counts(answers: Mapping[str, str], good: Sequence[str]) -> dict[str, float]:
    """Counts of one instance, keys as in `COUNT_KEYS`; sums of them give every indicator.

    Args:
        answers: question id → "True", "False" or "NA" (as `parse` gives), ids as in `vlind_prompts.Question`.
        good: numbers of the good pictures; without any the instance does not count at all.

    Raises:
        DataError: an answer is missing.
    """
    if not good:
        return dict.fromkeys(COUNT_KEYS, 0.0)
    used = [f"{stage}{i}" for stage in "abc" for i in (1, 2)] + [f"d{i}/{k}" for k in good for i in (1, 2)]
    missing = [name for name in used if name not in answers]
    if missing:
        raise DataError(f"no answer to {', '.join(missing[:5])}; answer every question of the instance")
    a, b, c = (_passed(answers, f"{stage}1", f"{stage}2") for stage in "abc")
    d = sum(_passed(answers, f"d1/{k}", f"d2/{k}") for k in good) / len(good)
    return {
        "instances": 1.0,
        "a": float(a),
        "b": float(b),
        "c": float(c),
        "c_pass": float(a and c),
        "bc_pass": float(a and b and c),
        "d": d,
        "d_pass": d if a and b and c else 0.0,
        "images": float(len(good)),
        "answers": float(len(used)),
        "true": float(sum(answers[name] == "True" for name in used)),
        "unparsed": float(sum(answers[name] not in ("True", "False") for name in used)),
    }


def _passed(answers: Mapping[str, str], first: str, second: str) -> bool:
    return answers[first] == "True" and answers[second] == "False"


def from_official(instances: Records, model: str | None = None) -> list[dict[str, str]]:
    """The answers in a result file of the published scripts, per instance.

    Args:
        instances: records with `{model}_pred_a1_image`, …, each `{"answer": "True" | "False" | "NA"}`.
        model: whose answers; None if the file holds those of one model.

    Raises:
        UsageError: no or several models in the file, or another one than asked for.
        DataError: an answer is missing.
    """
    first = instances[0] if instances else {}
    models = [match[1] for match in map(PREDICTION.fullmatch, map(str, first)) if match]
    if model is None and len(models) == 1:
        model = models[0]
    if model not in models:
        if not models:
            raise UsageError("the data hold no model's answers; give them as a file of their own (--answers)")
        which = f"no answers of model {model!r}" if model else "no model is chosen, and"
        raise UsageError(f"{which}; the file holds those of {', '.join(models)}")
    return [_official_answers(instances, index, f"{model}_pred_") for index in range(len(instances))]


def _official_answers(instances: Records, index: int, start: str) -> dict[str, str]:
    instance, found = instances[index], {}
    names = {"a1": "a1_image", "a2": "a2_image", "b1": "b1", "b2": "b2", "c1": "c1_image", "c2": "c2_image"}
    cells = {name: instance.get(start + key) for name, key in names.items()}
    for i in (1, 2):
        pictures = instance.get(f"{start}d{i}")
        if not isinstance(pictures, Mapping):
            raise DataError(f"{place(instances, index, 'instance')}: {start}d{i} is missing")
        cells |= {f"d{i}/{image}": cell for image, cell in pictures.items()}
    for name, cell in cells.items():
        answer = cell.get("answer") if isinstance(cell, Mapping) else None
        if not isinstance(answer, str):
            raise DataError(f"{place(instances, index, 'instance')}: no answer to {name}")
        found[name] = answer
    return found


def from_answers(instances: Records, answers: Records) -> list[dict[str, str]]:
    """Raw answers `{"global_id", "question", "answer"}`, parsed and sorted by instance.

    `question` is an id of `vlind_prompts.Question` ("a1", "d2/7"). Raises DataError for repeated or unknown ones.
    """
    place_of = {}
    for index, instance in enumerate(instances):
        key = str(instance.get("global_id"))
        if "global_id" not in instance or key in place_of:
            raise DataError(f"{place(instances, index, 'instance')}: global_id is missing or occurs twice ({key})")
        place_of[key] = index
    found: list[dict[str, str]] = [{} for _ in instances]
    for index, record in enumerate(answers):
        key, name, text = str(record.get("global_id")), record.get("question"), record.get("answer")
        if key not in place_of or not isinstance(name, str) or not isinstance(text, str):
            what = f"global_id {key} is not in the data" if key not in place_of else "needs question and answer as text"
            raise DataError(f"{place(answers, index, 'answer')}: {what}")
        if name in found[place_of[key]]:
            raise DataError(f"{place(answers, index, 'answer')}: instance {key}, question {name} is answered twice")
        found[place_of[key]][name] = parse(text)
    return found


def per_image(
    instances: Records, answers: Sequence[Mapping[str, str]], style: str = "all", votes: int = VOTES
) -> dict[str, dict[str, float]]:
    """Context (`concept/context_id`: its instances share their pictures) → counts, keys as in `COUNT_KEYS`."""
    return grouped(_rows(instances, answers, style, votes), COUNT_KEYS)


def _rows(
    instances: Records, answers: Sequence[Mapping[str, str]], style: str, votes: int
) -> list[tuple[str, dict[str, float]]]:
    found = []
    for index, (instance, given) in enumerate(zip(instances, answers, strict=True)):
        try:
            row = counts(given, good_images(instance, style, votes))
        except DataError as error:
            raise DataError(f"{place(instances, index, 'instance')}: {error}") from None
        cluster = instance.get("context_id", f"instance {instance.get('global_id', index)}")
        if row["instances"]:
            found.append((f"{instance.get('concept', '')}/{cluster}", row))
    return found


def score(
    instances: Records, answers: Sequence[Mapping[str, str]], style: str = "all", votes: int = VOTES
) -> dict[str, Any]:
    """The six indicators as unrounded fractions.

    Args:
        instances: records of `data.json`.
        answers: per instance, as `from_official` or `from_answers` gives them.
        style: one of `STYLES`; pictures of other styles are left out.
        votes: votes that make a picture good; instances without a good one are skipped.

    Returns:
        `s_ck … acc_lp`, `true_ratio`, `n` (instances), `n_skipped`, `n_images`, `n_unparsed`, `style`,
        `vote_threshold`, `splits` (the indicators per concept), `intervals` (contexts are drawn, whose instances share
        their pictures), `interval_method`, `counts`, `official`, `warnings`.
    """
    rows = _rows(instances, answers, style, votes)
    total = _sum([row for _, row in rows])
    values = _values(total)
    concepts = sorted({cluster.split("/")[0] for cluster, _ in rows})
    of_concept = {name: [(cluster, row) for cluster, row in rows if cluster.split("/")[0] == name] for name in concepts}
    warnings = [f"{name} is undefined: {UNDEFINED.get(name, 'no instance')}" for name in RATIOS if values[name] is None]
    if total["unparsed"]:
        warnings.append(
            f"{total['unparsed']:.0f} of {total['answers']:.0f} answers are neither True nor False; they are wrong"
        )
    return {
        **values,
        "n": len(rows),
        "n_skipped": len(instances) - len(rows),
        "n_images": int(total["images"]),
        "n_unparsed": int(total["unparsed"]),
        "style": style,
        "vote_threshold": votes,
        "splits": {name: _concept(part) for name, part in of_concept.items()},
        "intervals": _intervals(rows),
        "interval_method": method("context", {cluster for cluster, _ in rows}),
        "counts": total,
        "official": official(values),
        "warnings": warnings,
    }


def _concept(rows: Sequence[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    total = _sum([row for _, row in rows])
    return _values(total) | {"n": int(total["instances"]), "intervals": _intervals(rows)}


def _intervals(rows: Sequence[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    return intervals(grouped(rows, COUNT_KEYS), COUNT_KEYS, METRICS, len(rows))


def _sum(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) if rows else 0.0 for key in COUNT_KEYS}


def _values(total: Mapping[str, float]) -> dict[str, float | None]:
    vector = [total[key] for key in COUNT_KEYS]
    return {name: stats.value(metric, vector) for name, metric in METRICS.items()}


def official(values: Mapping[str, float | None]) -> dict[str, str | None]:
    """What the published script prints: percent with one decimal, "0.0" for an undefined S_CB or S_LP.

    None where that script raises, which is without any instance.
    """
    if values["s_ck"] is None:
        return dict.fromkeys(SIX)
    return {name: f"{(values[name] or 0) * 100:.1f}" for name in SIX}


def score_files(
    data: str | os.PathLike[str],
    answers: str | os.PathLike[str] | None = None,
    style: str = "all",
    votes: int = VOTES,
    model: str | None = None,
    prompts: str | None = None,
) -> dict[str, Any]:
    """Score VLind-Bench answers.

    Args:
        data: `data.json`, or without `answers` a result file of the published scripts.
        answers: JSON Lines `{"global_id", "question", "answer"}` with raw answers; see `from_answers`.
        style, votes: see `score`.
        model: which model's answers of a published result file.
        prompts: one of `PROMPTS`, which the answers were given to; only recorded.

    Returns:
        What `score` returns, with `prompts`, `model`, `data_sha256` and, if given, `answers_sha256`.
    """
    if prompts is not None and prompts not in PROMPTS:
        raise UsageError(f"unknown VLind prompts {prompts!r}; choose one of {', '.join(PROMPTS)}")
    instances = files.read_rows(data)
    if not instances:
        raise DataError(f"{data}: contains no instances; give the data.json of VLind-Bench")
    given = from_official(instances, model) if answers is None else from_answers(instances, files.read_rows(answers))
    result = score(instances, given, style, votes) | {"prompts": prompts, "model": model}
    if prompts is None:
        result["warnings"].append(f"the prompts are not stated; two are published: {', '.join(PROMPTS)}")
    result["data_sha256"] = files.sha256(data)
    return result if answers is None else result | {"answers_sha256": files.sha256(answers)}
