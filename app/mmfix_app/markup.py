"""HTML from text that a model or a visitor wrote: escaped here, and nowhere else."""

from __future__ import annotations

import base64
import html
from typing import Any

import numpy as np
import numpy.typing as npt

# The page's templates know ${…} and {{…}}; what a model writes must never reach them.
_TEMPLATE = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"})


def esc(text: Any) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(str(text), quote=True).translate(_TEMPLATE)


def where(weights: npt.NDArray[Any]) -> str:
    """The ninth of a map Float[rows, columns] that holds the most, in words: what the light shows, for who hears it."""
    held = [
        (float(piece.sum()), f"{row} {column}".replace("middle middle", "centre"))
        for row, band in zip(("upper", "middle", "lower"), np.array_split(weights, 3, axis=0), strict=True)
        for column, piece in zip(("left", "middle", "right"), np.array_split(band, 3, axis=1), strict=True)
    ]
    return max(held, key=lambda one: one[0])[1]


def packed(weights: npt.NDArray[Any]) -> str:
    """A map as attributes: its size, bytes relative to its largest value, and where it is lightest."""
    top = float(weights.max()) or 1.0
    values = np.rint(np.clip(weights / top, 0, 1) * 255).astype(np.uint8)
    body = base64.b64encode(values.tobytes()).decode()
    return (
        f'data-rows="{weights.shape[0]}" data-cols="{weights.shape[1]}" data-map="{body}" data-where="{where(weights)}"'
    )


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1f} %"


def error(text: str) -> str:
    """A message beside the control that it is about; empty for none."""
    return f'<p class="mm-error" role="alert">{esc(text)}</p>' if text else ""
