"""The contrast step's definition: weights, the plausibility cut, and tokens that are already at -inf."""

from __future__ import annotations

import math

import pytest
import torch

from mmfix_kernels.contrast import mix, mix_reference

INF = float("inf")


def test_the_cut_alone_keeps_the_plausible_tokens() -> None:
    logits = torch.tensor([[[2.0, 2.0 + math.log(0.5), 0.0, -INF]]])
    mixed = mix_reference(logits, (1.0,), beta=0.4)
    assert mixed.logits is not None
    assert mixed.logits.tolist()[0][2:] == [-INF, -INF]
    torch.testing.assert_close(mixed.logits[0, :2], logits[0, 0, :2])
    assert mixed.best.tolist() == [0]


def test_contrast_prefers_what_the_branch_does_not() -> None:
    logits = torch.tensor([[[3.0, 2.9, 0.0], [3.0, 0.0, -9.0]]])
    assert mix_reference(logits, (2.0, -1.0)).best.tolist() == [2]
    assert mix_reference(logits, (2.0, -1.0), beta=0.1).best.tolist() == [1], "the cut removes the implausible token"


def test_equal_rows_change_nothing() -> None:
    row = torch.randn(3, 1, 50)
    mixed = mix_reference(row.expand(3, 2, 50), (1.5, -0.5))
    assert mixed.logits is not None
    torch.testing.assert_close(mixed.logits, row[:, 0])


@pytest.mark.parametrize("weights", [(2.0, -1.0), (2.0, 0.0)])
def test_no_difference_of_infinities(weights: tuple[float, ...]) -> None:
    logits = torch.tensor([[[1.0, -INF, -INF, 0.0], [-INF, 1.0, -INF, 0.0]]])
    mixed = mix_reference(logits, weights)
    assert mixed.logits is not None
    assert mixed.logits[0, :3].tolist() == [-INF] * 3
    assert mixed.best.tolist() == [3]


@pytest.mark.parametrize(
    ("shape", "weights", "beta"), [((2, 3, 5), (1.0,), 0.0), ((2, 5), (1.0,), 0.0), ((1, 1, 5), (1.0,), 1.5)]
)
def test_bad_input_is_refused(shape: tuple[int, ...], weights: tuple[float, ...], beta: float) -> None:
    with pytest.raises(ValueError, match=r"logits|beta"):
        mix(torch.zeros(shape), weights, beta)


def test_on_a_cpu_the_reference_answers() -> None:
    logits = torch.randn(2, 3, 40)
    got, want = mix(logits, (2.0, -0.5, -0.5), 0.1), mix_reference(logits, (2.0, -0.5, -0.5), 0.1)
    assert got.logits is not None
    assert want.logits is not None
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.best, want.best)
