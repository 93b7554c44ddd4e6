"""VCD against two plain passes per token: the picture, and the picture with noise added by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import VCD
from mmfix.pictures import DiffusionNoise

STEPS = 3


def noisy(pixels: Tensor, step: int, seed: int) -> Tensor:
    """v' from the schedule written out, one beta at a time, and the recorded noise."""
    abar = 1.0
    for i in range(step + 1):
        abar *= 1 - ((5e-3 - 1e-5) / (1 + math.exp(6 - 12 * i / 999)) + 1e-5)
    noise = DiffusionNoise(seed=seed).noise(pixels.shape)
    return math.sqrt(abar) * pixels + math.sqrt(1 - abar) * noise


def oracle(model: Any, inputs: dict[str, Any], alpha: float, beta: float, step: int, seed: int) -> Tensor:
    other = noisy(inputs["pixel_values"], step, seed)

    def newest(grown: dict[str, Any], _: int) -> Tensor:
        factual = plain.newest(model, grown)
        changed = plain.newest(model, {**grown, "pixel_values": other})
        return plain.cut((1 + alpha) * factual - alpha * changed, factual, beta)

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize("alpha", [1.0, 0.5, -0.4])
def test_decoding_equals_two_plain_passes_per_token(llava: Any, alpha: float) -> None:
    """Also with a weight below zero: what the cut masks stays masked (requirements 5 and 7: noise after the
    normalisation, the cut in float32)."""
    inputs = plain.ragged()
    with mmfix.mitigate(llava, VCD(alpha=alpha, step=700, seed=5, beta=0.05)):
        out = vlm.greedy(llava, inputs, STEPS)
    plain.agrees(out, oracle(llava, inputs, alpha, 0.05, 700, 5))


def test_the_noisy_picture_at_the_default_step() -> None:
    """The check values: signal 0.8630 and noise 0.5052 at step 500, 0.2850 and 0.9585 at step 999."""
    pixels = vlm.picture(3, 1)
    for step, signal, noise in ((500, 0.8630, 0.5052), (999, 0.2850, 0.9585)):
        got = DiffusionNoise(step=step, seed=2)(pixels)
        drawn = DiffusionNoise(seed=2).noise(pixels.shape)
        torch.testing.assert_close(got, signal * pixels + noise * drawn, atol=5e-4, rtol=0)
        torch.testing.assert_close(got, noisy(pixels, step, 2), atol=1e-5, rtol=0)
    assert VCD().branches(None)[0].pixels == DiffusionNoise(step=500, seed=0)  # type: ignore[arg-type]


def test_the_noise_is_standard_normal() -> None:
    """By its quantiles, its moments and the lack of correlation between neighbours, channels and seeds."""
    noise = DiffusionNoise(seed=1).noise((3, 3, 128, 128))
    wanted = torch.distributions.Normal(0.0, 1.0)
    for share in (0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999):
        assert abs(float((noise < wanted.icdf(torch.tensor(share))).float().mean()) - share) < 0.01 * max(share, 0.1)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    others = (noise.roll(1, -1), noise.roll(1, -2), noise.roll(1, 0), DiffusionNoise(seed=2).noise(noise.shape))
    assert all(abs(float((noise * other).mean())) < 0.02 for other in others)


def test_the_noise_of_a_picture_does_not_depend_on_its_batch() -> None:
    """Another picture, a larger canvas, padding pictures, and packing in one row of patches."""
    change = DiffusionNoise(step=800, seed=4)
    alone = change(torch.ones(1, 3, 6, 8))
    canvas = torch.ones(2, 5, 3, 9, 10)
    canvas[1, 3:] = 0  # pictures that only fill up the batch
    changed = change(canvas)
    assert torch.equal(changed[1, 2, :, :6, :8], alone[0])
    assert not changed[1, 3:].any()
    packed = change(torch.ones(7, 12), lengths=[4, 3])
    assert torch.equal(packed[4:], change(torch.ones(3, 12)))
    assert not torch.equal(packed[:3] * 1, packed[3:6])


def test_one_documented_default_per_parameter() -> None:
    """Requirement 3: alpha 1, beta 0.1, step 500; the reader finds them in the registry."""
    params = mmfix.methods()["vcd"].params
    assert {name: one.default for name, one in params.items()} == {"alpha": 1.0, "beta": 0.1, "step": 500, "seed": 0}
    assert mmfix.methods()["vcd"].passes == 2


def test_the_noise_has_a_generator_of_its_own(llava: Any) -> None:
    """Requirement 4: the global seed does not matter and is not touched; the method's seed does."""
    found = []
    for seed, own in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with mmfix.mitigate(llava, VCD(seed=own, beta=1e-9)):
            found.append(vlm.logits(llava, vlm.one()))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_beams_and_sampling_act_on_the_same_logits(llava: Any) -> None:
    """Requirement 2."""
    plain.agrees_under_beams_and_draws(llava, VCD(), oracle(llava, plain.ragged(), 1.0, 0.1, 500, 0)[:, 0])


def test_strength_zero_is_the_cut_alone(llava: Any) -> None:
    """No second branch runs; with a cut that keeps all, the logits are the clean branch's bit for bit."""
    inputs = plain.ragged()
    with mmfix.mitigate(llava, VCD(alpha=0.0, beta=0.3)) as fix:
        cut = vlm.logits(llava, inputs)
        assert fix.rows_per_prompt == 1
    with mmfix.mitigate(llava, "plausibility", beta=0.3):
        assert torch.equal(vlm.logits(llava, inputs), cut)
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, VCD(alpha=0.0, beta=1e-9)):
        assert torch.equal(vlm.logits(llava, inputs), clean)


@pytest.mark.parametrize("wrong", [{"alpha": -1.5}, {"beta": 0.0}, {"step": 1000}, {"seed": -1}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"vcd.{next(iter(wrong))}"):
        VCD(**wrong)
