"""VHR: vision-aware head reinforcement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.heads import chosen, factors, fit, of_layer
from mmfix.method import Method, Site
from mmfix.registry import param, register
from mmfix_kernels import Edit, HeadScale


@register("vhr", title="Vision-aware Head Reinforcement", paper="arXiv:2412.13949", kind="head scale")
@dataclass(frozen=True, kw_only=True)
class VHR(Method):
    """Scale up the heads whose output changes most when the image is taken away.

    *Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence* (ACL 2025, arXiv:2412.13949).
    With A_i the output of head i at the last prompt position, before the output projection::

        VHD_i = || A_i(image, text) - A_i(text) ||_2
        VHD_i := 0 where VHD_i > mean + std of VHD and ||A_i(text)||^2 > mean + std of it      (drop_outliers)
        H     = { i : VHD_i > median of VHD }
        A_i  <- alpha * A_i    for i in H, at every prompt position and every later step

    Heads are chosen per sample, layer by layer in one prefill (scaled layers influence later choices), and then
    frozen. The text-only branch is the prompt without its image tokens: one short extra prefill, nothing per token;
    it is scaled too. Statistics are float32; the standard deviation is the population's; the median of an even
    number of heads is the mean of the middle two.

    Args:
        alpha: factor on the chosen heads, 0 to 10; 1 changes nothing (the paper: 2; 4 breaks the text).
        layers: layers that are reinforced; None takes the paper's {1} and the last 14, of a 32-layer model, in
            proportion: layer 1 and the last 7/16 of the layers.
        drop_outliers: the paper's removal of heads that are large without the image.
        scale_text_only: scale the chosen heads in the text-only branch as well, before later layers are compared.
        heads: the same heads for every prompt instead of a choice per prompt, which costs no second prefill (in the
            paper, heads of one sample used for all gain less): a file of ``mmfix heads``, or (layer, head) pairs.
        top: of the heads in such a file, the share (below 1) or number with the largest scores.

    Raises:
        MethodError: a value out of range, or layers together with heads.
        DataError: `heads` names a file that is no head map.
    """

    alpha: float = param(2.0, "factor on the chosen heads", 0.0, 10.0)
    layers: tuple[int, ...] | None = param(None, "layers that are reinforced; empty = the paper's, in proportion")
    drop_outliers: bool = param(True, "leave out heads that are large without the image")
    scale_text_only: bool = param(True, "scale the text-only branch too")
    heads: str | tuple[tuple[float, ...], ...] | None = param(
        None, "the same heads for every prompt: file of `mmfix heads`, or (layer, head) pairs"
    )
    top: float = param(0.5, "share (below 1) or number of the file's heads", 0.0, 100_000.0)

    def __post_init__(self) -> None:
        self.check("alpha", 0.0, 10.0)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))
        if self.layers is not None and self.heads is not None:
            raise MethodError("vhr.layers and vhr.heads: heads name their layers; give one of the two")
        object.__setattr__(self, "heads", chosen(self.heads, self.top, "vhr"))

    def prepare(self, family: Family) -> VHR:
        count = family.num_layers
        if self.layers is not None and (not self.layers or not all(-count <= n < count for n in self.layers)):
            raise MethodError(f"vhr.layers={self.layers!r}: give layers from {-count} to {count - 1}, or None")
        if self.heads is not None and not isinstance(self.heads, str):
            fit(self.heads, family, "vhr")
        return self

    def edits(self, site: Site) -> Sequence[Edit]:
        named = of_layer(self.heads, site.layer)
        if not named or self.alpha == 1.0 or not site.spans.any_image:
            return ()
        return (HeadScale(scale=factors(site.spans, site.num_heads, dict.fromkeys(named, self.alpha))),)

    @property
    def scales_text_only(self) -> bool:
        return self.scale_text_only

    def wants_heads(self, layer: int, num_layers: int) -> bool:
        if self.alpha == 1.0 or self.heads is not None:
            return False
        chosen = default_layers(num_layers) if self.layers is None else self.layers
        return layer in chosen or layer - num_layers in chosen

    def head_scale(self, site: Site, heads: Tensor, text_only: Tensor) -> HeadScale:
        divergence = (heads.float() - text_only.float()).norm(dim=-1)  # [B, H]
        if self.drop_outliers:
            text_norm = text_only.float().square().sum(-1)
            divergence = divergence.masked_fill(_large(divergence) & _large(text_norm), 0.0)
        chosen = divergence > divergence.quantile(0.5, dim=-1, keepdim=True)
        return HeadScale(scale=torch.where(chosen, self.alpha, 1.0))


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The paper's layers of a 32-layer model, {1, 18..31}, in proportion to `num_layers`."""
    last = round(num_layers * 14 / 32)
    return tuple(sorted({min(1, num_layers - 1), *range(num_layers - last, num_layers)}))


def _large(values: Tensor) -> Tensor:
    """Bool[B, H]: values above mean + standard deviation over the heads of the layer."""
    return values > values.mean(-1, keepdim=True) + values.std(-1, correction=0, keepdim=True)
