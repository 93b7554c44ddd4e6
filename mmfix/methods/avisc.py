"""AvisC: attentional vision calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.branches import Branch
from mmfix.families import Family
from mmfix.method import Method
from mmfix.mixing import Mix, contrast
from mmfix.registry import param, register
from mmfix.selection import Blind


@register("avisc", title="Attentional Vision Calibration", paper="arXiv:2405.17820", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class AvisC(Method):
    """Subtract what the model would say if it saw only blind tokens: image tokens that are looked at whatever is asked.

    *Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models* (arXiv:
    2405.17820). With a^l the weights of the prompt's last row on image tokens in layer l, mean over heads, and logits
    l' of the prompt whose image tokens are zero vectors unless they are blind::

        L      the fewest layers that hold `layer_share` of  sum_l sum_j a^l_j
        a      mean of a^l over L;   blind: a_j >= mean(a) + deviations * std(a)
        z    = (1 + alpha) l - alpha l'
        cut    z_i = -inf unless l_i >= log(beta) + max l

    Layers and tokens are chosen prompt by prompt, from the plain model's attention, by one more pass over the prompt;
    the zeroed prompt is a row of the same batch with its own cache. Where no token reaches the bound, all image tokens
    of that row are zero.

    The released code chooses for a batch of one, with image positions written down for LLaVA-1.5 and InstructBLIP,
    needs full attention maps of all layers, and serves sampling only; other maskings than zeros (ones, noise) are
    options of it. Its function takes alpha 1 where none is given; its scripts give other values. Record `alpha` and
    `deviations` with results.

    Args:
        layer_share: of the image's mass over all layers, that the chosen layers hold, 0 to 1.
        deviations: standard deviations above the mean from which a token is blind, -100 to 100.
        alpha: strength of the contrast, from -1; 0 runs no second branch and leaves the cut.
        beta: plausibility cut, in (0, 1].

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the image is not part of the prompt.
    """

    layer_share: float = param(0.5, "share of the image's mass that the chosen layers hold", 0.0, 1.0)
    deviations: float = param(1.0, "standard deviations above the mean of a blind token", -2.0, 4.0)
    alpha: float = param(1.0, "strength of the contrast", -1.0, 5.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("layer_share", 0.0, 1.0)
        self.check("deviations", -100.0, 100.0)
        self.check("alpha", -1.0, 100.0)
        self.check("beta", 1e-9, 1.0)

    def branches(self, family: Family) -> Sequence[Branch]:
        if not self.alpha:
            return []
        return [Branch(select=Blind(share=self.layer_share, deviations=self.deviations))]

    def mix(self) -> Mix:
        return contrast(self.alpha, branches=int(self.alpha != 0), beta=self.beta)
