"""HALC's maths by hand: fields of view at borders, which pairs are contrasted, what a detector may return."""

from __future__ import annotations

import math

import pytest
import torch

from mmfix import focal, scorers
from mmfix.errors import MethodError, MmfixError


def test_fields_of_view_shrink_grow_and_stop_at_the_border() -> None:
    near, same, wide, wider = focal.fields_of_view((0.4, 0.4, 0.6, 0.8), ratio=0.5)
    assert near == pytest.approx((0.45, 0.5, 0.55, 0.7))
    assert same == (0.4, 0.4, 0.6, 0.8)
    assert wide == pytest.approx((0.35, 0.3, 0.65, 0.9))
    assert wider == pytest.approx((0.275, 0.15, 0.725, 1.0))
    corner = focal.fields_of_view((0.0, 0.9, 0.2, 1.0), ratio=0.6)
    assert corner[2] == pytest.approx((0.0, 0.87, 0.26, 1.0))
    assert all(0.0 <= v[0] < v[2] <= 1.0 and 0.0 <= v[1] < v[3] <= 1.0 for v in corner)
    assert focal.fields_of_view((0.0, 0.0, 1.0, 1.0), ratio=3.0)[0] == pytest.approx((0.4, 0.4, 0.6, 0.6))
    for wrong in ({"ratio": 0.0}, {"count": 1}):
        with pytest.raises(MethodError, match="fields of view"):
            focal.fields_of_view((0.1, 0.1, 0.2, 0.2), **wrong)


def test_the_smallest_box_the_centre_or_nothing() -> None:
    large, small = (0.0, 0.0, 0.9, 0.9), (0.5, 0.5, 0.6, 0.9)
    assert focal.focus([large, small, large]) == (small, True)
    assert focal.focus([]) == ((0.2, 0.2, 0.8, 0.8), False)
    assert focal.focus([small] * 4) is None


def test_a_crop_holds_what_is_inside_the_box() -> None:
    pixels = torch.arange(64.0).view(1, 8, 8).repeat(3, 1, 1)
    assert torch.equal(focal.crop(pixels, (0.0, 0.0, 1.0, 1.0)), pixels)
    part = focal.crop(pixels, (0.5, 0.25, 1.0, 0.75))
    inside = pixels[:, 2:6, 4:]
    assert part.shape == pixels.shape
    assert (float(part.min()), float(part.max())) == (float(inside.min()), float(inside.max()))
    assert focal.crop(pixels, (0.99, 0.99, 1.0, 1.0)).unique().tolist() == [63.0]


def test_divergences_are_what_they_are_called() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.double().softmax(-1)
    m = (p[0] + p[2]) / 2

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * (a / b).log()).sum())

    reversed_, named = focal.divergences(logits), focal.divergences(logits, "jensen-shannon")
    assert float(reversed_[0, 2]) == pytest.approx((kl(m, p[0]) + kl(m, p[2])) / 2, rel=1e-5)
    assert float(named[0, 2]) == pytest.approx((kl(p[0], m) + kl(p[2], m)) / 2, rel=1e-5)
    assert torch.equal(reversed_, reversed_.T)
    assert reversed_.diagonal().tolist() == [0.0] * 3
    assert float(named.max()) <= math.log(2)
    with pytest.raises(MethodError, match="divergence 'kl'"):
        focal.divergences(logits, "kl")  # type: ignore[arg-type]


def test_the_pairs_that_disagree_most_are_contrasted_both_ways() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.5], [3.0, 0.2, 0.0], [0.0, 4.0, 1.0], [0.3, 0.0, 6.0]])
    apart = focal.divergences(logits)
    order = sorted(((float(apart[i, j]), i, j) for i in range(4) for j in range(i + 1, 4)), reverse=True)
    (_, a, b), (_, c, d) = order[:2]
    found = focal.contrasted(logits, candidates=4, weight=0.05)
    want = [logits[i] - 0.05 * logits[j] for i, j in ((a, b), (b, a), (c, d), (d, c))]
    torch.testing.assert_close(found, torch.stack(want))
    assert (a, b) != (0, 1)
    for wrong in (3, 0, 14):
        with pytest.raises(MethodError, match="even number from 2 to 12"):
            focal.contrasted(logits, candidates=wrong)


def test_a_token_that_is_ruled_out_is_never_lifted() -> None:
    logits = torch.tensor([[0.0, -2e3, 1.0], [1.0, -5e3, 0.0]])
    first, second = focal.contrasted(logits, candidates=2)
    assert float(first[1]) == -2e3 + 0.05 * 1e3
    assert float(second[1]) == -5e3 + 0.05 * 1e3
    assert float(first[0]) == pytest.approx(-0.05)


def test_a_detector_is_a_function_of_ones_own() -> None:
    pixels = torch.zeros(3, 8, 8)
    seen: list[str] = []

    def detect(picture: torch.Tensor, word: str) -> list[list[float]]:
        seen.append(word)
        return {"dog": [[0.1, 0.2, 0.3, 0.4]], "cat": []}.get(word, [[0.5, 0.5, 0.4, 0.9]])

    scorers.register("mine", detect, kind="boxes")
    try:
        assert scorers.boxes("mine", pixels, "dog", "halc") == [(0.1, 0.2, 0.3, 0.4)]
        assert scorers.boxes("mine", pixels, "cat", "halc") == []
        with pytest.raises(MmfixError, match=r"returned the box \(0.5, 0.5, 0.4, 0.9\) for 'fork'"):
            scorers.boxes("mine", pixels, "fork", "halc")
        assert seen == ["dog", "cat", "fork"]
    finally:
        scorers.unregister("mine")
    with pytest.raises(MethodError, match="'mine' is not registered"):
        scorers.boxes("mine", pixels, "dog", "halc")
