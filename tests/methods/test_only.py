"""ONLY against eager maps of a plain pass: peaks, heads and the way to the logits written out row by row."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.enhanced import _text
from mmfix.errors import MethodError
from mmfix.methods import ONLY
from mmfix.methods.only import Agreement, enhance_text
from mmfix_kernels import Label

STEPS = 3


def edited(weights: Tensor, text: list[int], image: list[int]) -> Tensor:
    """Float64[H, S] of one row: straight from the definition, one head at a time."""
    weights = weights.double().clone()
    ratios = []
    for head in weights:
        entropies = []
        for group in (text, image):
            part = head[group]
            part[part > part.mean() + part.std()] = 0.0
            head[group] = part
            share = part / part.sum()
            entropies.append(-float((share * (share + 1e-6).log()).sum()))
        ratios.append(entropies[0] / entropies[1])
    for n, ratio in enumerate(ratios):
        if ratio < sum(ratios) / len(ratios):
            weights[n] = 0.0
    return weights


def test_the_first_key_of_a_window_is_not_the_first_token() -> None:
    """Only the prompt's first token is left out of the text, also where a layer has dropped it; padding is no token."""
    labels = torch.tensor([[int(Label.PADDING), int(Label.TEXT), int(Label.TEXT), int(Label.IMAGE)]] * 2)
    assert _text(labels).tolist() == [[False, False, True, False]] * 2
    assert _text(labels, torch.tensor([0, 3])).tolist() == [[False, False, True, False], [False, True, True, False]]


