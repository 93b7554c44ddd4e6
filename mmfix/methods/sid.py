"""SID: self-introspective decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.branches import Branch
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Mix, contrast
from mmfix.registry import param, register
from mmfix.selection import Overlooked


@register("sid", title="Self-Introspective Decoding", paper="arXiv:2408.02032", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class SID(Method):
    """Subtract what the model would say if it saw only the image tokens that its early layers look at least.

    *Self-Introspective Decoding: Alleviating Hallucinations for Large Vision-Language Models* (ICLR 2025, arXiv:
    2408.02032). With a_j the weight of image token j in layer ``after - 1`` of the second branch, in its newest row,
    mean over heads, and logits l of the prompt and l' of the second branch, whose layers from `after` on see of the
    image only the `count` tokens of least a::

        z   = (1 + alpha) l - alpha l'
        cut   z_i = -inf unless l_i >= log(beta) + max l

    The choice of the prompt's last row holds for all rows of the prompt; every generated token chooses anew. Of equal
    weights the first token is kept. The branch is a row of the same batch with its own cache. With `count` at least the
    number of image tokens the branch is the plain model and nothing is contrasted.

    The released code chooses for a batch of one; its other mode removes the tokens instead of hiding them, but keeps no
    cache. Its function takes alpha 0.5 where none is given and its scripts 1, which is the one default here. Users
    report the same captions with everything switched off: compare with ``plausibility`` and with greedy on the same
    images.

    Args:
        count: image tokens that the later layers of the branch see, 1 to 100000.
        after: layers of the branch that see the whole image, from 1 up to one less than the model has.
        alpha: strength of the contrast, from -1; 0 runs no second branch and leaves the cut.
        beta: plausibility cut, in (0, 1].

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the image is not part of the prompt.
    """

    count: int = param(100, "image tokens that the branch keeps", 1, 576)
    after: int = param(2, "layers of the branch that see the whole image", 1, 31)
    alpha: float = param(1.0, "strength of the contrast", -1.0, 5.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("count", 1, 100_000)
        self.check("after", 1, 1000)
        self.check("alpha", -1.0, 100.0)
        self.check("beta", 1e-9, 1.0)

    def prepare(self, family: Family) -> SID:
        if self.after >= family.num_layers:
            raise MethodError(
                f"sid.after={self.after}: this model has {family.num_layers} layers, so no later one is left; give a "
                f"number from 1 to {family.num_layers - 1}"
            )
        return self

    def branches(self, family: Family) -> Sequence[Branch]:
        return [Branch(select=Overlooked(count=self.count, after=self.after))] if self.alpha else []

    def mix(self) -> Mix:
        return contrast(self.alpha, branches=int(self.alpha != 0), beta=self.beta)
