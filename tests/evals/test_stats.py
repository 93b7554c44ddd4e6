"""Intervals and tests: hand-checked values, and the properties that make comparisons valid."""

from __future__ import annotations

import subprocess
import sys
import time
from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mmfix_evals import draws, stats
from mmfix_evals.errors import UsageError


def mean(c: np.ndarray) -> np.ndarray:
    """Counts (successes, n) → share."""
    return stats.ratio(c[..., 0], c[..., 1])


def run(clusters: int, share: float, seed: int = 0, size: int = 6) -> np.ndarray:
    successes = np.random.default_rng(seed).binomial(size, share, clusters)
    return np.stack([successes, np.full(clusters, size)], axis=1)


small_runs = arrays(np.int64, st.tuples(st.integers(2, 12), st.just(2)), elements=st.integers(0, 5))


def test_scoring_and_statistics_import_no_torch() -> None:
    code = (
        "import sys, mmfix_evals.stats, mmfix_evals.pope_build; from mmfix_evals.metrics import pope, chair; "
        "heavy = {'torch', 'transformers', 'nltk', 'textblob', 'pycocotools'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_by_cluster_sums_and_orders() -> None:
    names, counts = stats.by_cluster(["b", "a", "b"], [[1, 2], [3, 4], [10, 20]])
    assert names == ["a", "b"]
    assert counts.tolist() == [[3, 4], [11, 22]]
    with pytest.raises(UsageError, match=r"must be \[1, k\]"):
        stats.by_cluster(["a"], [[1], [2]])


def test_bootstrap_agrees_with_all_possible_resamples() -> None:
    """With three images all 27 draws can be listed: the bootstrap's bounds are quantiles of exactly these."""
    counts = np.array([[0, 2], [1, 2], [2, 2]])
    exact = np.sort([counts[list(draw)].sum(axis=0) for draw in product(range(3), repeat=3)], axis=0)[:, 0] / 6
    found = stats.bootstrap(counts, mean, resamples=20_000, seed=1, confidence=0.9)
    low, high = np.percentile(np.tile(exact, 1000), [5, 95])
    assert (found.value, found.low, found.high) == (0.5, pytest.approx(low), pytest.approx(high))


def test_interval_covers_about_as_often_as_it_says() -> None:
    intervals = [stats.bootstrap(run(60, 0.7, seed), mean, 300, seed) for seed in range(200)]
    covered = sum(interval.low <= 0.7 <= interval.high for interval in intervals)
    assert 176 <= covered <= 199


def test_clusters_widen_the_interval() -> None:
    """Six equal answers per image carry the information of one."""
    images = np.random.default_rng(0).binomial(1, 0.5, 100)
    clustered = stats.bootstrap(np.stack([6 * images, np.full(100, 6)], axis=1), mean)
    separate = stats.bootstrap(np.stack([np.repeat(images, 6), np.ones(600)], axis=1), mean)
    assert clustered.value == separate.value
    assert (clustered.high - clustered.low) > 2 * (separate.high - separate.low)


def test_ratio_of_sums_not_mean_of_ratios() -> None:
    assert stats.bootstrap([[1, 1], [0, 9]], mean).value == 0.1


def test_same_seed_same_draws_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = run(50, 0.6)
    whole = stats.bootstrap(counts, mean, 500, seed=3)
    monkeypatch.setattr(draws, "KEPT_ELEMENTS", 0)
    monkeypatch.setattr(draws, "CHUNK_ELEMENTS", 50 * 7)
    assert stats.bootstrap(counts, mean, 500, seed=3) == whole
    assert stats.bootstrap(counts, mean, 500, seed=4) != whole


def test_undefined_resamples_are_counted_and_left_out() -> None:
    found = stats.bootstrap([[1, 1], [0, 0], [0, 0]], mean, 1000)
    assert found.value == found.low == found.high == 1.0
    assert found.undefined == pytest.approx(1000 * (2 / 3) ** 3, rel=0.15)


def test_undefined_resamples_do_not_enter_p() -> None:
    a, b = np.array([[1, 1], [0, 0], [0, 0]]), np.array([[0, 1], [0, 0], [0, 0]])
    found = stats.paired(a, b, mean, 1000)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert found.undefined > 200
    assert found.p == 1.0  # one image speaks for the difference, and one image shows nothing


@pytest.mark.parametrize("counts", [np.zeros((0, 2)), np.zeros((5, 2))])
def test_an_undefined_metric_has_no_bounds(counts: np.ndarray) -> None:
    found = stats.bootstrap(counts, mean, 50)
    assert (found.value, found.low, found.high, found.undefined) == (None, None, None, 50)
    difference = stats.paired(counts, counts, mean, 50)
    assert (difference.value, difference.low, difference.p) == (None, None, None)


def test_one_image_gives_a_value_but_no_interval() -> None:
    assert stats.bootstrap([[3, 4]], mean) == stats.Interval(0.75, None, None, 1, 0)


def test_macro_is_the_plain_mean_over_splits_with_common_draws() -> None:
    a, b = run(40, 0.9), run(40, 0.5, 1)
    both = stats.bootstrap_macro([a, b], mean, 400, seed=2)
    assert both.value == pytest.approx((mean(a.sum(0)) + mean(b.sum(0))) / 2)
    assert stats.bootstrap_macro([a, a], mean, 400, seed=2) == stats.bootstrap(a, mean, 400, seed=2)
    opposite = np.stack([6 - a[:, 0], a[:, 1]], axis=1)
    cancelled = stats.bootstrap_macro([a, opposite], mean, 400, seed=2)
    assert cancelled.low == pytest.approx(0.5)
    assert cancelled.high == pytest.approx(0.5)


@given(small_runs, st.integers(0, 99))
def test_identical_runs_do_not_differ(counts: np.ndarray, seed: int) -> None:
    found = stats.paired(counts, counts, mean, 40, seed)
    if found.value is not None:
        assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@given(small_runs, st.integers(0, 99))
def test_swapping_the_runs_mirrors_the_difference(counts: np.ndarray, seed: int) -> None:
    other = counts[::-1]
    one, two = stats.paired(counts, other, mean, 40, seed), stats.paired(other, counts, mean, 40, seed)
    if one.low is not None and one.value is not None and two.value is not None:
        assert (one.value, one.p) == (-two.value, two.p)
        assert one.low == pytest.approx(-two.high)


@given(small_runs, st.integers(2, 7), st.integers(0, 99))
def test_doubling_all_counts_changes_nothing(counts: np.ndarray, factor: int, seed: int) -> None:
    assert stats.bootstrap(counts * factor, mean, 40, seed) == stats.bootstrap(counts, mean, 40, seed)


def test_paired_is_a_minus_b_and_sharper_than_two_intervals() -> None:
    b = run(100, 0.6)
    a = b.copy()
    a[:30, 0] = np.minimum(6, a[:30, 0] + 1)
    found = stats.paired(a, b, mean)
    assert found.value > 0
    assert found.low > 0
    assert found.p == pytest.approx(2 / 2001)
    alone = stats.bootstrap(a, mean)
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_p_is_uniform_enough_without_an_effect() -> None:
    ps = [stats.paired(run(40, 0.6, 2 * s), run(40, 0.6, 2 * s + 1), mean, 200, s).p for s in range(200)]
    assert 1 <= sum(p <= 0.05 for p in ps) <= 24
    assert 80 <= sum(p <= 0.5 for p in ps) <= 120


def test_wrong_shapes_and_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="runs differ in shape"):
        stats.paired(run(3, 0.5), run(4, 0.5), mean)
    with pytest.raises(UsageError, match="all of one shape"):
        stats.bootstrap_macro([run(3, 0.5), run(4, 0.5)], mean)
    with pytest.raises(UsageError, match="resamples must be at least 1"):
        stats.bootstrap(run(3, 0.5), mean, resamples=0)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (3, 10, 0.09228515625), (0, 2000, 0.0)],
)
def test_mcnemar_by_hand(b: int, c: int, p: float) -> None:
    assert stats.mcnemar(b, c) == p


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60)
def test_mcnemar_is_the_binomial_sum_and_symmetric(b: int, c: int) -> None:
    m = b + c
    exact = min(Fraction(1), 2 * Fraction(sum(comb(m, k) for k in range(min(b, c) + 1)), 2**m))
    assert stats.mcnemar(b, c) == stats.mcnemar(c, b) == float(exact)


