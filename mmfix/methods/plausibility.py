"""The plausibility cut alone: the control of every contrast method."""

from __future__ import annotations

from dataclasses import dataclass

from mmfix.method import Method
from mmfix.mixing import Mix
from mmfix.registry import param, register


@register("plausibility", title="Adaptive plausibility cut alone", paper="arXiv:2210.15097", kind="contrast")
@dataclass(frozen=True, kw_only=True)
class Plausibility(Method):
    """Drop the tokens that the model itself holds unlikely; no contrast.

    With logits l, in float32::

        z_v = l_v where l_v >= log(beta) + max l, else -inf

    *Contrastive Decoding* (arXiv:2210.15097) introduced the cut. Much of what contrast methods gain over sampling comes
    from it, so it stands beside them in every table. Greedy decoding is not changed by it at all.

    Args:
        beta: share of the largest probability below which a token is cut, in (0, 1].
    """

    beta: float = param(0.1, "share of the largest probability below which a token is cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("beta", 1e-9, 1.0)

    def mix(self) -> Mix:
        return Mix(weights=(1.0,), beta=self.beta)
