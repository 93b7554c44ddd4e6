"""VTI: visual and textual intervention, by steering directions found once per model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mmfix.directions import Directions, load
from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, Site
from mmfix.registry import param, register
from mmfix.steering import Steer


@register("vti", title="Visual and Textual Intervention", paper="arXiv:2410.15778", kind="hidden edit")
@dataclass(frozen=True, kw_only=True)
class VTI(Method):
    """Turn the hidden states of vision tower and language model along fixed directions, at every layer and token.

    *Reducing Hallucinations in Vision-Language Models via Latent Space Steering* (ICLR 2025, arXiv:2410.15778). After
    the MLP of layer l, with n(x) = x / |x|, ``a = alpha_text`` (in the tower ``alpha_image``) and x a token's state::

        x <- |x| n( n(x) + scale a n(d_l) )

    The directions are found once by ``mmfix calibrate vti`` and read from their file:

    - text, [layers, hidden]: last-token states of a prompt with a truthful answer minus those with an invented one;
    - vision, [layers, tokens, width]: states of a picture averaged over copies with 99 % of the patches masked, minus
      those of the picture itself.

    Over the demonstrations they are reduced by PCA of rank one, all layers together (:mod:`mmfix.directions`). Prompt,
    picture and generated tokens are changed, those of a prompt without an image are not. One pass per token.

    The released code hides the factor 0.1, casts every state to float16 and replaces the model's MLPs by new modules;
    its text states of the last layer are taken after the final norm, here before it.

    Args:
        alpha_image, alpha_text: strengths in tower and language model, 0 to 10; 0 leaves that part alone.
        scale: factor on both, 0 to 1 (0.1 inside the released code).
        directions: a file of directions, or a folder with one; None takes the model's own, or those in the cache.

    Raises:
        MethodError: a value out of range; directions that are missing or belong to another model.
        UnsupportedModel: the layers of the vision tower cannot be found.
    """

    alpha_image: float = param(0.9, "strength in the vision tower", 0.0, 3.0)
    alpha_text: float = param(0.9, "strength in the language model", 0.0, 3.0)
    scale: float = param(0.1, "factor on both strengths", 0.0, 1.0)
    directions: str | None = param(None, "file of directions; empty = those of `mmfix calibrate vti`")

    found: ClassVar[Directions | None] = None  # of one instance, once prepared

    def __post_init__(self) -> None:
        for name in ("alpha_image", "alpha_text"):
            self.check(name, 0.0, 10.0)
        self.check("scale", 0.0, 1.0)
        if self.directions is not None and not isinstance(self.directions, str):
            raise MethodError(f"vti.directions={self.directions!r}: give a file name, or None")

    def prepare(self, family: Family) -> VTI:
        if not (self.steers or self.steers_tower):
            return self
        found = load(family, self.directions)
        parts = (("alpha_text", self.steers, found.text), ("alpha_image", self.steers_tower, found.vision))
        for name, used, tensor in parts:
            if used and tensor is None:
                raise MethodError(
                    f"vti.{name}={getattr(self, name):g}: the directions at hand have none for it; give pairs of "
                    f"captions to `mmfix calibrate vti`, or set vti.{name}=0"
                )
        ready = replace(self)
        object.__setattr__(ready, "found", found)
        return ready

    def measured(self, family: Family) -> dict[str, Any] | None:
        if not (self.steers or self.steers_tower):
            return None
        found = self.found
        if found is None:
            try:
                found = load(family, self.directions)
            except MethodError:
                return None  # as prepare() will say
        known = ("data", "data_sha256", "revision")
        return {"values": {"directions": found.identity}, **{n: found.facts[n] for n in known if n in found.facts}}

    @property
    def steers(self) -> bool:
        return self.alpha_text * self.scale > 0

    @property
    def steers_tower(self) -> bool:
        return self.alpha_image * self.scale > 0

    def steering(self, site: Site) -> Sequence[Steer]:
        if not self.steers or self.found is None or self.found.text is None:
            return ()
        return (Steer(direction=self.found.text[site.layer], strength=self.scale * self.alpha_text),)

    def tower_steering(self, layer: int, num_layers: int) -> Sequence[Steer]:
        if not self.steers_tower or self.found is None or self.found.vision is None:
            return ()
        return (Steer(direction=self.found.vision[layer], strength=self.scale * self.alpha_image),)
