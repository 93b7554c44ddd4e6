"""Which of a prompt's image tokens a contrast branch keeps, and what is known of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfix.errors import MethodError
from mmfix.tower import has_class_token

if TYPE_CHECKING:
    from mmfix.families import Family


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """The branch's prompt holds only the patches that the vision tower's CLS token attends to most.

    The other image tokens leave the prompt, and positions close up. Tokens that are no patch (row separators) leave it
    too.

    Args:
        count: patches that are kept, of each picture (of each tile, where a model cuts pictures into tiles).
        layer: tower layer whose attention counts, mean over heads; negative from the end.
    """

    count: int
    layer: int = -2

    def __call__(self, attention: Tensor) -> Tensor:
        """Bool[P, N] of Float[P, N]: the `count` largest of each row; of equal ones the first."""
        order = attention.argsort(dim=-1, descending=True, stable=True)[..., : self.count]
        return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, order, True)


@dataclass(frozen=True, kw_only=True)
class Blind:
    """The branch sees the image tokens that take attention whatever is asked; the others' features are zero.

    They are found in the prompt's last row, by a plain pass over the prompt ahead of its own. With a^l the row's
    weights on image tokens in layer l, mean over heads: the layers with the most mass on the image are taken until they
    hold `share` of what all layers have there, and of their mean map those tokens are kept that reach ``mean +
    deviations * std`` over the image tokens. Where none does, every image token of the branch is zero.

    Args:
        share: of the image's mass, over all layers.
        deviations: standard deviations (with n - 1) above the mean.
    """

    share: float
    deviations: float

    def __call__(self, maps: Tensor, image: Tensor) -> Tensor:
        """Bool[B, T] of Float[B, layers, T]: tokens that are kept, each prompt by itself.

        Args:
            image: Bool[B, T], image tokens.
        """
        looks = maps * image[:, None]
        chosen = self.layers(looks.sum(-1))
        mean_map = (looks * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
        count = image.sum(-1, keepdim=True)
        mean = mean_map.sum(-1, keepdim=True) / count.clamp(min=1)
        spread = torch.where(image, mean_map - mean, 0.0).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        return image & (mean_map >= mean + self.deviations * spread.sqrt())

    def layers(self, mass: Tensor) -> Tensor:
        """Bool[B, layers] of Float[B, layers], mass on the image: the fewest layers that hold the share; at least 1."""
        largest = mass.sort(dim=-1, descending=True, stable=True)
        held = largest.values.cumsum(-1) / mass.sum(-1, keepdim=True)
        count = (held < self.share).sum(-1, keepdim=True) + 1
        first = torch.arange(mass.shape[-1], device=mass.device) < count
        return torch.zeros_like(first).scatter(-1, largest.indices, first)


@dataclass(frozen=True, kw_only=True)
class Overlooked:
    """From layer `after` on, the branch sees only the image tokens that layer ``after - 1`` looks at least.

    They are chosen from the branch's own weights, mean over heads: by the last row of the prompt for all of its rows,
    and by every generated token for itself.

    Args:
        count: image tokens that are kept.
        after: layers that see everything, at least 1.
    """

    count: int
    after: int

    def __call__(self, weights: Tensor, image: Tensor) -> Tensor:
        """Bool[..., S] of Float[..., S]: the `count` image keys of least weight; of equal ones the first."""
        order = torch.where(image, weights, torch.inf).argsort(dim=-1, stable=True)[..., : self.count]
        return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, order, True) & image


Selection = Outliers | Blind | Overlooked


def why_not(family: Family, select: Selection) -> str:
    """Why a selection means nothing in this family; "" when it applies."""
    if not isinstance(select, Outliers):
        return (
            "image keys live in its cross-attention layers only, none in self-attention" if family.cross_layers else ""
        )
    if family.tower is None or not has_class_token(family.tower):
        return f"the vision tower ({type(family.tower).__name__}) has no CLS token whose attention could be read"
    if family.outer is not None or family.resampler is not None:
        return "image tokens are queries of a resampler, not patches, so the tower's attention does not rank them"
    return ""


def check_layer(name: str, layer: int, count: int) -> None:
    """Raise ``MethodError`` for a layer that a part of `count` layers does not have."""
    if not -count <= layer < count:
        raise MethodError(f"{name}={layer}: this model has layers {-count} to {count - 1} there")
