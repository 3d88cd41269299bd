"""Agreement of gene-wise moments and of depth, by hand and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from exprgen import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def lin(x, y):
    """Lin's definition, term by term."""
    covariance = np.cov(x, y, bias=True)
    return (
        2
        * covariance[0, 1]
        / (covariance[0, 0] + covariance[1, 1] + (np.mean(x) - np.mean(y)) ** 2)
    )


def test_moment_agreement_by_hand(rng):
    groups = np.repeat(["a", "b"], [30, 10])
    s, r = (rng.poisson(rng.gamma(1, 1, size=12), size=(40, 12)).astype(float) for _ in range(2))
    found = metrics.moment_agreement(
        sparse.csr_matrix(s), r, groups_synthetic=groups, groups_real=groups
    )
    exact = np.zeros(3)
    for group, weight in (("a", 0.75), ("b", 0.25)):
        x, y = s[groups == group], r[groups == group]
        exact += weight * np.array(
            [
                lin(x.mean(axis=0), y.mean(axis=0)),
                lin(x.std(axis=0, ddof=1), y.std(axis=0, ddof=1)),
                lin((x == 0).mean(axis=0), (y == 0).mean(axis=0)),
            ]
        )
    np.testing.assert_allclose(found, exact)


def test_each_moment_has_its_failure(rng):
    rate = rng.gamma(2, 2, size=40)
    real = rng.poisson(rate, size=(300, 40)).astype(float)
    np.testing.assert_allclose(metrics.moment_agreement(real[::-1], real), 1)
    # Means are drawn instead of cells: the spread is gone, and every zero.
    means = metrics.moment_agreement(real.mean(axis=0) + 1e-3 * rng.normal(size=real.shape), real)
    assert means.mean > 0.99
    assert means.sd < 0.05
    assert means.zero_fraction < 0.2
    # Twice as high: perfectly correlated, not concordant.
    assert metrics.mean_correlation(2 * real, real) == pytest.approx(1)
    assert metrics.moment_agreement(2 * real, real).mean < 0.7
    shuffled = metrics.moment_agreement(real[:, rng.permutation(40)], real)
    assert max(shuffled) < 0.5


def test_log_total_ratio_by_hand(rng):
    groups = np.repeat(["a", "b"], [30, 10])
    s, r = rng.poisson(3, size=(40, 6)), rng.poisson(4, size=(40, 6))
    of_s, of_r = (
        sum(
            n * np.log1p(x[groups == g].sum(axis=1)).var(ddof=1) for g, n in (("a", 30), ("b", 10))
        )
        for x in (s, r)
    )
    by = {"groups_synthetic": groups, "groups_real": groups}
    assert metrics.log_total_ratio(s, r, **by) == pytest.approx(of_s / of_r)
    assert metrics.log_total_ratio(sparse.csr_matrix(s), sparse.csc_matrix(r), **by) == (
        pytest.approx(of_s / of_r)
    )


def test_log_total_ratio_sees_depth_within_groups_alone(rng):
    groups = np.repeat(["a", "b"], 2000)
    between = np.where(groups == "a", 1, 4)[:, None]

    def counts(sd):
        depth = np.exp(sd * rng.normal(size=(4000, 1)))
        return rng.poisson(100 * depth * between, size=(4000, 10))

    by = {"groups_synthetic": groups, "groups_real": groups}
    # Poisson noise of totals of about 1,000 and 4,000 adds next to nothing to .25.
    assert metrics.log_total_ratio(counts(0.25), counts(0.5), **by) == pytest.approx(0.25, rel=0.1)
    assert metrics.log_total_ratio(counts(0.25), counts(0.5)) > 0.5
    assert np.isnan(metrics.log_total_ratio(counts(0.1), np.ones((4000, 10)), **by))


def test_moments_refuse_other_genes(rng):
    real = rng.normal(size=(9, 4))
    for metric in (
        metrics.moment_agreement,
        metrics.variance_ratio,
        metrics.mean_correlation,
        metrics.gene_correlation_agreement,
    ):
        with pytest.raises(ValueError, match="synthetic: 3, real: 4"):
            metric(real[:, :3], real)
