"""HallusionBench: yes/no questions in groups, about pictures and their edited versions.

aAcc = right questions / questions; qAcc = question groups (category, subcategory, set, question) all right / groups;
fAcc = figure groups (category, subcategory, set, figure) all right / groups, without VS figure 0 (no picture).
easy_qAcc and hard_qAcc are qAcc over the rows whose picture is not, and is, edited: they are per group, although the
leaderboard calls them aAcc. consistency_*: figure groups all, partly and not at all right, and the mean share.
Paper: Guan et al. 2024, arXiv:2310.14566.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from mmfix_evals import files
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.files import place
from mmfix_evals.metrics import judge
from mmfix_evals.metrics.hallusionbench_metrics import COUNT_KEYS, METRICS, UNDEFINED, per_image, summed, values
from mmfix_evals.metrics.hallusionbench_rows import (
    IDENTITY,
    RIGHT,
    UNCLEAR,
    Records,
    Row,
    answer,
    correctness_prompts,
    exact_verdict,
    identity,
    mistake,
    parse_same,
    parse_verdict,
    same_prompts,
    whole,
)
from mmfix_evals.metrics.intervals import intervals, method

__all__ = [
    "COUNT_KEYS",
    "METRICS",
    "VARIANTS",
    "correctness_prompts",
    "judge_rows",
    "per_image",
    "same_prompts",
    "score",
    "score_files",
]

QUESTIONS = {"VD": 591, "VS": 538}
VARIANTS = ("exact", "vlmeval", "judge")
"""exact: yes or no in the text, unparsed is wrong, fAcc without VS figure 0. vlmeval: the same, but fAcc keeps VS
figure 0, as VLMEvalKit does. judge: the official protocol from given verdicts; unclear is right for VS figure 0."""
VERDICT_KEYS = ("verdict", "gpt4v_output_gpt_check")


def judge_rows(records: Records, variant: str = "exact") -> list[Row]:
    """Records as judged questions.

    Args:
        records: with the ids, `visual_input`, `gt_answer` (0 or 1), and the answer under `model_prediction`, `answer`
            or `text`; under variant judge instead the verdict (0 wrong, 1 right, 2 unclear) under `verdict` or
            `gpt4v_output_gpt_check` and, for the error analysis, `same` (0 or 1).
        variant: one of `VARIANTS`.

    Raises:
        DataError: a field is missing or malformed, or a question occurs twice; names the place.
        UsageError: unknown variant.
    """
    if variant not in VARIANTS:
        raise UsageError(f"unknown HallusionBench variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    rows: list[Row] = []
    seen: dict[tuple[str, ...], int] = {}
    for index in range(len(records)):
        name = identity(records, index)
        if name in seen:
            first = place(records, seen[name], "question")
            raise DataError(f"{place(records, index, 'question')}: question {'_'.join(name)} is also at {first}")
        seen[name] = index
        rows.append(_row(records, index, name, variant))
    return rows


def _row(records: Records, index: int, name: tuple[str, ...], variant: str) -> Row:
    category, subcategory, group, figure, question = name
    gt = whole(records, index, "gt_answer", (0, 1))
    if variant == "judge":
        key = next((key for key in VERDICT_KEYS if key in records[index]), VERDICT_KEYS[0])
        verdict = whole(records, index, key, (0, 1, 2))
    else:
        verdict = exact_verdict(answer(records, index), gt)
    excused = variant == "judge" and category == "VS" and figure == "0" and verdict == UNCLEAR
    return Row(
        category=category,
        question=(category, subcategory, group, question),
        figure=(category, subcategory, group, figure),
        cluster=(category, subcategory, group),
        original=figure == "0",
        visual_input=whole(records, index, "visual_input", (0, 1, 2)),
        gt=gt,
        verdict=verdict,
        correct=verdict == RIGHT or excused,
        same=bool(whole(records, index, "same", (0, 1))) if variant == "judge" and "same" in records[index] else None,
    )


def error_analysis(rows: Sequence[Row]) -> tuple[dict[str, int] | None, str | None]:
    """Wrong question groups by cause: LH (language), VI (visual illusion), Mix; and the same per row with `_cg`.

    The three add up to the number of wrong groups. Needs a judge's verdicts and `same`; returns None and what is
    missing otherwise.
    """
    originals = {row.question: row.verdict for row in rows if row.original}
    groups: dict[tuple[str, ...], tuple[int, int]] = {}
    found, missing = dict.fromkeys(("LH", "VI", "Mix", "LH_cg", "VI_cg", "Mix_cg"), 0), 0
    for row in rows:
        cause = mistake(row, originals.get(row.question))
        if cause is None:
            missing += 1
            continue
        before = groups.get(row.question, (0, 0))
        groups[row.question] = (before[0] + cause[0], before[1] + cause[1])
        if any(cause):
            found[f"{_cause(cause)}_cg"] += 1
    if missing:
        return None, f"{missing} wrong answers lack 'same' or the answer for figure 0"
    for cause in groups.values():
        if any(cause):
            found[_cause(cause)] += 1
    return found, None


def _cause(pair: tuple[int, int]) -> str:
    return "Mix" if all(pair) else ("LH" if pair[0] else "VI")


def score(records: Records, variant: str = "exact") -> dict[str, Any]:
    """Score judged or yes/no answers; see `judge_rows` for the records.

    Returns:
        The `METRICS`, `splits` (VD and VS), `error_analysis` (None without a judge's verdicts), `n`, `n_unparsed`
        (unclear or without exactly one of yes and no), `variant`, `intervals` (sets are drawn: a picture with its
        edited versions), `interval_method`, `counts`, `warnings`.
    """
    rows = judge_rows(records, variant)
    sets = per_image(rows, variant)
    total = summed(sets)
    found = values(total)
    warnings = [
        f"{name} is undefined: {UNDEFINED.get(name, 'no such questions')}" for name in found if found[name] is None
    ]
    analysis = None
    if variant == "judge":
        analysis, reason = error_analysis(rows)
        if reason is not None:
            warnings.append(f"no error analysis: {reason}")
    elif total["unparsed"]:
        share = f"{total['unparsed']:.0f} of {len(rows)}"
        warnings.append(f"{share} answers do not contain exactly one of yes and no; they count as wrong")
    parts = {name: [row for row in rows if row.category == name] for name in QUESTIONS}
    if any(len(parts[name]) != expected for name, expected in QUESTIONS.items()):
        warnings.append(f"not the whole benchmark: {len(rows)} of {sum(QUESTIONS.values())} questions")
    splits = {name: _split(part, variant) for name, part in parts.items() if part}
    return {
        **found,
        "n": len(rows),
        "n_unparsed": int(total["unparsed"]),
        "variant": variant,
        "splits": splits,
        "intervals": intervals(sets, COUNT_KEYS, METRICS, len(rows)),
        "interval_method": method("set of pictures", sets),
        "error_analysis": analysis,
        "counts": total,
        "warnings": warnings,
    }


def _split(rows: Sequence[Row], variant: str) -> dict[str, Any]:
    sets = per_image(rows, variant)
    found = values(summed(sets)) | {"n": len(rows)}
    return found | {"intervals": intervals(sets, COUNT_KEYS, METRICS, len(rows))}


def score_files(
    responses: str | os.PathLike[str],
    variant: str = "exact",
    verdicts: str | os.PathLike[str] | None = None,
    same: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Score a JSON list or JSON Lines of HallusionBench's records with the model's answers.

    Args:
        responses: the records; see `judge_rows`.
        variant: one of `VARIANTS`.
        verdicts, same: under variant judge, replies of a judge (ids and `reply`) to `correctness_prompts` and to
            `same_prompts`; default: the records hold `verdict` and `same` themselves.

    Returns:
        What `score` returns, with `responses_sha256`, and `verdicts_sha256`, `same_sha256`, `judges` where given.
    """
    if variant != "judge" and (verdicts is not None or same is not None):
        raise UsageError(f"variant {variant!r} takes no replies of a judge; choose variant 'judge'")
    records = files.read_rows(responses)
    if not records:
        raise DataError(f"{responses}: contains no questions; give HallusionBench's records with answers")
    hashes, judges = {"responses_sha256": files.sha256(responses)}, set[str]()
    for key, path, parse in (("verdict", verdicts, parse_verdict), ("same", same, lambda text: int(parse_same(text)))):
        if path is not None:
            replies = files.read_rows(path)
            judges |= {str(row["judge"]) for row in replies if row.get("judge")}
            _join(records, replies, key, parse)
            hashes[f"{'verdicts' if key == 'verdict' else key}_sha256"] = files.sha256(path)
    return score(records, variant) | hashes | ({"judges": sorted(judges)} if variant == "judge" else {})


def _join(records: files.Rows, replies: files.Rows, key: str, parse: Callable[[str], int]) -> None:
    """Write the parsed reply about each record into it, matched by the five ids."""
    found = {}
    for index in range(len(replies)):
        name = identity(replies, index)
        if name in found:
            raise DataError(f"{replies.place(index)}: a second reply about {'_'.join(name)}")
        found[name] = parse(judge.reply_text(replies, index))
    for index, record in enumerate(records):
        name = identity(records, index)
        if name not in found:
            raise DataError(f"{records.place(index)}: {replies.path} holds no reply about {'_'.join(name)}")
        record[key] = found[name]


def judge_files(
    responses: str | os.PathLike[str],
    out: str | os.PathLike[str],
    endpoint: judge.Endpoint,
    cache: str | os.PathLike[str],
    what: str = "verdicts",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Ask a judge for `verdicts` or `same` and write its replies to `out`, for `score_files`."""
    if what not in ("verdicts", "same"):
        raise UsageError(f"a judge is asked for 'verdicts' or 'same', not for {what!r}")
    records = files.read_rows(responses)
    prompts = correctness_prompts(records) if what == "verdicts" else same_prompts(records)
    about = [dict(zip(IDENTITY, identity(records, index), strict=True)) for index in range(len(records))]
    judge.write_replies(out, about, judge.ask(endpoint, prompts, cache, progress))
