"""Which answer belongs to which question: by `question_id`, by order only if no answer has an id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmfix_evals.errors import DataError
from mmfix_evals.files import Rows, place

ANSWER_KEYS = ("answer", "text", "ans")
ID = "question_id"
SHOWN = 5

Records = Sequence[Mapping[str, Any]]


def label_of(value: object) -> str | None:
    """The label as "yes" or "no", from these words in any case or from 1 and 0; None for anything else."""
    if isinstance(value, str):
        word = value.strip().lower()
        return word if word in ("yes", "no") else None
    if isinstance(value, int):
        return {1: "yes", 0: "no"}.get(value)
    return None


def question_labels(questions: Records) -> list[str]:
    """The label of every question. Raises DataError naming the place of a missing or bad one."""
    labels = []
    for index, question in enumerate(questions):
        label = label_of(question.get("label"))
        if label is None:
            what = repr(question["label"]) if "label" in question else "missing"
            raise DataError(f"{place(questions, index, 'question')}: label is {what}; it must be 'yes' or 'no'")
        labels.append(label)
    return labels


def answer_texts(questions: Records, answers: Records, warnings: list[str]) -> list[str]:
    """The raw answers in the order of the questions; what is worth saying is appended to `warnings`.

    Raises DataError for ids that are missing, repeated or unknown, for different counts when matching by order, for an
    answer without text, and for an answer whose `image` differs from its question's.
    """
    with_id = sum(ID in answer for answer in answers)
    if with_id == 0:
        order = list(range(len(answers)))
        if len(answers) != len(questions):
            raise DataError(
                f"{_file(answers)}{len(answers)} answers without {ID} for {len(questions)} questions; "
                f"add {ID} to the answers or give exactly one answer per question, in the same order"
            )
        if len(answers) > 0:
            warnings.append(f"the answers have no {ID}: matched by order")
    else:
        order = _match(questions, answers)
    texts = []
    for question, index in zip(questions, order, strict=True):
        answer = answers[index]
        if "image" in question and "image" in answer and question["image"] != answer["image"]:
            where = place(answers, index, "answer")
            raise DataError(
                f"{where}: is about {answer['image']}, but its question about {question['image']}; "
                "check that both files belong together"
            )
        texts.append(_text(answers, index))
    return texts


def _match(questions: Records, answers: Records) -> list[int]:
    """Index of the answer to each question, by id (1 and "1" are the same id)."""
    wanted, given = _index(questions, "question"), _index(answers, "answer")
    missing = [key for key in wanted if key not in given]
    if missing:
        raise DataError(
            f"{_file(answers)}{len(missing)} of {len(wanted)} questions have no answer ({ID} {_some(missing)}); "
            "answer them or give the question file of these answers"
        )
    unknown = [key for key in given if key not in wanted]
    if unknown:
        first = place(answers, given[unknown[0]], "answer")
        raise DataError(
            f"{first}: {len(unknown)} answers belong to no question ({ID} {_some(unknown)}); "
            "give the question file of these answers"
        )
    return [given[key] for key in wanted]


def _index(records: Records, what: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for index, record in enumerate(records):
        if record.get(ID) is None:
            raise DataError(f"{place(records, index, what)}: {ID} is missing; give every question and answer one")
        key = str(record[ID])
        if key in found:
            first, again = place(records, found[key], what), place(records, index, what)
            raise DataError(f"{again}: {ID} {key} occurs twice (first at {first}); keep one, or score each split alone")
        found[key] = index
    return found


def _file(records: Records) -> str:
    """``file: `` where the records were read from one."""
    return f"{records.path}: " if isinstance(records, Rows) else ""


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", …" if len(keys) > SHOWN else "")


def _text(answers: Records, index: int) -> str:
    answer = answers[index]
    for key in ANSWER_KEYS:
        if key in answer:
            text = answer[key]
            if not isinstance(text, str):
                kind = type(text).__name__
                raise DataError(f"{place(answers, index, 'answer')}: {key!r} is {kind}, not text; store the raw answer")
            return text
    raise DataError(f"{place(answers, index, 'answer')}: none of the keys {', '.join(ANSWER_KEYS)}; add the raw answer")
