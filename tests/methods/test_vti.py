"""VTI against plain hooks and an SVD, and the files that its directions come from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain, steered, vlm
from support.families import FAMILIES
from torch import Tensor

import mmfix
from mmfix import directions
from mmfix.directions import Directions
from mmfix.errors import MethodError, MmfixError
from mmfix.families import describe
from mmfix.method import Method
from mmfix.methods import VTI
from mmfix.steering import Steer

STEPS = 3


@pytest.fixture
def file(llava: Any) -> str:
    """Directions of the tiny model, with one for each of its ten patches."""
    found = steered.made(llava)
    wide = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(5))
    return str(directions.save(llava, Directions(found.text, wide)))


def turned(x: Tensor, d: Tensor, strength: float) -> Tensor:
    """The equation, in float64."""
    x, d = x.double(), d.double()
    norm = x.square().sum(-1, keepdim=True).sqrt()
    moved = x / norm + strength * d / d.square().sum(-1, keepdim=True).sqrt()
    return (moved / moved.square().sum(-1, keepdim=True).sqrt() * norm).float()


def by_hand(model: Any, text: Tensor, vision: Tensor, strengths: tuple[float, float]) -> Any:
    """A copy of the model whose MLPs' outputs are turned; rows are all taken to hold an image."""
    model = copy.deepcopy(model)
    parts = ((model.model.language_model.layers, text, strengths[0]),
             (model.model.vision_tower.encoder.layers, vision, strengths[1]))  # fmt: skip
    for layers, found, strength in parts:
        for n, layer in enumerate(layers):
            layer.mlp.register_forward_hook(lambda m, a, out, d=found[n], s=strength: turned(out, d, s))
    return model


def test_generation_equals_hooks_written_by_hand(model: Any, file: str) -> None:
    found = directions.load(describe(model), file)
    assert found.text is not None
    assert found.vision is not None
    expected = by_hand(model, found.text, found.vision, (0.2, 0.15))
    want = plain.decoded(plain.ragged(), lambda inputs, step: plain.newest(expected, inputs), STEPS)
    with mmfix.mitigate(model, VTI(alpha_text=2.0, alpha_image=1.5, directions=file)) as fix:
        plain.agrees(vlm.greedy(model, plain.ragged(), STEPS), want)
    assert fix.report().fired["vti"].fired > 0
    assert (want[:, 0] - plain.newest(model, plain.ragged())).abs().max() > 1e-2


@pytest.mark.parametrize("part", ["alpha_text", "alpha_image"])
def test_one_part_alone(llava: Any, file: str, part: str) -> None:
    found = directions.load(describe(llava), file)
    strengths = (0.3, 0.0) if part == "alpha_text" else (0.0, 0.3)
    want = plain.newest(by_hand(llava, found.text, found.vision, strengths), plain.ragged())  # type: ignore[arg-type]
    off = {"alpha_text": 0.0, "alpha_image": 0.0, part: 3.0}
    with mmfix.mitigate(llava, "vti", directions=file, **off):
        torch.testing.assert_close(plain.newest(llava, plain.ragged()), want, atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
def test_a_prompt_without_an_image_in_a_batch_is_left_alone(llava: Any, file: str) -> None:
    rows = [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(9, seed=2)]
    inputs = vlm.batch(rows, vlm.picture(1))
    with mmfix.mitigate(llava, "vti", directions=file):
        got = vlm.greedy(llava, inputs, STEPS)
    alone = vlm.greedy(llava, vlm.batch(rows[1:]), STEPS)
    for a, b in zip(got.logits, alone.logits, strict=True):
        torch.testing.assert_close(a[1], b[0], atol=1e-4, rtol=0)
    assert (got.logits[0][0] - vlm.greedy(llava, inputs, 1).logits[0][0]).abs().max() > 1e-2


def test_with_a_contrast_every_branch_is_steered(llava: Any, file: str) -> None:
    """VCD on the steered model: twice its logits, less those of the steered model on the noised picture."""
    inputs = plain.ragged()
    found = directions.load(describe(llava), file)
    noise = mmfix.method("vcd").branches(describe(llava))[0].pixels
    assert noise is not None
    hand = by_hand(llava, found.text, found.vision, (0.09, 0.09))  # type: ignore[arg-type]
    noised = {**inputs, "pixel_values": noise(inputs["pixel_values"])}
    with mmfix.mitigate(llava, [VTI(directions=file), mmfix.method("vcd", alpha=1.0, beta=1e-9)]):
        got = vlm.greedy(llava, inputs, 1).logits[0]
        direct = vlm.logits(llava, inputs)[:, -1]
    want = 2 * plain.newest(hand, inputs) - plain.newest(hand, noised)
    torch.testing.assert_close(got, want, atol=5e-4, rtol=0)
    torch.testing.assert_close(direct, got, atol=1e-4, rtol=0)  # called without generate(): the same branches


def test_states_keep_their_norm_and_dtype() -> None:
    """VTI-2, at any strength; and the release's factor for states that point away (cosine on both signs)."""
    x, d = torch.randn(2, 3, 8).bfloat16(), torch.randn(8)
    for strength in (0.09, 2.0):
        got = Steer(direction=d, strength=strength)(x)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=0)
    along, against = d[None], torch.eye(8)[:1] - d[None]
    for state in (along, against):
        cosine = float(torch.nn.functional.cosine_similarity(state, -d[None]))
        assert (cosine > 0) == (state is against)
        want = turned(state, d, 0.3 * (1 + max(0.0, cosine)))
        torch.testing.assert_close(Steer(direction=d, strength=0.3, opposing=True)(state), want)
    torch.testing.assert_close(Steer(direction=d, strength=0.5, keep_norm=False)(along), 1.5 * along)


