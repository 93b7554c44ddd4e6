"""SID against two plain passes per token: the prompt, and the prompt with keys hidden by hand in the later layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import SID
from mmfix.selection import Overlooked

STEPS = 3


def overlooked(model: Any, inputs: dict[str, Any], prompt: int, count: int, after: int) -> Tensor:
    """Float[B, V]: newest logits, dense and without a cache; the first `prompt` columns are the prompt."""
    image = plain.image(inputs)
    hidden: list[Tensor] = []

    def scores(found: Tensor, allowed: Tensor, layer: int) -> Tensor:
        if layer == after - 1:
            weights = found.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
            gone = torch.zeros_like(weights, dtype=torch.bool)
            for b, row in ((b, row) for b in range(len(weights)) for row in range(weights.shape[1])):
                looks = weights[b, max(row, prompt - 1)]
                tokens = sorted(image[b].nonzero()[:, 0].tolist(), key=lambda j: float(looks[j]))
                gone[b, row, tokens[count:]] = True
            hidden.append(gone[:, None])
        return found.masked_fill(hidden[0], -torch.inf) if layer >= after else found

    return plain.dense(model, inputs, scores=scores)[:, -1]


def oracle(model: Any, inputs: dict[str, Any], count: int, after: int, alpha: float, beta: float) -> Tensor:
    prompt = inputs["input_ids"].shape[1]

    def newest(grown: dict[str, Any], _: int) -> Tensor:
        factual = plain.newest(model, grown)
        changed = overlooked(model, grown, prompt, count, after)
        return plain.cut((1 + alpha) * factual - alpha * changed, factual, beta)

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize(("count", "after", "alpha"), [(3, 2, 1.0), (1, 1, 0.5), (6, 4, 2.0)])
def test_decoding_equals_two_plain_passes_per_token(model: Any, count: int, after: int, alpha: float) -> None:
    """Tokens are chosen by prompt and by branch (requirement 1), at every generated token anew."""
    inputs = plain.ragged()
    want = oracle(model, inputs, count, after, alpha, 0.01)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with mmfix.mitigate(model, SID(count=count, after=after, alpha=alpha, beta=0.01)):
            plain.agrees(vlm.greedy(model, inputs, STEPS, **options), want)


def test_beams_and_guesses(llava: Any) -> None:
    """Requirement 3: a beam's first scores are the oracle's; guessed tokens change nothing."""
    inputs = plain.ragged()
    method = SID(count=3, beta=0.01)
    want = oracle(llava, inputs, 3, 2, 1.0, 0.01)[:, 0]
    ids = vlm.tokens(3, "image", 3, seed=4)
    repeated = vlm.batch([ids + ids[-3:] * 3], vlm.picture(4))
    with mmfix.mitigate(llava, method):
        beams = vlm.greedy(llava, inputs, 3, num_beams=2)
        greedy = vlm.greedy(llava, repeated, 8)
        guessed = vlm.greedy(llava, repeated, 8, prompt_lookup_num_tokens=3)
    torch.testing.assert_close(beams.logits[0][::2], want, atol=2e-4, rtol=0)
    assert torch.equal(greedy.sequences, guessed.sequences)
    torch.testing.assert_close(torch.stack(greedy.logits), torch.stack(guessed.logits), atol=1e-3, rtol=1e-4)


def test_the_least_with_ties() -> None:
    weights = torch.tensor([[0.2, 0.1, 0.3, 0.1, 0.1, 0.0]])
    image = torch.tensor([[False, True, True, True, True, False]])
    chosen = Overlooked(count=2, after=1)(weights, image)
    assert chosen.tolist() == [[False, True, False, True, False, False]]
    assert torch.equal(Overlooked(count=9, after=1)(weights, image), image)


def test_keeping_all_is_the_clean_prompt(llava: Any) -> None:
    inputs = plain.ragged()
    with mmfix.mitigate(llava, SID(count=100, beta=1e-9)) as fix:
        got = vlm.logits(llava, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], vlm.logits(llava, inputs)[real], atol=1e-4, rtol=0)
    assert fix.report().fired["sid"].fired == 0


def test_one_documented_default() -> None:
    """Requirement 2."""
    params = mmfix.methods()["sid"].params
    assert {name: one.default for name, one in params.items()} == {"count": 100, "after": 2, "alpha": 1.0, "beta": 0.1}


def test_strength_zero_is_the_cut_alone(llava: Any) -> None:
    inputs = plain.ragged()
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, SID(alpha=0.0, beta=1e-9)) as fix:
        assert torch.equal(vlm.logits(llava, inputs), clean)
        assert fix.rows_per_prompt == 1


@pytest.mark.parametrize("wrong", [{"count": 0}, {"after": 0}, {"after": 5}, {"alpha": -2.0}, {"beta": 0.0}])
def test_values_out_of_range_are_refused(llava: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"sid.{next(iter(wrong))}"), mmfix.mitigate(llava, SID(**wrong)):
        pass
