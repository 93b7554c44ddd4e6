"""Where in the picture each image token comes from: the grids of patches that a processor cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
MIXED = 32
"""Rows and columns of a map that is put together from several grids."""


@dataclass(frozen=True)
class PatchGrid:
    """Tokens that lie on one regular grid, row by row.

    Args:
        start: number of the grid's first image token.
        rows, columns: of the grid.
        skip: tokens after each row that stand for no patch (line breaks between rows).
        box: what part of the picture it covers, (left, top, right, bottom) as shares of its width and height.
    """

    start: int
    rows: int
    columns: int
    skip: int = 0
    box: Box = WHOLE

    @property
    def tokens(self) -> int:
        return self.rows * (self.columns + self.skip)

    def cells(self, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[rows, columns] of this grid's own weights."""
        own = weights[self.start : self.start + self.tokens].reshape(self.rows, self.columns + self.skip)
        return own[:, : self.columns]


def patch_grids(
    inputs: Mapping[str, Any], tokens: int, model: Any, processor: Any, size: tuple[int, int]
) -> list[PatchGrid]:
    """The grids of one picture.

    Args:
        inputs: what the processor made of one prompt with this picture.
        tokens: image tokens in that prompt.
        model, processor: read for patch size and tiling.
        size: width and height of the picture.

    Returns:
        Grids that together hold every image token, or nothing when the layout is not known.
    """
    readers: Sequence[Callable[[], list[PatchGrid]]] = (
        lambda: _from_thw(inputs, processor),
        lambda: _anyres(inputs, model, size),
        lambda: _tiles(inputs, tokens, processor, size),
        lambda: _square(tokens, processor, size),
    )
    for read in readers:
        try:
            grids = read()
        except (AttributeError, ImportError, KeyError, TypeError, ValueError, IndexError):
            continue  # the attributes of another family
        if grids and sum(grid.tokens for grid in grids) == tokens:
            return grids
    return []


def raster(weights: Sequence[float], grids: Sequence[PatchGrid]) -> npt.NDArray[Any] | None:
    """Float[rows, columns] over the whole picture: a token's weight is spread evenly over its patch.

    One grid that covers the picture is handed out as it is; the map of several has ``MIXED`` rows and columns.
    """
    if not grids:
        return None
    values = np.asarray(weights, dtype=np.float64)
    if len(grids) == 1 and grids[0].box == WHOLE:
        return grids[0].cells(values)
    found = np.zeros((MIXED, MIXED))
    for grid in grids:
        left, top, right, bottom = grid.box
        down = _overlap(np.linspace(top, bottom, grid.rows + 1))
        across = _overlap(np.linspace(left, right, grid.columns + 1))
        found += down.T @ grid.cells(values) @ across
    return found


def _overlap(edges: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[cells, MIXED]: the share of each cell that falls into each bin of the raster."""
    bins = np.linspace(0.0, 1.0, MIXED + 1)
    low = np.maximum(edges[:-1, None], bins[None, :-1])
    high = np.minimum(edges[1:, None], bins[None, 1:])
    shares: npt.NDArray[Any] = np.clip(high - low, 0.0, None) / np.maximum(np.diff(edges)[:, None], 1e-12)
    return shares


def _from_thw(inputs: Mapping[str, Any], processor: Any) -> list[PatchGrid]:
    """Qwen-VL and its kin tell frames, rows and columns of patches, which are merged by ``merge_size``."""
    frames, rows, columns = (int(n) for n in inputs["image_grid_thw"][0])
    merge = int(processor.image_processor.merge_size)
    return [PatchGrid(0, rows // merge, columns // merge)] if frames == 1 else []


def _anyres(inputs: Mapping[str, Any], model: Any, size: tuple[int, int]) -> list[PatchGrid]:
    """LLaVA-NeXT: the whole picture small, then tiles of it large without their padding, a line break per row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    height, width = (int(n) for n in inputs["image_sizes"][0])
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    down, across = get_anyres_image_grid_shape((height, width), model.config.image_grid_pinpoints, vision.image_size)
    rows, columns = side * down, side * across
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * columns / width, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * rows / height, 7))) // 2)
    return [PatchGrid(0, side, side), PatchGrid(side * side, rows, columns, skip=1)]


def _tiles(inputs: Mapping[str, Any], tokens: int, processor: Any, size: tuple[int, int]) -> list[PatchGrid]:
    """InternVL: tiles row by row, then the whole picture."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    count = int(inputs["pixel_values"].shape[0])
    side = math.isqrt(tokens // count)
    pictures = processor.image_processor
    if count < 2 or side * side * count != tokens:
        return []
    tile = (pictures.size["height"], pictures.size["width"])
    across, down = get_optimal_tiled_canvas((size[1], size[0]), tile, pictures.min_patches, pictures.max_patches)
    grids = [
        PatchGrid(n * side * side, side, side, box=(x / across, y / down, (x + 1) / across, (y + 1) / down))
        for n, (y, x) in enumerate((y, x) for y in range(down) for x in range(across))
    ]
    return [*grids, PatchGrid(len(grids) * side * side, side, side)] if count == len(grids) + 1 else grids


def _square(tokens: int, processor: Any, size: tuple[int, int]) -> list[PatchGrid]:
    """One square of patches, of the whole picture or of its middle when the processor crops."""
    side = math.isqrt(tokens)
    return [PatchGrid(0, side, side, box=_kept(processor, size))] if side and side * side == tokens else []


def _kept(processor: Any, size: tuple[int, int]) -> Box:
    """The part of a picture that is left after resizing its shortest side and cropping the middle."""
    pictures = processor.image_processor
    wanted = getattr(pictures, "size", None) or {}
    shortest = wanted.get("shortest_edge") if hasattr(wanted, "get") else getattr(wanted, "shortest_edge", None)
    if not getattr(pictures, "do_center_crop", False) or not shortest:
        return WHOLE
    scale = shortest / min(size)
    crop = pictures.crop_size
    across = min(1.0, crop["width"] / (size[0] * scale))
    down = min(1.0, crop["height"] / (size[1] * scale))
    return ((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)
