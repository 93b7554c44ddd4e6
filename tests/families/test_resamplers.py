"""Maps replaced between tower and language model: Q-Formers (self and cross attention) and Idefics2's perceiver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.dense_plans import Plan, uniform_numbers
from support.families import FAMILIES
from support.family_oracle import Oracle
from torch import Tensor

import mmfix
from mmfix.branches import Branch, VisionEdit
from mmfix.errors import UnsupportedModel
from mmfix.methods import Plausibility
from mmfix.mixing import Mix
from mmfix_kernels import MapReplacement


@dataclass(frozen=True, kw_only=True)
class Random(mmfix.Method):
    """Only the branch is heard: a random map in one attention call of the resampler."""

    layer: int = 0

    def branches(self, family: Any) -> Sequence[Branch]:
        edit = VisionEdit(maps=MapReplacement(kind="random", seed=3), part="resampler", layers=(self.layer,))
        return [Branch(vision=edit)]

    def mix(self) -> Mix:
        return Mix(weights=(0.0, 1.0))


Random.info = Plausibility.info


def random_rows(weights: Tensor, allowed: Tensor) -> Tensor:
    """Rows and keys numbered by themselves."""
    _, heads, rows, keys = weights.shape
    places = [torch.arange(n).numpy() for n in (heads, rows, keys)]
    drawn = uniform_numbers(3, places[0][:, None, None], places[1][:, None], places[2])
    r = torch.from_numpy(drawn).double() * allowed
    return r / r.sum(-1, keepdim=True)


def module(model: Any, name: str, layer: int) -> Any:
    """The attention module that is called as number `layer`."""
    if name == "idefics2":
        return model.model.connector.perceiver_resampler.layers[layer].self_attn
    first, second = model.qformer.encoder.layer
    return [first.attention.attention, first.crossattention.attention, second.attention.attention][layer]


@pytest.mark.parametrize(
    ("name", "layer"), [("blip-2", 0), ("blip-2", 1), ("instructblip", 0), ("instructblip", 1), ("idefics2", 1)]
)
def test_a_replaced_map_of_the_resampler(name: str, layer: int) -> None:
    tiny = FAMILIES[name]
    model, inputs = tiny.build(), tiny.inputs(padded=True)
    valid = inputs["attention_mask"].bool()
    oracle = Oracle(tiny, model, inputs)
    want = oracle.forward(inputs, {module(model, name, layer): Plan(weights=random_rows)})[valid]
    with torch.no_grad():
        plain = model(**inputs).logits[valid]
        with mmfix.mitigate(model, Random(layer=layer)):
            got = model(**inputs).logits[valid]
        assert torch.equal(model(**inputs).logits[valid], plain)
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("name", "served"), [("llava-next", True), ("gemma3", True), ("qwen2.5-vl", False), ("blip-2", False)]
)
def test_the_released_weights_need_a_projector(name: str, served: bool) -> None:
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    with torch.no_grad(), mmfix.mitigate(model, "causalmm-vision", variant="release"):
        if served:
            assert model(**inputs).logits.isfinite().any()
            return
        with pytest.raises(UnsupportedModel, match="projector"):
            model(**inputs)


def test_a_model_without_one_is_refused() -> None:
    with (
        pytest.raises(UnsupportedModel, match="no Q-Former or perceiver"),
        mmfix.mitigate(FAMILIES["llava"].build(), Random()),
    ):
        pass