class Nudge(Method):
    """Adds a direction to the stream after layer 1, to the newest row alone."""

    def steering(self, site: Any) -> Any:
        if site.layer != 1:
            return ()
        from mmfix_kernels import Rows

        return (Steer(direction=torch.ones(vlm.HIDDEN), strength=0.5, keep_norm=False, rows=Rows.LAST, at="layer"),)


Nudge.info = VTI.info


def test_the_stream_after_a_layer_in_the_newest_row(llava: Any) -> None:
    inputs = plain.ragged()
    other = copy.deepcopy(llava)

    def add(module: Any, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, -1] += 0.5
        return changed

    other.model.language_model.layers[1].register_forward_hook(add)
    with mmfix.mitigate(llava, Nudge()):
        got = vlm.logits(llava, inputs)
    torch.testing.assert_close(got, vlm.logits(other, inputs), atol=1e-5, rtol=0)
    assert torch.equal(got[:, :-1], vlm.logits(llava, inputs)[:, :-1])


def test_the_component_is_that_of_an_svd() -> None:
    x = torch.randn(4, 7, 50, generator=torch.Generator().manual_seed(1))
    mean = x.mean(1, keepdim=True)
    u, _, v = torch.linalg.svd(x - mean, full_matrices=False)
    for n in range(4):
        sign = u[n, :, 0][u[n, :, 0].abs().argmax()].sign()
        torch.testing.assert_close(directions.first_component(x)[n], mean[n, 0] + sign * v[n, 0], atol=1e-4, rtol=0)
    one = torch.randn(1, 50)
    assert torch.equal(directions.first_component(one), one[0])


def test_directions_are_differences_of_recorded_states(llava: Any) -> None:
    family = describe(llava)
    good, bad = (vlm.batch([vlm.tokens(3, "image", 6, seed=n)], vlm.picture(1)) for n in (1, 2))
    states = [llava(**b, output_hidden_states=True).hidden_states for b in (good, bad)]
    text, count = directions.text_direction(family, [(good, bad)])
    assert count == 1
    for layer in range(vlm.LAYERS - 1):  # the last of these is behind the final norm
        want = states[0][layer + 1][0, -1] - states[1][layer + 1][0, -1]
        torch.testing.assert_close(text[layer], want, atol=1e-5, rtol=0)
    pictures = [{"pixel_values": vlm.picture(n)} for n in range(2)]
    found = directions.vision_direction(family, pictures, trials=2, share=0.5, seed=3)
    generator = torch.Generator().manual_seed(3)
    tower, expected = llava.model.vision_tower, []
    for picture in pictures:
        hidden = [tower(picture["pixel_values"], output_hidden_states=True).hidden_states]
        for _ in range(2):
            copies = directions.masked(family, picture["pixel_values"], 0.5, generator)
            changed = (copies != picture["pixel_values"]).any(1)[0]
            assert int(changed[::8, ::8].sum()) == 4, "half of the nine patches, rounded down"
            hidden.append(tower(copies, output_hidden_states=True).hidden_states)
        expected.append(torch.stack([(b[0] + c[0]) / 2 - a[0] for a, b, c in zip(*hidden, strict=True)][1:]))
    for token in (0, 9):
        want = directions.first_component(torch.stack([e[:, token].flatten() for e in expected])).view(3, 32)
        torch.testing.assert_close(found[:, token], want, atol=1e-4, rtol=0)
    with pytest.raises(MmfixError, match="at least one"):
        directions.text_direction(family, [])
    with pytest.raises(MmfixError, match="at least one"):
        directions.vision_direction(family, [])


