"""Scores of predictive distributions against closed forms and sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from exprgen import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("n_samples", [1, 3, 50])
def test_pit_of_counts_is_exactly_uniform(rng, n_samples):
    # Ties in nearly every value; a share of zeros of .7.
    rate = rng.gamma(0.5, 1, size=(200, 30))
    samples, x = rng.poisson(rate, size=(n_samples, 200, 30)), rng.poisson(rate)
    u = metrics.pit(samples, x)
    assert u.shape == x.shape
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.001


def test_pit_by_hand():
    samples = np.array([[0], [2], [2], [5]])[:, :, None]
    u = [metrics.pit(samples, np.array([[2]]), seed=seed).item() for seed in range(500)]
    # One sample below, and a place among two equal ones, of five places in all.
    assert 0.2 < min(u) < 0.21
    assert 0.79 < max(u) < 0.8
    assert metrics.pit(samples, np.array([[9]]), seed=1) > 0.8
    assert metrics.pit(samples, sparse.csr_matrix([[2]]), seed=3).item() == u[3]


def test_pit_shows_intervals_that_are_too_wide(rng):
    u = metrics.pit(rng.normal(0, 3, size=(99, 500, 2)), rng.normal(size=(500, 2)))
    assert u.std() < 0.6 / np.sqrt(12)


def test_crps_is_the_sum_over_pairs(rng):
    samples, x = rng.normal(size=(5, 4, 3)), rng.normal(size=(4, 3))
    pairs = [np.abs(samples[i] - samples[j]).mean() for i in range(5) for j in range(5)]
    exact = np.abs(samples - x).mean() - sum(pairs) / (5 * 4) / 2
    assert metrics.crps(samples, x) == pytest.approx(exact)


@pytest.mark.parametrize("n_samples", [2, 40])
def test_crps_of_a_gaussian(rng, n_samples):
    """Gneiting and Raftery's closed form, whatever the number of samples."""
    x = np.linspace(-2, 3, 5)
    z = (x - 0.5) / 2
    exact = 2 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    samples = rng.normal(0.5, 2, size=(n_samples, 200_000 // n_samples, 5))
    found = metrics.crps(samples, np.broadcast_to(x, samples.shape[1:]))
    assert found == pytest.approx(exact.mean(), abs=0.02)


def test_crps_is_best_for_the_truth(rng):
    x = rng.normal(size=(4000, 1))
    scores = {sd: metrics.crps(rng.normal(0, sd, size=(20, 4000, 1)), x) for sd in (0.5, 1, 2)}
    assert scores[1] == pytest.approx(1 / np.sqrt(np.pi), abs=0.03)
    assert min(scores, key=scores.__getitem__) == 1


def test_interval_score_and_sharpness_by_hand():
    lower, upper, x = np.array([0, 1, 5, 0]), np.array([2, 3, 6, 0]), np.array([1, 0, 9, 0])
    # Widths 2, 2, 1, 0; one below at distance 1, one above at distance 3, each times 2 / .1.
    assert metrics.interval_score(lower, upper, x, alpha=0.1) == pytest.approx((5 + 20 + 60) / 4)
    assert metrics.sharpness(lower, upper) == 5 / 4
    assert metrics.sharpness(sparse.csr_matrix(lower), sparse.csr_matrix(upper)) == 5 / 4
    # Unsigned counts below their interval are not far above it.
    unsigned = (v.astype(np.uint8) for v in (lower, upper, x))
    assert metrics.interval_score(*unsigned, alpha=0.1) == pytest.approx(85 / 4)


def test_interval_score_is_best_for_the_true_quantiles(rng):
    x = rng.normal(size=20_000)
    scores = {}
    for level in (0.8, 0.9, 0.97):
        half = stats.norm.ppf(0.5 + level / 2)
        scores[level] = metrics.interval_score(-half, half, x, alpha=0.1)
    assert min(scores, key=scores.__getitem__) == 0.9


def test_calibration_refuses_what_does_not_fit(rng):
    samples, x = rng.normal(size=(5, 4, 3)), rng.normal(size=(4, 3))
    with pytest.raises(ValueError, match=r"\(n_samples, 4, 3\), got \(5, 4, 2\)"):
        metrics.pit(samples[:, :, :2], x)
    with pytest.raises(ValueError, match="number of samples must be at least 2, got 1"):
        metrics.crps(samples[:1], x)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1, got 90"):
        metrics.interval_score(x, x, x, alpha=90)
    for score in (
        lambda low, high: metrics.interval_score(low, high, x, alpha=0.1),
        metrics.sharpness,
    ):
        with pytest.raises(ValueError, match="12 of 12 intervals"):
            score(x, x - 1)
