"""DAMRO: contrast with the tower's outlier tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.branches import Branch
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Mix, contrast
from mmfix.registry import param, register
from mmfix.selection import Outliers, check_layer


@register("damro", title="DAMRO", paper="arXiv:2410.04514", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class DAMRO(Method):
    """Subtract what the model would say if it saw only the patches that the vision tower's CLS token looks at most.

    *DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination* (EMNLP 2024, arXiv:2410.04514).
    The tower's CLS token attends to a few outlier patches of the background, and so does the language model when it
    makes things up. With a_j the CLS token's attention to patch j in the tower's `layer`, mean over heads, and logits l
    of the prompt and l' of the prompt whose only image tokens are the `count` patches of largest a::

        z   = (1 + alpha) l - alpha l'
        cut   z_i = -inf unless l_i >= log(beta) + max l

    The branch is a row of the same batch with its own cache, and shorter: the other image tokens leave its prompt. The
    tower encodes each picture twice, once per prompt.

    The released code treats all heads of that layer as one (one softmax over ``q k / sqrt(width)``) and hands over the
    patches in order of attention, so that their positions lose the picture's order; here heads are averaged and the
    order stays. It takes its layer from the model's feature layer (-2) or the last (-1), alpha 0.5 to 2 by benchmark
    and model, and samples without temperature or warpers. With `beta` = 1 only the plain argmax survives the cut: a
    port that sets the cut to max l is exactly greedy.

    Args:
        count: patches that the branch sees, of each picture (or tile), 1 to 100000.
        layer: tower layer whose attention counts, negative from the end.
        alpha: strength of the contrast, from -1; 0 runs no second branch and leaves the cut.
        beta: plausibility cut, in (0, 1].

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the tower has no CLS token, or image tokens are not its patches.
    """

    count: int = param(10, "patches that the branch sees", 1, 576)
    layer: int = param(-2, "tower layer whose attention counts", -48, 47)
    alpha: float = param(0.5, "strength of the contrast", -1.0, 5.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("count", 1, 100_000)
        self.check("alpha", -1.0, 100.0)
        self.check("beta", 1e-9, 1.0)

    def prepare(self, family: Family) -> DAMRO:
        if self.alpha:
            check_layer("damro.layer", self.layer, len(family.tower_attentions))
        return self

    def branches(self, family: Family) -> Sequence[Branch]:
        return [Branch(select=Outliers(count=self.count, layer=self.layer))] if self.alpha else []

    def mix(self) -> Mix:
        return contrast(self.alpha, branches=int(self.alpha != 0), beta=self.beta)
