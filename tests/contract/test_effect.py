"""Every registered method changes what it should, and nothing where it should not."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from support import vlm
from support.cases import CASES, HEAD_SCALES, NAMES, Case, active

import mmfix
from mmfix.errors import MmfixWarning


@pytest.mark.parametrize("name", NAMES)
def test_it_changes_the_logits_and_says_so(model: Any, name: str) -> None:
    for seed in range(3):
        inputs = vlm.one(seed)
        plain = vlm.greedy(model, inputs)
        with mmfix.mitigate(model, active(name)) as fix:
            out = vlm.greedy(model, inputs)
        assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-2, "no effect at the prompt"
        fired = fix.report().fired[name]
        assert 0 < fired.fired <= fired.considered
        assert not any("never fired" in note for note in fix.report().notes)


@pytest.mark.parametrize("name", NAMES)
def test_it_acts_on_generated_tokens_too(model: Any, name: str) -> None:
    if mmfix.methods()[name].kind == "mask":
        pytest.skip("a mask opens pairs of the prompt alone")
    inputs, token = vlm.one(), torch.tensor([[17]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    with torch.no_grad(), mmfix.mitigate(model, active(name)) as fix:
        out = model(**inputs, use_cache=True)
        before = fix.report().fired[name]
        model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)
        after = fix.report().fired[name]
    assert after.considered > before.considered
    assert after.fired > before.fired


@pytest.mark.parametrize("name", NAMES)
def test_text_before_and_inside_the_image_is_never_changed_by_its_future(model: Any, name: str) -> None:
    """Causality: the logits of a prefix do not depend on the tokens that follow, when the spans are the same."""
    if mmfix.methods()[name].kind == "mask":
        pytest.skip("opening the future is what a mask method does")
    if mmfix.methods()[name].kind == "prompt":
        pytest.skip("the question stands before the picture")
    if name in HEAD_SCALES or CASES.get(name, Case()).ahead:
        pytest.skip("heads or tokens are chosen at the last position, for all positions, as the paper says")
    first, second = vlm.tokens(3, "image", 6, seed=1), vlm.tokens(3, "image", 6, seed=1)
    second[-2:] = [11, 12]
    with mmfix.mitigate(model, active(name)):
        a, b = (vlm.logits(model, vlm.batch([ids], vlm.picture())) for ids in (first, second))
    torch.testing.assert_close(a[:, :-2], b[:, :-2], atol=1e-5, rtol=0)
    assert (a[:, -1] - b[:, -1]).abs().max() > 1e-2


def same(a: Any, b: Any) -> bool:
    """Whether two generations agree bit for bit."""
    return torch.equal(a.sequences, b.sequences) and all(
        torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True)
    )


def nothing(name: str | None) -> Any:
    """A method at strength zero."""
    if name is None:
        return None
    identity = CASES.get(name, Case()).identity
    if identity is None:
        pytest.skip(f"{name} has no strength of zero")
    return mmfix.method(name, **identity)


@pytest.mark.parametrize("name", [*NAMES, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_vanilla_bit_for_bit(model: Any, name: str | None, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    inputs = {**vlm.one(), "pixel_values": vlm.picture().to(dtype)}
    plain = vlm.greedy(model, inputs)
    with mmfix.mitigate(model, nothing(name)) as fix:
        assert same(vlm.greedy(model, inputs), plain)
    assert all(fired.fired == 0 for fired in fix.report().fired.values())


@pytest.mark.parametrize("name", [*NAMES, None])
@pytest.mark.parametrize(
    "kind",
    [
        "llava",
        "llava-gqa",
    ],
)
def test_strength_zero_is_vanilla_with_padding(kind: str, name: str | None, built: Any) -> None:
    model = built(kind)
    inputs = vlm.batch([vlm.tokens(3, "image", 6), vlm.tokens(2, "image", 2, seed=1)], vlm.picture(0, 2))
    plain = vlm.greedy(model, inputs)
    with mmfix.mitigate(model, nothing(name)):
        assert same(vlm.greedy(model, inputs), plain)


@pytest.mark.parametrize("name", NAMES)
def test_without_an_image_it_does_nothing_and_warns_once(model: Any, name: str) -> None:
    inputs = vlm.batch([vlm.tokens(12)])
    plain = vlm.greedy(model, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mmfix.mitigate(model, active(name)) as fix:
            out = vlm.greedy(model, inputs)
            vlm.greedy(model, inputs)
    assert [w.category for w in caught].count(MmfixWarning) == 1
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.logits[0], plain.logits[0])
    for a, b in zip(out.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert fix.report().fired[name].fired == 0
    assert any("no image" in note for note in fix.report().notes)
    assert any("never fired" in note for note in fix.report().notes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
def test_without_an_image_decoding_is_bitwise_plain(model: Any, name: str) -> None:
    inputs = vlm.batch([vlm.tokens(12)])
    plain = vlm.greedy(model, inputs)
    with mmfix.mitigate(model, active(name)):
        assert same(vlm.greedy(model, inputs), plain)


@pytest.mark.parametrize("name", NAMES)
def test_two_images_in_one_prompt(model: Any, name: str) -> None:
    inputs = vlm.batch([vlm.tokens(2, "image", 3, "image", 5)], vlm.picture(0, 2))
    plain = vlm.greedy(model, inputs)
    with mmfix.mitigate(model, active(name), telemetry=True) as fix:
        out = vlm.greedy(model, inputs)
        labels = fix._session.spans.labels[0]
        assert int(fix.image_tokens[0].sum()) == 2 * vlm.IMAGE_TOKENS
    assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-2
    assert labels[:3].tolist() == [mmfix.engine.reports.Label.SYSTEM] * 3
    if CASES.get(name, Case()).longer_prompt:
        return  # everything lies elsewhere
    between = labels[3 + vlm.IMAGE_TOKENS : 6 + vlm.IMAGE_TOKENS]
    assert set(between.tolist()) <= {mmfix.engine.reports.Label.TEXT}


@pytest.mark.parametrize("name", NAMES)
def test_backends_agree(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = vlm.batch([vlm.tokens(3, "image", 6), vlm.tokens(2, "image", 2, seed=1)], vlm.picture(0, 2))
    found = {}
    for backend in ("sdpa", "reference"):
        monkeypatch.setenv("MMFIX_BACKEND", backend)
        with mmfix.mitigate(model, active(name), telemetry=True) as fix:
            found[backend] = (vlm.greedy(model, inputs).logits, fix.report())
        assert {layer.backend for layer in fix.report().layers} == {backend}
    for a, b in zip(*(logits for logits, _ in found.values()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert found["sdpa"][1].fired == found["reference"][1].fired


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_bfloat16(model: Any, name: str) -> None:
    model = copy.deepcopy(model).to(torch.bfloat16)
    inputs = {**vlm.one(), "pixel_values": vlm.picture().bfloat16()}
    plain = vlm.logits(model, inputs)
    with mmfix.mitigate(model, active(name), telemetry=True) as fix:
        got = vlm.logits(model, inputs)
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
    assert (got - plain)[0, -1].abs().max() > 0.05
    masses = fix.masses()
    assert masses is not None
    assert masses["image"].dtype == torch.float32


@pytest.mark.parametrize("name", [*NAMES, None])
def test_telemetry(model: Any, name: str | None) -> None:
    """Masses sum to one, per row, at the prompt and at every step; the report is JSON; outputs stay what they were."""
    method = None if name is None else active(name)
    inputs = vlm.batch([vlm.tokens(3, "image", 6), vlm.tokens(2, "image", 2, seed=1)], vlm.picture(0, 2))
    with mmfix.mitigate(model, method) as quiet:
        without = vlm.greedy(model, inputs)
    assert quiet.masses() is None
    seen = []
    with mmfix.mitigate(model, method, telemetry=True) as fix:
        assert fix.masses() is None
        handle = model.register_forward_hook(lambda *_: seen.append(fix.masses()))
        out = vlm.greedy(model, inputs)
        handle.remove()
    for a, b in zip(out.logits, without.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert len(seen) == 6
    for masses in seen:
        torch.testing.assert_close(masses["image"] + masses["text"], torch.ones(2), atol=1e-5, rtol=0)
        assert all((value >= 0).all() for value in masses.values())
        parts = masses["text_sink"] + masses["system"] + masses["generated"]
        assert (parts <= masses["text"] + 1e-5).all()
    assert (seen[0]["generated"] == 0).all()
    assert (seen[-1]["generated"] > 0).all()
    report = json.loads(json.dumps(fix.report().to_dict()))
    assert report["prompts"] == 2
    assert [layer["calls"] for layer in report["layers"]] == [6] * vlm.LAYERS
    if name is not None:
        assert mmfix.from_spec(report["methods"][0]) == fix.methods[0]


def test_plain_masses_are_those_of_the_eager_maps(llava: Any) -> None:
    ids = vlm.tokens(3, "image", 6)
    inputs = vlm.batch([ids], vlm.picture())
    eager = copy.deepcopy(llava)
    eager.set_attn_implementation("eager")
    maps = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, :, :, -1].mean((0, 2))  # [1, T]
    with mmfix.mitigate(llava, None, telemetry=True) as fix:
        vlm.logits(llava, inputs)
    masses = fix.masses()
    assert masses is not None
    image = torch.tensor(ids) == vlm.IMAGE_ID
    torch.testing.assert_close(masses["image"], maps[:, image].sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(masses["system"], maps[:, :4].sum(-1), atol=1e-5, rtol=0)
