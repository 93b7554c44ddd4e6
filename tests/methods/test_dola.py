"""DoLa against a plain pass with all hidden states, read out by hand, and the choice of layer written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import ConflictError, MethodError, UnsupportedModel
from mmfix.methods import DoLa
from mmfix.methods.dola import LayerContrast

STEPS = 3


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


def contrasted(own: Tensor, early: list[Tensor], alpha: float, released: bool) -> Tensor:
    """Float64[V] of one row: the farthest of some layers subtracted, all given as logits [V]."""
    p = own.double().softmax(-1)
    distances = []
    for one in early:
        q = one.double().softmax(-1)
        r = (p + q) / 2
        distances.append(kl(r, p) + kl(r, q) if released else kl(p, r) + kl(q, r))
    farthest = early[distances.index(max(distances))].double().log_softmax(-1)
    return p.log() - alpha * farthest


def oracle(model: Any, inputs: dict[str, Any], layers: tuple[int, ...], method: DoLa) -> Tensor:
    def newest(grown: dict[str, Any], _: int) -> Tensor:
        own, early = plain.early(model, grown, layers, None if method.norm else torch.nn.Identity())
        rows = [
            contrasted(own[b], [one[b] for one in early], method.alpha, method.divergence == "released")
            for b in range(len(own))
        ]
        return plain.cut(torch.stack(rows), own, method.beta)

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        (DoLa(beta=0.01), (0, 2, 4)),
        (DoLa(layers=(1, -1), alpha=0.5, beta=1e-9), (1, 4)),
        (DoLa(beta=0.01, divergence="released", norm=False), (0, 2, 4)),
    ],
    ids=["default", "half", "released"],
)
def test_decoding_equals_a_plain_pass_with_its_states(model: Any, method: DoLa, layers: tuple[int, ...]) -> None:
    """Layers are chosen by row (requirement 1), with padding, with and without a cache, in one of fixed size."""
    plain.agrees_with_every_cache(model, method, oracle(model, plain.ragged(), layers, method))


def test_recorded_logits_of_three_layers() -> None:
    """The chosen layer and the logits; rows and positions choose for themselves, also when the batch would not."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(4, 4, 5, 11, generator=generator)
    logits[1, 0] = logits[1, 1] = logits[1, 2]  # two layers equal to the last one: the third is the farthest
    for divergence in ("jensen-shannon", "released"):
        mix = LayerContrast(weights=(1.0, 0.0, 0.0, 0.0), log_probs=True, divergence=divergence, alpha=0.7)  # type: ignore[arg-type]
        got = mix(logits)
        rows = logits.log_softmax(-1)
        chosen = mix.chosen(rows[:, 0], rows[:, 1:])
        assert chosen[1].tolist() == [2] * 5
        assert len({str(row) for row in chosen.tolist()}) > 1
        for b in range(4):
            for k in range(5):
                early = list(logits[b, 1:, k])
                want = contrasted(logits[b, 0, k], early, 0.7, divergence == "released")
                torch.testing.assert_close(got[b, k].double(), want, atol=1e-5, rtol=0)


def test_what_is_filtered_stays_filtered() -> None:
    """Requirement 2: -inf, and never a difference of two infinities."""
    logits = torch.tensor([[[[2.0, 1.9, -30.0, -math.inf]], [[1.0, 3.0, 40.0, -math.inf]]]])
    got = LayerContrast(weights=(1.0, 0.0), beta=0.1, log_probs=True)(logits)
    assert got[0, 0, :2].isfinite().all()
    assert got[0, 0, 2:].isneginf().all()


def test_beams_and_sampling_act_on_the_same_logits(llava: Any) -> None:
    method = DoLa(beta=0.01)
    plain.agrees_under_beams_and_draws(llava, method, oracle(llava, plain.ragged(), (0, 2, 4), method)[:, 0])


def test_every_position_that_is_asked_for(llava: Any) -> None:
    """All positions, the last three, and some by number."""
    inputs = plain.ragged()
    with mmfix.mitigate(llava, DoLa(beta=0.01)):
        every = vlm.logits(llava, inputs)
        assert torch.equal(vlm.logits(llava, inputs, logits_to_keep=3), every[:, -3:])
        some = torch.tensor([15, 12])
        torch.testing.assert_close(vlm.logits(llava, inputs, logits_to_keep=some), every[:, some])
    torch.testing.assert_close(every[:, -1].double(), oracle(llava, inputs, (0, 2, 4), DoLa(beta=0.01))[:, 0],
        atol=2e-4, rtol=0)  # fmt: skip


def test_it_goes_with_edits_and_not_with_another_mix(llava: Any) -> None:
    """States are those of the edited model; a second method that combines logits is refused by name."""
    inputs = plain.ragged()
    with mmfix.mitigate(llava, "dola"):
        alone = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, [mmfix.method("vaf", image_gain=2.0), "dola"]):
        assert (vlm.logits(llava, inputs)[:, -1] != alone[:, -1]).any()
    with pytest.raises(ConflictError, match="'vcd' and 'dola'"), mmfix.mitigate(llava, ["vcd", "dola"]):
        pass


def test_logits_that_are_made_otherwise_are_refused(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose last state does not read out as its logits: refused, instead of a contrast of unlike things."""
    head = llava.lm_head.forward
    monkeypatch.setattr(llava.get_decoder().norm, "forward", lambda x: x * torch.linspace(0, 2, x.shape[-1]))
    with mmfix.mitigate(llava, "dola"):
        vlm.logits(llava, plain.ragged())  # another norm is the model's own all the same
    monkeypatch.setattr(type(llava), "get_output_embeddings", lambda self: lambda_module(lambda x: -2 * head(x)))
    with mmfix.mitigate(llava, "dola"), pytest.raises(UnsupportedModel, match="cannot be read out"):
        vlm.logits(llava, plain.ragged())


def lambda_module(function: Any) -> torch.nn.Module:
    module = torch.nn.Identity()
    module.forward = function  # type: ignore[method-assign]
    return module


def test_strength_zero_is_the_cut_alone(llava: Any) -> None:
    inputs = plain.ragged()
    clean = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, DoLa(alpha=0.0, beta=1e-9)) as fix:
        assert torch.equal(vlm.logits(llava, inputs), clean)
        assert fix.methods[0].readouts(None) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"layers": (5,)}, {"layers": ()}, {"alpha": -1.0}, {"beta": 0.0}, {"divergence": "l1"}]
)
def test_values_out_of_range_are_refused(llava: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"dola.{next(iter(wrong))}"), mmfix.mitigate(llava, DoLa(**wrong)):
        pass
