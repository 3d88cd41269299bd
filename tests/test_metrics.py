"""Metrics against closed forms, brute force and scanpy."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse, stats

from exprgen import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("shift", [0.0, 0.8, 2.0])
def test_logistic_auc_of_two_gaussians(rng, shift):
    a, b = rng.normal(shift, 1, (3000, 1)), rng.normal(0, 1, (3000, 1))
    exact = stats.norm.cdf(shift / np.sqrt(2))
    auc = metrics.c2st_auc(a, b, classifier="logistic")
    assert auc == pytest.approx(exact, abs=0.025)


def test_forest_sees_a_correlation_that_logistic_regression_misses(rng):
    covariance = [[1, 0.9], [0.9, 1]]
    a = rng.multivariate_normal([0, 0], covariance, 500)
    b = rng.normal(size=(500, 2))
    assert metrics.c2st_auc(a, b) > 0.7
    assert metrics.c2st_auc(a, b, classifier="logistic") == pytest.approx(0.5, abs=0.06)


def test_auc_is_seeded_and_takes_sparse_matrices(rng):
    a, b = rng.poisson(1, (40, 6)).astype(np.float32), rng.poisson(1, (40, 6)).astype(np.float32)
    auc = metrics.c2st_auc(a, b, seed=3)
    assert auc == metrics.c2st_auc(sparse.csr_matrix(a), sparse.csr_matrix(b), seed=3)
    assert auc != metrics.c2st_auc(a, b, seed=4)


def test_auc_refuses_what_it_cannot_compare(rng):
    a = rng.normal(size=(20, 3))
    with pytest.raises(ValueError, match="features"):
        metrics.c2st_auc(a, a[:, :2])
    with pytest.raises(ValueError, match="n_folds"):
        metrics.c2st_auc(a, a[:4])
    with pytest.raises(ValueError, match="'svm'"):
        metrics.c2st_auc(a, a, classifier="svm")


def test_forests_on_threads_are_the_same(rng):
    a, b = rng.normal(size=(30, 3)), rng.normal(1, 1, size=(30, 3))
    assert metrics.c2st_auc(a, b, n_jobs=2) == metrics.c2st_auc(a, b)


@pytest.mark.parametrize(
    "metric",
    [
        metrics.c2st_auc,
        metrics.variance_ratio,
        metrics.mean_correlation,
        metrics.gene_correlation_agreement,
        metrics.moment_agreement,
        partial(metrics.de_overlap, groups_synthetic=np.arange(40) % 2, groups_real=[0, 1] * 20),
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(rng, metric):
    a, b = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    b[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"(b|real) has 1 values that are not finite"):
        metric(sparse.csr_matrix(a), sparse.csr_matrix(b))


def test_log_cp10k_is_scanpys(pbmc):
    import scanpy as sc

    counts = pbmc.X.copy()
    values = metrics.log_cp10k(counts)
    np.testing.assert_allclose(values.toarray(), metrics.log_cp10k(counts.toarray()), rtol=1e-6)
    np.testing.assert_array_equal(counts.toarray(), pbmc.layers["counts"].toarray())
    sc.pp.normalize_total(pbmc, target_sum=1e4)
    sc.pp.log1p(pbmc)
    np.testing.assert_allclose(values.toarray(), pbmc.X.toarray(), rtol=1e-4)
    assert not metrics.log_cp10k(np.zeros((2, 3))).any()


def test_pooled_pcs_are_those_of_both_samples_together(rng):
    a, b = rng.normal(size=(30, 8)), rng.normal(1, 1, size=(20, 8))
    pcs_a, pcs_b = metrics.pooled_pcs(a, b, n_pcs=3)
    pooled = np.concatenate([a, b])
    u, s, _ = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.concatenate([pcs_a, pcs_b])), np.abs(u * s)[:, :3])
    assert metrics.pooled_pcs(a, b)[0].shape == (30, 8)


def test_quality_features_by_hand():
    counts = np.zeros((3, 40))
    counts[0, :30] = 1
    counts[0, 0] = 5
    counts[1, 3] = 2
    expected = [[34, 30, 24 / 34, 5, 29 / 30], [2, 1, 1, 2, 0], [0, 0, 0, 0, 0]]
    for form in (counts, sparse.csr_matrix(counts), sparse.csc_matrix(counts)):
        np.testing.assert_allclose(metrics.quality_features(form), expected)
    explicit = sparse.csr_matrix(counts)
    explicit.data[0] = 0  # a stored zero is a zero
    assert metrics.quality_features(explicit)[0, 1] == 29
    assert len(metrics.QUALITY_FEATURES) == 5


def test_variance_ratio_scales_within_groups(rng):
    real = rng.normal(size=(60, 5))
    groups = np.repeat(["a", "b"], 30)
    shift = np.where(groups == "a", 0, 50)[:, None]
    ratio = metrics.variance_ratio(
        2 * real + shift, real, groups_synthetic=groups, groups_real=groups
    )
    assert ratio == pytest.approx(4)
    assert metrics.variance_ratio(2 * real + shift, real) > 100
    constant = np.column_stack([real, np.ones(60)])
    assert metrics.variance_ratio(constant, constant) == pytest.approx(1)


def test_groups_without_two_cells_on_both_sides_do_not_count(rng):
    real = rng.normal(size=(5, 3))
    groups_real = np.array(["a", "a", "a", "b", "c"])
    groups_synthetic = np.array(["a", "a", "a", "c", "c"])
    ratio = metrics.variance_ratio(
        real, real, groups_synthetic=groups_synthetic, groups_real=groups_real
    )
    assert ratio == pytest.approx(1)
    with pytest.raises(ValueError, match="two cells"):
        metrics.variance_ratio(real[:1], real)
    with pytest.raises(ValueError, match="groups_synthetic must be given, got None"):
        metrics.variance_ratio(real, real, groups_real=groups_real)


def test_mean_correlation_by_hand(rng):
    real, synthetic = rng.normal(size=(40, 7)), rng.normal(size=(30, 7))
    exact = np.corrcoef(real.mean(axis=0), synthetic.mean(axis=0))[0, 1]
    assert metrics.mean_correlation(synthetic, real) == pytest.approx(exact)
    assert metrics.mean_correlation(3 * real - 1, real) == pytest.approx(1)


def test_zero_fraction_difference_by_hand():
    real, synthetic = np.array([[0, 1], [0, 2]]), np.array([[0, 0], [3, 1]])
    assert metrics.zero_fraction_difference(synthetic, real) == pytest.approx(0.5)
    assert metrics.zero_fraction_difference(sparse.csr_matrix(real), real) == 0


def test_gene_correlation_tells_structure_from_none(rng):
    loading = rng.normal(size=(2, 12))
    groups = np.repeat(["a", "b"], 2000)
    shift = np.where(groups == "a", -3, 3)[:, None] * rng.normal(size=12)

    def cells():
        return rng.normal(size=(4000, 2)) @ loading + rng.normal(size=(4000, 12)) + shift

    real, same = cells(), cells()
    shuffled = same.copy()
    for group in ("a", "b"):
        rows = np.flatnonzero(groups == group)
        for gene in range(12):
            shuffled[rows, gene] = shuffled[rng.permutation(rows), gene]
    by = {"groups_synthetic": groups, "groups_real": groups}
    assert metrics.gene_correlation_agreement(same, real, **by) > 0.99
    assert abs(metrics.gene_correlation_agreement(shuffled, real, **by)) < 0.3
    # Without the groups, the distance between them passes for structure.
    assert metrics.gene_correlation_agreement(shuffled, real) > 0.8


def test_coverage_is_closed():
    lower, upper = np.array([0, 1, 5]), np.array([0, 3, 6])
    assert metrics.coverage(lower, upper, np.array([0, 3, 7])) == pytest.approx(2 / 3)
    x = stats.nbinom.rvs(2, 0.3, size=20_000, random_state=0)
    low, high = stats.nbinom.ppf([0.05, 0.95], 2, 0.3)
    exact = stats.nbinom.cdf(high, 2, 0.3) - stats.nbinom.cdf(low - 1, 2, 0.3)
    assert metrics.coverage(low, high, x) == pytest.approx(exact, abs=0.01)
    with pytest.raises(ValueError, match="1 of 3"):
        metrics.coverage(lower, np.array([0, 0, 6]), lower)


def test_docs_list_every_metric():
    api = (Path(__file__).resolve().parents[1] / "docs" / "api.md").read_text("utf-8")
    section = api.split("\n## Metrics\n")[1].split("\n## ")[0]
    listed = re.findall(r"^   (\w+)$", section, re.MULTILINE)
    assert sorted(listed) == sorted(metrics.__all__)
