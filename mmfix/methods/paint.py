"""PAINT: raise scores of local and summary image tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfix.branches import Branch
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers
from mmfix.mixing import Mix, guidance
from mmfix.registry import param, register
from mmfix_kernels import Edit, KeyGain, Rows


@register("paint", title="PAINT (Fixing Imbalanced Attention)", paper="arXiv:2501.12206", kind="score edit", passes=1)
@dataclass(frozen=True, kw_only=True)
class PAINT(Method):
    """Raise the newest token's scores on the image tokens that the vision tower's class token looks at.

    *Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model*
    (arXiv:2501.12206). From the class token's attention in the tower, summed over heads, t in its first layer and b in
    the last but one, per picture::

        Top0   = the `share` of the patches with the largest t                        (local tokens)
        Bottom = the m patches with the largest b,  m = #{ b > Q3 + 1.5 (Q3 - Q1) }   (summary tokens: outliers)
        Top    = Top0 without Bottom
        S_j   <- S_j + alpha |S_j|   j in Top ;     S_j <- S_j + beta |S_j|   j in Bottom

    before the softmax, in `layers`, all heads, for the last prompt token and every generated one. A negative score
    shrinks to (1 - alpha) of itself, so above 1 its sign turns; keys that the mask hides stay hidden. With `gamma`
    above 1 the guidance of PAI is added, c and u the log-probabilities with the image (scores raised) and without::

        z = gamma (c - u) + u          z_i = -inf unless c_i >= log(0.1) + max c

    The released code skips the raise until its guidance has run once, so that the prompt, and with gamma = 1 every
    token, is computed as by the plain model; `variant="release"` does that. It classifies the tokens of a batch's first
    picture for all, and calls it without beta in some scripts. Here the raise acts from the first token on, per
    picture, in the image rows only; the row without the image is never raised. Its "spatial" set is arbitrary (sums of
    rows that are one each) and left out. Its low CHAIR figures go with collapsed text (alpha 0.8 gives captions of 36
    words, 0.9 of 6): read recall, length and repetition beside them.

    Args:
        alpha: share of a score's magnitude added on Top, 0 to 10 (released: 0.7 for captions, 0.2 for POPE).
        beta: the same on Bottom, 0 to 10 (released: 0.3, where it is given).
        share: of the patches in Top0, 0 to 1.
        gamma: strength of the guidance, from 0; 1 runs no second branch (released: 1.1 to 2).
        layers: layers whose scores are raised; None takes all from layer 2 on, as released.
        variant: "paper" raises from the prompt's last token on; "release" generated tokens alone, and none without
            guidance.

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the tower has no class token, or image tokens are not its patches.
    """

    alpha: float = param(0.7, "share of a score's magnitude added on local tokens", 0.0, 2.0)
    beta: float = param(0.3, "the same on summary tokens", 0.0, 2.0)
    share: float = param(0.25, "share of the patches that are local tokens", 0.0, 1.0)
    gamma: float = param(1.0, "strength of the guidance; 1 = none", 0.0, 5.0)
    layers: tuple[int, ...] | None = param(None, "layers whose scores are raised; empty = all from layer 2 on")
    variant: Literal["paper", "release"] = param("paper", "paper, or generated tokens alone as the released code")

    def __post_init__(self) -> None:
        for name, high in (("alpha", 10.0), ("beta", 10.0), ("share", 1.0), ("gamma", 100.0)):
            self.check(name, 0.0, high)
        if self.variant not in ("paper", "release"):
            raise MethodError(f"paint.variant={self.variant!r}: choose 'paper' or 'release'")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    def prepare(self, family: Family) -> PAINT:
        count = family.num_layers
        return dataclasses.replace(self, layers=chosen_layers(self, range(min(2, count - 1), count), count))

    def tower_layers(self, count: int) -> tuple[int, ...]:
        return (0, max(0, count - 2)) if self.alpha or self.beta else ()

    def patches(self, maps: Mapping[int, Tensor]) -> Tensor:
        late = max(maps)  # a tower of two layers has one map for both
        top, bottom = classes(maps[0].sum(1), maps[late].sum(1), self.share)
        return self.alpha * top + self.beta * bottom

    def patch_edits(self, site: Site, values: Tensor) -> Sequence[Edit]:
        released = self.variant == "release"
        if site.layer not in (self.layers or ()) or (released and self.gamma == 1):
            return ()
        return (KeyGain(gain=values, rows=Rows.GENERATED if released else Rows.LAST),)

    def branches(self, family: Family) -> Sequence[Branch]:
        return [Branch(image=False)] if self.gamma != 1 else []

    def mix(self) -> Mix | None:
        return guidance(self.gamma, 0.1) if self.gamma != 1 else None


def classes(first: Tensor, late: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Float32[P, N] twice: 1 on the patches of Top, and of Bottom, from two maps [P, N]; of equal ones the first."""
    count = int(first.shape[-1] * share)
    top0 = torch.zeros_like(first).scatter(1, first.argsort(dim=1, descending=True, stable=True)[:, :count], 1.0)
    low, high = torch.quantile(late, torch.tensor([0.25, 0.75], device=late.device), dim=1)
    outliers = late > (high + 1.5 * (high - low))[:, None]  # the m largest are those above the limit
    return top0 * ~outliers, outliers.float()
