"""VISTA: visual information steering and self-logits augmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers, in_proportion, layer_numbers
from mmfix.registry import param, register
from mmfix.steering import Blend, Steer


@register("vista", title="Visual Information Steering with Token-logit Augmentation", paper="arXiv:2502.03628",
          kind="hidden edit")  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class VISTA(Method):
    """Turn the hidden states towards what the image adds to the prompt, and let the language head read earlier layers.

    *The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual Information Steering*
    (ICML 2025, arXiv:2502.03628). With h_l the state of the prompt's last token after layer l, x what the MLP of
    layer l gives for any token, n(x) = x / |x| and h_n.. the states of some late layers::

        d_l  = h_l(image, text) - h_l(text)                                           once per prompt
        x   <- |x| n( n(x) + strength (1 + max(0, cos(x, -d_l))) n(d_l) )             every layer and token
        z    = (1 - gamma) W norm(h_last) + gamma mean_l W h_l                         logits

    Two more prefills per prompt, one of them without the image; one pass per token. In further turns of a conversation
    the directions are those of its first prompt.

    The released code casts to float16, and reads the late states without the final norm, as here by default; its last
    direction is taken behind that norm, here before it. Its late layers are h_25 to h_30 of 32, the embeddings being
    h_0: the outputs of layers 24 to 29. Its rank-one PCA of a single demonstration is the difference itself.

    Args:
        strength: lambda, 0 to 10 (0.17 for captions, 0.01 for yes-or-no questions); 0 does not steer.
        gamma: share of the late layers in the logits, 0 to 1; 0 leaves them alone.
        layers: layers that are steered; None takes all.
        late_layers: layers that the head reads; None takes 24 to 29 of 32, in proportion.
        normed: put the final norm before the head for the late layers too (the release: no).

    Raises:
        MethodError: a value out of range, or layers that the model does not have.
        MmfixError: a prompt in pieces, or an image in a later turn.
        UnsupportedModel: the image is not part of the prompt.
    """

    strength: float = param(0.17, "lambda: how far states are turned", 0.0, 1.0)
    gamma: float = param(0.3, "share of late layers in the logits", 0.0, 1.0)
    layers: tuple[int, ...] | None = param(None, "layers that are steered; empty = all")
    late_layers: tuple[int, ...] | None = param(None, "layers that the head reads; empty = 24 to 29 of 32")
    normed: bool = param(False, "final norm before the head for late layers too")

    def __post_init__(self) -> None:
        self.check("strength", 0.0, 10.0)
        self.check("gamma", 0.0, 1.0)
        for name in ("layers", "late_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))

    def prepare(self, family: Family) -> VISTA:
        count = family.num_layers
        late = in_proportion(24, 30, count) if self.late_layers is None else self.late_layers
        late = layer_numbers("vista.late_layers", tuple(late), count)
        return dataclasses.replace(self, layers=chosen_layers(self, range(count), count), late_layers=late)

    @property
    def steers(self) -> bool:
        return self.strength > 0

    @property
    def compares_states(self) -> bool:
        return self.steers

    def steering(self, site: Site) -> Sequence[Steer]:
        if not self.steers or site.states is None or site.layer not in (self.layers or ()):
            return ()
        with_image, without = site.states
        return (Steer(direction=with_image.float() - without.float(), strength=self.strength, opposing=True),)

    def blend(self) -> Blend | None:
        if self.gamma == 0 or not self.late_layers:
            return None
        return Blend(share=self.gamma, layers=self.late_layers, normed=self.normed)
