"""SoFA: soft attention between images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, Site
from mmfix.methods.frame_block import frames, tokens_per_picture
from mmfix.registry import param, register
from mmfix.segments import MaskEdit, Role, Segments


@register("sofa", title="SoFt Attention", paper="arXiv:2503.13792", kind="mask")
@dataclass(frozen=True, kw_only=True)
class SoFA(Method):
    """Let images look at later images, softly, so that their order matters less.

    *Identifying and Mitigating Position Bias of Multi-image Vision-Language Models* (CVPR 2025, arXiv:2503.13792). In
    every second layer, on the rows of image tokens, at prefill::

        A = (1 - sigma) A_causal + sigma A_bi
        A_bi = softmax of the scores under a mask that also opens the tokens of later images

    Maps are blended after the softmax, which is the same as blending outputs, so every row still sums to one. Inside
    an image attention stays causal, and so does text; decoding is unchanged. One pass, with two attention calls in
    the layers concerned.

    An image is a run of image tokens, cut into pieces of `tokens` where images touch. With fewer than two images
    nothing changes. Released code was not read; the number of layers is the paper's, which of them is ours.

    Args:
        sigma: weight of the bidirectional map, 0 to 1; 0 changes nothing. The paper chooses it on a validation set.
        layers: "even" layers (0, 2, …), "odd" ones, or "all".
        tokens: image tokens per image, at least 1. None takes the number from the model's configuration, and where it
            does not tell, the length of each run of image tokens.

    Raises:
        MethodError: a value out of range.
        MmfixError: a run of image tokens is no whole number of images.
    """

    sigma: float = param(0.5, "weight of the map that also sees later images", 0.0, 1.0)
    layers: Literal["even", "odd", "all"] = param("even", "layers in which maps are blended")
    tokens: int | None = param(None, "image tokens per image; empty = the model's, or one image per run", 1)

    def __post_init__(self) -> None:
        self.check("sigma", 0.0, 1.0)
        if self.layers not in ("even", "odd", "all"):
            raise MethodError(f"sofa.layers={self.layers!r}: choose 'even', 'odd' or 'all'")
        if self.tokens is not None and (not isinstance(self.tokens, int) or self.tokens < 1):
            raise MethodError(f"sofa.tokens={self.tokens!r}: give a whole number from 1 on, or None")

    @property
    def tells_pictures_apart(self) -> bool:
        return True

    def prepare(self, family: Family) -> SoFA:
        return dataclasses.replace(self, tokens=self.tokens or tokens_per_picture(family))

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        if self.sigma == 0 or (self.layers != "all" and site.layer % 2 != (self.layers == "odd")):
            return ()
        return (MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation=OtherImage(self.tokens), share=self.sigma),)


@dataclass(frozen=True)
class OtherImage:
    """Pairs of tokens of two images.

    Args:
        tokens: of an image; None for one image per run.
    """

    tokens: int | None

    def __call__(self, segments: Segments, rows: slice) -> Tensor:
        """Bool[B, l, T]."""
        image = frames(segments.image >= 0, self.tokens)
        query, key = image[:, rows, None], image[:, None, :]
        return (query != key) & (query >= 0) & (key >= 0)
