"""How sure a model was of its answer: the probability of the first generated token, for reliability diagrams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Confident:
    """An answer together with the probability of its first token; everything else is the answer's own."""

    def __init__(self, answer: Any, confidence: float | None) -> None:
        self.answer = answer
        self.confidence = confidence

    def __getattr__(self, name: str) -> Any:
        return getattr(self.answer, name)


class _FirstStep:
    """A logits processor that changes nothing and keeps the distribution of the first step."""

    def __init__(self) -> None:
        self.probabilities: Any = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.probabilities is None:
            self.probabilities = scores.float().softmax(-1).cpu()
        return scores


def generate(decoder: Any, prompts: Sequence[str], shown: Sequence[Any], **arguments: Any) -> list[Any]:
    """``decoder.generate`` with each answer's confidence; None where one step is not one distribution.

    That is so when sampling or with beams, with an assistant, or when the caller brings logits processors.
    """
    plain = not arguments.get("do_sample") and (arguments.get("num_beams") or 1) == 1
    taken = {"assistant_model", "prompt_lookup_num_tokens", "logits_processor", "generation_config"} & set(arguments)
    if not plain or taken or getattr(decoder, "model", None) is None:
        return list(decoder.generate(list(shown), list(prompts), **arguments))
    first = _FirstStep()
    answers = list(decoder.generate(list(shown), list(prompts), logits_processor=[first], **arguments))
    if first.probabilities is None or len(first.probabilities) != len(answers):
        return answers  # the decoder split the batch
    return [
        Confident(answer, float(row[answer.token_ids[0]]) if answer.token_ids else None)
        for answer, row in zip(answers, first.probabilities, strict=True)
    ]
