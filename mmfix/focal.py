"""Focal contrast (HALC, arXiv:2403.00425): the maths of choosing a word by looking at its object from many distances.

A detector (a function of the user's own, :func:`mmfix.scorers.boxes`) says where the object of a word is. The word is
decoded again from a few fields of view around it, and the pairs of views that disagree most are contrasted in both
directions. Everything here is a function of boxes and logits; nothing calls a model. The search that uses it is
:mod:`mmfix.focusing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix.errors import MethodError
from mmfix.scorers import Box

CENTRE: Box = (0.2, 0.2, 0.8, 0.8)  # where a word's object is taken to be when the detector does not find it
MOST_SHRUNK = 0.8
FLOOR = -1e3  # logits below it count as ruled out


Divergence = Literal["reversed", "jensen-shannon"]


@dataclass(frozen=True, kw_only=True)
class Refocus:
    """A beam search that looks again at the object of every word that it says.

    Args:
        detector: name of a registered function (pixels, word) → boxes.
        scorer: name of a registered function (pixels, text) → number, or None for the model's own log-probability.
        beams: where ``generate()`` is not told how many; None leaves it at what it is told.
        views, ratio: fields of view, and how much wider each is than the one before.
        candidates: answers per beam whose word was decoded again, an even number.
        weight: of the subtracted view.
        most: boxes; a word with more is left alone.
        divergence: by which pairs of views are chosen.
        owner: the method, for messages.
    """

    detector: str
    scorer: str | None = None
    beams: int | None = 3
    views: int = 4
    ratio: float = 0.6
    candidates: int = 4
    weight: float = 0.05
    most: int = 3
    divergence: Divergence = "reversed"
    owner: str = "this method"


class Focus(NamedTuple):
    """Where to look for a word's object; `detected` is False for the centre of the picture."""

    box: Box
    detected: bool


def focus(boxes: Sequence[Box], most: int = 3) -> Focus | None:
    """The smallest of a word's boxes; the centre when there is none, nothing to do (None) when there are too many."""
    if len(boxes) > most:
        return None
    if not boxes:
        return Focus(CENTRE, False)
    return Focus(min(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1])), True)


def fields_of_view(box: Box, ratio: float = 0.6, count: int = 4) -> list[Box]:
    """`count` views of a box: one nearer, the box itself, and ever wider ones, each clipped to the picture.

    A view of width w and height h becomes wider by ``w * ratio / 2`` on either side and ``h * ratio / 2`` above and
    below; the nearer one is smaller by as much, with a ratio of at most 0.8.

    Raises:
        MethodError: a ratio outside (0, 4], or fewer than 2 views.
    """
    if not 0.0 < ratio <= 4.0:
        raise MethodError(f"ratio of fields of view {ratio}: give a number above 0, at most 4")
    if count < 2:
        raise MethodError(f"{count} fields of view: give 2 or more, since they are compared")
    views = [_grown(box, -min(ratio, MOST_SHRUNK)), box]
    while len(views) < count:
        views.append(_grown(views[-1], ratio))
    return views[:count]


def _grown(box: Box, ratio: float) -> Box:
    left, top, right, bottom = box
    across, down = (right - left) * ratio / 2, (bottom - top) * ratio / 2
    return max(0.0, left - across), max(0.0, top - down), min(1.0, right + across), min(1.0, bottom + down)


def crop(pixels: Tensor, box: Box) -> Tensor:
    """The part of a picture [3, H, W] inside a box, stretched to its size (bilinear); at least one pixel."""
    height, width = pixels.shape[-2:]
    left, top = (min(int(side * size), size - 1) for side, size in ((box[0], width), (box[1], height)))
    right, bottom = (
        max(first + 1, round(side * size)) for side, size, first in ((box[2], width, left), (box[3], height, top))
    )
    part = pixels[None, :, top:bottom, left:right].float()
    return F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0].to(pixels.dtype)


def divergences(logits: Tensor, kind: Divergence = "reversed") -> Tensor:
    """Float32[n, n]: how far apart what n views [n, V] say is; symmetric, 0 on the diagonal.

    With p_i the softmax of view i and M = (p_i + p_j) / 2: "reversed" is ``(KL(M || p_i) + KL(M || p_j)) / 2``, as the
    released code has it; "jensen-shannon" is ``(KL(p_i || M) + KL(p_j || M)) / 2``, which the paper names.

    Raises:
        MethodError: another kind.
    """
    if kind not in ("reversed", "jensen-shannon"):
        raise MethodError(f"divergence {kind!r}: choose 'reversed' or 'jensen-shannon'")
    logs = logits.float().log_softmax(-1)
    found = logs.new_zeros(len(logs), len(logs))
    for i, j in combinations(range(len(logs)), 2):
        middle = torch.logaddexp(logs[i], logs[j]) - torch.log(torch.tensor(2.0))
        ways = [(middle, logs[i]), (middle, logs[j])]
        if kind == "jensen-shannon":
            ways = [(p, m) for m, p in ways]
        found[i, j] = found[j, i] = sum(_kl(p, q) for p, q in ways) / 2
    return found


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities; a token that p rules out adds nothing."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum()


def contrasted(
    logits: Tensor,
    candidates: int = 4,
    weight: float = 0.05,
    kind: Divergence = "reversed",
) -> Tensor:
    """Float32[candidates, V]: ``l_i - weight * l_j`` in both directions for the pairs of views that disagree most.

    Where view i rules a token out (l_i < -1000), l_j counts as at least -1000, so that it is never lifted.

    Args:
        logits: of n views [n, V].
        candidates: an even number; half as many pairs are used, the ones that disagree most first.

    Raises:
        MethodError: an odd number, or more pairs than there are.
    """
    return torch.stack([less(logits[i], logits[j], weight) for i, j in directions(logits, candidates, kind)])


def directions(logits: Tensor, candidates: int = 4, kind: Divergence = "reversed") -> list[tuple[int, int]]:
    """(view, view that is subtracted from it) of each candidate of :func:`contrasted`, which has the same arguments."""
    pairs = list(combinations(range(len(logits)), 2))
    if candidates < 2 or candidates % 2 or candidates // 2 > len(pairs):
        raise MethodError(
            f"{candidates} candidates of {len(logits)} views: give an even number from 2 to {2 * len(pairs)}"
        )
    apart = divergences(logits, kind)
    chosen = sorted(pairs, key=lambda pair: -float(apart[pair]))[: candidates // 2]
    return [way for a, b in chosen for way in ((a, b), (b, a))]


def less(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """Float32[V]: ``one - weight * other``, as in :func:`contrasted`."""
    one, other = one.float(), other.float()
    return one - weight * torch.where(one < FLOOR, other.clamp(min=FLOOR), other)
