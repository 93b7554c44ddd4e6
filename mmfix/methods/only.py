"""ONLY: one-layer intervention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfix.enhanced import Enhanced
from mmfix.families import Family
from mmfix.method import Method, layer_numbers
from mmfix.mixing import Mix
from mmfix.registry import param, register


@dataclass(frozen=True, kw_only=True)
class Agreement(Mix):
    """Adds the second logits where both agree, subtracts them where they do not.

    Args:
        threshold: L1 distance of the two distributions, 0 to 2, below which they agree.
        plus, minus: weights of the second logits where they agree, and where not.
    """

    threshold: float = 0.2
    plus: float = 3.0
    minus: float = 1.0

    def combined(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """Float32[B, k, V] of [B, 2, k, V]."""
        own, other = logits[:, 0].float(), logits[:, 1].float()
        distance = (own.softmax(-1) - other.softmax(-1)).abs().sum(-1, keepdim=True)
        agreed, contrasted = own + self.plus * other, (1 + self.minus) * own - self.minus * other
        mixed = torch.where(distance < self.threshold, agreed, contrasted)
        return mixed.masked_fill(own.isneginf(), float("-inf"))


def enhance_text(weights: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """Weights without their peaks, and without the heads that look at the text less broadly than at the image.

    Of the text keys, and of the image keys, those above ``mean + std`` of their group become 0 (std with n - 1). Then
    heads whose ratio of entropies, text over image, is below the mean of the heads' ratios become 0, row by row. Rows
    are not normalised again.

    Args:
        weights: Float[B, H, n, S]; text, image: Bool, broadcastable to it.
    """
    entropies = []
    for group in (text, image):
        part = torch.where(group, weights, 0.0)
        count = group.sum(-1, keepdim=True)
        mean = part.sum(-1, keepdim=True) / count.clamp(min=1)
        spread = torch.where(group, part - mean, 0.0).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        weights = torch.where(group & (weights > mean + spread.sqrt()), 0.0, weights)
        part = torch.where(group, weights, 0.0)
        share = part / part.sum(-1, keepdim=True)
        entropies.append(-(share * torch.log(share + 1e-6)).sum(-1))
    broad, narrow = entropies[0].nan_to_num(nan=0.0), entropies[1].nan_to_num(nan=torch.inf)
    ratio = broad / narrow
    kept = ratio >= ratio.mean(1, keepdim=True)
    return torch.where(kept[..., None], weights, 0.0)


@register("only", title="One-Layer Intervention", paper="arXiv:2507.00898", kind="contrast")
@dataclass(frozen=True, kw_only=True)
class ONLY(Method):
    """Contrast with what one layer's text-enhanced attention would say, in one pass.

    *ONLY: One-Layer Intervention Sufficiently Mitigates Hallucinations in Large Vision-Language Models* (ICCV 2025,
    arXiv:2507.00898). In `layer`, with A the weights of a row::

        A'     A without text weights above their mean + std (the first token is left out of it and stays as it is),
               without image weights above theirs, and without the heads whose ratio of entropies H(text) / H(image) is
               below the mean of the heads
        h      output projection of A' V, which skips the layers between
        x'     share x + norm(h)         x what the last layer receives, norm its own on its input
        l'     logits of x' + MLP(x'), the rest of the last layer, read out
        z    = l + plus l'               where sum |p - p'| < threshold
               (1 + minus) l - minus l'  elsewhere
        cut    z_i = -inf unless l_i >= log(beta) + max l

    The second logits cost one attention call and the last layer's MLP once more; nothing of them goes into the cache.
    Each row of a batch and each position has its own weights, heads and distance.

    The paper's equations for how h travels were not found in detail: this is what the released code does, which writes
    down the image's place (35, 576) and the last layer (31), drops for the whole batch the heads that its first prompt
    drops, adds the distances of a batch up, and serves sampling only. It uses a threshold of 0.2 for POPE and 0.25 for
    captions. Spans and layers here are the model's own.

    Args:
        layer: layer whose attention is computed again; negative from the end.
        threshold: L1 distance below which the two agree, 0 to 2; 0 always subtracts, above 2 always adds.
        plus: weight of the second logits where they agree, from 0.
        minus: weight where they do not, from 0; both 0 computes nothing and leaves the cut.
        share: of the last layer's input, 0 to 10.
        beta: plausibility cut, in (0, 1].

    Raises:
        MethodError: a value out of range, or a layer that the model does not have.
        UnsupportedModel: the image is not part of the prompt, or the layers are built of other parts.
    """

    layer: int = param(0, "layer whose attention is computed again", -32, 31)
    threshold: float = param(0.2, "L1 distance below which the two agree", 0.0, 2.0)
    plus: float = param(3.0, "weight of the second logits where they agree", 0.0, 5.0)
    minus: float = param(1.0, "weight of the second logits where they do not", 0.0, 5.0)
    share: float = param(0.2, "share of the last layer's input", 0.0, 1.0)
    beta: float = param(0.1, "plausibility cut", 0.0, 1.0)

    def __post_init__(self) -> None:
        self.check("threshold", 0.0, 100.0)
        self.check("plus", 0.0, 100.0)
        self.check("minus", 0.0, 100.0)
        self.check("share", 0.0, 10.0)
        self.check("beta", 1e-9, 1.0)

    @property
    def acts(self) -> bool:
        return bool(self.plus or self.minus)

    def readouts(self, family: Family) -> Sequence[Enhanced]:
        if not self.acts:
            return []
        layer = layer_numbers("only.layer", (self.layer,), family.num_layers)[0]
        return [Enhanced(layer=layer, edit=enhance_text, share=self.share)]

    def mix(self) -> Mix:
        if not self.acts:
            return Mix(weights=(1.0,), beta=self.beta)
        return Agreement(weights=(1.0, 0.0), beta=self.beta, threshold=self.threshold, plus=self.plus, minus=self.minus)
