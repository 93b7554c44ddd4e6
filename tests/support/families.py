"""Every family: a tiny random model and prompts in model-input form. Nothing is downloaded.

A prompt is written out by hand: text tokens, image placeholders in the number that the model's own tower gives, and
whatever else the family asks for (grids, sizes, token types). Two prompts of different length make a left-padded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from support import family_models as m
from support import family_pictures as p
from support.family_pictures import IMAGE_ID, Inputs

import mmfix

TEXT = (5, 90)  # ids of plain text tokens
Row = list[int | str]


@dataclass(frozen=True)
class Tiny:
    """One family.

    Args:
        name: name used in tests and in docs/families.md.
        title: the family as people call it.
        build: makes the model, always with the same weights.
        span: tokens of picture n: placeholders, with markers where the family has them.
        pictures: what the model is given for the pictures with these numbers; one list per prompt.
        types: name of a per-token type, if the model takes one.
        image_type: the type of image tokens; others have type 0 (PaliGemma: all of the prompt has type 0).
        later: type of generated tokens.
        extra: inputs made from the others.
    """

    name: str
    title: str
    build: Callable[[], Any]
    span: Callable[[int], list[int]]
    pictures: Callable[[list[list[int]]], Inputs]
    types: str = ""
    image_type: int = 1
    later: int = 0
    extra: Callable[[Inputs], Inputs] = lambda inputs: {}

    def rows(self, seed: int = 0, padded: bool = False, system: int = 3) -> list[Row]:
        """Prompts as text ids and the word "image", with `system` tokens (or one less) before it."""
        generator = torch.Generator().manual_seed(seed)

        def text(count: int) -> Row:
            return list(torch.randint(*TEXT, (count,), generator=generator).tolist())

        rows: list[Row] = [[1, *text(system), "image", *text(6)]]
        return [*rows, [1, *text(system - 1), "image", *text(3)]] if padded else rows

    def inputs(self, seed: int = 0, padded: bool = False) -> Inputs:
        """One prompt with a picture; `padded` adds a shorter one with another picture, padded on the left."""
        return self.batch(self.rows(seed, padded), seed)

    def batch(self, rows: list[Row], seed: int = 0) -> Inputs:
        """Model inputs of prompts given as in :meth:`rows`; pictures are numbered in order from `seed`."""
        numbers: list[list[int]] = []
        ids: list[list[int]] = []
        count = seed
        for row in rows:
            ids.append([])
            numbers.append([])
            for part in row:
                if part == "image":
                    ids[-1] += self.span(count)
                    numbers[-1].append(count)
                    count += 1
                else:
                    ids[-1].append(int(part))
        width = max(map(len, ids))
        inputs = {
            "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        }
        if count > seed:
            inputs |= self.pictures(numbers)
        if self.types:
            inputs[self.types] = (inputs["input_ids"] == IMAGE_ID).long() * self.image_type
        return {**inputs, **self.extra(inputs)}


def _tiny(*args: Any, **more: Any) -> tuple[str, Tiny]:
    return args[0], Tiny(*args, **more)


_TYPED = {"types": "mm_token_type_ids"}
FAMILIES: dict[str, Tiny] = dict([
    _tiny("llava", "LLaVA-1.5", lambda: m.llava(m.text(hf.LlamaConfig), m.clip()), p.run(9), p.whole(24)),
    _tiny("llava-siglip", "LLaVA (SigLIP, Qwen2)", m.llava_siglip, p.run(9), p.whole(24)),
    _tiny("llava-next", "LLaVA-NeXT", m.llava_next, p.tile_span, p.tiles),
    _tiny("llava-onevision", "LLaVA-OneVision", m.llava_onevision, p.tile_span, p.tiles),
    _tiny("qwen2-vl", "Qwen2-VL", m.qwen2_vl, p.grid_span, p.grid, **_TYPED),
    _tiny("qwen2.5-vl", "Qwen2.5-VL", m.qwen2_5_vl, p.grid_span, p.grid, **_TYPED),
    _tiny("qwen3-vl", "Qwen3-VL", m.qwen3_vl, p.grid_span, p.grid, **_TYPED),
    _tiny("glm-4v", "GLM-4.1V", m.glm4v, p.grid_span, p.grid, **_TYPED),
    _tiny("internvl", "InternVL", m.internvl, p.run(4), p.whole(32)),
    _tiny("idefics2", "Idefics2", m.idefics2, p.run(4), p.by_prompt(24)),
    _tiny("idefics3", "Idefics3", m.idefics3, p.run(4), p.by_prompt(32)),
    _tiny("smolvlm", "SmolVLM", m.smolvlm, p.two_tiles, p.two_per_picture),
    _tiny("paligemma", "PaliGemma", m.paligemma, p.run(9), p.whole(24), types="token_type_ids", image_type=0, later=1),
    _tiny("gemma3", "Gemma 3", m.gemma3, p.run(4), p.whole(32), types="token_type_ids"),
    _tiny("mistral3", "Mistral Small 3.1", m.mistral3, p.patch_rows(16), p.padded_pixels),
    _tiny("pixtral", "Pixtral (LLaVA)", m.pixtral_llava, p.patch_rows(8), p.padded_pixels),
    _tiny("instructblip", "InstructBLIP", m.instructblip, p.run(4), p.questions),
    _tiny("blip-2", "BLIP-2", m.blip_2, p.run(4), p.whole(16)),
    _tiny("mllama", "Llama 3.2 Vision", m.mllama, p.run(1), p.four_tiles, extra=p.seen_tiles),
    _tiny("aya-vision", "Aya Vision", m.aya, p.run(4), p.whole(32)),
])  # fmt: skip


def acts_on(name: str, method: str, **params: Any) -> None:
    """A method changes what a family says, and a padded batch of two agrees with its prompts alone."""
    tiny = FAMILIES[name]
    model = tiny.build()
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both, single = tiny.inputs(padded=True), tiny.inputs()
    with torch.no_grad():
        before = model.generate(**single, **options).logits
        with mmfix.mitigate(model, method, **params):
            together, alone = (model.generate(**x, **options).logits for x in (both, single))
    for a, b, c in zip(together, alone, before, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=1e-4 * float(b.abs().max()), rtol=0)
        assert (b - c).abs().max() > 1e-3
