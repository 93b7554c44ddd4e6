"""LQCD: leading-query contrastive decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.branches import Branch
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Mix, contrast
from mmfix.prompts import PromptEdit
from mmfix.registry import param, register


@register("lqcd", title="Leading Query Contrastive Decoding", paper="arXiv:2408.11261", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class LQCD(Method):
    """Subtract what the model would say to a question that leads it to an answer.

    *Towards Analyzing and Mitigating Sycophancy in Large Vision-Language Models* (arXiv:2408.11261). With l the logits
    of the prompt at hand, whose question is neutral, and l_lead those of the same picture with a leading question
    ("… , right?")::

        z = (1 + alpha) l - alpha l_lead
        z_i = -inf unless l_i >= log(beta) + max l

    Both questions are given, the neutral one as the prompt of ``generate()`` and the leading one here; rewriting one
    into the other is the caller's business. They may differ in length: each is a row of the same batch with its own
    positions and its own cache. Equal questions give the clean logits. All prompts of a batch share the leading
    question. A prompt without an image keeps its logits.

    Most of what it gains against sycophancy comes from the neutral question that it is told, not from the contrast:
    whoever can name that question may ask it alone, in one pass, and no claim can then flip the answer. So read the
    contrast from its accuracy against that of the plain model on the neutral question, not from a flip rate against the
    plain model on the leading one.

    No code was released and the paper's numbers are not known to us; the defaults are those of visual contrastive
    decoding. The paper's second version scales alpha by the sentiment of the query, which is not built.

    Args:
        leading: token ids of everything after the last image in the leading prompt, the assistant's header included;
            :func:`question` cuts them out of a tokenised prompt.
        alpha: strength, at least 0; 0 leaves the cut alone.
        beta: plausibility cut on the neutral prompt, in (0, 1].

    Raises:
        MethodError: a value out of range, or no leading question.

    Example:
        >>> leading = processor(images=image, text=leading_prompt, return_tensors="pt")["input_ids"][0]
        >>> with mmfix.mitigate(model, "lqcd", leading=question(leading, model.config.image_token_id)):
        ...     ids = model.generate(**neutral_inputs)
    """

    leading: tuple[int, ...] | None = param(None, "token ids of the leading question, after the image")
    alpha: float = param(1.0, "strength of the contrast", 0.0, 5.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("alpha", 0.0, 100.0)
        self.check("beta", 1e-9, 1.0)
        if self.leading is not None:
            object.__setattr__(self, "leading", tuple(int(n) for n in self.leading))

    def prepare(self, family: Family) -> LQCD:
        if self.alpha > 0 and not self.leading:
            raise MethodError(
                "lqcd: there is no leading question to contrast with; give leading=(…), the token ids of everything "
                "after the image in the leading prompt"
            )
        if family.image_token_id in (self.leading or ()):
            raise MethodError(
                f"lqcd.leading holds the image token {family.image_token_id}; give the ids after the last image only "
                "(mmfix.methods.lqcd.question cuts them out of a prompt)"
            )
        return self

    def branches(self, family: Family) -> Sequence[Branch]:
        if self.alpha == 0:
            return []
        return [Branch(prompt=PromptEdit(tokens=self.leading or (), at="question"))]

    def mix(self) -> Mix:
        return contrast(self.alpha, branches=int(self.alpha > 0), beta=self.beta)


def question(ids: Sequence[int], image_token_id: int) -> tuple[int, ...]:
    """The ids after the last image token of one prompt.

    Raises:
        MethodError: the prompt has no image token, or nothing follows it.
    """
    plain = [int(n) for n in ids]
    if image_token_id not in plain or plain[-1] == image_token_id:
        raise MethodError(
            f"a leading prompt of {len(plain)} tokens needs the image token {image_token_id} and text after it"
        )
    return tuple(plain[len(plain) - plain[::-1].index(image_token_id) :])
