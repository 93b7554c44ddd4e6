"""Layer by head: how much each head looks at the picture, how much it depends on it, and where it looks.

At the last position of the prompt, which chooses the first word of the answer, in the plain model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmfix.headscores import look
from mmfix_app.markup import packed, percent
from mmfix_app.pictures import data_uri
from mmfix_decoding import Decoder, prompts
from mmfix_decoding.grids import raster


@dataclass(frozen=True)
class HeadMaps:
    """What the heads do with one picture and prompt.

    Args:
        mass: Float[layers, heads], attention on the picture.
        divergence: Float[layers, heads], VHD.
        maps: per layer and head Float[rows, columns] over the picture; empty when the patch layout is not known.
    """

    mass: npt.NDArray[Any]
    divergence: npt.NDArray[Any]
    maps: Sequence[Sequence[npt.NDArray[Any]]]


def measure(decoder: Decoder, image: Image.Image, prompt: str) -> HeadMaps:
    """One forward pass of the prompt, and a short one without the picture.

    The decoder's lock is held: no stream runs meanwhile.
    """
    request = prompts.single(image, prompt).load()
    grids = decoder.image_grids(image, prompt)
    with decoder.exclusive():
        found = look(decoder.model, prompts.encode([request], decoder.processor, decoder.model))
    on_image = found.weights[:, 0, :, found.image[0]].cpu().numpy()  # [layers, heads, image tokens]
    divergence = found.divergence[:, 0].cpu().numpy()
    maps = [[found for head in layer if (found := raster(head, grids)) is not None] for layer in on_image]
    return HeadMaps(on_image.sum(-1), divergence, maps if grids else [])


def render(found: HeadMaps, image: Image.Image) -> str:
    """The map as a grid of buttons, first layer at the bottom, and the picture beside it."""
    layers, heads = found.mass.shape
    most = float(found.divergence.max()) or 1.0
    top_mass = float(found.mass.max()) or 1.0
    first = np.unravel_index(int(found.divergence.argmax()), found.divergence.shape)
    rows = []
    for layer in reversed(range(layers)):
        cells = []
        for head in range(heads):
            mass, vhd = float(found.mass[layer, head]), float(found.divergence[layer, head])
            said = f"Layer {layer}, head {head}: {percent(mass)} of its attention on the picture, VHD {vhd:.2f}"
            shown = packed(found.maps[layer][head]) if found.maps else ""
            cells.append(
                f'<button type="button" class="head" data-layer="{layer}" data-head="{head}" tabindex="-1" '
                f'data-mass="{mass / top_mass:.3f}" data-vhd="{vhd / most:.3f}" '
                f'data-first="{int((layer, head) == first)}" '
                f'aria-pressed="false" aria-label="{said}" title="{said}" {shown}></button>'
            )
        rows.append(f'<div class="row"><span class="n">{layer}</span>{"".join(cells)}</div>')
    numbers = "".join(f"<span>{head}</span>" for head in range(heads))
    crisp = " crisp" if max(image.size) <= 256 else ""
    return (
        '<div class="heads"><div class="grid"><p class="measures" role="group" aria-label="What the colour shows">'
        '<button type="button" class="measure" data-name="mass" aria-pressed="true">Attention on the picture</button>'
        '<button type="button" class="measure" data-name="vhd" aria-pressed="false">Dependence on it (VHD)</button></p>'
        f'<div class="cells" style="--heads:{heads}">{"".join(rows)}<div class="row numbers"><span class="n"></span>'
        f'{numbers}</div></div><p class="axis">head → (layer upwards)</p>'
        f'<p class="scale" data-name="mass">Full colour: {percent(top_mass)}.</p>'
        f'<p class="scale" data-name="vhd" hidden>Full colour: {most:.2f}.</p></div>'
        f'<figure><div class="pic{crisp}"><img src="{data_uri(image, 384)}" alt="The picture. The light falls where '
        'the chosen head looks."><canvas aria-hidden="true"></canvas></div><figcaption class="look" aria-live="polite">'
        f"{'' if found.maps else 'No map: the patch layout of this model is not known.'}</figcaption></figure></div>"
    )
