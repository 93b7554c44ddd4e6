"""Intervals, p values and needed images of resamples that are written down, so that every number is known."""

from __future__ import annotations

import numpy as np
import pytest

from mmfix_evals import stats
from mmfix_evals.draws import Draws
from mmfix_evals.errors import UsageError


def first(counts: np.ndarray) -> np.ndarray:
    return counts[..., 0]


def drawn(values: list[float], images: int = 20, each: float = 0.0) -> Draws:
    """Resamples with these values of :func:`first`, of images that count `each`."""
    per_image = np.full((1, images, 1), each)
    return Draws(per_image.sum(axis=1), np.array(values, dtype=float)[None, :, None], per_image)


def compared(values: list[float], images: int = 20) -> stats.Difference:
    """A difference whose resamples are these values, of images that all differ by 1."""
    return stats.difference(drawn(values, images, 1.0), drawn([0.0] * len(values), images), first)


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1.0] * 9, 0.2),  # 2 (0 + 1) / 10
        ([1.0] * 8 + [-1.0], 0.4),  # 2 (1 + 1) / 10
        ([1.0] * 7 + [0.0, -1.0], 0.6),  # a tie is on both sides
        ([1.0] * 7 + [1e-13, -1.0], 0.6),  # and so is what rounding makes of one
        ([-1.0] * 7 + [-1e-13, 1.0], 0.6),
        ([1.0] * 8 + [1e-6], 0.2),  # a small difference is none
        ([-1.0] * 8 + [-1e-6], 0.2),
        ([1.0] * 5 + [-1.0] * 4, 1.0),  # 2 (4 + 1) / 10
        ([0.0] * 9, 1.0),  # 2 (9 + 1) / 10 is no probability
        ([1.0] * 8 + [np.nan], 2 / 9),  # an undefined resample is none
    ],
)
def test_p_is_twice_the_smaller_tail_with_one_added(values: list[float], p: float) -> None:
    found = compared(values)
    assert found.p == pytest.approx(p, rel=1e-12)
    assert found.undefined == sum(np.isnan(values))


def test_bounds_are_percentiles_of_both_tails() -> None:
    values = [float(n) for n in range(201)]
    for confidence, low, high in ((0.95, 5.0, 195.0), (0.9, 10.0, 190.0), (0.5, 50.0, 150.0)):
        found = stats.interval(drawn(values), first, confidence)
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_one_image_has_no_bounds_and_two_have() -> None:
    one, two = compared([1.0, 2.0, 3.0], images=1), compared([1.0, 2.0, 3.0], images=2)
    assert (one.value, one.low, one.high, one.p, one.standard_error) == (1.0, None, None, None, None)
    assert (two.low, two.high) == (pytest.approx(1.05), pytest.approx(2.95))
    assert two.standard_error == pytest.approx((2 / 3) ** 0.5)  # of the resamples: their number is no sample size
    assert two.p == 0.5  # two images agree in sign by chance half of the time; 2 (0 + 1) / 4 is as much


def test_images_that_differ_are_counted_once() -> None:
    """Over two splits, an image that differs in one count of one of them differs."""
    per_image = np.zeros((2, 5, 2))
    other = per_image.copy()
    other[0, 1, 0] = other[1, 1, 1] = other[1, 3, 1] = 1.0
    a, b = (Draws(one.sum(axis=1), np.zeros((2, 4, 2)), one) for one in (other, per_image))
    assert stats.difference(a, b, first).informative == 2


@pytest.mark.parametrize(
    ("error", "informative", "images"),
    [
        (0.02, 10, 126),  # 100 ((1.959964 + 0.841621) 0.02 / 0.05)² = 125.6
        (0.04, 100, 503),  # four times 125.58
        (0.0001, 100, 2),
        (0.02, 9, None),
        (0.0, 100, None),
        (None, 100, None),
    ],
)
def test_images_to_see_by_hand(error: float | None, informative: int, images: int | None) -> None:
    found = stats.Difference(0.01, None, None, None, 100, 0, error, informative)
    assert found.images_to_see(0.05) == images


@pytest.mark.parametrize(("b", "c", "p"), [(1, 3, 0.625), (2, 3, 1.0), (1, 4, 0.375), (6, 0, 0.03125)])
def test_mcnemar_of_few_pairs(b: int, c: int, p: float) -> None:
    """2 (1 + 4) / 16, then all of 32, 2 (1 + 5) / 32 and 2 / 64."""
    assert stats.mcnemar(b, c) == stats.mcnemar(c, b) == p


@pytest.mark.parametrize("pairs", [(3, -1), (-1, 3), (3, 0.5), (0.5, 3)])
def test_mcnemar_refuses_either_count(pairs: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="whole numbers"):
        stats.mcnemar(*pairs)  # type: ignore[arg-type]


def test_holm_keeps_the_order_and_stays_a_probability() -> None:
    """4 x 0.01, 3 x 0.012 raised to the one before, 2 x 0.03, and 0.9; with ties, and beyond 1."""
    assert stats.holm([0.9, 0.012, 0.01, 0.03]) == pytest.approx([0.9, 0.04, 0.04, 0.06])
    assert stats.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert stats.holm([0.6, 0.4, 0.7]) == [1.0, 1.0, 1.0]
