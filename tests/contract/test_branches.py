"""Contrast branches: every decoding mode sees the mixed logits of branches that were each computed alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmfix
from mmfix.branches import Branch
from mmfix.errors import ConflictError, MethodError
from mmfix.methods import CausalMM, CausalMMLanguage, CausalMMVision, Plausibility
from mmfix.mixing import Mix, contrast

GAMMA, EPSILON = 1.0, 1e-6


def dense_map(kind: str, weights: Tensor, allowed: Tensor) -> Tensor:
    """A replaced map straight from its definition, float64."""
    n = allowed.sum(-1, keepdim=True).double()
    if kind == "uniform":
        return allowed.double() / n.clamp(min=1)
    largest = weights.amax(-1, keepdim=True)
    mass = n * largest - 1
    reverse = (largest - weights) * allowed
    return torch.where(mass > 1e-6, reverse / mass, weights)


def alone(model: Any, inputs: dict[str, Any], kind: str | None, layers: tuple[int, ...]) -> Tensor:
    """Logits of one branch: plain dense attention, no cache, no engine."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(repeats, 1) for x in (key, value))
        scores = query.double() @ key.transpose(-1, -2) * scaling
        length = scores.shape[-1]
        valid = inputs["attention_mask"].bool()
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None, :]
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
        if kind is not None and module.layer_idx in layers:
            weights = dense_map(kind, weights, allowed.expand_as(weights))
        return (weights @ value).float().transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("oracle", attend)
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation_internal = "oracle"
    try:
        return vlm.logits(model, inputs)[:, -1]
    finally:
        decoder.config._attn_implementation_internal = before


def oracle(model: Any, inputs: dict[str, Any], kind: str, layers: tuple[int, ...], steps: int) -> Tensor:
    """Mixed logits [B, steps, V] of greedy decoding, each branch recomputed from scratch at every step."""
    inputs = dict(inputs)
    rows = []
    for _ in range(steps):
        factual, changed = alone(model, inputs, None, ()), alone(model, inputs, kind, layers)
        mixed = (1 + GAMMA) * factual - GAMMA * changed
        mixed = mixed.masked_fill(factual < math.log(EPSILON) + factual.amax(-1, keepdim=True), -math.inf)
        rows.append(mixed)
        token = mixed.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    return torch.stack(rows, 1)


def ragged() -> dict[str, Any]:
    """Two prompts of different lengths, left-padded."""
    rows = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(2, "image", 4, seed=2)]
    return vlm.batch(rows, vlm.picture(1, 2))


@pytest.mark.parametrize(("kind", "language"), [("uniform", "uniform"), ("reversed", "reversed_normalised")])
def test_generation_equals_the_cacheless_oracle(model: Any, kind: str, language: str) -> None:
    inputs = ragged()
    method = CausalMMLanguage(language=language, epsilon=EPSILON, language_layers=(1, 2))
    with mmfix.mitigate(model, method) as fix:
        out = vlm.greedy(model, inputs, steps=4)
    expected = oracle(model, inputs, kind, (1, 2), 4)
    got = torch.stack(out.logits, 1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert fix.report().fired["causalmm-language"].fired > 0


def test_equal_branches_change_nothing(model: Any) -> None:
    inputs = ragged()
    plain = vlm.greedy(model, inputs).sequences
    with mmfix.mitigate(model, CausalMM(gamma=0.0, epsilon=1e-6)):
        assert torch.equal(vlm.greedy(model, inputs).sequences, plain)


def modes() -> dict[str, dict[str, Any]]:
    return {
        "greedy": {},
        "beams": {"num_beams": 3},
        "returned": {"num_beams": 3, "num_return_sequences": 2},
        "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    }


@pytest.mark.parametrize("mode", modes())
@pytest.mark.parametrize("method", ["causalmm", "causalmm-vision", "causalmm-language"])
def test_the_cache_changes_nothing(llava: Any, method: str, mode: str) -> None:
    inputs, found = ragged(), []
    for cached in (True, False):
        with mmfix.mitigate(llava, method, epsilon=1e-6):
            torch.manual_seed(3)
            options = {"max_new_tokens": 5, "do_sample": False, "use_cache": cached, **modes()[mode]}
            found.append(llava.generate(**inputs, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["causalmm", "causalmm-vision", "causalmm-language", "plausibility"])
def test_a_batch_equals_single_runs(model: Any, method: str) -> None:
    rows = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(2, "image", 4, seed=2)]
    pictures = vlm.picture(1, 2)
    with mmfix.mitigate(model, method, **({} if method == "plausibility" else {"epsilon": 1e-6})):
        together = vlm.greedy(model, vlm.batch(rows, pictures), steps=4)
        for n, row in enumerate(rows):
            single = vlm.greedy(model, vlm.batch([row], pictures[n : n + 1]), steps=4)
            for a, b in zip(together.logits, single.logits, strict=True):
                torch.testing.assert_close(a[n], b[0], atol=1e-4, rtol=0)


def test_two_pictures_in_one_prompt(llava: Any) -> None:
    both = vlm.batch([vlm.tokens(2, "image", 2, "image", 4), vlm.tokens(2, "image", 3)], vlm.picture(0, 3))
    with mmfix.mitigate(llava, CausalMMVision(epsilon=1e-6)):
        together = vlm.greedy(llava, both, steps=3).logits
        first = vlm.greedy(llava, vlm.batch([vlm.tokens(2, "image", 2, "image", 4)], vlm.picture(0, 3)[:2]), steps=3)
    for a, b in zip(together, first.logits, strict=True):
        torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=0)


def test_prompt_lookup_decoding_agrees(llava: Any) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(llava, CausalMMLanguage(epsilon=1e-6)):
        plain = llava.generate(**inputs, max_new_tokens=8, do_sample=False)
        guessed = llava.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, guessed)


