"""Sinks as the diagnostics show them are the sinks that VAR acts on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import plain, vlm

import mmfix
from mmfix import sinks
from mmfix.methods import VAR

DIMS, TAU = (3, 7), 1.6


def test_they_are_those_of_var_layer_by_layer(model: Any) -> None:
    inputs = plain.ragged()
    found = sinks.observe(mmfix.describe(model), inputs, DIMS, TAU)
    with mmfix.mitigate(model, VAR(sink_dims=DIMS, tau=TAU, first_layer=0, skip_last_layer=False, move=1e-9)) as fix:
        vlm.logits(model, inputs)
        own = [state.sinks.clone() for state in fix._session.layers]
    count = 0
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        for layer, one in enumerate(found[row].layers):
            assert torch.equal(one.sink, own[layer][row] & real)
            count += int(one.sink.sum())
        text, image = found[row].counts()
        assert sum(text) + sum(image) == sum(int(one.sink.sum()) for one in found[row].layers)
        assert text[1] == int((one_layer := found[row].layers[1].sink)[~plain.image(inputs)[row]].sum())
        assert one_layer.shape == real.shape
    assert count > 10, "hardly a sink: the test shows nothing"


def test_dimensions_and_received_attention() -> None:
    """A token that is massive in one dimension shows it; what it receives is the mean of the eager map's column."""
    model = copy.deepcopy(vlm.build("llava"))
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 11] = 40.0
        model.get_input_embeddings().weight[1, 29] = -30.0
    inputs = plain.ragged()
    found = sinks.observe(mmfix.describe(model), inputs, (11,), 5.0)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(**inputs, output_attentions=True, output_hidden_states=True)
    for row, one in enumerate(found):
        start = int(inputs["attention_mask"][row].argmax())
        first = one.layers[0]
        assert first.sink.nonzero().tolist() == [[start]]
        assert first.dims == (11, 29)
        x = out.hidden_states[0][row, start]
        assert first.sizes[0] == pytest.approx(float(x[11].abs() / x.square().mean().sqrt()), rel=1e-4)
        column = out.attentions[2][row, :, start:, start].mean()
        assert float(one.layers[2].received[start]) == pytest.approx(float(column), rel=1e-4)
        assert float(first.phi[:start].sum()) == 0.0
    rows = sinks.described(found[0], [str(n) for n in range(inputs["input_ids"].shape[1])])
    start = int(inputs["attention_mask"][0].argmax())
    (only,) = rows[0]["sinks"]
    assert (only["position"], only["kind"], only["image_token"], only["token"]) == (start, "text", None, str(start))
