"""MMCA: multi-modal causal attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers
from mmfix.registry import param, register
from mmfix.segments import MaskEdit, Role, Segments
from mmfix_kernels import Edit, Group, SplitSoftmax


@register("mmca", title="Multi-Modal Causal Attention", paper="arXiv:2309.14327", kind="map", trained_in_paper=True)
@dataclass(frozen=True, kw_only=True)
class MMCA(Method):
    """Give text and pictures attention weights of their own; a patch sees no patch but itself.

    *DeepSpeed-VisualChat: Multi-Round Multi-Image Interleave Chat via Multi-Modal Causal Attention*
    (arXiv:2309.14327). In every layer and head, at the prompt and in decoding, with all keys causal::

        text row   A = c (softmax of the scores of image keys + softmax of the scores of text keys)
        image row  A = c (1 on itself                         + softmax of the scores of text keys)

    A part without a visible key is zero, and the row is then the other part alone, so that a prompt without an image
    is the plain model's. The paper's c is 1: a row that sees both parts has mass 2. It trains with that; used without
    training it is an extrapolation that has to be measured, and two gentler masses are offered. One pass.

    The released code softmaxes a row of constants where a part is empty, which spreads weight over hidden keys, and
    treats the pictures of a later turn on a cache as text; neither is reproduced.

    Args:
        mass: "sum", c = 1 as in the paper; "mean", c = 1/2; "measured", each part weighs what it weighs in one softmax
            over both, so that text rows are plain and only patches change.
        layers: layers that are changed, negative ones counted from the end; None means all, () none.

    Raises:
        MethodError: a value out of range, or a layer that the model does not have.
    """

    mass: Literal["sum", "mean", "measured"] = param("sum", "mass of the two parts of a row")
    layers: tuple[int, ...] | None = param(None, "layers that are changed; empty = all")

    def __post_init__(self) -> None:
        if self.mass not in ("sum", "mean", "measured"):
            raise MethodError(f"mmca.mass={self.mass!r}: choose 'sum', 'mean' or 'measured'")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    def prepare(self, family: Family) -> MMCA:
        return dataclasses.replace(self, layers=chosen_layers(self, range(family.num_layers), family.num_layers))

    def edits(self, site: Site) -> Sequence[Edit]:
        if self.mass == "measured" or not self._acts(site):
            return ()
        return (SplitSoftmax(group=Group.IMAGE, mass=self.mass),)

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        if not self._acts(site):
            return ()
        return (MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation=Another(), allow=False),)

    def _acts(self, site: Site) -> bool:
        return site.spans.any_image and (self.layers is None or site.layer in self.layers)


@dataclass(frozen=True)
class Another:
    """Pairs of two different tokens."""

    def __call__(self, segments: Segments, rows: slice) -> Tensor:
        """Bool[1, l, T]."""
        place = torch.arange(segments.role.shape[1], device=segments.role.device)
        return (place[rows, None] != place[None, :])[None]