def test_mcnemar_of_many_pairs() -> None:
    start = time.process_time()
    assert stats.mcnemar(49_000, 51_000) == pytest.approx(2.588716038e-10, rel=1e-8)
    assert time.process_time() - start < 10


def test_mcnemar_refuses_what_is_not_a_count() -> None:
    with pytest.raises(UsageError, match="whole numbers"):
        stats.mcnemar(-1, 3)
    with pytest.raises(UsageError, match="whole numbers"):
        stats.mcnemar(0.5, 3)  # type: ignore[arg-type]


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_never_lowers_and_keeps_the_order(ps: list[float]) -> None:
    adjusted = stats.holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


def test_a_few_images_never_give_a_small_p() -> None:
    """n images that differ agree in sign by chance with probability 2**(1 - n): p is no smaller, whatever is drawn."""
    for images in (2, 3, 5, 8):
        a = np.tile([[1.0, 1.0]], (images, 1))
        b = np.tile([[0.0, 1.0]], (images, 1))
        found = stats.paired(a, b, lambda c: stats.ratio(c[..., 0], c[..., 1]), 2000, 0)
        assert found.p == max(2.0 ** (1 - images), 2 / 2001)


def test_one_drawing_gives_what_single_ones_give() -> None:
    """Two ratios of the same counts, over two splits, against a loop over the drawn images."""
    a, b = (np.stack([run(30, 0.7, seed), run(30, 0.6, seed + 5)]) for seed in (1, 2))
    first, second = stats.draw(list(a), 200, 3), stats.draw(list(b), 200, 3)
    for metric in (mean, lambda c: stats.ratio(c[..., 1] - c[..., 0], c[..., 1])):
        assert stats.difference(first, second, metric) == stats.paired_macro(list(a), list(b), metric, 200, 3)
        assert stats.interval(first, metric) == stats.bootstrap_macro(list(a), metric, 200, 3)
    weights = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=200)
    slow = [np.mean([mean((w[:, None] * split).sum(axis=0)) for split in a]) for w in weights]
    found = stats.interval(first, mean)
    assert (found.low, found.high) == tuple(np.percentile(slow, [2.5, 97.5]))