def test_static_cache_agrees(llava: Any) -> None:
    inputs = ragged()
    with mmfix.mitigate(llava, CausalMM(epsilon=1e-6)):
        dynamic = llava.generate(**inputs, max_new_tokens=5, do_sample=False)
        static = llava.generate(
            **inputs, max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True
        )
    assert torch.equal(dynamic, static)


def test_the_cache_gets_its_own_operations_back(llava: Any) -> None:
    with mmfix.mitigate(llava, CausalMMLanguage(epsilon=1e-6)):
        out = vlm.greedy(llava, vlm.one(), steps=2)
        assert "reorder_cache" in vars(out.past_key_values)
    assert "reorder_cache" not in vars(out.past_key_values)


def test_mix_formulas() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 1, 7)
    factual, a, b = logits.unbind(1)
    torch.testing.assert_close(contrast(0.7, 2)(logits), (1 + 1.4) * factual - 0.7 * a - 0.7 * b)
    cut = Mix(weights=(1.0,), beta=0.5)(logits[:, :1])
    probabilities = factual.softmax(-1)
    keep = probabilities >= 0.5 * probabilities.amax(-1, keepdim=True)
    assert torch.equal(cut.isneginf(), ~keep)
    guided = Mix(weights=(1.5, -0.5), log_probs=True)(logits[:, :2])
    torch.testing.assert_close(guided, 1.5 * (factual.log_softmax(-1) - a.log_softmax(-1)) + a.log_softmax(-1))
    masked = logits[:, :2].clone()
    masked[:, :, :, 0] = -math.inf
    assert not Mix(weights=(2.0, -1.0))(masked).isnan().any(), "a difference of two infinities"
    excluded = logits[:, :2].clone()
    excluded[:, 1, :, 3] = -math.inf
    mixed = Mix(weights=(2.0, -1.0))(excluded)
    torch.testing.assert_close(mixed[..., 3], factual[..., 3])  # what a branch rules out is not thereby lifted
    with pytest.raises(MethodError, match="sum to"):
        Mix(weights=(1.0, 1.0))


def test_the_plausibility_cut_alone_leaves_greedy_decoding_alone(model: Any) -> None:
    inputs = ragged()
    plain = vlm.greedy(model, inputs)
    with mmfix.mitigate(model, Plausibility(beta=0.2)):
        cut = vlm.greedy(model, inputs)
    assert torch.equal(plain.sequences, cut.sequences)
    assert cut.logits[0].isneginf().any()


def test_two_methods_that_combine_logits_conflict(llava: Any) -> None:
    with pytest.raises(ConflictError, match="both combine logits"), mmfix.mitigate(llava, ["causalmm", "plausibility"]):
        pass


def test_draws_are_averaged(llava: Any) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(llava, CausalMMLanguage(draws=2, epsilon=1e-9)):
        both = vlm.logits(llava, inputs)
    singles = []
    for seed in (0, 1):
        with mmfix.mitigate(llava, CausalMMLanguage(seed=seed, epsilon=1e-9)):
            singles.append(vlm.logits(llava, inputs))
    torch.testing.assert_close(both, (singles[0] + singles[1]) / 2, atol=1e-4, rtol=0)


def test_a_branch_without_the_image_is_the_text_prompt(llava: Any) -> None:
    """Branch rows are pushed right and padded; their logits are those of the prompt without its image tokens."""
    from dataclasses import dataclass

    from mmfix import Method

    @dataclass(frozen=True, kw_only=True)
    class TextOnly(Method):
        def branches(self, family: Any) -> Any:
            return [Branch(image=False)]

        def mix(self) -> Mix:
            return Mix(weights=(0.0, 1.0))

    TextOnly.info = Plausibility.info
    rows = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(2, "image", 4, seed=2)]
    short = vlm.batch([[t for t in row if t != vlm.IMAGE_ID] for row in rows])
    for extra in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with mmfix.mitigate(llava, TextOnly()):
            got = vlm.greedy(llava, vlm.batch(rows, vlm.picture(1, 2)), steps=4, **extra)
        expected = vlm.greedy(llava, short, steps=4)
        for a, b in zip(got.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
