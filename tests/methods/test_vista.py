"""VISTA against plain hooks, with directions from plain passes of each prompt alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import plain, vlm
from support.families import FAMILIES, acts_on
from torch import Tensor

import mmfix
from mmfix.errors import MethodError, MmfixError, MmfixWarning, UnsupportedModel
from mmfix.methods import VISTA

STEPS = 3
LATE = (2, 3)


def layer_states(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """What every layer gives, before the final norm."""
    found: list[Tensor] = []
    layers = model.model.language_model.layers
    handles = [layer.register_forward_hook(lambda m, a, out: found.append(out)) for layer in layers]
    vlm.logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def differences(model: Any, row: list[int], picture: Tensor) -> list[Tensor]:
    """Float[hidden] per layer: the last token's states with the picture, less those of the text alone."""
    whole = layer_states(model, vlm.batch([row], picture))
    text = layer_states(model, vlm.batch([[t for t in row if t != vlm.IMAGE_ID]]))
    return [a[0, -1] - b[0, -1] for a, b in zip(whole, text, strict=True)]


def turned(x: Tensor, d: Tensor, strength: float) -> Tensor:
    """The equation, in float64."""
    x, d = x.double(), d.double()
    norm, length = x.norm(dim=-1, keepdim=True), d.norm(dim=-1, keepdim=True)
    cosine = (x * -d).sum(-1, keepdim=True) / (norm * length)
    moved = x / norm + strength * (1 + cosine.clamp(min=0)) * d / length
    return (moved / moved.norm(dim=-1, keepdim=True) * norm).float()


def by_hand(model: Any, rows: list[list[int]], pictures: Tensor, strength: float, gamma: float, normed: bool) -> Any:
    """Inputs → logits [B, V] of the newest token."""
    other = copy.deepcopy(model)
    language = other.model.language_model
    found = [differences(model, row, pictures[n : n + 1]) for n, row in enumerate(rows)]
    for n, layer in enumerate(language.layers):
        d = torch.stack([one[n] for one in found])[:, None]
        layer.mlp.register_forward_hook(lambda m, a, out, d=d: turned(out, d, strength))

    def newest(inputs: dict[str, Any], step: int) -> Tensor:
        states = layer_states(other, inputs)
        late = [language.norm(states[n]) if normed else states[n] for n in LATE]
        early = torch.stack([other.lm_head(x[:, -1]) for x in late]).mean(0)
        return (1 - gamma) * other.lm_head(language.norm(states[-1][:, -1])) + gamma * early

    return newest


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("strength", "gamma"), [(0.3, 0.0), (0.0, 0.4), (0.17, 0.3)])
def test_generation_equals_hooks_written_by_hand(model: Any, strength: float, gamma: float, normed: bool) -> None:
    pictures = vlm.picture(1, 2)
    with torch.no_grad():
        expected = by_hand(model, plain.ROWS, pictures, strength, gamma, normed)
        want = plain.decoded(plain.ragged(pictures), expected, STEPS)
    with mmfix.mitigate(model, VISTA(strength=strength, gamma=gamma, late_layers=LATE, normed=normed)) as fix:
        plain.agrees(vlm.greedy(model, plain.ragged(pictures), STEPS), want)
    report = fix.report()
    assert report.fired["vista"].fired > 0
    assert report.extra_prefills == (2 if strength else 0)
    assert report.passes_per_token == 1
    assert (want[:, 0] - plain.newest(model, plain.ragged(pictures))).abs().max() > 1e-2


def test_directions_are_those_of_each_prompt_anew(llava: Any) -> None:
    """VISTA-4: of two prompts in a row the second is steered as if it were alone."""
    with mmfix.mitigate(llava, "vista", strength=0.5):
        vlm.greedy(llava, vlm.one(1), 2)
        second = vlm.greedy(llava, vlm.one(2), 2)
    with mmfix.mitigate(llava, "vista", strength=0.5) as fix:
        alone = vlm.greedy(llava, vlm.one(2), 2)
    assert all(torch.equal(a, b) for a, b in zip(second.logits, alone.logits, strict=True))
    assert fix.methods[0].layers == tuple(range(vlm.LAYERS))


def test_the_plain_passes_change_nothing_of_the_real_one(llava: Any) -> None:
    """With directions found and a strength too small to matter, the logits and caches are the plain ones."""
    inputs = plain.ragged()
    want = vlm.greedy(llava, inputs, STEPS)
    with mmfix.mitigate(llava, VISTA(strength=1e-9, gamma=0.0), telemetry=True) as fix:
        got = vlm.greedy(llava, inputs, STEPS)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert [layer.calls for layer in fix.report().layers] == [STEPS] * vlm.LAYERS
    assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()


def test_with_a_contrast_branches_are_steered_alike(llava: Any) -> None:
    """VCD on the steered model: both branches take the directions of the factual prompt."""
    inputs = plain.ragged()
    noise = mmfix.method("vcd").branches(mmfix.describe(llava))[0].pixels
    assert noise is not None
    with torch.no_grad():
        steered = by_hand(llava, plain.ROWS, inputs["pixel_values"], 0.2, 0.0, False)
        noised = {**inputs, "pixel_values": noise(inputs["pixel_values"])}
        want = 2 * steered(inputs, 0) - steered(noised, 0)
    with mmfix.mitigate(llava, [VISTA(strength=0.2, gamma=0.0), mmfix.method("vcd", alpha=1.0, beta=1e-9)]):
        got = vlm.greedy(llava, inputs, 1).logits[0]
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_an_image_in_a_later_turn_and_layers_that_are_not_there(llava: Any) -> None:
    first = vlm.batch([vlm.tokens(4, seed=1)])
    with mmfix.mitigate(llava, "vista"):
        with pytest.warns(MmfixWarning, match="no image"):
            out = vlm.greedy(llava, first, 2, use_cache=True)
        ids = torch.cat([out.sequences, torch.tensor([vlm.tokens("image", 3)[1:]])], 1)
        later = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": vlm.picture()}
        with pytest.raises(MmfixError, match="later turn"):
            vlm.greedy(llava, later, 2, past_key_values=out.past_key_values)
    for params, message in (
        ({"late_layers": (9,)}, "layers from -5 to 4"),
        ({"layers": (9,)}, "layers from -5 to 4"),
        ({"gamma": 1.5}, "from 0 to 1"),
        ({"strength": -1.0}, "from 0 to 10"),
    ):
        with pytest.raises(MethodError, match=message), mmfix.mitigate(llava, "vista", **params):
            pass


@pytest.mark.parametrize("name", ["qwen2-vl", "blip-2", "paligemma", "gemma3", "llava-next", "aya-vision"])
def test_other_families(name: str) -> None:
    """It acts, batches agree with single prompts, and a model whose image is not in the prompt is refused."""
    acts_on(name, "vista", strength=0.5)


def test_an_image_outside_the_prompt_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="cross-attention"), mmfix.mitigate(FAMILIES["mllama"].build(), "vista"):
        pass
