"""PAINT against dense attention with scores raised by hand, and token classes from the tower's own eager maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError, UnsupportedModel
from mmfix.methods import PAINT
from mmfix.methods.paint import classes

STEPS = 3


def tower_maps(model: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the class token to the patches, summed over heads, in the first and the last layer but one."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        found = tower(pictures, output_attentions=True).attentions
    return found[0][:, :, 0, 1:].sum(1), found[-2][:, :, 0, 1:].sum(1)


def chosen(first: list[float], late: list[float], share: float) -> tuple[set[int], set[int]]:
    """Top and Bottom of one picture, by sorting."""
    order = sorted(range(len(first)), key=lambda n: -first[n])
    line = sorted(late)

    def quantile(q: float) -> float:
        at = q * (len(line) - 1)
        low = int(at)
        return line[low] + (at - low) * (line[min(low + 1, len(line) - 1)] - line[low])

    limit = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25))
    m = sum(value > limit for value in late)
    bottom = set(sorted(range(len(late)), key=lambda n: -late[n])[:m])
    return set(order[: int(len(first) * share)]) - bottom, bottom


def raised(model: Any, inputs: plain.Inputs, method: PAINT) -> Any:
    """Score edits of one grown input for dense attention, from the prompt's last row on."""
    first, late = tower_maps(model, inputs["pixel_values"])
    gains = torch.zeros(inputs["input_ids"].shape, dtype=torch.float64)
    picture = 0
    for row in range(len(gains)):
        places = plain.image(inputs)[row].nonzero()[:, 0].tolist()
        for start in range(0, len(places), vlm.IMAGE_TOKENS):
            top, bottom = chosen(first[picture].tolist(), late[picture].tolist(), method.share)
            for patch in top:
                gains[row, places[start + patch]] = method.alpha
            for patch in bottom:
                gains[row, places[start + patch]] = method.beta
            picture += 1

    def edit(prompt: int) -> Any:
        def scores(found: Tensor, allowed: Tensor, layer: int) -> Tensor:
            if layer < 2:
                return found
            found = found.clone()
            for row in range(prompt - 1, found.shape[2]):
                found[:, :, row] += gains[:, None, : found.shape[3]] * found[:, :, row].abs()
            return found

        return scores

    return edit


def outliers(model: Any) -> Any:
    """A model whose tower's class token looks at one patch of every picture much more than at the others."""
    model = copy.deepcopy(model)
    tower = model.model.vision_tower
    layer = tower.encoder.layers[1] if hasattr(tower, "encoder") else tower.vision_model.encoder.layers[1]
    with torch.no_grad():
        layer.self_attn.q_proj.weight *= 4.0
        layer.self_attn.k_proj.weight *= 4.0
    return model


@pytest.mark.parametrize("options", [{}, {"alpha": 1.4, "beta": 0.1, "share": 0.5}], ids=["default", "strong"])
def test_decoding_equals_dense_attention(model: Any, options: dict[str, Any]) -> None:
    """Each prompt has the classes of its own picture; the raise acts at the prompt and at every step (1, 2 and 4)."""
    method = PAINT(**options)
    model = outliers(model)
    inputs = plain.ragged()
    prompt = inputs["input_ids"].shape[1]
    first, late = tower_maps(model, inputs["pixel_values"])
    sets = [chosen(a.tolist(), b.tolist(), method.share) for a, b in zip(first, late, strict=True)]
    assert sets[0] != sets[1], "both pictures have the same classes: the test shows nothing"
    assert any(bottom for _, bottom in sets), "no outliers: the test shows nothing"

    def newest(grown: plain.Inputs, _: int) -> Tensor:
        return plain.dense(model, grown, scores=raised(model, grown, method)(prompt))[:, -1]

    want = plain.decoded(inputs, newest, STEPS)
    with mmfix.mitigate(model, method):
        out = vlm.greedy(model, inputs, STEPS)
        direct = vlm.logits(model, inputs)[:, -1]
        plain.agrees(vlm.greedy(model, inputs, STEPS), want)
    plain.agrees(out, want)
    torch.testing.assert_close(direct, want[:, 0].float(), atol=2e-4, rtol=0)


def test_guidance_raises_the_prompt_and_never_the_text(model: Any) -> None:
    """Requirements 1 and 5."""
    method = PAINT(gamma=1.5, alpha=0.9)
    inputs = plain.ragged()
    prompt = inputs["input_ids"].shape[1]

    def newest(grown: plain.Inputs, _: int) -> Tensor:
        c = plain.dense(model, grown, scores=raised(model, grown, method)(prompt))[:, -1].log_softmax(-1)
        u = vlm.logits(model, plain.text_only(grown))[:, -1].log_softmax(-1)
        return plain.cut(1.5 * (c - u) + u, c, 0.1)

    want = plain.decoded(inputs, newest, STEPS)
    with mmfix.mitigate(model, method):
        plain.agrees(vlm.greedy(model, inputs, STEPS), want)


