"""V-SEAM: head modulation by how much each head helps the right answer."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.heads import HeadMap, Heads, chosen, factors, fit, some
from mmfix.method import Method, Site
from mmfix.registry import param, register
from mmfix_kernels import Edit, HeadScale


@register("vseam", title="V-SEAM head modulation", paper="arXiv:2509.14837", kind="head scale")
@dataclass(frozen=True, kw_only=True)
class VSEAM(Method):
    """Scale every head by how much it helps or hurts the right answer, as measured beforehand.

    *V-SEAM: Visual Semantic Editing and Attention Modulating for Causal Interpretability of Vision-Language Models*
    (arXiv:2509.14837). On questions with known answers, and then on every prompt with an image::

        score_lh = mean of p(right first token) - p(right first token | head's output := mean of the other heads)
        A_lh    <- clip(1 + strength score_lh, 0, 2) A_lh            all positions, all layers, all later steps

    ``mmfix heads --score vseam`` measures the scores, on questions that no evaluation here uses. They are small, of
    the order of 0.01, so that a strength of 1 is nearly the plain model: :attr:`largest` says by how much heads are
    scaled. The released code scores and evaluates on overlapping questions. It hooks the input of the output
    projection, which is the same place.

    One forward pass per token.

    Args:
        heads: a file of ``mmfix heads --score vseam``, or (layer, head, score) triples; heads not named stay.
        strength: lambda, 0 to 1000; 0 changes nothing (released: 1).

    Raises:
        MethodError: no heads, a head the model does not have, a map of another score (whose numbers are no shares of
            probability, and mostly have no sign), or a value out of range.
        DataError: `heads` names a file that is no head map.
    """

    heads: str | tuple[tuple[float, ...], ...] | None = param(
        None, "file of `mmfix heads`, or (layer, head, score) triples"
    )
    strength: float = param(1.0, "lambda, factor on the scores", 0.0, 1000.0)

    def __post_init__(self) -> None:
        self.check("strength", 0.0, 1000.0)
        named = _scored(self.heads)
        object.__setattr__(self, "heads", named)

    @property
    def largest(self) -> float:
        """The largest distance of a factor from 1."""
        return max((abs(self._factor(one[2]) - 1.0) for one in self._named()), default=0.0)

    def prepare(self, family: Family) -> VSEAM:
        if self.heads is None:
            raise MethodError("vseam.heads is not given; measure this model's heads with `mmfix heads --score vseam "
                              "--out heads.json` and give heads='heads.json'")  # fmt: skip
        fit(self._named(), family, "vseam")
        return self

    def edits(self, site: Site) -> Sequence[Edit]:
        by_head = {int(one[1]): self._factor(one[2]) for one in self._named() if one[0] == site.layer}
        if not site.spans.any_image or all(factor == 1.0 for factor in by_head.values()):
            return ()
        return (HeadScale(scale=factors(site.spans, site.num_heads, by_head)),)

    def _factor(self, score: float) -> float:
        return min(2.0, max(0.0, 1.0 + self.strength * score))

    def _named(self) -> tuple[tuple[float, ...], ...]:
        return self.heads if isinstance(self.heads, tuple) else ()


def _scored(heads: Heads | None) -> tuple[tuple[float, ...], ...] | None:
    if isinstance(heads, (str, os.PathLike)) and (score := HeadMap.read(heads).score) != "vseam":
        raise MethodError(
            f"vseam.heads: {os.fspath(heads)} holds the score {score!r}, and factors are made of the score 'vseam', "
            "whose sign says whether a head helps; measure it with `mmfix heads --score vseam`, or give (layer, head, "
            "score) triples"
        )
    named = some(chosen(heads, math.inf, "vseam"), "vseam")
    if named is not None and any(len(one) != 3 for one in named):
        raise MethodError("vseam.heads: every head needs a score; give (layer, head, score) triples or a file")
    return named
