"""Which key is what: token spans of a batch of prompts, as one int8 label per key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mmfix.errors import MmfixError
from mmfix_kernels import Label, Rows

NEVER = 1 << 40  # a row position that no sequence reaches


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """Spans of one batch of prompts, [B, T] with T the padded length.

    Args:
        image: Bool[B, T], image tokens (several images need not touch).
        valid: Bool[B, T], False on padding.
        labels: Int8[B, T], one :class:`mmfix_kernels.Label` per token.
        starts: for each kind of row, Int64[B]: position of the first row of that kind (``NEVER`` if there is none).
        last: Int64[B], position of the last token of each prompt.
        ids: Int64[B, T]; None where only embeddings are known.
    """

    image: Tensor
    valid: Tensor
    labels: Tensor
    starts: dict[Rows, Tensor]
    last: Tensor
    ids: Tensor | None = None

    @property
    def has_image(self) -> Tensor:
        """Bool[B]: which prompts hold an image."""
        return self.image.any(-1)

    @cached_property
    def any_image(self) -> bool:
        """Whether some prompt holds an image; without one, a method that acts on image keys has no edits."""
        return bool(self.image.any())

    @property
    def length(self) -> int:
        return self.image.shape[1]


def build(image: Tensor, valid: Tensor, ids: Tensor | None = None) -> TokenSpans:
    """Spans from image and padding masks, both Bool[B, T]; padding may lie on either side."""
    if image.shape != valid.shape:
        raise MmfixError(
            f"image mask {tuple(image.shape)} and attention mask {tuple(valid.shape)} differ in shape; "
            "give both for the same padded batch"
        )
    image = image & valid
    positions = torch.arange(image.shape[1], device=image.device).expand_as(image)
    has_image = image.any(-1)
    first_image = torch.where(image, positions, NEVER).amin(-1)
    after_image = torch.where(image, positions, -1).amax(-1) + 1
    last = torch.where(valid, positions, 0).amax(-1)

    labels = torch.full(image.shape, int(Label.TEXT), dtype=torch.int8, device=image.device)
    labels[positions < torch.where(has_image, first_image, 0)[:, None]] = int(Label.SYSTEM)
    labels[image] = int(Label.IMAGE)
    labels[~valid] = int(Label.PADDING)
    starts = {
        Rows.ALL: torch.zeros_like(last),
        Rows.AFTER_IMAGE: torch.where(has_image, after_image, NEVER),
        Rows.LAST: last,
        Rows.GENERATED: torch.full_like(last, image.shape[1]),
    }
    return TokenSpans(image, valid, labels, starts, last, ids)


def relabel_sinks(labels: Tensor, sinks: Tensor) -> Tensor:
    """Labels with the keys of `sinks` (Bool[B, T]) turned into text or image sinks; padding stays padding."""
    image = labels == int(Label.IMAGE)
    padding = labels == int(Label.PADDING)
    sunk = torch.where(image, int(Label.IMAGE_SINK), int(Label.TEXT_SINK)).to(labels.dtype)
    return torch.where(sinks & ~padding, sunk, labels)


def padding_mask(attention_mask: Any, like: Tensor) -> Tensor:
    """Bool[B, T] of the tokens that are not padding, from whatever mask the model was given."""
    batch, length = like.shape[:2]
    if isinstance(attention_mask, dict):  # one mask per kind of layer; the full one sees every token
        attention_mask = attention_mask.get("full_attention")
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=like.device)
    mask: Tensor = attention_mask
    if mask.ndim == 2:
        return mask[:, :length].to(like.device).bool()
    last = mask[:, 0, -1, :length].expand(batch, -1).to(like.device)  # what the last row may see
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min
