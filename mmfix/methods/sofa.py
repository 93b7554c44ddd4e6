"""SoFA: soft attention between images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmfix.errors import MethodError
from mmfix.method import Method, Site, param, register
from mmfix.segments import MaskEdit, Role


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

    An image is a run of image tokens: images without a token between them count as one. With fewer than two images
    nothing changes. Released code was not read; the number of layers is the paper's, which of them is ours.

    Args:
        sigma: weight of the bidirectional map, 0 to 1; 0 changes nothing. The paper chooses it on a validation set.
        layers: "even" layers (0, 2, …), "odd" ones, or "all".

    Raises:
        MethodError: a value out of range.
    """

    sigma: float = param(0.5, "weight of the map that also sees later images", 0.0, 1.0)
    layers: Literal["even", "odd", "all"] = param("even", "layers in which maps are blended")

    def __post_init__(self) -> None:
        self.check("sigma", 0.0, 1.0)
        if self.layers not in ("even", "odd", "all"):
            raise MethodError(f"sofa.layers={self.layers!r}: choose 'even', 'odd' or 'all'")

    @property
    def tells_pictures_apart(self) -> bool:
        return True

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        if self.sigma == 0 or (self.layers != "all" and site.layer % 2 != (self.layers == "odd")):
            return ()
        return (MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation="other_image", share=self.sigma),)
