"""Frame-wise block causal masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix.errors import MethodError, MmfixError
from mmfix.families import Family
from mmfix.method import Method, Site, chosen_layers
from mmfix.registry import param, register
from mmfix.segments import MaskEdit, Role, Segments


@register(
    "frame-block",
    title="Frame-wise Block Causal Attention Mask",
    paper="arXiv:2409.03206",
    kind="mask",
    trained_in_paper=True,
)
@dataclass(frozen=True, kw_only=True)
class FrameBlock(Method):
    """Let the tokens of one frame (or picture) see each other, whatever their order; frames stay causal.

    *TC-LLaVA: Rethinking the Transfer from Image to Video Understanding with Temporal Considerations*
    (arXiv:2409.03206). At prefill, in every layer and head::

        allowed[q, k] = k <= q  or  (q and k are image tokens of the same frame)

    A frame sees itself whole and all earlier frames, none sees a later one; text and decoding stay causal. No position
    changes and no extra pass. The paper trains with this mask, beside a temporal rotary embedding that needs training
    and is not built; used without training the mask is an extrapolation that has to be measured. A model that has such
    a mask of its own (Gemma 3) is left as it is. No released code was read.

    A frame is a run of image tokens, cut into pieces of `tokens` where frames touch. Pieces of a prompt may not end
    inside a frame.

    Args:
        tokens: image tokens per frame, at least 1. None takes the number from the model's configuration, and where it
            does not tell, the length of each run of image tokens.
        layers: layers in which the mask opens, negative ones counted from the end; None means all, () none.

    Raises:
        MethodError: a number of tokens below 1, or a layer that the model does not have.
        MmfixError: at prefill, a run of image tokens is no whole number of frames, or a piece of the prompt ends inside
            a frame.
    """

    tokens: int | None = param(None, "image tokens per frame; empty = the model's, or one frame per run", 1)
    layers: tuple[int, ...] | None = param(None, "layers in which the mask opens; empty = all")

    def __post_init__(self) -> None:
        if self.tokens is not None and (not isinstance(self.tokens, int) or self.tokens < 1):
            raise MethodError(f"frame-block.tokens={self.tokens!r}: give a whole number from 1 on, or None")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(n) for n in self.layers))

    @property
    def tells_pictures_apart(self) -> bool:
        return True

    def prepare(self, family: Family) -> FrameBlock:
        layers = chosen_layers(self, range(family.num_layers), family.num_layers)
        return dataclasses.replace(self, layers=layers, tokens=self.tokens or tokens_per_picture(family))

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        if self.layers is not None and site.layer not in self.layers:
            return ()
        return (MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation=SameFrame(self.tokens)),)


@dataclass(frozen=True)
class SameFrame:
    """Pairs of tokens of one frame.

    Args:
        tokens: of a frame; None for one frame per run of image tokens.
    """

    tokens: int | None

    def __call__(self, segments: Segments, rows: slice) -> Tensor:
        """Bool[B, l, T]."""
        frame = frames(segments.image >= 0, self.tokens)
        return (frame[:, rows, None] == frame[:, None, :]) & (frame[:, None, :] >= 0)


def tokens_per_picture(family: Family) -> int | None:
    """Image tokens of one picture where the configuration tells a fixed number; None where pictures differ."""
    config = family.whole.config
    if getattr(config, "image_grid_pinpoints", None):  # tiles: their number depends on the picture
        return None
    told = getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None)
    return told if isinstance(told, int) and told > 0 else None


def frames(image: Tensor, tokens: int | None) -> Tensor:
    """Int64[B, T]: number of the frame that each image token belongs to, -1 for text.

    Args:
        image: Bool[B, T].
        tokens: of a frame; None for one frame per run.

    Raises:
        MmfixError: a run of image tokens is no whole number of frames.
    """
    position = torch.arange(image.shape[1], device=image.device).expand_as(image)
    starts = image & ~F.pad(image[:, :-1], (1, 0))
    if tokens is None:
        return torch.where(image, starts.long().cumsum(-1) - 1, -1)
    index = position - torch.where(starts, position, 0).cummax(-1).values
    ends = image & ~F.pad(image[:, 1:], (0, 1))
    odd = ends & ((index + 1) % tokens != 0)
    if bool(odd.any()):
        raise MmfixError(
            f"a run of {int(index[odd][0]) + 1} image tokens is no whole number of frames of {tokens}; "
            "give the tokens per frame of this model, or the whole prompt at once if it came in pieces (no "
            "prefill_chunk_size)"
        )
    return torch.where(image, (image & (index % tokens == 0)).long().cumsum(-1) - 1, -1)
