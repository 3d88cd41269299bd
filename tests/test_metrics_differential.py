"""Differences between groups against SciPy, brute force and simulated truths; TSTR."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from exprgen import metrics

GROUPS = np.repeat(["a", "b", "c"], [40, 60, 100])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def cells(rng, effect, *, noise=1.0, groups=GROUPS):
    """Gaussian values around one mean profile per group."""
    names = np.unique(groups)
    means = effect[: len(names)][np.searchsorted(names, groups)]
    return means + noise * rng.normal(size=means.shape)


def test_log_fold_changes_by_hand():
    values = np.array([[1.0, 0], [3, 0], [1, 1], [0, 5]])
    groups = np.array(["a", "a", "b", "c"])
    for form in (values, sparse.csr_matrix(values), sparse.csc_matrix(values)):
        np.testing.assert_allclose(metrics.log_fold_changes(form, groups, "a"), [1.5, -3])
        np.testing.assert_allclose(
            metrics.log_fold_changes(form, groups, "c"), [-5 / 3, 5 - 1 / 3]
        )
    for group, n in (("z", 0), ("a", 4)):
        with pytest.raises(ValueError, match=f"has {n} of the 4"):
            metrics.log_fold_changes(values, np.where(n, "a", groups), group)


@pytest.mark.parametrize("attenuation", [1.0, 0.5, 1.3])
def test_slope_is_free_of_noise(rng, attenuation):
    """Noise as large as the effect: an ordinary slope would read a half of the truth."""
    effect = 0.2 * rng.normal(size=(3, 200))
    slopes, ordinary = [], []
    by = {"groups_synthetic": GROUPS, "groups_a": GROUPS, "groups_b": GROUPS}
    for _ in range(60):
        s, a, b = (cells(rng, x * effect) for x in (attenuation, 1, 1))
        slopes.append(metrics.fold_change_slope(s, a, b, **by))
        x, y = (metrics.log_fold_changes(v, GROUPS, "a") for v in (b, s))
        ordinary.append(np.cov(x, y)[0, 1] / np.var(x, ddof=1))
    error = np.std(slopes) / np.sqrt(len(slopes))
    assert error < 0.02
    # The ratio of two estimates is biased by the square of its relative noise, of this order.
    assert np.mean(slopes) == pytest.approx(attenuation, abs=4 * error + 0.02)
    assert np.mean(ordinary) < 0.75 * attenuation


def test_slopes_are_ratios_of_covariances(rng):
    effect = rng.normal(size=(3, 30))
    s, a, b = (cells(rng, effect) for _ in range(3))
    by = {"groups_synthetic": GROUPS, "groups_a": GROUPS, "groups_b": GROUPS}
    slopes = metrics.fold_change_slopes(sparse.csr_matrix(s), a, b, **by)
    for group in "abc":
        x, y, z = (metrics.log_fold_changes(v, GROUPS, group) for v in (s, a, b))
        assert slopes[group] == pytest.approx(np.cov(x, z)[0, 1] / np.cov(y, z)[0, 1])
    found = metrics.fold_change_slope(s, a, b, **by)
    assert found == pytest.approx(np.mean(list(slopes.values())))
    without_a = metrics.fold_change_slope(s, a, b, **by, min_cells=41)
    assert without_a == pytest.approx((slopes["b"] + slopes["c"]) / 2)
    assert np.isnan(metrics.fold_change_slope(s, a, b, **by, min_cells=101))


def test_a_group_that_one_sample_lacks_is_left_out_of_all(rng):
    effect = rng.normal(size=(3, 30))
    s, a, b = (cells(rng, effect) for _ in range(3))
    two = GROUPS != "c"
    by = {"groups_a": GROUPS, "groups_b": GROUPS}
    found = metrics.fold_change_slopes(s[two], a, b, groups_synthetic=GROUPS[two], **by)
    expected = metrics.fold_change_slopes(
        s[two], a[two], b[two],
        groups_synthetic=GROUPS[two], groups_a=GROUPS[two], groups_b=GROUPS[two],
    )  # fmt: skip
    assert found == pytest.approx(expected)
    one = GROUPS == "a"
    alone = {"groups_synthetic": GROUPS[one]}
    assert metrics.fold_change_slopes(s[one], a, b, **alone, **by) == {}
    assert np.isnan(metrics.fold_change_slope(s[one], a, b, **alone, **by))
    real = {"groups_real": GROUPS}
    assert np.isnan(metrics.fold_change_rank_correlation(s[one], a, **alone, **real))
    assert np.isnan(metrics.de_overlap(s[one], a, **alone, **real))
    with pytest.raises(ValueError, match="No group has at least two cells"):
        metrics.de_overlap(s, a, groups_synthetic=np.full(200, "z"), **real)


def test_rank_correlation_is_scipys(rng):
    s, r = (np.round(cells(rng, rng.normal(size=(3, 30))), 1) for _ in range(2))
    exact = np.mean(
        [
            stats.spearmanr(*(metrics.log_fold_changes(v, GROUPS, g) for v in (s, r))).statistic
            for g in "abc"
        ]
    )
    by = {"groups_synthetic": GROUPS, "groups_real": GROUPS}
    assert metrics.fold_change_rank_correlation(s, r, **by) == pytest.approx(exact)
    # Ranks do not see attenuation, the slope does.
    assert metrics.fold_change_rank_correlation(r / 2, r, **by) == pytest.approx(1)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_overlap_is_that_of_scipys_welch_tests(rng, form):
    effect = 0.3 * rng.normal(size=(3, 60))
    s, r = cells(rng, effect, noise=2), cells(rng, effect)

    def top(values, group):
        of = group == GROUPS
        t = stats.ttest_ind(values[of], values[~of], equal_var=False).statistic
        return set(np.argsort(-np.abs(t))[:10].tolist())

    exact = np.mean([len(top(s, g) & top(r, g)) / len(top(s, g) | top(r, g)) for g in "abc"])
    by = {"groups_synthetic": GROUPS, "groups_real": GROUPS, "n_genes": 10}
    assert 0.1 < exact < 0.9
    assert metrics.de_overlap(form(s), form(r), **by) == pytest.approx(exact)
    assert metrics.de_overlap(r, r, **by) == 1


def test_genes_without_variance_do_not_break_the_overlap(rng):
    r = cells(rng, rng.normal(size=(3, 12)))
    r[:, 0] = 0  # never seen
    r[:, 1] = GROUPS == "a"  # in every cell of one group, and nowhere else
    by = {"groups_synthetic": GROUPS, "groups_real": GROUPS}
    assert metrics.de_overlap(r, r, **by, n_genes=1) == 1
    other = r.copy()
    other[:, 1] = 0
    assert metrics.de_overlap(other, r, **by, n_genes=1) < 1


def test_differences_refuse_what_does_not_fit(rng):
    r = cells(rng, np.zeros((3, 8)))
    by = {"groups_synthetic": GROUPS, "groups_real": GROUPS}
    with pytest.raises(ValueError, match="number of features"):
        metrics.de_overlap(r[:, :5], r, **by)
    with pytest.raises(ValueError, match=r"groups_real must have shape \(200,\)"):
        metrics.de_overlap(r, r, groups_synthetic=GROUPS, groups_real=GROUPS[:-1])
    with pytest.raises(ValueError, match="n_genes"):
        metrics.de_overlap(r, r, **by, n_genes=0)


def test_training_on_synthetic_cells(rng):
    effect = rng.normal(size=(3, 20))
    train, test = cells(rng, effect), cells(rng, effect)
    real = metrics.train_on_synthetic_f1(train, GROUPS, test, GROUPS)
    assert real > 0.95
    # Swapped names: every prediction is wrong, except among "c".
    swapped = np.select([GROUPS == "a", GROUPS == "b"], ["b", "a"], "c")
    assert metrics.train_on_synthetic_f1(train, swapped, test, GROUPS) == pytest.approx(
        1 / 3, abs=0.05
    )
    shuffled = metrics.train_on_synthetic_f1(train, rng.permutation(GROUPS), test, GROUPS)
    assert shuffled < 0.55
    found = metrics.train_on_synthetic_f1(sparse.csr_matrix(train), GROUPS, test, GROUPS, seed=1)
    assert found == pytest.approx(real, abs=1e-6)


def test_labels_that_synthetic_cells_lack_count_nothing(rng):
    effect = 3 * rng.normal(size=(3, 20))
    train, test = cells(rng, effect), cells(rng, effect)
    one, two = GROUPS == "c", GROUPS != "b"
    # All are called "c", 100 of 200 rightly: F1 = 2 * .5 * 1 / 1.5, and 0 for the others.
    found = metrics.train_on_synthetic_f1(train[one], GROUPS[one], test, GROUPS)
    assert found == pytest.approx(2 / 9)
    assert metrics.train_on_synthetic_f1(train[two], GROUPS[two], test, GROUPS) < 2 / 3
    with pytest.raises(ValueError, match="labels_test must have shape"):
        metrics.train_on_synthetic_f1(train, GROUPS, test, GROUPS[:3])