def test_the_power_estimate_keeps_what_it_promises() -> None:
    """Of many experiments with the number of images it asks for, about 80 % find a difference of that size."""
    rng = np.random.default_rng(4)

    def experiment(images: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
        """Eight questions about each image; one of them may change, so the share changes by an eighth."""
        base = 1 + rng.binomial(6, 0.7, images)
        change = rng.choice([-1, 0, 1], images, p=[0.2, 0.6 - 8 * gain, 0.2 + 8 * gain])
        return tuple(np.stack([right, np.full(images, 8)], axis=1) for right in (base + change, base))

    estimates = [stats.paired(*experiment(400, 0.0), mean, 400, seed).images_to_see(0.01) for seed in range(15)]
    needed = round(float(np.median([n for n in estimates if n is not None])))
    assert needed == pytest.approx((2.80 * 0.4**0.5 / 8 / 0.01) ** 2, rel=0.1)
    gains = [(one - other)[:, 0] / 8 for one, other in (experiment(needed, 0.01) for _ in range(300))]
    found = np.mean([abs(gain.mean()) > 1.96 * gain.std() / needed**0.5 for gain in gains])
    assert 0.72 < found < 0.88


def test_power_is_not_guessed_from_few_images() -> None:
    same = run(50, 0.5)
    assert stats.paired(same, same, mean, 100).images_to_see(0.01) is None
    other = same.copy()
    other[:9, 0] = 6 - other[:9, 0]
    few = stats.paired(other, same, mean, 100)
    assert few.informative <= 9
    assert few.images_to_see(0.01) is None


def test_drawing_is_fast_enough_to_be_repeated() -> None:
    """The work of one drawing is shared: thirty metrics cost little more than one. Counted, not timed."""
    calls = []
    original = draws._new_weights

    def counted(*given: int) -> object:
        calls.append(given)
        return original(*given)

    draws._kept_weights.cache_clear()
    draws._new_weights = counted  # type: ignore[assignment]
    try:
        for seed in range(10):
            stats.paired(run(40, 0.6, seed), run(40, 0.6, seed + 1), mean, 100)
    finally:
        draws._new_weights = original
        draws._kept_weights.cache_clear()
    assert calls == [(40, 100, 0)]
