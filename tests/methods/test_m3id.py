"""M3ID against plain passes of the prompt with and without its image, and the weights written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import M3ID
from mmfix.mixing import Growth, Mix

STEPS = 4


def oracle(model: Any, inputs: dict[str, Any], decay: float, start: int, beta: float, steps: int = STEPS) -> Tensor:
    def newest(grown: dict[str, Any], step: int) -> Tensor:
        factual = plain.newest(model, grown)
        text = plain.newest(model, plain.text_only(grown))
        g = math.exp(-decay * (start + step))
        return plain.cut(factual + (factual - text) * (1 - g) / g, factual, beta)

    return plain.decoded(inputs, newest, steps)


@pytest.mark.parametrize("start", [0, 7])
def test_decoding_equals_plain_passes(llava: Any, start: int) -> None:
    """t counts from the first generated token, which at t = 0 has the clean logits (requirements 1 and 3); prompts of
    different length, with and without a cache, in a cache of fixed size, with guessed tokens."""
    inputs = plain.ragged()
    want = oracle(llava, inputs, 0.1, start, 0.01)
    method = M3ID(decay=0.1, start=start, beta=0.01)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with mmfix.mitigate(llava, method):
            plain.agrees(vlm.greedy(llava, inputs, STEPS, **options), want)
    if start == 0:
        clean = plain.newest(llava, inputs)
        kept = want[:, 0].isfinite()
        torch.testing.assert_close(want[:, 0][kept], clean[kept], atol=1e-6, rtol=0)


def test_guessed_tokens_have_their_own_weights(llava: Any) -> None:
    """Several positions in one pass: each is weighted by its own t."""
    ids = vlm.tokens(3, "image", 3, seed=4)
    inputs = vlm.batch([ids + ids[-3:] * 3], vlm.picture(4))
    with mmfix.mitigate(llava, M3ID(decay=0.3, beta=0.01)):
        greedy = vlm.greedy(llava, inputs, 8)
        guessed = vlm.greedy(llava, inputs, 8, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, guessed.sequences)
    torch.testing.assert_close(torch.stack(greedy.logits), torch.stack(guessed.logits), atol=1e-3, rtol=1e-4)


def test_a_second_request_counts_from_its_own_start(llava: Any) -> None:
    inputs = plain.ragged()
    with mmfix.mitigate(llava, M3ID(decay=0.5, beta=0.01)):
        vlm.greedy(llava, vlm.one(3, after=5), STEPS)
        out = vlm.greedy(llava, inputs, STEPS)
    plain.agrees(out, oracle(llava, inputs, 0.5, 0, 0.01))


def test_weights_at_long_t() -> None:
    """Requirement 2: t = 0, 1, 50, 500; growth without bound up to the documented limit, finite logits throughout."""
    weights = Growth(rate=0.02)(torch.tensor([0, 1, 50, 500, 690, 691, 100_000])).tolist()
    assert weights == pytest.approx([0.0, 0.0202013, 1.7182818, 22025.4658, 984608.1, 1e6, 1e6], rel=1e-5)
    assert Growth(rate=0.02, limit=3.0)(torch.tensor([69, 70])).tolist() == pytest.approx([2.97490, 3.0], rel=1e-5)
    assert Growth(rate=0.02, start=50)(torch.tensor([0])).tolist() == pytest.approx([1.7182818], rel=1e-6)
    logits = torch.tensor([[[[2.0, 1.9, -30.0, -math.inf]], [[1.0, 3.0, 40.0, 5.0]]]]).float()
    mix = M3ID().mix()
    mixed = mix(logits, torch.tensor([100_000]))
    assert mixed[0, 0, :2].isfinite().all()
    assert mixed[0, 0, 2:].isneginf().all()
    assert torch.equal(mix(logits, torch.tensor([0]))[0, 0, :2], logits[0, 0, 0, :2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_answers_in_half_precision(dtype: torch.dtype) -> None:
    """The chosen token is that of float32, and no plausible logit is infinite."""
    logits = 4 * torch.randn(1, 2, 1, 50, generator=torch.Generator().manual_seed(0))
    mix, step = M3ID().mix(), torch.tensor([511])
    whole, half = mix(logits, step), mix(logits.to(dtype), step)
    assert int(half.argmax()) == int(whole.argmax())
    assert not half.isposinf().any()
    assert not half.float().softmax(-1).isnan().any()


def test_a_growing_contrast_must_be_told_the_step() -> None:
    with pytest.raises(MethodError, match="give steps"):
        Mix(weights=(2.0, -1.0), growth=Growth(rate=0.1))(torch.zeros(1, 2, 1, 4))


def test_no_growth_is_the_cut_alone(llava: Any) -> None:
    inputs = plain.ragged()
    want = vlm.greedy(llava, inputs, STEPS)
    with mmfix.mitigate(llava, M3ID(decay=0.0, beta=1e-9)) as fix:
        got = vlm.greedy(llava, inputs, STEPS)
        assert fix.rows_per_prompt == 1
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("wrong", [{"decay": -0.1}, {"start": -1}, {"limit": -1.0}, {"beta": 0.0}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"m3id.{next(iter(wrong))}"):
        M3ID(**wrong)
