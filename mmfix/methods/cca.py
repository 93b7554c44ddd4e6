"""CCA: concentric causal attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfix.errors import MethodError, MmfixError, UnsupportedModel
from mmfix.families import Family
from mmfix.method import Method, Site
from mmfix.registry import param, register
from mmfix.segments import MaskEdit, Role, Segments
from mmfix.spans import TokenSpans

Grid = tuple[int, int]


@register("cca", title="Concentric Causal Attention", paper="arXiv:2410.15926", kind="mask", trained_in_paper=True)
@dataclass(frozen=True, kw_only=True)
class CCA(Method):
    """Order the patches of a picture in rings from its border to its centre, so that none is far from the question.

    *Mitigating Object Hallucination via Concentric Causal Attention* (NeurIPS 2024, arXiv:2410.15926). A picture of
    h x w patches has ``R = ceil(min(h, w) / 2)`` rings, the outermost 0::

        ring(y, x) = min(y, x, h-1-y, w-1-x)
        position   = start of the picture + ring(y, x); a picture takes R positions instead of h*w, and what follows
                     it (text, further pictures, generated tokens) counts on from there
        allowed[q, k] of two patches of a picture = ring(k) <= ring(q); every other pair is causal

    In all layers and heads, the mask at prefill, the positions in decoding too. No extra pass. The paper trains with
    both; used without training they are an extrapolation that has to be measured.

    Every prompt has its own positions and mask, whatever its padding and the number of its pictures; one without a
    picture is left alone. The released code gives all prompts of a batch the positions of the last and only the first
    one a mask, knows one picture of 24 x 24 patches, and no padding; that is not reproduced.

    Args:
        grid: rows and columns of a picture's patches. None takes the number of image tokens per picture from the
            model's configuration, and where it does not tell, the length of each run of image tokens; either must be
            a square number. Pictures without a token between them need a known grid.

    Raises:
        MethodError: a grid that is not two positive numbers.
        UnsupportedModel: the model cuts pictures into tiles, or numbers image tokens along several axes.
        MmfixError: at prefill, a run of image tokens is no whole number of grids, as when a piece of the prompt ends
            inside a picture.
    """

    grid: tuple[int, int] | None = param(None, "rows and columns of patches; empty = a square")

    def __post_init__(self) -> None:
        if self.grid is None:
            return
        grid = tuple(int(n) for n in self.grid)
        if len(grid) != 2 or min(grid) < 1:
            raise MethodError(f"cca.grid={self.grid!r}: give (rows, columns), both at least 1")
        object.__setattr__(self, "grid", grid)

    @property
    def tells_pictures_apart(self) -> bool:
        return True

    def prepare(self, family: Family) -> CCA:
        if self.grid is not None:
            return self
        config = family.whole.config
        if getattr(config, "image_grid_pinpoints", None):
            raise UnsupportedModel(
                f"{family.name} cuts pictures into tiles (config.image_grid_pinpoints), so its image tokens are no "
                "single grid with a centre; use a model with one grid per picture"
            )
        told = getattr(config, "image_seq_length", None) or getattr(config, "mm_tokens_per_image", None)
        if not isinstance(told, int):
            return self
        side = math.isqrt(told)
        if side * side != told:
            raise UnsupportedModel(
                f"{family.name} has {told} image tokens per picture, which is no square; give grid=(rows, columns)"
            )
        return dataclasses.replace(self, grid=(side, side))

    def positions(self, spans: TokenSpans) -> Tensor:
        """Int64[B, T]: every token comes after the places of what precedes it; a patch lies where its ring does."""
        found = patches(spans.image, self.grid)
        width = torch.where(found.first, found.rings, (spans.valid & ~spans.image).long())  # places a token adds
        within = torch.where(spans.image, found.ring - found.rings, -1)
        return (width.cumsum(-1) + within).clamp(min=0)

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        return tuple(
            MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation=Rings(self.grid, seen), allow=seen)
            for seen in (True, False)
        )


@dataclass(frozen=True)
class Rings:
    """Pairs of patches of one picture, by the rings they lie in.

    Args:
        grid: rows and columns of a picture's patches; None for squares.
        seen: the key's ring is the query's or further out; False: it is further in.
    """

    grid: Grid | None
    seen: bool

    def __call__(self, segments: Segments, rows: slice) -> Tensor:
        """Bool[B, l, T]."""
        found = patches(segments.image >= 0, self.grid)
        same = found.picture[:, rows, None] == found.picture[:, None, :]
        seen = found.ring[:, None, :] <= found.ring[:, rows, None]
        return same & (seen if self.seen else ~seen)


@dataclass(frozen=True, eq=False)
class Patches:
    """Where the image tokens of prompts lie in their pictures; what is said of text means nothing.

    Args:
        first: Bool[B, T], the first token of a picture.
        picture: Int64[B, T], number of the picture.
        ring: Int64[B, T], 0 at the border.
        rings: Int64[B, T], rings of the picture.
    """

    first: Tensor
    picture: Tensor
    ring: Tensor
    rings: Tensor


def patches(image: Tensor, grid: Grid | None) -> Patches:
    """Patches of runs of image tokens, Bool[B, T], each run one or several pictures, row by row.

    Raises:
        MmfixError: a run is no whole number of grids, or without a grid no square.
    """
    position = torch.arange(image.shape[1], device=image.device).expand_as(image)
    starts = image & ~F.pad(image[:, :-1], (1, 0))
    run = starts.long().cumsum(-1)
    size = torch.zeros(image.shape[0], image.shape[1] + 1, dtype=torch.long, device=image.device)
    size = size.scatter_add(1, run, image.long()).gather(1, run)
    index = position - torch.where(starts, position, 0).cummax(-1).values
    if grid is None:
        rows = columns = size.double().sqrt().round().long().clamp(min=1)
        odd = image & (rows * columns != size)
        wanted = "no square; give grid=(rows, columns)"
    else:
        rows, columns = (torch.full_like(size, n) for n in grid)
        odd = image & (size % (rows * columns) != 0)
        wanted = f"no whole number of pictures of {grid[0]} x {grid[1]}; give the grid of this model"
    if bool(odd.any()):
        raise MmfixError(
            f"cca: a run of {int(size[odd][0])} image tokens is {wanted}, or the whole prompt at once if it came in "
            "pieces (no prefill_chunk_size)"
        )
    index = index % (rows * columns)
    y, x = index // columns, index % columns
    ring = torch.stack([y, x, rows - 1 - y, columns - 1 - x]).amin(0)
    first = image & (index == 0)
    return Patches(first, first.long().cumsum(-1), ring, (torch.minimum(rows, columns) + 1) // 2)
