"""MemVR against hooks written token by token on each prompt alone, without a cache."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support import plain, vlm
from support.families import FAMILIES, acts_on
from torch import Tensor

import mmfix
from mmfix.errors import ConflictError, MethodError, UnsupportedModel
from mmfix.methods import VISTA, MemVR

STEPS = 4
WINDOW = (0, 1, 2)


def uncertainty(model: Any, state: Tensor) -> float:
    """Of the next token, from one layer's state [hidden]."""
    scores = model.lm_head(model.model.language_model.norm(state)).double()
    p = scores.softmax(-1).sort(descending=True).values[:10]
    p = p / p.sum()
    return float(-(p * p.log()).sum() / math.log(10))


class ByHand:
    """A copy of a model that looks again; counts how many tokens did, by layer."""

    def __init__(self, model: Any, row: list[int], picture: Tensor, ratio: float, threshold: float, act: bool) -> None:
        self.model, self.prompt, self.looks = copy.deepcopy(model), len(row), [0] * vlm.LAYERS
        image = torch.cat(list(model.model.get_image_features(pixel_values=picture).pooler_output)).double()
        layers = self.model.model.language_model.layers
        self.now: list[bool] = []
        self.spent: list[bool] = []

        def decide(number: int, states: Tensor) -> None:
            hot = [uncertainty(model, state) > threshold for state in states[0]]
            hot[: self.prompt] = [hot[self.prompt - 1]] * self.prompt
            spent = [False] * len(hot) if number == WINDOW[0] else self.spent
            self.now = [a and not b for a, b in zip(hot, spent, strict=True)]
            self.spent = [a or b for a, b in zip(hot, spent, strict=True)]

        def look(number: int, x: Tensor, out: Tensor) -> Tensor:
            changed = out.clone()
            for n, wanted in enumerate(self.now):
                if wanted:
                    match = image @ x[0, n].double()
                    seen = (torch.nn.functional.silu(match) if act else match) @ image
                    own = out[0, n].double()
                    seen *= own.abs().mean() / seen.abs().mean()
                    changed[0, n] = ((1 - ratio) * own + ratio * seen).float()
                    self.looks[number] += 1
            return changed

        for number in WINDOW:
            layers[number].register_forward_hook(lambda m, a, out, n=number: decide(n, out))
            layers[number + 1].mlp.register_forward_hook(lambda m, a, out, n=number + 1: look(n, a[0], out))


@pytest.mark.parametrize("act", [False, True])
def test_generation_equals_hooks_written_by_hand(model: Any, act: bool) -> None:
    """In a left-padded batch; the threshold lies where some tokens look at once, some later and some never."""
    picture, ratio = vlm.picture(1, 2), 0.5
    with torch.no_grad():
        found = [ByHand(model, r, picture[n : n + 1], ratio, 0.955, act) for n, r in enumerate(plain.ROWS)]
        wants = []
        for n, (row, one) in enumerate(zip(plain.ROWS, found, strict=True)):
            inputs = vlm.batch([row], picture[n : n + 1])
            wants.append(plain.decoded(inputs, lambda x, step, one=one: plain.newest(one.model, x), STEPS))
    want = torch.cat(wants)
    looks = [sum(one.looks[n] for one in found) for n in range(vlm.LAYERS)]
    assert sum(count > 0 for count in looks) >= 2, "one layer alone decides: the test shows little"
    with mmfix.mitigate(model, MemVR(ratio=ratio, threshold=0.955, layers=WINDOW, activation=act)) as fix:
        plain.agrees(vlm.greedy(model, plain.ragged(picture), STEPS), want)
        plain.agrees(vlm.greedy(model, plain.ragged(picture), STEPS, use_cache=False), want)
    assert 0 < fix.report().fired["memvr"].share < 1
    assert (want[:, 0] - plain.newest(model, plain.ragged(picture))).abs().max() > 1e-2


