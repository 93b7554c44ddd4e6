"""Prompts made into others: text put in, asked again, or without the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmfix.errors import MmfixError

# One prompt's ids and image mask, [T] without padding, made into others.
Rewrite = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class PromptEdit:
    """Another prompt around the same picture.

    Args:
        tokens: ids that are put into the prompt.
        at: "before_image" and "after_image" insert them there (at the first and last image); "question" puts them in
            place of everything after the last image.
        around: ids of tokens that open and close a picture; what is inserted goes outside of them.
    """

    tokens: tuple[int, ...]
    at: Literal["before_image", "after_image", "question"] = "after_image"
    around: tuple[int, ...] = ()

    def __call__(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """One prompt's ids and image mask, [T] without padding, changed."""
        place = image.nonzero()[:, 0]
        first, after = (int(place[0]), int(place[-1]) + 1) if len(place) else (0, 0)
        before, behind = _outside(ids, first, after, self.around)
        start, stop = {
            "before_image": (before, before),
            "after_image": (behind, behind),
            "question": (after, len(ids)),
        }[self.at]
        new = torch.tensor(self.tokens, dtype=ids.dtype, device=ids.device)
        none = torch.zeros_like(new, dtype=torch.bool)
        return torch.cat([ids[:start], new, ids[stop:]]), torch.cat([image[:start], none, image[stop:]])


def _outside(ids: Tensor, first: int, after: int, around: tuple[int, ...]) -> tuple[int, int]:
    """Where a picture at first:after begins and ends together with the tokens that open and close it."""
    while first > 0 and int(ids[first - 1]) in around:
        first -= 1
    while after < len(ids) and int(ids[after]) in around:
        after += 1
    return first, after


@dataclass(frozen=True, kw_only=True)
class RepeatQuestion:
    """The question once more (or several times) in front of the picture.

    The question is the text after the last image, up to the answer's marker where one follows.

    Args:
        times: copies in front of the first image; 0 leaves the prompt as it is.
        marker: token ids that begin an answer; empty takes everything after the last image.
        around: ids of tokens that open and close a picture: the copies go in front of them, and hold none of them.
        special: ids of which the first after the question ends the turn; it and what follows are not copied.
    """

    times: int = 1
    marker: tuple[int, ...] = ()
    around: tuple[int, ...] = ()
    special: tuple[int, ...] = ()

    def __call__(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """One prompt's ids and image mask, [T] without padding, changed; without an image as they are."""
        place = image.nonzero()[:, 0]
        if not len(place):
            return ids, image
        first, after = _outside(ids, int(place[0]), int(place[-1]) + 1, self.around)
        text, width = ids[after:].tolist(), len(self.marker)
        starts = [n for n in range(len(text)) if width and tuple(text[n : n + width]) == self.marker]
        if width and len(starts) != 1:
            raise MmfixError(
                f"{len(starts)} answers begin (token ids {list(self.marker)}) after the image of a prompt, so which "
                "question is to be read again is not known; give prompts of one question, with the answer's header"
            )
        stop = starts[0] if starts else len(text)
        stop = next((n for n in range(stop) if text[n] in self.special), stop)
        question = ids[after : after + stop].repeat(self.times)
        if self.times and not len(question):
            raise MmfixError(
                "there is no question after the image of a prompt, so nothing can be read again; give prompts whose "
                "question follows the image, whole and not in pieces (no prefill_chunk_size)"
            )
        none = torch.zeros_like(question, dtype=torch.bool)
        return torch.cat([ids[:first], question, ids[first:]]), torch.cat([image[:first], none, image[first:]])


def drop_image(ids: Tensor, valid: Tensor, image: Tensor, rows: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Prompts of `rows` without the tokens of `image`, the others as they are.

    What is left is pushed to the right, up to where the prompt ended, so that the text after the image stays in place.

    Args:
        ids: [N, T], or embeddings [N, T, hidden].
        valid, image: [N, T]; rows: Bool[N]; pad: what is put in the freed places.

    Returns:
        `ids` and `valid`, in the same shapes.
    """
    keep = valid & ~image
    places = torch.arange(valid.shape[1], device=valid.device)
    after = places > torch.where(valid, places, -1).amax(-1, keepdim=True)  # padding on the right
    order = torch.argsort(keep.int() + 2 * after.int(), dim=-1, stable=True)
    short_valid = keep.gather(1, order)
    wide = order if ids.ndim == 2 else order[..., None].expand_as(ids)
    empty, chosen = ~short_valid, rows[:, None]
    if ids.ndim == 3:
        empty, chosen = empty[..., None], chosen[..., None]
    short = ids.gather(1, wide).masked_fill(empty, pad)
    return torch.where(chosen, short, ids), torch.where(rows[:, None], short_valid, valid)
