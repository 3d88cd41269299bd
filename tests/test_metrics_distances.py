"""Distances between samples against closed forms, brute force and SciPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import integrate, sparse, stats

from exprgen import metrics
from exprgen.metrics import _distances

ALL = (metrics.energy_distance, metrics.mmd, metrics.sliced_wasserstein, metrics.wasserstein)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def distances(a, b):
    """All Euclidean distances, one by one."""
    return np.array([[np.sqrt(((x - y) ** 2).sum()) for y in b] for x in a])


@pytest.fixture
def few(rng):
    return rng.normal(size=(7, 3)), rng.normal(0.5, 2, size=(5, 3))


def test_energy_distance_is_the_sum_over_pairs(few):
    a, b = few
    exact = 2 * distances(a, b).mean() - distances(a, a).sum() / 42 - distances(b, b).sum() / 20
    assert metrics.energy_distance(a, b) == pytest.approx(exact)
    assert metrics.energy_distance(b, a) == pytest.approx(exact)


def test_energy_distance_of_two_gaussians(rng):
    # In one dimension: twice the integral of the squared difference of the distribution functions.
    a, b = rng.normal(1, 1, (4000, 1)), rng.normal(0, 1.5, (3000, 1))
    exact, _ = integrate.quad(
        lambda x: 2 * (stats.norm.cdf(x, 1, 1) - stats.norm.cdf(x, 0, 1.5)) ** 2, -10, 10
    )
    assert metrics.energy_distance(a, b) == pytest.approx(exact, rel=0.1)


def test_unbiased_estimates_centre_at_zero(rng):
    # The biased ones of such small samples do not: .36 and .10, far above the tolerances.
    pairs = [(rng.normal(size=(10, 3)), rng.normal(size=(10, 3))) for _ in range(400)]
    for metric in (metrics.energy_distance, lambda a, b: metrics.mmd(a, b, bandwidth=2)):
        values = np.array([metric(a, b) for a, b in pairs])
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))


def test_mmd_is_the_sum_over_pairs(few):
    a, b = few
    h = np.median(distances(*[np.concatenate(few)] * 2)[np.triu_indices(12, 1)])
    assert metrics.median_distance(a, b) == pytest.approx(h)
    for bandwidth in (None, 0.7):
        scale = h if bandwidth is None else bandwidth
        k_aa, k_bb, k_ab = (
            np.exp(-(distances(x, y) ** 2) / (2 * scale**2)) for x, y in ((a, a), (b, b), (a, b))
        )
        unbiased = (k_aa.sum() - 7) / 42 + (k_bb.sum() - 5) / 20 - 2 * k_ab.mean()
        biased = k_aa.mean() + k_bb.mean() - 2 * k_ab.mean()
        assert metrics.mmd(a, b, bandwidth=bandwidth) == pytest.approx(unbiased)
        found = metrics.mmd(a, b, bandwidth=bandwidth, estimator="biased")
        assert found == pytest.approx(biased)


def test_mmd_of_two_gaussians(rng):
    d, shift, h = 3, 0.8, 1.5
    a, b = rng.normal(size=(3000, d)), rng.normal(size=(3000, d))
    a[:, 0] += shift
    scale = (h**2 / (h**2 + 2)) ** (d / 2)
    exact = 2 * scale * (1 - np.exp(-(shift**2) / (2 * (h**2 + 2))))
    assert metrics.mmd(a, b, bandwidth=h) == pytest.approx(exact, rel=0.1)


def test_sums_do_not_depend_on_the_blocks(rng, monkeypatch):
    a, b = rng.normal(size=(40, 3)), rng.normal(1, 1, size=(30, 3))

    def all_of_them():
        return (
            metrics.energy_distance(a, b),
            *metrics.mmd_test(a, b, n_permutations=9),
            *metrics.precision_recall_density_coverage(a, b),
            metrics.membership_auc(a, b, b + 1),
        )

    whole = all_of_them()
    monkeypatch.setattr(_distances, "_BLOCK", 100)
    np.testing.assert_allclose(all_of_them(), whole)


def test_median_distance_of_many_cells_is_nearly_that_of_some(rng, monkeypatch):
    a, b = rng.normal(size=(300, 5)), rng.normal(size=(200, 5))
    exact = metrics.median_distance(a, b)
    monkeypatch.setattr(_distances, "_MEDIAN_OF", 100)
    assert metrics.median_distance(a, b) == pytest.approx(exact, rel=0.05)


def test_mmd_permutations_are_relabellings(rng):
    # Four cells against two: of the 15 labellings, some are at least as extreme as the observed.
    a, b = rng.normal(size=(4, 2)), rng.normal(2, 1, size=(2, 2))
    pooled = np.concatenate([a, b])
    h = metrics.median_distance(a, b)
    observed = metrics.mmd(a, b, bandwidth=h)
    as_large = np.mean(
        [
            metrics.mmd(np.delete(pooled, of_b, 0), pooled[list(of_b)], bandwidth=h)
            >= observed - 1e-12
            for of_b in itertools.combinations(range(6), 2)
        ]
    )
    found = metrics.mmd_test(a, b, n_permutations=4000)
    assert found.statistic == pytest.approx(observed)
    assert found.p_value == pytest.approx(as_large, abs=0.03)


def test_mmd_p_values_are_uniform_under_the_null(rng):
    p = np.array(
        [
            metrics.mmd_test(
                rng.normal(size=(12, 2)), rng.normal(size=(9, 2)), n_permutations=19, seed=i
            ).p_value
            for i in range(400)
        ]
    )
    # P(p <= level) is the level itself on the grid of 1 / 20.
    for level in (0.05, 0.25, 0.5, 0.75):
        low, high = stats.binom.ppf([0.001, 0.999], 400, level)
        assert low <= (p <= level + 1e-9).sum() <= high


def test_mmd_test_finds_a_difference_in_spread(rng):
    a, b = rng.normal(size=(100, 2)), rng.normal(0, 2, size=(100, 2))
    found = metrics.mmd_test(a, b, n_permutations=99)
    assert found.p_value == pytest.approx(0.01)
    assert found == metrics.mmd_test(a, b, n_permutations=99)


def test_wasserstein_is_the_best_of_all_matchings(rng):
    a, b = rng.normal(size=(6, 2)), rng.normal(1, 2, size=(6, 2))
    squared = distances(a, b) ** 2
    best = min(
        np.mean([squared[i, j] for i, j in enumerate(p)]) for p in itertools.permutations(range(6))
    )
    assert metrics.wasserstein(a, b) == pytest.approx(np.sqrt(best))
    assert metrics.wasserstein(np.repeat(a, 2, axis=0), b) == pytest.approx(np.sqrt(best))


def test_wasserstein_of_shifted_and_scaled_cells(rng):
    a = rng.normal(size=(50, 4))
    assert metrics.wasserstein(a, a + np.array([3, 0, 0, 4])) == pytest.approx(5)
    root = np.sqrt(((a - a.mean(axis=0)) ** 2).sum(axis=1).mean())
    scaled = a.mean(axis=0) + 3 * (a - a.mean(axis=0))
    assert metrics.wasserstein(a, scaled) == pytest.approx(2 * root)


@pytest.mark.parametrize("sizes", [(6, 6), (6, 9), (7, 4)])
def test_sliced_wasserstein_is_exact_in_one_dimension(rng, sizes):
    a, b = rng.normal(size=(sizes[0], 1)), rng.normal(1, 2, size=(sizes[1], 1))
    assert metrics.sliced_wasserstein(a, b) == pytest.approx(metrics.wasserstein(a, b))


def test_sliced_wasserstein_of_shifted_cells(rng):
    a = rng.normal(size=(20, 5))
    shifted = a + np.array([2, 0, 0, 0, 0])
    found = metrics.sliced_wasserstein(a, shifted, n_projections=5000)
    assert found == pytest.approx(2 / np.sqrt(5), rel=0.05)
    assert metrics.sliced_wasserstein(a, a[::-1]) == pytest.approx(0)
    assert metrics.sliced_wasserstein(a, shifted, seed=1) != metrics.sliced_wasserstein(a, shifted)


@pytest.mark.parametrize("metric", ALL)
def test_distances_take_sparse_matrices_and_refuse_nonsense(rng, metric):
    a, b = rng.poisson(1.0, (20, 4)), rng.poisson(2.0, (20, 4))
    assert metric(sparse.csr_matrix(a), sparse.csc_matrix(b)) == metric(a, b)
    with pytest.raises(ValueError, match="number of features"):
        metric(a, b[:, :3])
    broken = a.astype(float)
    broken[[1, 4], 2] = np.nan
    with pytest.raises(ValueError, match="b has 2 values that are not finite"):
        metric(a, broken)
    with pytest.raises(ValueError, match="a is empty"):
        metric(a[:0], b)


def test_arguments_out_of_range_are_named(few):
    a, b = few
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        metrics.mmd(a, b, bandwidth=0)
    with pytest.raises(ValueError, match="give a bandwidth"):
        metrics.mmd(np.zeros((5, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="'fair'"):
        metrics.mmd(a, b, estimator="fair")
    with pytest.raises(ValueError, match="n_permutations"):
        metrics.mmd_test(a, b, n_permutations=0)
    with pytest.raises(ValueError, match="n_projections"):
        metrics.sliced_wasserstein(a, b, n_projections=0)
