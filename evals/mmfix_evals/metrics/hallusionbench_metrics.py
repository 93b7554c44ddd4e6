"""The metrics of HallusionBench as functions of counts summed over sets of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import stats
from mmfix_evals.metrics.hallusionbench_rows import UNCLEAR, Row

GROUPS = ("q", "f", "easy", "hard")
COUNT_KEYS = (
    "questions",
    "correct",
    *(f"{group}_{what}" for group in GROUPS for what in ("groups", "right")),
    "f_some",
    "f_none",
    "f_share",
    "said_yes",
    "gt_yes",
    "wrong",
    "wrong_gt_no",
    "unparsed",
)
"""Order of the columns of a count matrix `[..., 18]`, summed over sets; see `per_image`."""

Counts = NDArray[np.float64]


def _ratio(c: Counts, above: str, below: str) -> Counts:
    return stats.ratio(c[..., COUNT_KEYS.index(above)], c[..., COUNT_KEYS.index(below)])


def yes_difference(c: Counts) -> Counts:
    """Share of answers yes minus share of right answers yes, of counts `[..., 18]`; NaN without questions."""
    return _ratio(c, "said_yes", "questions") - _ratio(c, "gt_yes", "questions")


METRICS: dict[str, Callable[[Counts], Counts]] = {
    "aAcc": partial(_ratio, above="correct", below="questions"),
    "qAcc": partial(_ratio, above="q_right", below="q_groups"),
    "fAcc": partial(_ratio, above="f_right", below="f_groups"),
    "easy_qAcc": partial(_ratio, above="easy_right", below="easy_groups"),
    "hard_qAcc": partial(_ratio, above="hard_right", below="hard_groups"),
    "consistency_right": partial(_ratio, above="f_right", below="f_groups"),
    "consistency_some": partial(_ratio, above="f_some", below="f_groups"),
    "consistency_none": partial(_ratio, above="f_none", below="f_groups"),
    "consistency_score": partial(_ratio, above="f_share", below="f_groups"),
    "yes_difference": yes_difference,
    "false_positive_share": partial(_ratio, above="wrong_gt_no", below="wrong"),
}
"""Unrounded fractions of summed counts `[..., 18]`; NaN where undefined. `false_positive_share`: of the wrong answers
those to questions with the answer no."""
UNDEFINED = {
    "hard_qAcc": "no question about an edited picture",
    "easy_qAcc": "no question without edited picture",
    "false_positive_share": "no answer is wrong",
}


def per_image(rows: Sequence[Row], variant: str = "exact") -> dict[str, dict[str, float]]:
    """Set (a picture with its edited versions: all groups lie within one) → counts, keys as in `COUNT_KEYS`."""
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault("/".join(row.cluster), []).append(row)
    return {name: _counts(members, variant) for name, members in sets.items()}


def _counts(rows: Sequence[Row], variant: str) -> dict[str, float]:
    pictured = [row for row in rows if variant == "vlmeval" or not (row.category == "VS" and row.original)]
    shares = _shares([(row.figure, row) for row in pictured])
    groups = {
        "q": _shares([(row.question, row) for row in rows]),
        "f": shares,
        "easy": _shares([(row.question, row) for row in rows if row.visual_input != 2]),
        "hard": _shares([(row.question, row) for row in rows if row.visual_input == 2]),
    }
    found: dict[str, float] = dict.fromkeys(COUNT_KEYS, 0)
    for name, values in groups.items():
        found[f"{name}_groups"] = len(values)
        found[f"{name}_right"] = sum(value == 1 for value in values)
    wrong = [row for row in rows if not row.correct]
    return found | {
        "questions": len(rows),
        "correct": len(rows) - len(wrong),
        "f_some": sum(0 < value < 1 for value in shares),
        "f_none": sum(value == 0 for value in shares),
        "f_share": sum(shares),
        "said_yes": sum(row.correct == bool(row.gt) for row in rows),
        "gt_yes": sum(row.gt for row in rows),
        "wrong": len(wrong),
        "wrong_gt_no": sum(row.gt == 0 for row in wrong),
        "unparsed": sum(row.verdict == UNCLEAR for row in rows),
    }


def _shares(members: Sequence[tuple[tuple[str, ...], Row]]) -> list[float]:
    """Share of right answers of each group."""
    groups: dict[tuple[str, ...], list[bool]] = {}
    for name, row in members:
        groups.setdefault(name, []).append(row.correct)
    return [sum(group) / len(group) for group in groups.values()]


def summed(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Counts of all sets together."""
    return {key: sum(row[key] for row in rows.values()) for key in COUNT_KEYS}


def values(total: Mapping[str, float]) -> dict[str, float | None]:
    """The metrics of summed counts; None where undefined."""
    return {name: stats.value(metric, [total[key] for key in COUNT_KEYS]) for name, metric in METRICS.items()}
