"""AvisC against plain passes: eager maps of the prompt, layers and blind tokens written out, a prompt with zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import AvisC
from mmfix.selection import Blind

STEPS = 3


def blind(maps: Tensor, share: float, deviations: float) -> tuple[list[int], list[bool]]:
    """Layers, and which tokens are blind, of one prompt: Float[layers, image tokens], straight from the definition."""
    mass = maps.sum(-1) / maps.sum()
    order = sorted(range(len(mass)), key=lambda n: -float(mass[n]))
    layers: list[int] = []
    while not layers or sum(float(mass[n]) for n in layers) < share:
        layers.append(order[len(layers)])
    mean_map = maps[layers].mean(0)
    bound = mean_map.mean() + deviations * mean_map.std()
    return sorted(layers), [bool(value >= bound) for value in mean_map]


def blind_tokens(model: Any, inputs: dict[str, Any], share: float, deviations: float) -> Tensor:
    """Bool[B, T] of the image tokens that stay, one prompt at a time, by eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    kept = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(inputs["input_ids"]):
        real = inputs["attention_mask"][row].bool()
        with torch.no_grad():
            out = eager(input_ids=ids[real][None], pixel_values=inputs["pixel_values"][row : row + 1],
                output_attentions=True)  # fmt: skip
        maps = torch.stack(out.attentions)[:, 0, :, -1].mean(1)[:, ids[real] == vlm.IMAGE_ID]
        kept[row, ids == vlm.IMAGE_ID] = torch.tensor(blind(maps, share, deviations)[1])
    return kept


def zeroed(model: Any, inputs: dict[str, Any], kept: Tensor) -> Tensor:
    """Float[B, V]: newest logits of the prompts whose other image tokens are zero vectors."""
    ids = inputs["input_ids"]
    words = model.get_input_embeddings()(ids).clone()
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    words[ids == vlm.IMAGE_ID] = torch.cat([part.reshape(-1, vlm.HIDDEN) for part in features])
    width = kept.shape[1]
    words[:, :width][(ids[:, :width] == vlm.IMAGE_ID) & ~kept] = 0.0
    with torch.no_grad():
        return model(inputs_embeds=words, attention_mask=inputs["attention_mask"]).logits[:, -1]


def oracle(model: Any, inputs: dict[str, Any], method: AvisC) -> Tensor:
    kept = blind_tokens(model, inputs, method.layer_share, method.deviations)

    def newest(grown: dict[str, Any], _: int) -> Tensor:
        factual = plain.newest(model, grown)
        return plain.cut((1 + method.alpha) * factual - method.alpha * zeroed(model, grown, kept), factual, method.beta)

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize(
    "method",
    [AvisC(beta=0.01), AvisC(layer_share=0.2, deviations=0.0, alpha=2.5, beta=0.01)],
    ids=["default", "half"],
)
def test_decoding_equals_plain_passes(model: Any, method: AvisC) -> None:
    """Layers and tokens by prompt (requirement 1): the two prompts of the batch differ in length and picture."""
    inputs = plain.ragged()
    want = oracle(model, inputs, method)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with mmfix.mitigate(model, method) as fix:
            plain.agrees(vlm.greedy(model, inputs, STEPS, **options), want)
            assert fix.report().extra_prefills == 1


def test_recorded_maps() -> None:
    """Layers and blind tokens of recorded maps, several prompts at once, against the definition."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.rand(4, 6, 12, generator=generator) ** 3
    image = torch.zeros(4, 12, dtype=torch.bool)
    for row in range(4):
        image[row, row : row + 7] = True
    for share, deviations in ((0.5, 1.0), (0.0, 0.5), (0.97, -0.5), (0.9, 9.0)):
        select = Blind(share=share, deviations=deviations)
        got, layers = select(maps, image), select.layers((maps * image[:, None]).sum(-1))
        for row in range(4):
            chosen, kept = blind(maps[row][:, image[row]], share, deviations)
            assert layers[row].nonzero().flatten().tolist() == chosen
            assert got[row][image[row]].tolist() == kept
            assert not got[row][~image[row]].any()


def test_no_blind_token_is_a_picture_of_zeros(llava: Any) -> None:
    """Requirement 2: beyond every bound, the branch has an image without content."""
    inputs = plain.ragged()
    nothing = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    with mmfix.mitigate(llava, AvisC(deviations=100.0, beta=1e-9)):
        got = vlm.greedy(llava, inputs, 1).logits[0]
    want = 2 * plain.newest(llava, inputs) - zeroed(llava, inputs, nothing)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_all_tokens_blind_is_the_clean_prompt(llava: Any) -> None:
    inputs = plain.ragged()
    with mmfix.mitigate(llava, AvisC(deviations=-100.0, beta=1e-9)) as fix:
        got = vlm.logits(llava, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], vlm.logits(llava, inputs)[real], atol=1e-4, rtol=0)
    assert fix.report().fired["avisc"].fired == 0


def test_strength_zero_is_the_cut_alone(llava: Any) -> None:
    inputs = plain.ragged()
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, AvisC(alpha=0.0, beta=1e-9)) as fix:
        assert torch.equal(vlm.logits(llava, inputs), clean)
        assert fix.rows_per_prompt == 1
        assert fix.report().extra_prefills == 0


def test_what_it_was_is_recorded() -> None:
    """Requirement 3: strength and bound stand in what results carry."""
    params = mmfix.spec(AvisC(alpha=2.5, deviations=0.99))["params"]
    assert (params["alpha"], params["deviations"]) == (2.5, 0.99)


@pytest.mark.parametrize("wrong", [{"layer_share": 1.5}, {"deviations": 1e9}, {"alpha": -2.0}, {"beta": 0.0}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"avisc.{next(iter(wrong))}"):
        AvisC(**wrong)
