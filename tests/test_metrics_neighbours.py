"""Nearest-neighbour metrics against loops, what their papers prove, and planted copies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from exprgen import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def prdc_by_loops(synthetic, real, k):
    def distance(x, y):
        return np.sqrt(((x - y) ** 2).sum())

    def radii(cells):
        return [sorted(distance(x, y) for y in cells)[k] for x in cells]

    radius_r, radius_s = radii(real), radii(synthetic)
    precision = [
        any(distance(s, r) <= d for r, d in zip(real, radius_r, strict=True)) for s in synthetic
    ]
    recall = [
        any(distance(s, r) <= d for s, d in zip(synthetic, radius_s, strict=True)) for r in real
    ]
    density = [
        sum(distance(s, r) <= d for r, d in zip(real, radius_r, strict=True)) / k
        for s in synthetic
    ]
    coverage = [
        any(distance(s, r) <= d for s in synthetic) for r, d in zip(real, radius_r, strict=True)
    ]
    return [np.mean(of) for of in (precision, recall, density, coverage)]


@pytest.mark.parametrize(("n", "m", "k"), [(30, 30, 5), (12, 25, 1), (40, 10, 3)])
def test_prdc_is_what_loops_find(rng, n, m, k):
    synthetic, real = rng.normal(0.3, 1.4, (n, 2)), rng.normal(size=(m, 2))
    found = metrics.precision_recall_density_coverage(synthetic, real, k=k)
    np.testing.assert_allclose(found, prdc_by_loops(synthetic, real, k))


@pytest.mark.parametrize(("n", "m"), [(60, 60), (30, 90)])
def test_density_and_coverage_of_one_distribution_are_the_papers(rng, n, m):
    """Naeem et al., lemmas 1 and 2: E density = 1; E coverage as the docstring has it."""
    k = 3
    found = np.array(
        [
            metrics.precision_recall_density_coverage(
                rng.exponential(size=(n, 4)), rng.exponential(size=(m, 4)), k=k
            )
            for _ in range(200)
        ]
    )
    coverage = 1 - np.prod([(m - i) / (m + n - i) for i in range(1, k + 1)])
    error = found.std(axis=0) / np.sqrt(len(found))
    assert abs(found[:, 2].mean() - 1) < 4 * error[2]
    assert abs(found[:, 3].mean() - coverage) < 4 * error[3]


def test_prdc_of_identical_and_of_distant_cells(rng):
    real = rng.normal(size=(50, 3))
    same = metrics.precision_recall_density_coverage(real[::-1], real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    # A ball holds its own cell and k others, of which the last lies on its edge, give or take
    # rounding.
    assert 1 <= same.density <= 6 / 5
    np.testing.assert_allclose(
        metrics.precision_recall_density_coverage(real + 100, real), [0, 0, 0, 0]
    )


def test_an_outlier_fools_precision_but_not_density(rng):
    # Figure 3 of the paper: one far real cell has a ball that holds everything.
    real = rng.normal(size=(100, 2))
    real[0] = [50, 0]
    synthetic = rng.normal(size=(100, 2)) + np.array([25, 0])
    found = metrics.precision_recall_density_coverage(synthetic, real)
    assert found.precision > 0.9
    assert found.density < 0.25
    assert found.coverage < 0.05


def test_a_missing_mode_shows_in_recall_and_coverage_alone(rng):
    real = rng.normal(size=(200, 2)) + np.repeat([[0, 0], [30, 0]], 100, axis=0)
    synthetic = rng.normal(size=(200, 2))
    found = metrics.precision_recall_density_coverage(synthetic, real)
    assert found.precision > 0.9
    assert found.density > 0.8
    assert found.recall <= 0.5
    assert found.coverage <= 0.5


def test_local_mixing_is_what_loops_find(rng):
    a, b, k = rng.normal(size=(9, 2)), rng.normal(0.5, 1, size=(14, 2)), 4
    pooled, of_a = np.concatenate([a, b]), np.arange(23) < 9
    ratios = []
    for i in range(23):
        order = np.argsort(((pooled - pooled[i]) ** 2).sum(axis=1), kind="stable")
        near = [j for j in order if j != i][:k]
        ratios.append(np.mean(of_a[near] != of_a[i]) / ((14 if of_a[i] else 9) / 22))
    assert metrics.local_mixing(a, b, k=k) == pytest.approx(np.mean(ratios))


def test_local_mixing_is_one_for_one_distribution_and_zero_apart(rng):
    values = [
        metrics.local_mixing(rng.normal(size=(60, 3)), rng.normal(size=(30, 3)), k=10)
        for _ in range(100)
    ]
    assert abs(np.mean(values) - 1) < 4 * np.std(values) / 10
    a = rng.normal(size=(60, 3))
    assert metrics.local_mixing(a, a + 100, k=10) == 0


def test_neighbours_need_more_cells_than_k(rng):
    a = rng.normal(size=(5, 2))
    with pytest.raises(ValueError, match="synthetic has 5 cells; at least 6"):
        metrics.precision_recall_density_coverage(a, rng.normal(size=(9, 2)))
    with pytest.raises(ValueError, match="at least 31"):
        metrics.local_mixing(a, a)
    with pytest.raises(ValueError, match="k must be at least 1"):
        metrics.local_mixing(a, a, k=0)


def cells(rng, n):
    """Skewed and of two kinds: not a shape in which distances are known."""
    return np.exp(rng.normal(size=(n, 12))) + 5 * (rng.random((n, 1)) < 0.3)


@pytest.mark.parametrize(("n_train", "n_held_out"), [(300, 300), (1200, 300), (150, 400)])
def test_memorisation_flags_copies_and_not_honest_cells(rng, n_train, n_held_out):
    train, held_out = cells(rng, n_train), cells(rng, n_held_out)
    honest, copies = cells(rng, 400), train[rng.integers(n_train, size=400)]
    assert metrics.nearest_neighbour_ratio(honest, train, held_out) == pytest.approx(1, abs=0.06)
    assert metrics.nearest_neighbour_ratio(copies, train, held_out) < 1e-6
    noisy = copies + 0.05 * rng.normal(size=copies.shape)
    assert metrics.nearest_neighbour_ratio(noisy, train, held_out) < 0.3
    sd = np.sqrt((n_train + n_held_out + 1) / (12 * n_train * n_held_out))
    assert abs(metrics.membership_auc(honest, train, held_out) - 0.5) < 4 * sd
    share = len(np.unique(copies, axis=0)) / n_train
    copied = metrics.membership_auc(copies, train, held_out)
    # Copied training cells are always told; the others are a little farther than chance.
    assert 0.5 + share / 2 - 0.1 < copied <= 0.5 + share / 2 + 4 * sd


def test_ratio_by_loops(rng):
    synthetic, train, held_out = (rng.normal(size=(n, 2)) for n in (11, 8, 8))

    def nearest(x, among):
        return min(np.sqrt(((x - y) ** 2).sum()) for y in among)

    exact = np.median([nearest(s, train) for s in synthetic]) / np.median(
        [nearest(s, held_out) for s in synthetic]
    )
    assert metrics.nearest_neighbour_ratio(synthetic, train, held_out) == pytest.approx(exact)


def test_membership_auc_counts_pairs(rng):
    synthetic, train, held_out = (rng.normal(size=(n, 2)) for n in (11, 8, 6))
    train[:2] = synthetic[:2]
    held_out[0] = synthetic[5]  # a tie, at distance 0
    near_t, near_h = (
        np.sqrt(((x[:, None] - synthetic) ** 2).sum(axis=2)).min(axis=1) for x in (train, held_out)
    )
    pairs = [(t < h) + (t == h) / 2 for t in near_t for h in near_h]
    auc = metrics.membership_auc(synthetic, train, held_out)
    assert auc == pytest.approx(np.mean(pairs), abs=1 / 48)


def test_membership_auc_is_that_of_mann_and_whitney(rng):
    """Under no memorisation, z is standard normal."""
    z = [metrics.memorisation(*(cells(rng, n) for n in (60, 90, 40)))[0].z for _ in range(300)]
    assert stats.kstest(z, "norm").pvalue > 0.001
    assert np.std(z) == pytest.approx(1, abs=4 / np.sqrt(2 * len(z)))


def test_memorisation_names_the_copied_group_first(rng):
    groups = np.repeat(["common", "rare", "other"], [200, 40, 200])
    train, held_out, synthetic = (cells(rng, 440) for _ in range(3))
    rare = groups == "rare"
    synthetic[rare] = train[rare]
    by = dict.fromkeys(("groups_synthetic", "groups_train", "groups_held_out"), groups)
    worst, *others = metrics.memorisation(synthetic, train, held_out, **by)
    assert worst.group == "rare"
    assert worst.n == 40
    assert worst.auc == pytest.approx(1)
    assert worst.ratio < 1e-6
    assert worst.z > 5
    for honest in others:
        assert abs(honest.z) < 4
        assert honest.ratio == pytest.approx(1, abs=0.1)
    alone = metrics.memorisation(synthetic[rare], train[rare], held_out[rare])
    assert alone[0][1:] == worst[1:]


def test_memorisation_of_groups_that_are_not_everywhere(rng):
    x = rng.normal(size=(6, 2))
    groups = np.array(["a", "a", "a", "b", "b", "c"])
    found = metrics.memorisation(
        x, x + 1, x + 2, groups_synthetic=groups, groups_train=groups, groups_held_out=groups
    )
    assert {m.group for m in found} == {"a", "b"}
    with pytest.raises(ValueError, match="must be given, got None"):
        metrics.memorisation(x, x, x, groups_train=groups)
    with pytest.raises(ValueError, match="groups_train must have shape"):
        metrics.memorisation(
            x, x, x, groups_synthetic=groups, groups_train=groups[:2], groups_held_out=groups
        )
    assert np.isnan(metrics.nearest_neighbour_ratio(x, x + 1, x))
