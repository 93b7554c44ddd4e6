"""JRT: the question before and after the picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method
from mmfix.prompts import RepeatQuestion
from mmfix.registry import param, register


@register("jrt", title="Just Read Twice", paper="arXiv:2407.05483", kind="prompt")
@dataclass(frozen=True, kw_only=True)
class JRT(Method):
    """Put the question in front of the picture too, so that every patch is read with the question known.

    *Just Read Twice: Closing the Recall Gap for Recurrent Language Models* (arXiv:2407.05483) repeats the prompt, so
    that a causal model meets every order of its parts. Here, as a control for methods that open the mask::

        system, image, question, answer header  ->  system, (times - 1) x question, image, question, answer header

    ``generate()`` is called and answers as ever; the longer prompt is made inside. One pass per token. The price is a
    prefill and a cache longer by the question; the picture, which is most of a prompt, is not read twice. The paper
    repeats everything; a picture repeated would double that price. Prompts without an image are left alone.

    The question is the text between the last image and the answer's marker. Prompts have to come at once, as ids and
    padded on the left; models that number image tokens along several axes, and caches of fixed size, are refused.

    Args:
        times: how often the question is read, 1 to 8; 1 changes nothing.
        until: where the question ends: at the "assistant" marker, or at the end of the "prompt".
        marker: token ids that begin an answer; None takes those of the processor given to ``mitigate``.
        around: ids of tokens that open and close a picture: the copy goes in front of them and holds none; None takes
            those that model or processor name.
        special: ids of which the first after the question ends it, as where a template closes the turn; None takes the
            tokenizer's special tokens.

    Raises:
        MmfixError: a prompt has no question after its image, or not one answer's header.
        MethodError: a value out of range, or ``until="assistant"`` and no marker is known.
    """

    times: int = param(2, "how often the question is read", 1, 8)
    until: Literal["assistant", "prompt"] = param("assistant", "end of the question")
    marker: tuple[int, ...] | None = param(None, "token ids that begin an answer; empty = the processor's")
    around: tuple[int, ...] | None = param(None, "token ids that open and close a picture; empty = the model's")
    special: tuple[int, ...] | None = param(None, "token ids that end a question; empty = the tokenizer's")

    def __post_init__(self) -> None:
        self.check("times", 1, 8)
        if not isinstance(self.times, int):
            raise MethodError(f"jrt.times={self.times!r}: give a whole number from 1 to 8")
        if self.until not in ("assistant", "prompt"):
            raise MethodError(f"jrt.until={self.until!r}: choose 'assistant' or 'prompt'")
        for name in ("marker", "around", "special"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(int(n) for n in given))

    def prepare(self, family: Family) -> JRT:
        if self.times == 1:
            return self
        around = family.around_image if self.around is None else self.around
        special = tuple(n for n in family.special if n != family.image_token_id and n not in around)
        found = dataclasses.replace(self, around=around, special=special if self.special is None else self.special)
        if self.until == "prompt" or self.marker:
            return found
        if family.markers is None:
            raise MethodError(
                "jrt: the token ids that begin an answer are unknown; pass processor= to mitigate(), or give "
                "marker=(…), or until='prompt' for prompts that end with the question"
            )
        return dataclasses.replace(found, marker=family.markers.assistant)

    def rewrite(self) -> RepeatQuestion | None:
        if self.times == 1:
            return None
        marker = (self.marker or ()) if self.until == "assistant" else ()
        return RepeatQuestion(times=self.times - 1, marker=marker, around=self.around or (), special=self.special or ())
