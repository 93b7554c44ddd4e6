"""Which of a prompt's image tokens a contrast branch keeps, and what is known of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfix.errors import MethodError

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


Selection = Outliers


def why_not(family: Family, select: Selection) -> str:
    """Why a selection means nothing in this family; "" when it applies."""
    if family.tower is None or not _has_cls(family.tower):
        return f"the vision tower ({type(family.tower).__name__}) has no CLS token whose attention could be read"
    if family.outer is not None or family.resampler is not None:
        return "image tokens are queries of a resampler, not patches, so the tower's attention does not rank them"
    return ""


def check_layer(name: str, layer: int, count: int) -> None:
    """Raise ``MethodError`` for a layer that a part of `count` layers does not have."""
    if not -count <= layer < count:
        raise MethodError(f"{name}={layer}: this model has layers {-count} to {count - 1} there")


def _has_cls(tower: torch.nn.Module) -> bool:
    return any(name.rsplit(".", 1)[-1] in ("class_embedding", "cls_token") for name, _ in tower.named_parameters())
