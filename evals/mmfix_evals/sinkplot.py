"""Attention sinks of one picture and prompt: their number per layer, and the image sinks over the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfix.sinks import Sinks
from mmfix_decoding.grids import PatchGrid
from mmfix_evals import headplot

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 8
TEXT, IMAGE = "#0072B2", "#D55E00"


def boxes(grids: Sequence[PatchGrid]) -> dict[int, tuple[float, float, float, float]]:
    """Image token → the part of the picture that its patch covers, (left, top, right, bottom) as shares."""
    found = {}
    for grid in grids:
        left, top, right, bottom = grid.box
        across, down = np.linspace(left, right, grid.columns + 1), np.linspace(top, bottom, grid.rows + 1)
        for row in range(grid.rows):
            for column in range(grid.columns):
                token = grid.start + row * (grid.columns + grid.skip) + column
                found[token] = tuple(float(v) for v in (across[column], down[row], across[column + 1], down[row + 1]))
    return found  # type: ignore[return-value]


def draw(found: Sinks, picture: Image, grids: Sequence[PatchGrid], title: str, path: Path) -> None:
    """Bars of text and image sinks per layer above one small picture per layer; sinks of the image are framed."""
    layers = len(found.layers)
    columns = min(COLUMNS, layers)
    rows = -(-layers // columns) if grids else 0
    drawn = headplot.figure(max(4.0, 1.3 * columns), 2.2 + 1.5 * rows)
    shape = drawn.add_gridspec(1 + rows, columns, height_ratios=[1.6, *([1] * rows)])
    _bars(drawn.add_subplot(shape[0, :]), found, title)
    where = boxes(grids)
    tokens = found.image.nonzero()[:, 0].tolist()
    for layer, one in enumerate(found.layers if grids else ()):
        axis = drawn.add_subplot(shape[1 + layer // columns, layer % columns])
        axis.imshow(np.asarray(picture), extent=(0, 1, 1, 0), aspect=picture.height / picture.width)
        axis.set_axis_off()
        axis.set_title(f"layer {layer}", fontsize=7)
        for number, position in enumerate(tokens):
            if bool(one.sink[position]) and number in where:
                _frame(axis, where[number])
    headplot.save(drawn, path)


def _bars(axis: Any, found: Sinks, title: str) -> None:
    text, image = found.counts()
    places = np.arange(len(text))
    axis.bar(places - 0.2, text, 0.4, color=TEXT, label="text sinks")
    axis.bar(places + 0.2, image, 0.4, color=IMAGE, label="image sinks")
    axis.set_xlabel("layer")
    axis.set_ylabel("tokens")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xticks(places[:: max(1, len(text) // 16)])
    axis.set_title(title)
    axis.legend(frameon=False, fontsize=7)


def _frame(axis: Any, box: tuple[float, float, float, float]) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=IMAGE, linewidth=1.5))
