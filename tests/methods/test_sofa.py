"""SoFA against dense maps blended by hand, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain_pass, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError, MmfixError
from mmfix.methods import SoFA
from mmfix.methods.frame_block import tokens_per_picture
from mmfix.methods.sofa import OtherImage
from mmfix.segments import build

STEPS = 3
ROWS = [
    vlm.tokens(2, "image", 2, "image", 1, "image", 4, seed=1),
    vlm.tokens(2, "image", 3, "image", 5, seed=2),
    vlm.tokens(3, "image", 4, seed=3),
]


def images(ids: list[int]) -> list[int]:
    """The number of the picture that each token belongs to, -1 for text."""
    found, number = [], -1
    for n, token in enumerate(ids):
        number += token == vlm.IMAGE_ID and (n == 0 or ids[n - 1] != vlm.IMAGE_ID)
        found.append(number if token == vlm.IMAGE_ID else -1)
    return found


def test_images_that_touch_are_told_apart_by_their_length(llava: Any) -> None:
    """As with a token between them, where the model says how many tokens an image has."""
    n = vlm.IMAGE_TOKENS
    image = torch.tensor([[False] + [True] * (2 * n) + [False] * 2])
    segments = build(None, image, torch.ones_like(image), None)
    pairs = OtherImage(n)(segments, slice(0, 2 * n + 3))[0]
    first, second = slice(1, n + 1), slice(n + 1, 2 * n + 1)
    assert pairs[first, second].all()
    assert pairs[second, first].all()
    assert pairs.sum() == 2 * n * n
    assert not OtherImage(None)(segments, slice(0, 2 * n + 3)).any()
    assert SoFA().prepare(mmfix.describe(llava)).tokens == tokens_per_picture(mmfix.describe(llava))
    with pytest.raises(MethodError, match=r"sofa\.tokens=0"):
        SoFA(tokens=0)


def later_images(inputs: dict[str, Any]) -> Tensor:
    """Bool[B, 1, T, T]: pairs of an image token and a token of a later image, one by one."""
    batch, length = inputs["input_ids"].shape
    opened = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        number = images(inputs["input_ids"][b].tolist())
        for q in range(length):
            for k in range(q + 1, length):
                opened[b, 0, q, k] = number[q] >= 0 and number[k] > number[q]
    return opened


def blended(model: Any, inputs: dict[str, Any], sigma: float, layers: set[int]) -> Tensor:
    causal = plain_pass.causal(inputs)
    wide = causal | later_images(inputs)

    def weights(scores: Tensor, layer: int) -> Tensor:
        narrow = plain_pass.softmax(scores, causal)
        if layer not in layers:
            return narrow
        mixed = (1 - sigma) * narrow + sigma * plain_pass.softmax(scores, wide)
        rows = causal.any(-1)[:, 0]  # of tokens that are not padding
        assert torch.allclose(mixed.sum(-1)[:, 0][rows], torch.ones(1, dtype=mixed.dtype))
        return mixed

    return plain_pass.logits(model, inputs, weights)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize(("which", "layers"), [("even", {0, 2, 4}), ("odd", {1, 3}), ("all", {0, 1, 2, 3, 4})])
def test_it_blends_maps_of_later_images(grouped: Any, sigma: float, which: Any, layers: set[int]) -> None:
    """Three, two and one picture in a padded batch, at the prompt and in decoding."""
    inputs = vlm.batch(ROWS, vlm.picture(0, 6))
    with mmfix.mitigate(grouped, SoFA(sigma=sigma, layers=which)) as fix:
        got = vlm.greedy(grouped, inputs, STEPS)
        fired = fix.report().fired["sofa"]
    want = plain_pass.greedy(grouped, inputs, STEPS, lambda given: blended(grouped, given, sigma, layers))
    for a, b in zip(got.logits, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    plain = vlm.logits(grouped, inputs)[:, -1]
    moved = (got.logits[0] - plain).abs().amax(-1)
    assert moved[:2].min() > 1e-2
    assert moved[2] < 1e-4, "one picture has no other"
    assert fired.fired == len(layers) * vlm.HEADS * 3 * vlm.IMAGE_TOKENS, "rows of images that a later image follows"


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
@pytest.mark.parametrize(
    ("inputs", "sigma"),
    [
        (vlm.batch(ROWS[1:2], vlm.picture(0, 2)), 0.0),
        (vlm.one(), 0.5),
        (vlm.batch([vlm.tokens(9)]), 1.0),
    ],
    ids=["no weight", "one picture", "no picture"],
)
def test_nothing_changes(llava: Any, inputs: dict[str, Any], sigma: float) -> None:
    plain = vlm.greedy(llava, inputs, STEPS)
    with mmfix.mitigate(llava, SoFA(sigma=sigma, layers="all")):
        got = vlm.greedy(llava, inputs, STEPS)
    assert torch.equal(got.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_decoding_modes_of_a_batch_equal_single_runs(llava: Any, options: dict[str, Any]) -> None:
    rows = [(ROWS[0], vlm.picture(0, 3)), (ROWS[1], vlm.picture(1, 2))]
    if "cache_implementation" in options:
        options = {**options, "disable_compile": True}
    with mmfix.mitigate(llava, SoFA(sigma=0.6)):
        together = vlm.greedy(llava, vlm.batch([r for r, _ in rows], torch.cat([p for _, p in rows])), STEPS, **options)
        for n, (row, pictures) in enumerate(rows):
            alone = vlm.greedy(llava, vlm.batch([row], pictures), STEPS, **options)
            assert torch.equal(alone.sequences[0, -STEPS:], together.sequences[n, -STEPS:])


def test_it_leaves_no_trace_and_refuses_what_it_cannot_do(llava: Any) -> None:
    inputs = vlm.batch(ROWS[:1], vlm.picture(0, 3))
    plain = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, SoFA()):
        changed = vlm.logits(llava, inputs)
        with pytest.raises(MmfixError, match="pieces"):
            vlm.greedy(llava, inputs, prefill_chunk_size=15)
    assert not torch.equal(changed, plain)
    assert torch.equal(vlm.logits(llava, inputs), plain)
    for params in ({"sigma": 1.2}, {"sigma": -0.1}, {"layers": "none"}):
        with pytest.raises(MethodError, match="sofa"):
            mmfix.method("sofa", **params)