def test_never_uncertain_is_the_identity_and_says_so(llava: Any) -> None:
    """MEMVR-3: a threshold that nothing exceeds leaves every bit, and the report tells that it never fired."""
    want = vlm.greedy(llava, plain.ragged(), STEPS)
    with mmfix.mitigate(llava, "memvr", threshold=1.0, layers=WINDOW) as fix:
        got = vlm.greedy(llava, plain.ragged(), STEPS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    report = fix.report()
    assert (report.fired["memvr"].fired, report.fired["memvr"].considered > 0) == (0, True)
    assert any("never fired" in note for note in report.notes)


def test_always_uncertain_looks_once_after_the_first_layer_of_the_window(llava: Any) -> None:
    """MEMVR-2: uncertainty is read in the window alone, and each token looks once in a pass."""
    inputs = vlm.one()
    length, calls = inputs["input_ids"].shape[1], []
    handle = llava.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with mmfix.mitigate(llava, MemVR(threshold=0.0, layers=(1, 3))) as fix:
        vlm.greedy(llava, inputs, STEPS)
    handle.remove()
    assert len(calls) == STEPS, "the head as a module is the model's own business"
    fired = [one.fired for one in fix.report().fired_by_layer["memvr"]]
    assert fired == [0, 0, length + STEPS - 1, 0, 0]


def test_no_weight_is_touched_and_generations_do_not_interact(llava: Any) -> None:
    """MEMVR-1: the same prompt gives the same before and after another, and weights are the same objects, unwritten."""
    before = {name: (p.data_ptr(), p._version, p.clone()) for name, p in llava.named_parameters()}
    with mmfix.mitigate(llava, MemVR(threshold=0.0, ratio=0.9, layers=WINDOW)):
        first, _, again = (vlm.greedy(llava, vlm.one(seed), STEPS) for seed in (1, 2, 1))
        for name, weight in llava.named_parameters():
            assert (weight.data_ptr(), weight._version) == before[name][:2]
            assert torch.equal(weight, before[name][2])
    assert all(torch.equal(a, b) for a, b in zip(first.logits, again.logits, strict=True))


def test_an_image_in_a_further_turn_is_remembered_too(llava: Any) -> None:
    """Two pictures, one per turn: the second turn's tokens look at both, as in the whole conversation."""
    ids = vlm.tokens(3, "image", 4, "image", 5, seed=3)
    pictures, cut = vlm.picture(1, 2), 4 + vlm.IMAGE_TOKENS + 3
    options = {"threshold": 0.0, "ratio": 0.9, "layers": (0,)}
    with torch.no_grad(), mmfix.mitigate(llava, MemVR(**options)) as fix:
        first = llava(**vlm.batch([ids[:cut]], pictures[:1]), use_cache=True)
        step = llava(input_ids=torch.tensor([[ids[cut]]]), past_key_values=first.past_key_values)
        rest = torch.tensor([ids[cut + 1 :]])
        mask = torch.ones(1, len(ids))
        llava(input_ids=rest, pixel_values=pictures[1:], attention_mask=mask, past_key_values=step.past_key_values)
        memory = fix._session.steering.retracing[0].memory
    features = torch.cat(list(llava.model.get_image_features(pixel_values=pictures).pooler_output))
    torch.testing.assert_close(memory[0], features, atol=1e-5, rtol=0)


def test_with_other_methods(llava: Any) -> None:
    """A head read inside a pass leaves a blend of layers alone; layers cannot be read out and blended at once."""
    inputs = plain.ragged()
    late = VISTA(strength=0.0, gamma=0.4, late_layers=(1, 3))
    with mmfix.mitigate(llava, late):
        want = vlm.greedy(llava, inputs, STEPS)
    with mmfix.mitigate(llava, [late, MemVR(threshold=1.0, layers=WINDOW)]):
        got = vlm.greedy(llava, inputs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    with pytest.raises(ConflictError, match=r"'dola' reads layers out.*'vista'"), mmfix.mitigate(llava, [late, "dola"]):
        pass


def test_branches_of_a_contrast_remember_their_own_picture(llava: Any) -> None:
    """VCD on the model that looks again: the noised row's memory is the noised picture."""
    row, picture = plain.ROWS[0], vlm.picture(1)
    noise = mmfix.method("vcd").branches(mmfix.describe(llava))[0].pixels
    assert noise is not None
    with torch.no_grad():
        rows = []
        for pixels in (picture, noise(picture)):
            hand = ByHand(llava, row, pixels, 0.5, 0.0, False)
            rows.append(plain.newest(hand.model, vlm.batch([row], pixels)))
    again = MemVR(ratio=0.5, threshold=0.0, layers=WINDOW)
    with mmfix.mitigate(llava, [again, mmfix.method("vcd", alpha=1.0, beta=1e-9)]):
        got = vlm.greedy(llava, vlm.batch([row], picture), 1).logits[0]
    torch.testing.assert_close(got, 2 * rows[0] - rows[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ratio": 1.1}, "from 0 to 1"),
        ({"threshold": -0.1}, "from 0 to 1"),
        ({"layers": (9,)}, "layers from -5 to 4"),
        ({"layers": (-1,)}, "no layer follows the last"),
    ],
)
def test_bad_parameters(llava: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message), mmfix.mitigate(llava, "memvr", **params):
        pass


@pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma3", "idefics3", "instructblip", "pixtral"])
def test_other_families(name: str) -> None:
    """It acts, and batches agree with single prompts."""
    acts_on(name, "memvr", threshold=0.0, ratio=0.9, layers=(0,))


@pytest.mark.parametrize(("name", "message"), [("mllama", "cross-attention"), ("blip-2", "is no module")])
def test_models_that_it_cannot_serve(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message), mmfix.mitigate(FAMILIES[name].build(), "memvr"):
        pass