@pytest.mark.parametrize("name", ["qwen2-vl", "blip-2", "mllama", "pixtral", "idefics3"])
def test_other_families_are_calibrated_and_steered(name: str, tmp_path: Path) -> None:
    """Packed patches, a model around the model, cross-attention, tiles: directions are found, kept, and act."""
    tiny = FAMILIES[name]
    model, inputs = tiny.build(), tiny.inputs()
    family = describe(model)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -1] = 7
    text, _ = directions.text_direction(family, [(inputs, other)])
    vision = directions.vision_direction(family, [inputs], trials=1, share=0.5)
    assert text.shape == (family.num_layers, family.hidden_size)
    path = directions.save(model, Directions(text, vision), tmp_path)
    with torch.no_grad():
        before = model(**inputs).logits
        for off in ("alpha_image", "alpha_text"):
            with mmfix.mitigate(model, "vti", directions=str(path), **{off: 0.0}, scale=1.0) as fix:
                changed = model(**inputs).logits
            assert (changed - before).abs().max() > 1e-3, off
            assert fix.report().fired["vti"].fired > 0
        assert torch.equal(model(**inputs).logits, before)


def test_what_was_not_calibrated_is_refused(llava: Any, tmp_path: Path) -> None:
    def refused(message: str, **params: Any) -> None:
        with pytest.raises(MethodError, match=message) as caught, mmfix.mitigate(llava, "vti", **params):
            pass
        assert "\n" not in str(caught.value)

    refused("there are none; run `mmfix calibrate vti --model")
    refused("there are none in", directions=str(tmp_path))
    half = directions.save(llava, Directions(None, torch.randn(3, 1, 32)), tmp_path)
    refused("set vti.alpha_text=0", directions=str(half))
    with mmfix.mitigate(llava, "vti", directions=str(half), alpha_text=0.0):
        vlm.logits(llava, vlm.one())
    whole = half.read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    refused("not a readable file", directions=str(half))
    from safetensors.torch import save_file

    save_file({"text": torch.zeros(2)}, half)
    refused("does not hold directions", directions=str(half))
    half.write_bytes(whole.replace(b'\\"llava\\"', b'\\"other\\"'))
    refused("made with another model", directions=str(half))
    refused("give a file name", directions=3)
    refused("give a number from 0 to 10", alpha_text=11.0)


def test_the_users_cache_and_provenance(llava: Any, file: str) -> None:
    """VTI-3: without a file the directions of the cache are taken; facts come back with them."""
    facts = {"pairs": 7, "data": "own pictures", "data_sha256": "ab"}
    path = directions.save(llava, Directions(torch.ones(vlm.LAYERS, vlm.HIDDEN), None, facts))
    assert str(path) == file
    assert directions.load(describe(llava)).facts["pairs"] == 7
    with mmfix.mitigate(llava, "vti", alpha_image=0.0) as fix:
        vlm.logits(llava, vlm.one())
    assert json.loads(json.dumps(fix.report().to_dict()))["methods"][0]["params"]["scale"] == 0.1  # VTI-1
    told = fix.report().to_dict()["calibrated"]["vti"]
    assert (told.pop("values")["directions"].split(",")[0], told) == (
        path.name,
        {"data": "own pictures", "data_sha256": "ab"},
    )
    with mmfix.mitigate(llava, "vti", scale=0.0) as fix:
        assert fix.report().calibrated == {}
    with pytest.raises(MmfixError, match="choose a writable folder"):
        directions.save(llava, Directions(None, None), Path(file))


def test_directions_for_pictures_of_another_size_are_refused(llava: Any, tmp_path: Path) -> None:
    path = directions.save(llava, Directions(None, torch.randn(3, 4, 32)), tmp_path)
    with (
        mmfix.mitigate(llava, "vti", alpha_text=0.0, directions=str(path)),
        pytest.raises(MmfixError, match="for pictures of 4 patches and this one has 10"),
    ):
        vlm.logits(llava, vlm.one())
    with mmfix.mitigate(llava, "vti", alpha_text=0.0, directions=str(path)):  # a user's own look is the model's
        llava.model.get_image_features(pixel_values=vlm.picture())
