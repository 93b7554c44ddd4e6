"""A picture of which only what matters for the question is left (AGLA), and which question belongs to which picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfix import scorers
from mmfix.errors import MethodError, UnsupportedModel
from mmfix.scorers import Question


@dataclass(frozen=True, kw_only=True)
class KeepRelevant:
    """The pixels of highest relevance for the question; the others become the mean colour (0 after normalisation).

    Args:
        scorer: name of a relevance function, see :mod:`mmfix.scorers`.
        keep: share of the pixels that stay, in (0, 1]; equal relevances at the border stay all.
        owner: the method, for messages.
    """

    scorer: str
    keep: float = 0.5
    owner: str = "this method"

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise MethodError(f"share of pixels that stay: {self.keep}; give a number in (0, 1]")

    def __call__(self, pixels: Tensor, questions: Sequence[Question]) -> Tensor:
        """Pictures [N, 3, H, W] masked, each for its question."""
        return torch.stack([self._masked(one, asked) for one, asked in zip(pixels, questions, strict=True)])

    def _masked(self, pixels: Tensor, question: Question) -> Tensor:
        found = scorers.relevance(self.scorer, pixels, question, self.owner)
        stays = max(1, round(self.keep * found.numel()))
        least = found.flatten().topk(stays).values[-1]
        return torch.where(found >= least, pixels, torch.zeros_like(pixels))


@dataclass(frozen=True, eq=False)
class Asked:
    """The prompts of the call at hand.

    Args:
        ids: Int64[B, T]; valid: Bool[B, T], False for padding; image: the image token.
        decode: token ids → text, or None.
    """

    ids: Tensor
    valid: Tensor
    image: int
    decode: Callable[[Sequence[int]], str] | None = None

    def questions(self, pixels: Tensor, family: str) -> list[Question]:
        """One per picture [N, 3, H, W], in order; pictures are told apart by how many tokens each has.

        Raises:
            UnsupportedModel: packed or tiled pictures, or tokens that do not fit the pictures.
        """
        if pixels.ndim != 4:
            raise UnsupportedModel(
                f"{family}: its pictures come as {tuple(pixels.shape)}, packed or in tiles, where a map of relevance "
                "has no place; use a model with one picture [3, H, W] per image"
            )
        tokens = ((self.ids == self.image) & self.valid).sum(-1).tolist()
        each, rest = divmod(sum(tokens), len(pixels))
        if rest or not each or any(count % each for count in tokens):
            raise UnsupportedModel(
                f"{family}: {len(pixels)} pictures and {tokens} image tokens in the prompts, so it is not known which "
                "picture belongs to which question; give pictures of one size"
            )
        return [asked for row, count in enumerate(tokens) for asked in [self._question(row)] * (count // each)]

    def _question(self, row: int) -> Question:
        ids = self.ids[row][self.valid[row] & (self.ids[row] != self.image)].tolist()
        return Question(tuple(ids), None if self.decode is None else self.decode(ids))
