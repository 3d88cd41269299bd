"""What metrics take for numbers and labels, and what they refuse by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from exprgen import metrics as m

A, B = np.random.default_rng(0).poisson(3, (2, 40, 6))
GROUPS = np.repeat(["a", "b"], 20)
BOTH = {"groups_synthetic": GROUPS, "groups_real": GROUPS}
THREE = {"groups_synthetic": GROUPS, "groups_a": GROUPS, "groups_b": GROUPS}

CALLS = {
    "log_cp10k": m.log_cp10k,
    "quality_features": m.quality_features,
    "pooled_pcs": lambda a: m.pooled_pcs(a, B),
    "energy_distance": lambda a: m.energy_distance(a, B),
    "zero_fraction_difference": lambda a: m.zero_fraction_difference(a, B),
    "variance_ratio": lambda a: m.variance_ratio(a, B),
    "log_total_ratio": lambda a: m.log_total_ratio(a, B),
    "log_fold_changes": lambda a: m.log_fold_changes(a, GROUPS, "a"),
    "fold_change_slope": lambda a: m.fold_change_slope(a, B, A, **THREE),
    "de_overlap": lambda a: m.de_overlap(a, B, **BOTH),
    "train_on_synthetic_f1": lambda a: m.train_on_synthetic_f1(a, GROUPS, B, GROUPS),
    "coverage": lambda a: m.coverage(B - 5, B + 5, a),
    "interval_score": lambda a: m.interval_score(B - 5, B + 5, a, alpha=0.1),
    "sharpness": lambda a: m.sharpness(a, np.full_like(B, 99)),
    "pit": lambda a: m.pit(np.stack([B, A]), a),
    "crps": lambda a: m.crps(np.stack([B, A]), a),
}
CALIBRATION = {"coverage", "interval_score", "sharpness", "pit", "crps"}


def _array(found):
    found = found.toarray() if sparse.issparse(found) else found
    return np.concatenate([np.ravel(part) for part in np.atleast_1d(found)])


@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_the_same_in_any_form(name):
    exact = _array(CALLS[name](A.astype(float)))
    forms = [A.astype(np.uint8), A.astype(np.float16), A.tolist(), pd.DataFrame(A)]
    forms += [sparse.csc_array(A), sparse.coo_matrix(A)]
    for form in forms:
        np.testing.assert_allclose(_array(CALLS[name](form)), exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_sample_is_refused(name):
    call = CALLS[name]
    broken = A.astype(float)
    broken[3, 1] = np.nan
    for wrong in (broken, sparse.csr_matrix(broken)):
        with pytest.raises(ValueError, match="has 1 values that are not finite"):
            call(wrong)
    with pytest.raises(ValueError, match="is empty, of shape"):
        call(A[:0])
    for nothing in (A.astype(str), None):
        with pytest.raises(TypeError, match="must be an array of numbers"):
            call(nothing)
    if name not in CALIBRATION:
        with pytest.raises(ValueError, match=r"must have shape \(n_obs, n_vars\), got \(40,\)"):
            call(A[:, 0])


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, bool])
def test_differences_of_whole_numbers_do_not_wrap(kind):
    samples, x = np.array([[[1], [5]], [[3], [5]]], kind), np.array([[2], [7]], kind)
    assert m.crps(samples, x) == m.crps(samples.astype(float), x.astype(float))


def test_genes_are_not_broadcast():
    with pytest.raises(ValueError, match=r"\(synthetic: 6, real: 1\)"):
        m.zero_fraction_difference(A, B[:, :1])
    with pytest.raises(ValueError, match=r"\(a: 6, b: 1\)"):
        m.pooled_pcs(A, B[:, :1])


@pytest.mark.parametrize("name", ["log_cp10k", "quality_features", "log_total_ratio"])
def test_counts_are_not_negative(name):
    with pytest.raises(ValueError, match="must be counts, but 1 values are negative"):
        CALLS[name](np.where(np.arange(A.size).reshape(A.shape) == 7, -1, A))


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
def test_labels_are_never_missing(missing):
    labels = ["a"] * 20 + [missing] * 20
    calls = [
        lambda g: m.train_on_synthetic_f1(A, g, B, GROUPS),
        lambda g: m.log_fold_changes(A, g, "a"),
        lambda g: m.fold_change_slope(A, B, A, **THREE | {"groups_a": g}),
        lambda g: m.de_overlap(A, B, **BOTH | {"groups_real": g}),
        lambda g: m.variance_ratio(A, B, **BOTH | {"groups_real": g}),
        lambda g: m.memorisation(
            A, B, A, groups_synthetic=GROUPS, groups_train=g, groups_held_out=GROUPS
        ),
    ]
    for call in calls:
        for given in (labels, np.array(labels, dtype=object), pd.Categorical(labels)):
            with pytest.raises(ValueError, match=r"has 20 missing labels \(first: cell 20\)"):
                call(given)
        with pytest.raises(ValueError, match="must be given, got None; give the labels"):
            call(None)


def test_numbers_of_things_are_whole_and_large_enough():
    for n_genes, error in ((-3, ValueError), (2, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="n_genes must be"):
            m.gene_correlation_agreement(A, B, n_genes=n_genes)
    with pytest.raises(ValueError, match="n_pcs must be at least 1"):
        m.pooled_pcs(A, B, n_pcs=0)
    with pytest.raises(ValueError, match="n_folds must be at least 2"):
        m.c2st_auc(A, B, n_folds=1)


def test_cells_that_are_all_alike_have_no_components():
    assert not np.any(m.pooled_pcs(np.ones((9, 4)), np.ones((9, 4))))
    assert np.isnan(m.variance_ratio(np.ones((9, 4)), np.ones((9, 4))))
