"""ICD: instruction contrastive decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.branches import Branch
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Mix, contrast
from mmfix.prompts import PromptEdit
from mmfix.registry import param, register


@register("icd", title="Instruction Contrastive Decoding", paper="arXiv:2403.18715", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class ICD(Method):
    """Subtract what the model would say under a disturbed instruction.

    *Mitigating Hallucinations in Large Vision-Language Models with Instruction Contrastive Decoding* (Findings of ACL
    2024, arXiv:2403.18715). With logits l of the prompt and l' of the same picture under the disturbed instruction::

        z   = (1 + alpha) l - alpha l'
        cut   z_i = -inf unless l_i >= log(beta) + max l

    A disturbance is a role that the model is given and that makes it see worse, such as "You are a confused object
    detector." It is put beside the question, or in its place; the picture stays. Combination and cut are those of
    ``vcd``: the released code was not read, and its numbers may differ.

    The disturbance has no default, so that results always carry the one they were made with: give `instruction`, or
    the ids of its tokens.

    Args:
        instruction: the disturbance as text; needs ``processor=`` in ``mitigate()``.
        tokens: the disturbance as token ids, without special tokens; goes before `instruction`.
        at: "after_image" and "before_image" insert it there, outside of the tokens with which a template opens and
            closes a picture (as far as model or processor name them); "question" puts it in place of everything after
            the image, so that it must hold the rest of the turn and the answer's header too.
        alpha: strength of the contrast, from -1; 0 runs no second branch and leaves the cut.
        beta: plausibility cut, in (0, 1].

    Raises:
        MethodError: a value out of range, no disturbance, or a text without a processor.
    """

    instruction: str | None = param(None, "disturbance as text", example="You are a confused object detector.")
    tokens: tuple[int, ...] | None = param(None, "disturbance as token ids")
    at: Literal["after_image", "before_image", "question"] = param("after_image", "where the disturbance stands")
    alpha: float = param(1.0, "strength of the contrast", -1.0, 5.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("alpha", -1.0, 100.0)
        self.check("beta", 1e-9, 1.0)
        if self.at not in ("after_image", "before_image", "question"):
            raise MethodError(f"icd.at={self.at!r}: choose 'after_image', 'before_image' or 'question'")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(int(t) for t in self.tokens))
            if not self.tokens or min(self.tokens) < 0:
                raise MethodError(f"icd.tokens={self.tokens!r}: give token ids, at least one")

    def prepare(self, family: Family) -> ICD:
        if self.alpha == 0 or self.tokens is not None:
            return self
        if not self.instruction:
            raise MethodError(
                "icd: the disturbed instruction is part of the experiment and has no default; give instruction='You "
                "are a confused object detector.' with processor=, or tokens=(…)"
            )
        if family.encode is None:
            raise MethodError(
                "icd.instruction is text and the model's tokenizer is unknown; pass processor= to mitigate(), or give "
                "tokens=(…)"
            )
        return dataclasses.replace(self, tokens=tuple(family.encode(self.instruction)))

    def branches(self, family: Family) -> Sequence[Branch]:
        if self.alpha == 0:
            return []
        return [Branch(prompt=PromptEdit(tokens=self.tokens or (), at=self.at, around=family.around_image))]

    def mix(self) -> Mix:
        return contrast(self.alpha, branches=int(self.alpha != 0), beta=self.beta)