def test_the_release_raises_generated_tokens_alone(model: Any) -> None:
    method = PAINT(gamma=1.5, alpha=0.9, variant="release")
    inputs = plain.ragged()
    prompt = inputs["input_ids"].shape[1]

    def newest(grown: plain.Inputs, _: int) -> Tensor:
        c = plain.dense(model, grown, scores=raised(model, grown, method)(prompt + 1))[:, -1].log_softmax(-1)
        u = vlm.logits(model, plain.text_only(grown))[:, -1].log_softmax(-1)
        return plain.cut(1.5 * (c - u) + u, c, 0.1)

    want = plain.decoded(inputs, newest, STEPS)
    with mmfix.mitigate(model, method):
        plain.agrees(vlm.greedy(model, inputs, STEPS), want)
        fixed = vlm.greedy(model, inputs, STEPS, cache_implementation="static", disable_compile=True)
    plain.agrees(fixed, want)


def test_the_release_without_guidance_is_the_plain_model(llava: Any) -> None:
    """Requirement 2: its flag is then never cleared. Ours acts."""
    inputs = plain.ragged()
    before = vlm.greedy(llava, inputs, STEPS)
    with mmfix.mitigate(llava, PAINT(variant="release")) as fix:
        after = vlm.greedy(llava, inputs, STEPS)
        assert fix.report().fired["paint"].fired == 0
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    with pytest.raises(MethodError, match="choose 'paper' or 'release'"):
        PAINT(variant="both")  # type: ignore[arg-type]


def test_two_pictures_in_a_prompt_and_several_sequences(llava: Any) -> None:
    """Classes go with their picture, whatever repeats the prompts."""
    ids = vlm.tokens(2, "image", 3, "image", 5)
    inputs = vlm.batch([ids, plain.ROWS[0]], vlm.picture(7, 3))
    prompt = inputs["input_ids"].shape[1]
    want = plain.dense(llava, inputs, scores=raised(llava, inputs, PAINT())(prompt))[:, -1]
    with mmfix.mitigate(llava, "paint"):
        out = vlm.greedy(llava, inputs, 1, num_beams=3, num_return_sequences=3)
        turned = vlm.greedy(llava, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}, 1)
    got = out.logits[0].reshape(2, 3, -1)
    for beam in range(3):
        torch.testing.assert_close(got[:, beam], want.float(), atol=2e-4, rtol=0)
    assert (turned.logits[0] - want).abs().max() > 1e-2


def test_recorded_maps() -> None:
    """A quarter of the first map; outliers of the second leave it; no outliers, and nothing but outliers."""
    first = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]] * 3)
    late = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 9.0], [9, 9.5, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1], [1.0] * 8])
    top, bottom = classes(first, late, 0.25)
    assert top.nonzero().tolist() == [[0, 0], [0, 1], [2, 0], [2, 1]]
    assert bottom[0].nonzero().flatten().tolist() == [4, 7]
    assert bottom[2].sum() == 0
    for row in range(3):
        want = chosen(first[row].tolist(), late[row].tolist(), 0.25)
        assert (set(top[row].nonzero().flatten().tolist()), set(bottom[row].nonzero().flatten().tolist())) == want


def test_a_tower_without_a_class_token_is_refused() -> None:
    from support.families import FAMILIES

    for name in ("paligemma", "qwen2.5-vl"):
        model = FAMILIES[name].build()
        with pytest.raises(UnsupportedModel, match="class token"), mmfix.mitigate(model, "paint"):
            pass


def test_beside_a_contrast_that_changes_the_tower(llava: Any) -> None:
    """Classes come from the plain look at the picture, also where another look replaces the tower's maps."""
    inputs = plain.ragged()
    seen = []
    for methods in ([PAINT()], [PAINT(), mmfix.method("causalmm-vision")], [PAINT(), mmfix.method("vcd")]):
        with mmfix.mitigate(llava, methods) as fix:
            out = vlm.greedy(llava, inputs, 2)
            rows = fix.rows_per_prompt
            seen.append(fix._session.watch.laid[0][::rows].clone())
            assert fix.report().fired["paint"].fired > 0
        assert all(step.isfinite().any(-1).all() for step in out.logits)
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0])


def test_nothing_of_it_stays(llava: Any) -> None:
    before = vlm.logits(llava, vlm.one())
    with mmfix.mitigate(llava, "paint"):
        vlm.logits(llava, vlm.one())
    assert torch.equal(vlm.logits(llava, vlm.one()), before)
    assert llava.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"beta": 11}, {"share": 1.1}, {"gamma": -1}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=rf"paint\.{next(iter(wrong))}"):
        PAINT(**wrong)
