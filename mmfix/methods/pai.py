"""PAI: pay attention to the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.branches import Branch
from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers
from mmfix.mixing import Mix, guidance
from mmfix.registry import param, register
from mmfix_kernels import Edit, Group, Rows, ScoreEdit


@register("pai", title="Paying Attention to the Image", paper="arXiv:2407.21771", kind="contrast", passes=2)
@dataclass(frozen=True, kw_only=True)
class PAI(Method):
    """Raise the newest token's scores on the image, and guide away from what the text alone would say.

    *Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs* (ECCV 2024,
    arXiv:2407.21771). For the last prompt token and every generated one, with c and u the log-probabilities with the
    image (scores raised) and without it (scores as they are)::

        S_j <- S_j + alpha |S_j|                 j an image key, before the softmax, in `layers`, all heads
        z    = gamma (c - u) + u                 z_i = -inf unless c_i >= log(beta) + max c

    A negative score shrinks to (1 - alpha) of itself, so above 1 its sign turns. The prompt without the image is a row
    of the same batch with its own cache and positions; it follows beams and starts anew with every prompt.

    The released code skips the raise until its guidance has run once, so that the first generated token (the whole
    answer in yes-or-no questions) gets guidance alone, and with gamma = 1 no token is ever raised; here the raise acts
    from the first token on, whatever gamma. It also takes one image span for a whole batch and repeats no key heads,
    which excludes padding and grouped queries; here both work. Its README uses alpha 0.2; other alphas are told per
    model.

    Args:
        alpha: share of a score's magnitude that is added, 0 to 10.
        gamma: strength of the guidance, from 0; 1 runs no second branch and cuts nothing.
        beta: plausibility cut of the guidance, in (0, 1].
        layers: layers whose scores are raised; None takes all from layer 2 on, as released.

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the image is not part of the prompt.
    """

    alpha: float = param(0.2, "share of a score's magnitude added on image keys", 0.0, 2.0)
    gamma: float = param(1.1, "strength of the guidance; 1 = none", 0.0, 5.0)
    beta: float = param(0.1, "plausibility cut of the guidance", 0.0, 1.0)
    layers: tuple[int, ...] | None = param(None, "layers whose scores are raised; empty = all from layer 2 on")

    def __post_init__(self) -> None:
        self.check("alpha", 0.0, 10.0)
        self.check("gamma", 0.0, 100.0)
        self.check("beta", 1e-9, 1.0)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    def prepare(self, family: Family) -> PAI:
        count = family.num_layers
        return dataclasses.replace(self, layers=chosen_layers(self, range(min(2, count - 1), count), count))

    def edits(self, site: Site) -> Sequence[Edit]:
        if self.alpha == 0 or site.layer not in (self.layers or ()) or not site.spans.any_image:
            return ()
        return (ScoreEdit(group=Group.IMAGE, rows=Rows.LAST, abs_gain=self.alpha),)

    def branches(self, family: Family) -> Sequence[Branch]:
        return [Branch(image=False)] if self.gamma != 1 else []

    def mix(self) -> Mix | None:
        return guidance(self.gamma, self.beta) if self.gamma != 1 else None
