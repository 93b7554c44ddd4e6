"""MMCA against two softmaxes written row by row."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import plain_pass, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import MMCA

STEPS = 3
ROWS = [
    vlm.tokens(2, "image", 3, "image", 4, seed=1),
    vlm.tokens("image", 5, seed=2),
    vlm.tokens(6, seed=3),
]
PICTURES = 3


def rows(scores: Tensor, ids: Tensor, mask: Tensor, mass: str) -> Tensor:
    """Weights [B, H, T, T], one row at a time."""
    weights = torch.zeros_like(scores)
    for b in range(len(ids)):
        image, valid = ids[b] == vlm.IMAGE_ID, mask[b].bool()
        for q in range(ids.shape[1]):
            seen = valid & (torch.arange(ids.shape[1]) <= q)
            pictures = seen & image
            if image[q] and valid[q]:
                pictures = torch.zeros_like(seen)
                pictures[q] = True
            parts = [part for part in (pictures, seen & ~image) if bool(part.any())]
            if mass == "measured":
                parts = [torch.stack(parts).any(0)] if parts else []
            for part in parts:
                share = scores[b, :, q].masked_fill(~part, -torch.inf).softmax(-1)
                weights[b, :, q] += share / (len(parts) if mass == "mean" else 1)
    return weights


@pytest.mark.parametrize("mass", ["sum", "mean", "measured"])
def test_two_softmaxes(grouped: Any, mass: Any) -> None:
    """Two pictures, one and none in a padded batch, at the prompt and in decoding."""
    inputs = vlm.batch(ROWS, vlm.picture(0, PICTURES))

    def one(given: dict[str, Any]) -> Tensor:
        def weights(scores: Tensor, layer: int) -> Tensor:
            if layer in (0, 4):
                return rows(scores, given["input_ids"], given["attention_mask"], mass)
            return plain_pass.softmax(scores, plain_pass.causal(given))

        return plain_pass.logits(grouped, given, weights)

    with mmfix.mitigate(grouped, MMCA(mass=mass, layers=(0, -1))):
        got = vlm.greedy(grouped, inputs, STEPS, suppress_tokens=[vlm.IMAGE_ID])
    for step in range(STEPS):
        tokens = got.sequences[:, inputs["input_ids"].shape[1] :][:, :step]
        given = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
        }
        torch.testing.assert_close(got.logits[step], one(given)[:, -1], atol=1e-4, rtol=0)
    moved = (got.logits[0] - vlm.logits(grouped, inputs)[:, -1]).abs().amax(-1)
    assert moved[:2].min() > 1e-2
    assert moved[2] < 1e-4, "MMCA-2: without an image it is plain causal attention"


def test_pictures_of_a_later_turn_on_a_cache(llava: Any) -> None:
    """MMCA-4: they are image rows there too."""
    whole = vlm.batch(ROWS[:1], vlm.picture(0, 2))
    cut = [0, 3 + vlm.IMAGE_TOKENS + 2, len(ROWS[0])]
    with torch.no_grad(), mmfix.mitigate(llava, "mmca"):
        want = vlm.logits(llava, whole)
        cache, parts = None, []
        for n, (start, stop) in enumerate(itertools.pairwise(cut)):
            out = llava(
                input_ids=whole["input_ids"][:, start:stop],
                attention_mask=whole["attention_mask"][:, :stop],
                pixel_values=whole["pixel_values"][n : n + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)


def test_a_patch_that_sees_no_text(llava: Any) -> None:
    """MMCA-1: an empty part is zero, also where the first token of all is a patch."""
    inputs = vlm.batch([[vlm.IMAGE_ID] * vlm.IMAGE_TOKENS + [5, 6, 7]], vlm.picture())
    with mmfix.mitigate(llava, "mmca"):
        first = vlm.logits(llava, inputs)
    want = plain_pass.logits(
        llava, inputs, lambda s, layer: rows(s, inputs["input_ids"], inputs["attention_mask"], "sum")
    )
    torch.testing.assert_close(first, want, atol=1e-4, rtol=0)


def test_what_is_refused(llava: Any) -> None:
    with pytest.raises(MethodError, match="choose 'sum', 'mean' or 'measured'"):
        mmfix.method("mmca", mass="half")
    with pytest.raises(MethodError, match="layers from"), mmfix.mitigate(llava, MMCA(layers=(9,))):
        pass
    assert mmfix.methods()["mmca"].trained_in_paper
