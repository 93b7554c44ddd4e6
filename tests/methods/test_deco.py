"""DeCo against a plain pass with all hidden states, candidates and layer written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.confine import confine
from mmfix.errors import MethodError
from mmfix.methods import DeCo
from mmfix.methods.deco import Correction

STEPS = 3


def corrected(own: Tensor, early: list[Tensor], alpha: float, top_p: float, top_k: int) -> Tensor:
    """Float64[V] of one row, all given as logits [V]; loops over layers and candidates."""
    p = own.double().softmax(-1)
    candidates: list[int] = []
    for token in sorted(range(len(p)), key=lambda i: -float(p[i]))[:top_k]:
        candidates.append(token)
        if sum(float(p[i]) for i in candidates) >= top_p:
            break
    surest, found = -1.0, early[0] if early else own
    for one in early:
        q = one.double().softmax(-1)
        for i in candidates:
            if float(q[i]) > surest:
                surest, found = float(q[i]), one
    mixed = own.double() + alpha * surest * found.double()
    out = torch.full_like(mixed, -math.inf)
    out[candidates] = mixed[candidates]
    return out


def oracle(model: Any, inputs: dict[str, Any], layers: tuple[int, ...], method: DeCo) -> Tensor:
    def newest(grown: dict[str, Any], _: int) -> Tensor:
        own, early = plain.early(model, grown, layers)
        return torch.stack([
            corrected(own[b], [one[b] for one in early], method.alpha, method.top_p, method.top_k)
            for b in range(len(own))
        ])  # fmt: skip

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        (DeCo(), (3, 4)),
        (DeCo(layers=(0, 2, 3, -1), top_k=7, alpha=1.5), (0, 2, 3, 4)),
        (DeCo(layers=(1, 3), top_p=0.4), (1, 3)),
    ],
    ids=["default", "many", "nucleus"],
)
def test_decoding_equals_a_plain_pass_with_its_states(model: Any, method: DeCo, layers: tuple[int, ...]) -> None:
    """Layer and token are those of each row of the batch (requirement 1)."""
    plain.agrees_with_every_cache(model, method, oracle(model, plain.ragged(), layers, method))


def test_recorded_logits() -> None:
    """Chosen layer, its largest probability and the logits, row by row and position by position."""
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(3, 5, 4, 30, generator=generator)
    for top_p, top_k in ((0.9, 20), (0.5, 3), (1.0, 1000), (1e-9, 20)):
        mix = Correction(weights=(1.0, 0.0, 0.0, 0.0, 0.0), alpha=0.6, top_p=top_p, top_k=top_k)
        got = mix(logits)
        for b in range(3):
            for k in range(4):
                want = corrected(logits[b, 0, k], list(logits[b, 1:, k]), 0.6, top_p, top_k)
                assert torch.equal(got[b, k].isneginf(), want.isneginf())
                torch.testing.assert_close(got[b, k].double(), want, atol=1e-5, rtol=0)


def test_a_batch_of_two_equals_two_singles(llava: Any) -> None:
    inputs = plain.ragged()
    with mmfix.mitigate(llava, DeCo(layers=(0, 1, 2, 3))):
        both = vlm.greedy(llava, inputs, STEPS)
        for row in range(2):
            real = int(inputs["attention_mask"][row].sum())
            single = {name: value[row : row + 1, -real:] if value.ndim == 2 else value[row : row + 1]
                      for name, value in inputs.items()}  # fmt: skip
            one = vlm.greedy(llava, single, STEPS)
            for a, b in zip(both.logits, one.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=0)


def test_the_same_rule_under_beams_and_sampling(llava: Any) -> None:
    """Requirement 2."""
    plain.agrees_under_beams_and_draws(llava, DeCo(), oracle(llava, plain.ragged(), (3, 4), DeCo())[:, 0])


def test_confined_to_some_prompts_of_a_batch(llava: Any) -> None:
    """The other prompt's logits are the plain model's, bit for bit; candidates are not cut there."""
    inputs = plain.ragged()
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, DeCo()):
        every = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, confine(DeCo(), (False, True))):
        got = vlm.logits(llava, inputs)
    assert torch.equal(got[0], clean[0])
    torch.testing.assert_close(got[1], every[1])


def test_strength_zero_leaves_the_candidates(llava: Any) -> None:
    inputs = plain.ragged()
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, DeCo(alpha=0.0, top_p=1.0, top_k=1000)):
        assert torch.equal(vlm.logits(llava, inputs), clean)
    with mmfix.mitigate(llava, DeCo(alpha=0.0, top_k=4, top_p=1.0)):
        cut = vlm.logits(llava, inputs)
    assert (cut.isfinite().sum(-1) == 4).all()
    assert torch.equal(cut[cut.isfinite()], clean[cut.isfinite()])


@pytest.mark.parametrize("wrong", [{"layers": (5,)}, {"layers": ()}, {"alpha": -1.0}, {"top_p": 0.0}, {"top_k": 0}])
def test_values_out_of_range_are_refused(llava: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"deco.{next(iter(wrong))}"), mmfix.mitigate(llava, DeCo(**wrong)):
        pass
