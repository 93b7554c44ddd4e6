"""AGLA: assembly of global and local attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mmfix import scorers
from mmfix.branches import Branch
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Mix
from mmfix.registry import param, register
from mmfix.relevance import KeepRelevant


@register("agla", title="AGLA", paper="arXiv:2406.12718", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class AGLA(Method):
    """Add what the model says of the picture with everything masked that does not matter for the question.

    *AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local Attention*
    (arXiv:2406.12718). A matching model gives the relevance of every pixel for the question (the paper takes the
    gradients of BLIP's image-text matching); here it is a function of the user's own, by name, see
    :mod:`mmfix.scorers`. With logits l of the picture v and l' of the masked picture v'::

        v'  = v where its relevance is among the largest `keep` of the picture, else the mean colour
        z   = l + alpha l'            a weighted sum: the masked branch counts for, not against
        cut   z_i = -inf unless l_i >= log(beta) + max l

    The sum is larger than its parts by 1 + alpha, which sharpens sampling and beams and leaves greedy decoding alone.

    The released code chooses how much to mask from the matching score, by a rule that could not be verified; here it is
    a share, the same for all pictures. Prompts without an image stay as they are. Passes per token: 2, and the user's
    model once per picture.

    Args:
        scorer: name of a registered function (pixels, question) → relevance.
        alpha: weight of the masked branch; 0 runs no second branch and leaves the cut, less than 0 subtracts.
        beta: plausibility cut, in (0, 1].
        keep: share of pixels that stay, in (0, 1].

    Raises:
        MethodError: a value out of range; no scorer, or one that is not registered, when a model is entered.
        UnsupportedModel: pictures are packed or cut into tiles, so that a map has no place.
    """

    scorer: str | None = param(None, "name of a registered relevance function")
    alpha: float = param(2.0, "weight of the branch with the masked picture", -0.5, 5.0)
    beta: float = param(0.5, "plausibility cut", 0.0, 1.0)
    keep: float = param(0.5, "share of the picture that stays", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("alpha", -0.99, 100.0)
        self.check("beta", 1e-9, 1.0)
        self.check("keep", 1e-9, 1.0)

    def prepare(self, family: Family) -> Method:
        if self.alpha:
            scorers.get(self.scorer, "map", "agla")
        return dataclasses.replace(self)

    def branches(self, family: Family) -> Sequence[Branch]:
        if not self.alpha or self.scorer is None:
            return []
        return [Branch(pixels=KeepRelevant(scorer=self.scorer, keep=self.keep, owner="agla"))]

    def mix(self) -> Mix:
        if not self.alpha:
            return Mix(weights=(1.0,), beta=self.beta)
        whole = 1.0 + self.alpha
        return Mix(weights=(1.0 / whole, self.alpha / whole), beta=self.beta, scale=whole)
