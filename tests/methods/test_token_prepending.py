"""Token Prepending against the plain model given the longer prompt, its placeholder filled layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError, MmfixError
from mmfix.methods import TokenPrepending

STEPS, DEPTH, TOKEN = 4, 2, 33
I = [vlm.IMAGE_ID] * vlm.IMAGE_TOKENS  # noqa: E741
GIVEN = [[1, 7, 8, *I, 11, 12, 13], [*I, 9, *I, 21, 22], [1, 5, 6, 7]]
WANTED = [[1, 7, 8, TOKEN, *I, 11, 12, 13], [TOKEN, *I, 9, *I, 21, 22], [1, 5, 6, 7]]
PLACES = [3, 0, None]


def filled(model: Any, inputs: dict[str, Any], length: int) -> Tensor:
    """Logits [B, T, V] without a cache; `length` places of each row are the prompt, its end last."""
    pads = (inputs["attention_mask"] == 0).sum(-1).tolist()

    def fill(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].clone()
        for b, (pad, place) in enumerate(zip(pads, PLACES, strict=True)):
            if place is not None:
                hidden[b, pad + place] = args[0][b, length - 1]
        return (hidden, *args[1:]), kwargs

    layers = model.model.language_model.layers[1 : DEPTH + 1]
    handles = [layer.register_forward_pre_hook(fill, with_kwargs=True) for layer in layers]
    try:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return vlm.logits(model, {**inputs, "position_ids": positions})
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no cache"])
def test_it_is_the_longer_prompt_with_a_placeholder_filled(grouped: Any, options: dict[str, Any]) -> None:
    """One picture, two and none in a padded batch, at the prompt and in decoding."""
    pictures = vlm.picture(0, 3)
    wanted = vlm.batch(WANTED, pictures)
    with mmfix.mitigate(grouped, TokenPrepending(depth=DEPTH, token=TOKEN)) as fix:
        got = vlm.greedy(grouped, vlm.batch(GIVEN, pictures), STEPS, suppress_tokens=[vlm.IMAGE_ID], **options)
        assert fix.report().passes_per_token == 1
    length = wanted["input_ids"].shape[1]
    tokens = got.sequences[:, -STEPS:]
    for step in range(STEPS):
        given = {
            **wanted,
            "input_ids": torch.cat([wanted["input_ids"], tokens[:, :step]], 1),
            "attention_mask": torch.cat([wanted["attention_mask"], torch.ones_like(tokens[:, :step])], 1),
        }
        torch.testing.assert_close(got.logits[step], filled(grouped, given, length)[:, -1], atol=1e-4, rtol=0)
    plain = vlm.logits(grouped, wanted)[:, -1]
    moved = (got.logits[0] - plain).abs().amax(-1)
    assert moved[:2].min() > 1e-2, "more than the placeholder alone does"
    assert moved[2] < 1e-4


def test_defaults_and_what_is_refused(llava: Any) -> None:
    with mmfix.mitigate(llava, "token-prepending") as fix:
        assert fix.methods == (TokenPrepending(depth=1, token=1),)
    for params in ({"depth": -1}, {"depth": 1.5}, {"token": -3}):
        with pytest.raises(MethodError, match="token-prepending"):
            mmfix.method("token-prepending", **params)
    with pytest.raises(MethodError, match="4 layers after the first"), mmfix.mitigate(llava, TokenPrepending(depth=5)):
        pass
    with pytest.raises(MethodError, match="text token"), mmfix.mitigate(llava, TokenPrepending(token=vlm.IMAGE_ID)):
        pass
    with mmfix.mitigate(llava, TokenPrepending()), pytest.raises(MmfixError, match="pieces"):
        vlm.greedy(llava, vlm.one(), prefill_chunk_size=14)
