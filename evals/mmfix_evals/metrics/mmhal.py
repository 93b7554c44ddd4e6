"""MMHal-Bench: a judge rates free answers from 0 to 6. Score = mean rating, hallucination rate = share of ratings < 3.

The published judge is gpt-4-0314 at temperature 0 with a text-only template; numbers of another judge or template are
not comparable, so both belong into the result. Paper: Sun et al. 2023, arXiv:2309.14525.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.files import place
from mmfix_evals.metrics import judge
from mmfix_evals.metrics.intervals import Rows, grouped, intervals, method, units

__all__ = [
    "COUNT_KEYS",
    "METRICS",
    "PROMPT",
    "RULES",
    "judge_files",
    "judge_prompts",
    "per_image",
    "score",
    "score_files",
]

QUESTIONS = 96
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
"""Type of question i is `TYPES[i % 8]` where no type is stated; the order is not confirmed by a source."""
RATINGS = range(7)
HALLUCINATED_BELOW = 3
RULES = ("official", "strict")
"""What a reply without exactly one rating counts: 0 and a hallucination (official), or nothing (strict)."""
COUNT_KEYS = ("questions", "rated", "rating", "hallucinated", "unparsed")
"""Order of the columns of a count matrix `[..., 5]`; see `counts`."""
PLACEHOLDERS = ("image_content", "question", "gt_answer", "model_answer")

PROMPT = """You judge whether an answer about a picture is true and informative. You do not see the picture. You are \
given what it shows, a question about it, a correct answer, and the answer to be judged. A hallucination is any \
statement of that answer that contradicts what the picture shows or is not supported by it; conclusions that follow \
from common sense are none. An answer is informative if it says what the question asks for.

Shown in the picture: {image_content}
Question: {question}
Correct answer: {gt_answer}
Answer to be judged: {model_answer}

Explain your judgement in a few sentences. Then end with one line "Rating: N", N being
6 very informative, with good reasoning, no hallucination
5 very informative, no hallucination
4 somewhat informative, no hallucination
3 not informative, no hallucination
2 very informative, with hallucination
1 somewhat informative, with hallucination
0 not informative, with hallucination
"""
"""mmfix's own wording on the published scale; ratings given with it are not comparable with published ones."""

Counts = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]


def _ratio(c: Counts, above: str, below: str) -> Counts:
    return stats.ratio(c[..., COUNT_KEYS.index(above)], c[..., COUNT_KEYS.index(below)])


METRICS: dict[str, Callable[[Counts], Counts]] = {
    "score": partial(_ratio, above="rating", below="rated"),
    "hallucination_rate": partial(_ratio, above="hallucinated", below="rated"),
}
"""Mean rating (0 to 6) and share of hallucinated answers, of summed counts `[..., 5]`; NaN without ratings."""


def parse_rating(reply: str) -> int | None:
    """The rating s of a reply that holds "rating: s" for exactly one s of 0 to 6, in any case; else None."""
    lowered = reply.lower()
    found = [rating for rating in RATINGS if f"rating: {rating}" in lowered]
    return found[0] if len(found) == 1 else None


def counts(reply: str, rule: str = "official") -> dict[str, int]:
    """Counts of one reply, keys as in `COUNT_KEYS`. Raises UsageError for a rule that is not among `RULES`."""
    if rule not in RULES:
        raise UsageError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
    rating = parse_rating(reply)
    value = 0 if rating is None and rule == "official" else rating
    return {
        "questions": 1,
        "rated": int(value is not None),
        "rating": value or 0,
        "hallucinated": int(value is not None and value < HALLUCINATED_BELOW),
        "unparsed": int(rating is None),
    }


def question_type(record: Mapping[str, Any], index: int) -> str:
    """The stated type of a question, or that of its place."""
    stated = record.get("question_type")
    return stated if isinstance(stated, str) and stated else TYPES[index % len(TYPES)]


def per_image(records: Records, replies: Sequence[str], rule: str = "official") -> dict[str, dict[str, int]]:
    """Picture → counts, keys as in `COUNT_KEYS`."""
    rows = [counts(reply, rule) for reply in replies]
    return grouped(zip(units(records, "image_id"), rows, strict=True), COUNT_KEYS)


def score(records: Records, replies: Sequence[str], rule: str = "official") -> dict[str, Any]:
    """Score the judge's replies.

    Args:
        records: the benchmark's records, for the types of the questions.
        replies: the judge's text for each.
        rule: one of `RULES`.

    Returns:
        `score`, `hallucination_rate`, `splits` (the same per type), `n`, `n_unparsed`, `rule`, `intervals`,
        `interval_method`, `counts`, `warnings`.
    """
    if len(records) != len(replies):
        raise DataError(f"{len(replies)} replies of the judge for {len(records)} questions; give one for each")
    rows = [counts(reply, rule) for reply in replies]
    kinds = [question_type(record, index) for index, record in enumerate(records)]
    total = _sum(rows)
    values = _values(total)
    warnings = [f"{name} is undefined: no rating" for name, value in values.items() if value is None]
    if total["unparsed"]:
        effect = "count as 0 and as hallucinations" if rule == "official" else "are left out"
        warnings.append(f"{total['unparsed']} of {len(rows)} replies hold no rating or several; they {effect}")
    if len(rows) != QUESTIONS:
        warnings.append(f"not the whole benchmark: {len(rows)} of {QUESTIONS} questions")
    if any(not record.get("question_type") for record in records):
        warnings.append("types of questions are taken from their order, which no source confirms")
    drawn = list(zip(units(records, "image_id"), rows, strict=True))
    parts = {kind: [one for one, own in zip(drawn, kinds, strict=True) if own == kind] for kind in sorted({*kinds})}
    return {
        **values,
        "n": len(rows),
        "n_unparsed": total["unparsed"],
        "rule": rule,
        "splits": {kind: _type(part) for kind, part in parts.items()},
        "intervals": _intervals(drawn),
        "interval_method": method("image", [unit for unit, _ in drawn], "question"),
        "counts": total,
        "warnings": warnings,
    }