def second(model: Any, inputs: dict[str, Any], layer: int, share: float) -> Tensor:
    """Float[B, V]: the second logits of the newest token, from an eager pass with maps and states."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    decoder = eager.get_decoder()
    first, last = decoder.layers[layer], decoder.layers[-1]
    heads, repeats = vlm.HEADS, vlm.HEADS // decoder.config.num_key_value_heads
    with torch.no_grad():
        out = eager(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
        values = first.self_attn.v_proj(first.input_layernorm(out.hidden_states[layer]))
        rows = []
        for b, ids in enumerate(inputs["input_ids"].tolist()):
            real = inputs["attention_mask"][b].nonzero()[:, 0].tolist()
            image = [n for n in real if ids[n] == vlm.IMAGE_ID]
            text = [n for n in real[1:] if ids[n] != vlm.IMAGE_ID]
            weights = edited(out.attentions[layer][b, :, -1], text, image).float()
            value = values[b].view(len(ids), -1, vlm.HIDDEN // heads).repeat_interleave(repeats, 1)
            entering = first.self_attn.o_proj(torch.einsum("hs,shd->hd", weights, value).flatten())
            state = share * out.hidden_states[-2][b, -1] + last.input_layernorm(entering)
            state = state + last.mlp(last.post_attention_layernorm(state))
            rows.append(eager.lm_head(decoder.norm(state)))
    return torch.stack(rows)


def oracle(model: Any, inputs: dict[str, Any], method: ONLY) -> tuple[Tensor, Tensor]:
    """Logits [B, steps, V] of greedy decoding, and the distances [steps, B]."""
    distances = []

    def newest(grown: dict[str, Any], _: int) -> Tensor:
        own = plain.newest(model, grown)
        other = second(model, grown, method.layer % vlm.LAYERS, method.share)
        distances.append((own.softmax(-1) - other.softmax(-1)).abs().sum(-1))
        rows = [
            own[b] + method.plus * other[b]
            if distances[-1][b] < method.threshold
            else (1 + method.minus) * own[b] - method.minus * other[b]
            for b in range(len(own))
        ]
        return plain.cut(torch.stack(rows), own, method.beta)

    return plain.decoded(inputs, newest, STEPS), torch.stack(distances)


@pytest.mark.parametrize(
    "method",
    [
        ONLY(beta=0.01),
        ONLY(threshold=3.0, plus=1.5, beta=0.01),
        ONLY(layer=-2, minus=0.5, share=1.0, threshold=0.0, beta=0.01),
    ],
    ids=["default", "agreeing", "contrasting"],
)
def test_decoding_equals_plain_passes(model: Any, method: ONLY) -> None:
    """Spans and last layer come from the model (requirement 1), the second state travels as written out above
    (requirement 2); prompts of different length, with and without a cache, in one of fixed size."""
    inputs = plain.ragged()
    want, _ = oracle(model, inputs, method)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with mmfix.mitigate(model, method) as fix:
            plain.agrees(vlm.greedy(model, inputs, STEPS, **options), want)
            assert fix.rows_per_prompt == 1


def test_both_sides_of_the_distance_in_one_batch(llava: Any) -> None:
    """Requirement 3: one prompt agrees, the other does not."""
    inputs = plain.ragged()
    _, distances = oracle(llava, inputs, ONLY(beta=0.01))
    method = ONLY(threshold=float(distances[0].mean()), beta=0.01)
    want, distances = oracle(llava, inputs, method)
    assert {bool(distance < method.threshold) for distance in distances[0]} == {True, False}
    with mmfix.mitigate(llava, method):
        plain.agrees(vlm.greedy(llava, inputs, STEPS), want)


def test_both_sides_of_the_distance_on_recorded_logits() -> None:
    logits = torch.tensor([[[[2.0, 1.0, -math.inf]], [[2.1, 1.0, 5.0]]], [[[2.0, 1.0, 0.0]], [[2.0, 1.1, 0.0]]]])
    got = Agreement(weights=(1.0, 0.0), threshold=0.2, plus=3.0, minus=1.0)(logits)
    torch.testing.assert_close(got[0, 0], torch.tensor([1.9, 1.0, -math.inf]))
    torch.testing.assert_close(got[1, 0], torch.tensor([8.0, 4.3, 0.0]))


def test_recorded_maps() -> None:
    """Several rows at once, each with its own peaks and heads; a row before the image keeps its heads."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(2, 4, 3, 14, generator=generator).pow(4)
    weights = weights / weights.sum(-1, keepdim=True)
    text, image = torch.zeros(14, dtype=torch.bool), torch.zeros(14, dtype=torch.bool)
    image[4:9], text[1:4], text[9:] = True, True, True
    got = enhance_text(weights, text, image)
    for b in range(2):
        for row in range(3):
            want = edited(weights[b, :, row], text.nonzero()[:, 0].tolist(), image.nonzero()[:, 0].tolist())
            torch.testing.assert_close(got[b, :, row].double(), want, atol=1e-6, rtol=0)
    assert (got == 0).all(-1).any()
    before = enhance_text(weights, text, torch.zeros_like(image))
    assert (before != 0).any(-1).all()


def test_beams_and_sampling_act_on_the_same_logits(llava: Any) -> None:
    method = ONLY(beta=0.01)
    plain.agrees_under_beams_and_draws(llava, method, oracle(llava, plain.ragged(), method)[0][:, 0])


def test_the_cache_holds_nothing_of_it(llava: Any) -> None:
    inputs = plain.ragged()
    clean = vlm.greedy(llava, inputs, 1).past_key_values
    with mmfix.mitigate(llava, "only"):
        found = vlm.greedy(llava, inputs, 1).past_key_values
    for a, b in zip(found.layers, clean.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=0)


def test_strength_zero_is_the_cut_alone(llava: Any) -> None:
    inputs = plain.ragged()
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, ONLY(plus=0.0, minus=0.0, beta=1e-9)) as fix:
        assert torch.equal(vlm.logits(llava, inputs), clean)
        assert fix._session.readouts is None


@pytest.mark.parametrize("wrong", [{"layer": 5}, {"threshold": -1.0}, {"plus": -1.0}, {"minus": -1.0}, {"beta": 0.0}])
def test_values_out_of_range_are_refused(llava: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"only.{next(iter(wrong))}"), mmfix.mitigate(llava, ONLY(**wrong)):
        pass
