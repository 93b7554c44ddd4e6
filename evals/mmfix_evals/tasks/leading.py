"""Questions that lead, answered by a method that contrasts them with the neutral question (LQCD)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

METHOD = "lqcd"


def wants_questions(method: Any) -> bool:
    """Whether a decoder's method is, or contains, one that contrasts with a leading question and has none yet."""
    return any(_open(one) for one in _listed(method))


def contrast(
    decoder: Any, neutral: Sequence[str], asked: Sequence[str], shown: Sequence[Any], **arguments: Any
) -> list[Any]:
    """Answers to neutral questions, each contrasted with the question as it was asked.

    The engine takes one leading question for all prompts of a batch, so prompts are put together by the question that
    was asked. Where it leads nowhere both questions are the same, and the contrast leaves the logits as they are.

    Args:
        decoder: a :class:`mmfix_decoding.Decoder` whose method :func:`wants_questions`.
        neutral, asked: the prompt of ``generate()`` and the leading one, per document.
        shown: one picture each.
        **arguments: of ``decoder.generate``.

    Returns:
        Answers in the order given; what the engine counted is summed over them, as if they were one call.
    """
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(asked):
        groups.setdefault(question, []).append(index)
    answers: dict[int, Any] = {}
    reports = []
    for question, members in groups.items():
        chosen = with_leading(decoder, question, shown[members[0]])
        pictures, prompts = [shown[n] for n in members], [neutral[n] for n in members]
        found = chosen.generate(pictures, prompts, **arguments)
        reports.append(found[0].report)
        answers.update(zip(members, found, strict=True))
    report = {**reports[-1], "fired": _summed(reports)}
    return [dataclasses.replace(answers[n], report=report) for n in range(len(asked))]


def with_leading(decoder: Any, question: str, picture: Any) -> Any:
    """The decoder with a leading question, as the model's template writes it, for the method that lacks one."""
    import mmfix
    from mmfix.methods.lqcd import question as after_image
    from mmfix_decoding import prompts

    request = prompts.single(picture, question).load()
    ids = prompts.encode([request], decoder.processor, decoder.model)["input_ids"][0]
    leading = after_image(ids.tolist(), mmfix.describe(decoder.model).image_token_id)
    given = [dataclasses.replace(one, leading=leading) if _open(one) else one for one in _listed(decoder.method)]
    return decoder.with_method(given)


def _listed(method: Any) -> list[Any]:
    return list(method) if isinstance(method, (list, tuple)) else [] if method is None else [method]


def _open(one: Any) -> bool:
    return getattr(getattr(one, "info", None), "name", None) == METHOD and one.leading is None


def _summed(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Method → counts of what it changed and of what it looked at, over several calls."""
    total: dict[str, dict[str, int]] = {}
    for report in reports:
        for name, counted in report["fired"].items():
            kept = total.setdefault(name, dict.fromkeys(counted, 0))
            for key, value in counted.items():
                kept[key] += value
    return total