def _type(rows: Rows) -> dict[str, Any]:
    return _values(_sum([row for _, row in rows])) | {"n": len(rows), "intervals": _intervals(rows)}


def _intervals(rows: Rows) -> dict[str, Any]:
    return intervals(grouped(rows, COUNT_KEYS), COUNT_KEYS, METRICS, len(rows))


def _sum(rows: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(row[key] for row in rows) for key in COUNT_KEYS}


def _values(total: Mapping[str, int]) -> dict[str, float | None]:
    return {name: stats.value(metric, [total[key] for key in COUNT_KEYS]) for name, metric in METRICS.items()}


def judge_prompts(records: Records, template: str = PROMPT) -> list[str]:
    """What the judge is asked about each record.

    Args:
        records: with `image_content` (list of words), `question`, `gt_answer` and `model_answer`.
        template: with the placeholders {image_content}, {question}, {gt_answer} and {model_answer}, or with four {}
            in this order, as the published template has them.

    Raises:
        DataError: a field is missing.
        UsageError: the template lacks a placeholder.
    """
    pieces = template.split("{}")
    if len(pieces) == len(PLACEHOLDERS) + 1:
        named = "".join(f"{piece}{{{name}}}" for piece, name in zip(pieces, (*PLACEHOLDERS, ""), strict=True))
        template = named.removesuffix("{}")
    missing = [name for name in PLACEHOLDERS if f"{{{name}}}" not in template]
    if missing:
        raise UsageError(f"the judge template lacks the placeholders {', '.join(f'{{{name}}}' for name in missing)}")
    return [_filled(template, records, index) for index in range(len(records))]


def _filled(template: str, records: Records, index: int) -> str:
    record, values = records[index], {}
    for name in PLACEHOLDERS:
        value = record.get(name)
        if name == "image_content" and isinstance(value, list):
            value = ", ".join(map(str, value))
        if not isinstance(value, str):
            raise DataError(f"{place(records, index, 'question')}: {name!r} is missing or not a text")
        values[name] = value
    return judge.fill(template, values)


def judge_files(
    responses: str | os.PathLike[str],
    out: str | os.PathLike[str],
    endpoint: judge.Endpoint,
    cache: str | os.PathLike[str],
    template: str = PROMPT,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Ask a judge about every record of a response file and write its replies to `out`, for `score_files`.

    `judge.plan(endpoint, judge_prompts(files.read_rows(responses), template), cache)` tells the cost before.
    """
    records = files.read_rows(responses)
    replies = judge.ask(endpoint, judge_prompts(records, template), cache, progress)
    about = [
        {"index": i, "image_id": row.get("image_id"), "question": row["question"]} for i, row in enumerate(records)
    ]
    judge.write_replies(out, about, replies)


def score_files(
    responses: str | os.PathLike[str], replies: str | os.PathLike[str] | None = None, rule: str = "official"
) -> dict[str, Any]:
    """Score judged answers.

    Args:
        responses: the benchmark's records with the model's answers (JSON list or JSON Lines).
        replies: the judge's replies in the same order: what `judge_files` writes, or a JSON list of OpenAI chat
            completions as the published script saves it. None: the records hold them under `reply`.
        rule: one of `RULES`.

    Returns:
        What `score` returns, with `judges` (models as named in the replies), `responses_sha256`, `replies_sha256`.

    Raises:
        DataError: files of different length or about different questions, a record without reply.
    """
    records = files.read_rows(responses)
    if not records:
        raise DataError(f"{responses}: contains no questions; give the response file of MMHal-Bench")
    judged = records if replies is None else files.read_rows(replies)
    if len(judged) != len(records):
        raise DataError(f"{replies}: {len(judged)} replies for {len(records)} questions of {responses}")
    texts = []
    for index, (record, one) in enumerate(zip(records, judged, strict=True)):
        for name in ("image_id", "question"):
            if name in one and name in record and one[name] != record[name]:
                raise DataError(f"{judged.place(index)}: {name} differs from that of {records.place(index)}")
        texts.append(judge.reply_text(judged, index))
    result = score(records, texts, rule)
    judges = sorted({name for row in judged for name in (row.get("judge"), row.get("model")) if isinstance(name, str)})
    if not judges:
        result["warnings"].append("the replies do not say which judge wrote them; ratings of two judges do not compare")
    hashes = {"responses_sha256": files.sha256(responses), "replies_sha256": files.sha256(replies or responses)}
    return result | {"judges": judges} | hashes
