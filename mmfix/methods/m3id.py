"""M3ID: multi-modal mutual-information decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.branches import Branch
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Growth, Mix
from mmfix.registry import param, register


@register("m3id", title="Multi-Modal Mutual-Information Decoding", paper="arXiv:2403.14003", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class M3ID(Method):
    """Guide away from what the text alone would say, more and more as the answer grows.

    *Multi-Modal Hallucination Control by Visual Information Grounding* (CVPR 2024, arXiv:2403.14003). The longer an
    answer, the less it depends on the image. With logits l of the prompt and l_text of the prompt without its image,
    at generated token t::

        z    = l + (1 - g) / g (l - l_text)        g = exp(-decay t)
        cut    z_i = -inf unless l_i >= log(beta) + max l

    The weight ``(1 - g) / g = exp(decay t) - 1`` has no bound: with decay 0.02 it is 0.02 at t = 1, 1.72 at 50 and
    22025 at 500, where the plain logits no longer count beside the difference and the cut alone holds the answer
    together. `limit` bounds it (the default is reached at t = 691 and keeps float32 finite).
    t counts every prompt's own tokens, from `start` at the first generated one. The prompt without the image is a row
    of the same batch with its own cache and positions.

    The authors' code was not read; the port in the release of ONLY starts t at 0, so that the first generated token
    (the whole answer in yes-or-no questions) is the plain model's, and cuts with beta 0.1, as the defaults here do.
    It sets no limit.

    Args:
        decay: per generated token, from 0 to 1; 0 runs no second branch and leaves the cut.
        start: t of the first generated token, 0 to 100000.
        limit: the largest weight, 0 to 1e6.
        beta: plausibility cut, in (0, 1].

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the image is not part of the prompt.
    """

    decay: float = param(0.02, "growth of the contrast per generated token", 0.0, 1.0)
    start: int = param(0, "t of the first generated token", 0, 1000)
    limit: float = param(1e6, "largest weight of the contrast", 0.0, 1e6)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("decay", 0.0, 1.0)
        self.check("start", 0, 100_000)
        self.check("beta", 1e-9, 1.0)
        self.check("limit", 0.0, 1e6)

    def branches(self, family: Family) -> Sequence[Branch]:
        return [Branch(image=False)] if self.decay else []

    def mix(self) -> Mix:
        if not self.decay:
            return Mix(weights=(1.0,), beta=self.beta)
        growth = Growth(rate=self.decay, start=self.start, limit=self.limit)
        return Mix(weights=(2.0, -1.0), beta=self.beta, growth=growth)
