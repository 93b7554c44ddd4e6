"""Layer by head: how much each head looks at the picture, how much it depends on it, and where it looks.

At the last position of the prompt, which chooses the first word of the answer, in the plain model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

import mmfix
from mmfix import Method, MethodInfo, Site
from mmfix.recording import record_attention
from mmfix_app.markup import packed, percent
from mmfix_app.pictures import data_uri
from mmfix_decoding import Decoder, prompts
from mmfix_decoding.grids import raster
from mmfix_kernels import HeadScale


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe(Method):
    """Measures vision-aware head divergence in every layer, and changes nothing.

    ``VHD_i = || A_i(image, text) - A_i(text) ||_2`` (arXiv:2412.13949), A_i the head's output at the last position.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        "probe", "Head probe", "arXiv:2412.13949", "head scale", 1.0, False, {}, Method
    )
    found: dict[int, Tensor] = field(default_factory=dict)

    def wants_heads(self, layer: int, num_layers: int) -> bool:
        return True

    def head_scale(self, site: Site, heads: Tensor, text_only: Tensor) -> HeadScale:
        self.found[site.layer] = (heads.float() - text_only.float()).norm(dim=-1)[0]
        return HeadScale(scale=torch.ones(heads.shape[:2], device=heads.device))


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
    probe = Probe()
    with decoder.exclusive(), torch.no_grad():
        inputs = prompts.encode([request], decoder.processor, decoder.model)
        with (
            mmfix.mitigate(decoder.model, probe, telemetry=True),
            record_attention(decoder.model) as recorder,
        ):
            decoder.model(**inputs)
            weights = recorder.weights()
        image_token = mmfix.describe(decoder.model).image_token_id
        positions = (inputs["input_ids"][0] == image_token).nonzero().flatten()
    assert weights is not None
    on_image = weights[:, 0].index_select(-1, positions).cpu().numpy()  # [layers, heads, image tokens]
    divergence = torch.stack([probe.found[n] for n in range(len(on_image))]).cpu().numpy()
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
        f'<p class="scale" data-name="mass">Darkest: {percent(top_mass)}.</p>'
        f'<p class="scale" data-name="vhd" hidden>Darkest: {most:.2f}.</p></div>'
        f'<figure><div class="pic{crisp}"><img src="{data_uri(image, 384)}" alt="The picture. The light falls where '
        'the chosen head looks."><canvas aria-hidden="true"></canvas></div><figcaption class="look" aria-live="polite">'
        f"{'' if found.maps else 'No map: the patch layout of this model is not known.'}</figcaption></figure></div>"
    )
