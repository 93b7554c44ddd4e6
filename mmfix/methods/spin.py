"""SPIN: image-guided head suppression."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers
from mmfix.registry import param, register
from mmfix_kernels import Edit, Group, HeadSelect, Rows


@register("spin", title="Image-guided Head Suppression (SPIN)", paper="arXiv:2505.16411", kind="head scale")
@dataclass(frozen=True, kw_only=True)
class SPIN(Method):
    """Suppress the heads that look least at the image, anew for every token.

    *Mitigating Hallucinations in Vision-Language Models through Image-Guided Head Suppression* (EMNLP 2025,
    arXiv:2505.16411). For the last prompt token and every generated one, with S the scores and A the attention of
    head h on the image keys I, the outputs of heads are scaled before the output projection::

        g_h  = sum_{j in I} A_hj   (rank="mass")        or   sum_{j in I} S_hj   (rank="scores", as released)
        O_h <- O_h for the floor(keep * H) heads with the largest g ;  O_h <- factor O_h for the others

    The released code ranks by the sum of signed scores before the softmax, in which a head that spreads over many
    keys with small negative scores comes last whatever share of its attention they get; it divides g by its standard
    deviation and takes a softmax, which changes no rank, and rounds keep * H down. One forward pass per token.

    Args:
        keep: share of the query heads that stay as they are, 0 to 1 (released: 0.95 for captions, 0.8 for POPE).
        factor: on the outputs of the others, 0 to 1; 1 changes nothing (released: 0.08, and 0.1 for POPE).
        layers: layers whose heads are suppressed; None takes all.
        rank: what ranks heads, "mass" or "scores".

    Raises:
        MethodError: a value out of range.
        UnsupportedModel: the image is not part of the prompt.
    """

    keep: float = param(0.95, "share of heads that stay as they are", 0.0, 1.0)
    factor: float = param(0.08, "factor on the other heads' outputs", 0.0, 1.0)
    layers: tuple[int, ...] | None = param(None, "layers whose heads are suppressed; empty = all")
    rank: Literal["mass", "scores"] = param("mass", "rank heads by attention mass, or by scores as released")

    def __post_init__(self) -> None:
        self.check("keep", 0.0, 1.0)
        self.check("factor", 0.0, 1.0)
        if self.rank not in ("mass", "scores"):
            raise MethodError(f"spin.rank={self.rank!r}: choose 'mass' or 'scores'")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    def prepare(self, family: Family) -> SPIN:
        count = family.num_layers
        return dataclasses.replace(self, layers=chosen_layers(self, range(count), count))

    def kept(self, heads: int) -> int:
        """``floor(keep * heads)``, forgiving the last bits of the product (0.29 * 100 is 29)."""
        return math.floor(self.keep * heads + 1e-9)

    def edits(self, site: Site) -> Sequence[Edit]:
        kept = self.kept(site.num_heads)
        if (
            self.factor == 1
            or kept == site.num_heads
            or site.layer not in (self.layers or ())
            or not site.spans.any_image
        ):
            return ()
        return (HeadSelect(group=Group.IMAGE, keep=kept, factor=self.factor, by=self.rank, rows=Rows.LAST),)
