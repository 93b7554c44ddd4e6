"""VLind-Bench: what is asked about an instance, in the wording of either published script, and how answers are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from mmfix_evals.errors import DataError, UsageError

Answer = Literal["True", "False", "NA"]

STYLES: dict[str, tuple[str, ...]] = {
    "all": tuple(str(i) for i in range(12)),
    "photorealistic": tuple(str(i) for i in range(4)),
    "illustration": tuple(str(i) for i in range(4, 8)),
    "cartoon": tuple(str(i) for i in range(8, 12)),
}
"""Style → the numbers of its counterfactual pictures."""
VOTES = 2  # of the human votes that make a counterfactual picture a good one

STAGES = ("a", "b", "c", "d")
EXPECTED: dict[int, Answer] = {1: "True", 2: "False"}
"""The right answer to question 1 and question 2 of every stage."""

_FORGET = "Forget real-world common sense and just follow the information provided in the"
PROMPTS: dict[str, dict[str, str]] = {
    "gpt4o": {
        "a": "Statement: {s}\nBased on the common sense, is the given statement true or false? "
        "Only respond in True or False.",
        "b": "Statement: {s}\nBased on the image, is the given statement true or false? Only respond in True or False.",
        "c": "Context: {ctx}\nStatement: {s}\nBased on the context, is the given statement true or false? "
        f"{_FORGET} context. Only respond in True or False.",
        "d": "Statement: {s}\nBased on the image, is the given statement true or false? "
        f"{_FORGET} image. Only respond in True or False.",
    },
    "instructblip": {
        "a": "Only respond in True or False.\nStatement: {s}\n"
        "Based on common sense, is the given statement true or false?",
        "b": "Only respond in True or False.\nStatement: {s}\n"
        "Based on the image, is the given statement true or false?",
        "c": "Only respond in True or False.\nContext: {ctx}\nStatement: {s}\n"
        "Based on the context, is the given statement true or false?",
        "d": "Only respond in True or False.\nStatement: {s}\n"
        "Based on the image, is the given statement true or false?",
    },
}
"""Name → stage → prompt; the two published scripts do not ask the same. `{s}`: statement, `{ctx}`: context."""


class Question(NamedTuple):
    """One question: `id` is a1 … c2, or d1/3 for the counterfactual picture 3; `image` a path below the data folder."""

    id: str
    text: str
    image: str
    expected: Answer


def parse(text: str) -> Answer:
    """The first word that is exactly true or false, line breaks read as spaces, commas and periods deleted; else NA.

    Words are split at single spaces, so "True!", "(true)" and "**False**" are NA.
    """
    for word in text.lower().replace("\n", " ").replace(",", "").replace(".", "").split(" "):
        if word in ("true", "false"):
            return "True" if word == "true" else "False"
    return "NA"


def good_images(instance: Mapping[str, Any], style: str = "all", votes: int = VOTES) -> list[str]:
    """Numbers of the counterfactual pictures of a style that enough people called good.

    Raises:
        UsageError: unknown style.
        DataError: votes missing or not numbers.
    """
    if style not in STYLES:
        raise UsageError(f"unknown VLind style {style!r}; choose one of {', '.join(STYLES)}")
    given = instance.get("aggregated_human_label_good_images")
    if not isinstance(given, Mapping) or not all(isinstance(vote, int) for vote in given.values()):
        raise DataError("'aggregated_human_label_good_images' must be {picture number: votes}")
    return [image for image, vote in given.items() if vote >= votes and image in STYLES[style]]


def questions(
    instance: Mapping[str, Any], prompts: str = "gpt4o", style: str = "all", votes: int = VOTES
) -> list[Question]:
    """Everything that is asked about one instance; empty if it has no good picture of the style.

    Args:
        instance: a record of `data.json`.
        prompts: one of `PROMPTS`; belongs into the result.
        style: one of `STYLES`.
        votes: votes that make a picture good.

    Raises:
        UsageError: unknown prompts or style.
        DataError: a field is missing.
    """
    if prompts not in PROMPTS:
        raise UsageError(f"unknown VLind prompts {prompts!r}; choose one of {', '.join(PROMPTS)}")
    good = good_images(instance, style, votes)
    if not good:
        return []
    texts, false, true = PROMPTS[prompts], _field(instance, "false_statement"), _field(instance, "true_statement")
    context, folder = _field(instance, "context"), f"{_field(instance, 'concept')}/{_field(instance, 'context_id')}_"
    factual = f"images/factual/{folder}{_field(instance, 'factual_context')}/0.jpg"
    counterfactual = f"images/counterfactual/{folder}{context}"
    best = f"{counterfactual}/{_field(instance, 'best_img_id')}.jpg"
    there = [
        f"There is {_field(instance, noun)} in the given image." for noun in ("existent_noun", "non-existent_noun")
    ]
    asked = [
        *((f"a{i}", "a", s, factual) for i, s in enumerate((false, true), 1)),
        *((f"b{i}", "b", s, best) for i, s in enumerate(there, 1)),
        *((f"c{i}", "c", s, best) for i, s in enumerate((true, false), 1)),
        *((f"d{i}/{k}", "d", s, f"{counterfactual}/{k}.jpg") for k in good for i, s in enumerate((true, false), 1)),
    ]
    return [
        Question(name, texts[stage].replace("{ctx}", context).replace("{s}", statement), image, EXPECTED[int(name[1])])
        for name, stage, statement, image in asked
    ]


def _field(instance: Mapping[str, Any], name: str) -> str:
    value = instance.get(name)
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DataError(f"{name!r} is missing or not a text; give the data.json of VLind-Bench")
    return str(value)
