"""HallusionBench: records, verdicts, what a judge is asked, and what kind of mistake a wrong answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmfix_evals.errors import DataError
from mmfix_evals.files import place
from mmfix_evals.metrics import judge
from mmfix_evals.metrics.parsers import vlmeval

IDENTITY = ("category", "subcategory", "set_id", "figure_id", "question_id")
ANSWER_KEYS = ("model_prediction", "answer", "text")
WRONG, RIGHT, UNCLEAR = 0, 1, 2

Records = Sequence[Mapping[str, Any]]

CORRECTNESS_PROMPT = """Compare an answer with a reference answer to the same question.

Question: {question}
Reference answer: {gt_answer_details}
Answer: {model_prediction}

Reply with one word: correct if the answer agrees with the reference, incorrect if it contradicts the reference, \
unclear if it does not commit itself.
"""
"""mmfix's own wording of the first question to the judge; verdicts given with it are not the published protocol."""
SAME_PROMPT = """Two answers were given to one question, about two versions of a picture or with and without a picture.
Decide whether they say the same or contradict each other.

Answer 1: {answer}
Answer 2: {original}

Reply with one word: same or different.
"""
"""mmfix's own wording of the second question to the judge."""


@dataclass(frozen=True)
class Row:
    """One judged question.

    Attributes:
        category: VD (visual dependent) or VS (visual supplement).
        question: group of the question: category, subcategory, set and question id.
        figure: group of the figure: category, subcategory, set and figure id.
        cluster: category, subcategory and set: the pictures of a set are versions of one another.
        original: whether this is figure 0.
        visual_input: 0 none, 1 original, 2 edited picture.
        gt: the right answer, 1 for yes.
        verdict: 0 wrong, 1 right, 2 unclear.
        correct: whether it counts as right.
        same: whether a judge finds it the same as the answer for figure 0; None if unknown.
    """

    category: str
    question: tuple[str, ...]
    figure: tuple[str, ...]
    cluster: tuple[str, ...]
    original: bool
    visual_input: int
    gt: int
    verdict: int
    correct: bool
    same: bool | None = None


def parse_verdict(reply: str) -> int:
    """0 if the judge's reply contains "incorrect", else 1 if "correct", else 2; in any case."""
    lowered = reply.lower()
    if "incorrect" in lowered:
        return WRONG
    return RIGHT if "correct" in lowered else UNCLEAR


def parse_same(reply: str) -> bool:
    """Whether the judge's reply contains "same", in any case."""
    return "same" in reply.lower()


def identity(records: Records, index: int) -> tuple[str, ...]:
    """Category, subcategory, set, figure and question id of a record as texts. DataError if one is missing."""
    found = tuple(str(records[index].get(name, "")).strip() for name in IDENTITY)
    if not all(found) or found[0] not in ("VD", "VS"):
        where = place(records, index, "question")
        raise DataError(f"{where}: needs {', '.join(IDENTITY)}, category being VD or VS; found {found}")
    return found


def answer(records: Records, index: int) -> str:
    """The model's raw answer in a record."""
    for key in ANSWER_KEYS:
        if key in records[index]:
            text = records[index][key]
            if isinstance(text, str):
                return text
            raise DataError(f"{place(records, index, 'question')}: {key!r} is {type(text).__name__}, not text")
    raise DataError(f"{place(records, index, 'question')}: none of the keys {', '.join(ANSWER_KEYS)}")


def whole(records: Records, index: int, key: str, choices: Sequence[int]) -> int:
    """A field that is one of some whole numbers, as number or text."""
    value = records[index].get(key)
    if isinstance(value, (int, str)) and not isinstance(value, bool) and str(value).strip() in map(str, choices):
        return int(value)
    where = place(records, index, "question")
    raise DataError(f"{where}: {key!r} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def exact_verdict(text: str, gt: int) -> int:
    """1 if exactly one of the words yes and no is found and right, 0 if wrong, 2 otherwise (rule `vlmeval`)."""
    found = vlmeval(text)
    if found == "unparsed":
        return UNCLEAR
    return RIGHT if (found == "yes") == bool(gt) else WRONG


def correctness_prompts(records: Records, template: str = CORRECTNESS_PROMPT) -> list[str]:
    """What the judge is asked about each record; placeholders {question}, {gt_answer_details}, {model_prediction}."""
    prompts = []
    for index, record in enumerate(records):
        values = {"question": record.get("question"), "gt_answer_details": record.get("gt_answer_details")}
        missing = [name for name, value in values.items() if not isinstance(value, str)]
        if missing:
            raise DataError(f"{place(records, index, 'question')}: {', '.join(missing)} is missing or not a text")
        filled = {name: str(value) for name, value in values.items()} | {"model_prediction": answer(records, index)}
        prompts.append(judge.fill(template, filled))
    return prompts


def same_prompts(records: Records, template: str = SAME_PROMPT) -> list[str]:
    """What the judge is asked to compare: each answer with the answer for figure 0 of its question group."""
    names = [identity(records, index) for index in range(len(records))]
    first = {(*name[:3], name[4]): answer(records, i) for i, name in enumerate(names) if name[3] == "0"}
    prompts = []
    for index, name in enumerate(names):
        if (*name[:3], name[4]) not in first:
            raise DataError(f"{place(records, index, 'question')}: no answer for figure 0 of this question")
        values = {"answer": answer(records, index), "original": first[(*name[:3], name[4])]}
        prompts.append(judge.fill(template, values))
    return prompts


def mistake(row: Row, original: int | None) -> tuple[int, int] | None:
    """(language hallucination, visual illusion) of one row, each 0 or 1.

    Args:
        row: the judged question.
        original: verdict of figure 0 of the same question group; None if there is none.

    Returns:
        None if it needs `original` or `row.same` and does not have it.

    Raises:
        DataError: a wrong VS row with a figure that is neither original nor edited.
    """
    c = row.verdict
    if row.original:
        if row.category == "VD":
            return (0, int(c != RIGHT))
        return (int(c == WRONG), 0)
    if c == RIGHT:
        return (0, 0)
    if original is None:
        return None
    if row.category == "VD":
        if original == RIGHT and c == WRONG:
            return None if row.same is None else (int(row.same), 1)
        return (0, 1)
    return _supplement_mistake(row, original)


def _supplement_mistake(row: Row, original: int) -> tuple[int, int] | None:
    c, same = row.verdict, row.same
    if original == WRONG:
        if c == UNCLEAR:
            return (1, 1)
        return None if same is None else (1, int(not same))
    if original == UNCLEAR or c == UNCLEAR or row.visual_input == 1:
        return (0, 1)
    if row.visual_input != 2:
        raise DataError(f"{' '.join(row.figure)}: visual_input is {row.visual_input} for a figure that is not 0")
    return None if same is None else (int(same), int(not same))
