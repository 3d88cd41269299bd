"""Outliers: conformal p-values against brute force, what they promise, and what is refused."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from faults import TINY, make_cells, refused, trained_on_all_roles, trained_on_counts, warned
from scipy import stats
from sklearn.metrics import roc_auc_score

from exprgen import NBVAE, CondVAE, ExprFlow, pl, tl
from exprgen._errors import (
    CovariateError,
    DataQualityWarning,
    GeneMismatchError,
    UnseenCategoryError,
)
from exprgen.datasets import simulate_latent
from exprgen.tl._conformal_ranks import conformal_p_values
from exprgen.tl._contrast import contrast
from exprgen.tl._tail_pvalues import tail_p_values

QUIET = {"progress_bar": False, "seed": 0}
NAMES = [f"exprgen_outlier_{name}" for name in ("pvalue", "padj", "score", "library")]


def _one_group(n, m):
    return np.zeros(n), np.zeros(m)


# P-values --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_covariates", [0, 1, 2])
def test_p_values_are_those_of_a_regression_on_all_cells(n_covariates):
    """Brute force: fit n + 1 cells anew for each query cell, and count."""
    rng = np.random.default_rng(0)
    n, m = 40, 30
    covariates = rng.normal(3, 2, (n + m, n_covariates))
    scores = rng.gamma(1, 1, (n + m, 2)) * [1, 50] + covariates.sum(1)[:, None]
    groups = rng.integers(3, size=n + m)
    parts = [part for x in (scores, covariates, groups) for part in (x[:n], x[n:])]
    found = conformal_p_values(*parts)
    for j in range(m):
        rows = [*range(n), n + j]
        a = covariates[rows]
        products = [a[:, i] * a[:, k] for i in range(n_covariates) for k in range(i + 1)]
        design = np.column_stack([np.ones(n + 1), a, *products])
        residual = scores[rows] - design @ np.linalg.lstsq(design, scores[rows], rcond=None)[0]
        total = (residual / np.sqrt(np.mean(residual**2, 0))).sum(1)
        peers = groups[:n] == groups[n + j]
        p = (1 + np.sum(total[:n][peers] >= total[n])) / (1 + peers.sum())
        assert found.p_values[j] == pytest.approx(p, abs=1e-12)


def test_the_share_of_ordinary_cells_below_a_level_is_that_level():
    """Exactly, however few and skewed; ranks among residuals of the calibration cells are not."""
    rng = np.random.default_rng(1)
    n, n_runs, level = 24, 4000, 3 / 25
    exact, naive = np.zeros(n_runs, bool), np.zeros(n_runs, bool)
    for run in range(n_runs):
        a = rng.gamma(2, 1, (n + 1, 2))
        s = a[:, :1] + rng.gamma(0.5, 1 + a[:, :1])
        found = conformal_p_values(s[:n], s[n:], a[:n], a[n:], *_one_group(n, 1))
        exact[run] = found.p_values[0] <= level + 1e-9
        above = np.sum(found.calibration_scores >= found.scores[0])
        naive[run] = (1 + above) / (n + 1) <= level + 1e-9
    low, high = stats.binom(n_runs, level).ppf([0.001, 0.999])
    assert low <= exact.sum() <= high
    assert naive.sum() > high


def test_equal_scores_are_no_outliers_and_constants_change_nothing():
    constant = np.ones((30, 1))
    found = conformal_p_values(constant, constant, constant, constant, *_one_group(30, 30))
    assert (found.p_values == 1).all()
    assert np.isfinite(found.scores).all()
    rng = np.random.default_rng(0)
    score, other = rng.normal(size=(60, 1)), rng.normal(size=(60, 2))
    with_constant = np.column_stack([other, np.full(60, 7.0), other[:, 0]])
    p_values = [
        conformal_p_values(score[:30], score[30:], a[:30], a[30:], *_one_group(30, 30)).p_values
        for a in (other, with_constant)
    ]
    np.testing.assert_array_equal(*p_values)


def test_the_answer_does_not_depend_on_how_many_cells_are_asked_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, k)) for k in (2, 2) for n in (50, 70)]
    groups = rng.integers(2, size=50), rng.integers(2, size=70)
    at_once = conformal_p_values(*parts, *groups)
    monkeypatch.setattr("exprgen.tl._conformal_ranks._BLOCK_VALUES", 100)
    np.testing.assert_array_equal(conformal_p_values(*parts, *groups).p_values, at_once.p_values)


# Cells -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left_out():
    """A model of three of four types; calibration cells, and new ones of all four types."""
    adata = simulate_latent(1400, n_vars=60, log_depth=(6.0, 0.5), seed=0)
    adata = adata[:, np.asarray(adata.X.mean(0)).ravel() > 0.1]
    new_type = (adata.obs["cell_type"] == "type_3").to_numpy()
    known = np.flatnonzero(~new_type)
    train, calibration = adata[known[:500]].copy(), adata[known[500:800]].copy()
    query = adata[np.r_[known[800:], np.flatnonzero(new_type)[:150]]].copy()
    train.obs["cell_type"] = train.obs["cell_type"].cat.remove_unused_categories()
    NBVAE.setup_anndata(train, layer="counts")
    model = NBVAE(train, seed=0, n_latent=4)
    model.train(60, progress_bar=False)
    return model, calibration, query, (query.obs["cell_type"] == "type_3").to_numpy()


def test_a_type_that_was_left_out_is_found_and_others_are_left_alone(left_out):
    model, calibration, query, is_out = left_out
    found = tl.outliers(query, model, calibration, copy=True, **QUIET).obs
    p_values = found[NAMES[0]].to_numpy()
    assert roc_auc_score(is_out, found[NAMES[2]]) > 0.9
    assert roc_auc_score(is_out, -p_values) > 0.9
    n, m = calibration.n_obs, int((~is_out).sum())
    for level in (0.01, 0.05, 0.1):
        ranks = int(level * (n + 1))
        band = stats.betabinom(m, ranks, n + 1 - ranks).ppf([0.001, 0.999])
        assert band[0] <= (p_values[~is_out] <= level).sum() <= band[1]
    adjusted = found[NAMES[1]].to_numpy()
    np.testing.assert_allclose(adjusted, stats.false_discovery_control(p_values))


def test_scores_tell_nothing_of_the_library(left_out):
    model, calibration, query, is_out = left_out
    ordinary = query[~is_out].copy()
    rho = {}
    for adjust in (True, False):
        found = tl.outliers(
            ordinary, model, calibration, score="likelihood", adjust=adjust, copy=True, **QUIET
        ).obs
        np.testing.assert_allclose(found[NAMES[3]], ordinary.layers["counts"].sum(1).A1)
        rho[adjust] = stats.spearmanr(found[NAMES[2]], found[NAMES[3]]).statistic
    assert rho[False] > 0.5
    assert abs(rho[True]) < 4 / np.sqrt(ordinary.n_obs)


def test_the_terms_are_the_bound_and_the_ratio_of_posterior_and_prior(left_out):
    model, _, query, _ = left_out
    found = model._surprise(
        query,
        ("likelihood", "latent"),
        conditions="own",
        n_samples=50,
        unseen="error",
        noise=(0, 2),
        description="",
        progress_bar=False,
    )
    bound = model.log_likelihood(query, n_samples=50, given="depth", **QUIET)
    np.testing.assert_allclose(found.terms[:, 0], -bound, rtol=0.02)
    # p(z | depth) by numbers: the joint density over its integral along one line of states.
    x, c, library = model._cells(query).tensors(slice(0, 5), torch.device("cpu"))
    space, density = model.module.space, model.module.density
    features = space.features.conditions(c)
    with torch.no_grad():
        mean, sd = space.encode(x, c, library)
        draws = density.sample(
            features.repeat_interleave(10_000, 0),
            torch.Generator().manual_seed(0),
            mean[:, -1].repeat_interleave(10_000),
        )
        near = (draws[:, :4].view(5, -1, 4) - mean[:, None, :4]) / 0.4
        share = (0.5 * -near.square()).sum(-1).exp().mean(1)  # a Gaussian kernel
        smooth = (share / (0.4 * np.sqrt(2 * np.pi)) ** 4).log()
        log_q = torch.distributions.Normal(mean, sd).log_prob(mean)[:, :4].sum(1)
    np.testing.assert_allclose(found.terms[:5, 1], (log_q - smooth).numpy(), atol=1.0)


def test_the_contrast_treats_calibration_and_other_cells_alike(left_out):
    """Which of the cells calibrate changes no score; a model's own cells have even odds."""
    model, calibration, query, is_out = left_out
    both = ad.concat([calibration, query])
    odds = np.concatenate(contrast(model, query, calibration, seed=0)[::-1])
    order = np.random.default_rng(0).permutation(both.n_obs)
    others, chosen = order[:300], order[300:]
    again = contrast(model, both[chosen].copy(), both[others].copy(), seed=0)
    np.testing.assert_allclose(np.concatenate(again[::-1]), odds[order], atol=0.05)
    of_query = odds[calibration.n_obs :]
    assert roc_auc_score(is_out, of_query) > 0.95
    ordinary = both[: calibration.n_obs + int((~is_out).sum())]
    without = np.concatenate(contrast(model, ordinary[300:], ordinary[:300], seed=0))
    assert np.std(without) < 0.5 * np.std(of_query)


def test_the_best_label_is_the_likeliest_and_needs_none(left_out):
    calibration, query = (part.copy() for part in left_out[1:3])
    train = left_out[0].adata
    NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=["cell_type"])
    model = NBVAE(train, seed=0, n_latent=2)
    model.train(5, progress_bar=False)
    options = {"n_samples": 3, "unseen": "error", "noise": (0, 2), "description": ""}
    options |= {"terms": ("likelihood", "latent"), "progress_bar": False}
    by_label = []
    for label in train.obs["cell_type"].cat.categories:
        query.obs["cell_type"] = label
        by_label.append(model._surprise(query, conditions="own", **options).terms)
    terms = np.stack(by_label)
    nearest = terms[:, :, 0].argmin(0)
    assert len(np.unique(nearest)) == 3
    query.obs["cell_type"] = "no label that training saw"
    best = model._surprise(query, conditions="best", **options).terms
    np.testing.assert_allclose(best, terms[nearest, np.arange(query.n_obs)], rtol=1e-5)
    with pytest.raises(UnseenCategoryError):
        tl.outliers(query, model, calibration, **QUIET)
    del query.obs["cell_type"]
    tl.outliers(query, model, calibration, conditions="best", **QUIET)
    assert query.uns["exprgen"]["outliers"]["conditions"] == "best"
    assert "cell_type" not in query.obs


def test_groups_have_their_own_calibration_cells(left_out):
    model, calibration, query, is_out = left_out
    query = query[~is_out].copy()
    with pytest.warns(DataQualityWarning, match=r"of group 'type_\d'.* 2\d % of all"):
        tl.outliers(query, model, calibration, groupby="cell_type", **QUIET)
    n = calibration.obs["cell_type"].astype(str).value_counts()
    for label, cells in query.obs.groupby(query.obs["cell_type"].astype(str)):
        ranks = cells[NAMES[0]] * (n[label] + 1)
        np.testing.assert_allclose(ranks, ranks.round(), atol=1e-9)
    info = query.uns["exprgen"]["outliers"]
    assert info["groupby"] == "cell_type"
    assert info["smallest_p"] == 1 / (n.max() + 1)


def test_results_survive_a_file_and_are_replaced_by_the_next(left_out, tmp_path):
    model, calibration, query, _ = left_out
    query = query.copy()
    tl.outliers(query, model, calibration, **QUIET)
    query.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    first = again.obs[NAMES].copy()
    info = again.uns["exprgen"]["outliers"]
    assert info["score"] == "combined"
    assert list(info["adjusted_for"]) == ["library", "genes detected"]
    assert len(info["calibration_score"]) == info["n_calibration"] == calibration.n_obs
    reordered = again[:, ::-1].copy()
    tl.outliers(reordered, model, calibration, **QUIET)
    pd.testing.assert_frame_equal(reordered.obs[NAMES], first, rtol=1e-4)
    tl.outliers(again, model, calibration, score="latent", **QUIET)
    assert not np.allclose(again.obs[NAMES[2]], first[NAMES[2]])


@pytest.mark.filterwarnings("ignore:1 cells of adata lie far outside")
def test_continuous_models_answer_too():
    adata = simulate_latent(260, n_vars=30, n_types=2, log_depth=(4.5, 0.3), seed=0)
    adata = adata[:, adata.X[:120].min(0).toarray()[0] == 0].copy()
    adata.layers["log"] = adata.layers["counts"].log1p()
    train, calibration, query = (
        adata[i].copy() for i in (range(120), range(120, 180), range(180, 260))
    )
    options = {"copy": True, "n_samples": 2, **QUIET}
    flow = {"density_hidden": 8, "n_latent": 2}
    for model_class, kwargs, short in (
        (CondVAE, TINY, {"max_epochs": 2}),
        (ExprFlow, flow, {"density_kwargs": {"max_epochs": 2}}),
    ):
        model_class.setup_anndata(train, layer="log")
        model = model_class(train, seed=0, **kwargs)
        model.train(**short, progress_bar=False)
        if model_class is ExprFlow:
            with refused(ValueError, "score='latent'", "gene space", "CondVAE", of=query):
                tl.outliers(query, model, calibration, score="latent", **options)
        with pytest.warns(DataQualityWarning, match="60 calibration cells"):
            found = tl.outliers(query, model, calibration, **options)
        info = found.uns["exprgen"]["outliers"]
        assert info["score"] == "combined"
        assert list(info["adjusted_for"]) == ["genes detected"]
        detected = query.layers["log"].toarray() > model.module.space.likelihood.lower.numpy()
        np.testing.assert_array_equal(found.obs["exprgen_outlier_detected"], detected.sum(1))


# What is refused -------------------------------------------------------------------------


def _cells():
    new = make_cells(400)[90:].copy()
    new.obs_names = [f"new_{i}" for i in range(new.n_obs)]
    return new[:60].copy(), new[60:].copy()


def test_what_cannot_calibrate_is_refused():
    model = trained_on_all_roles()
    query, calibration = _cells()
    trained = make_cells()
    with refused(ValueError, "calibration has 8", "trained on", "validation", of=(query, trained)):
        tl.outliers(query, model, trained, **QUIET)
    with refused(ValueError, "60 cells of adata", "'new_0'", "calibration", of=query):
        tl.outliers(query, model, query.copy(), **QUIET)
    repeats = calibration[[*range(50), 3, 4]]
    with refused(ValueError, "2 calibration cells", "more than once", "'new_63'", of=query):
        tl.outliers(query, model, repeats, **QUIET)
    for wrong in ("cells.h5ad", None):
        with refused(TypeError, "calibration= wants an AnnData", of=query):
            tl.outliers(query, model, wrong, **QUIET)
        with refused(TypeError, "adata= wants an AnnData", of=query):
            tl.outliers(wrong, model, query, **QUIET)
    with refused(ValueError, "calibration has 0 cells", "20", of=query):
        tl.outliers(query, model, calibration[:0].copy(), **QUIET)
    with refused(GeneMismatchError, "gene_0", of=query):
        tl.outliers(query, model, calibration[:, 1:].copy(), **QUIET)
    without = calibration[calibration.obs["cell_type"] != "type_1"].copy()
    with refused(ValueError, "1 groups", "'type_1'", "cell_type", of=query):
        tl.outliers(query, model, without, groupby="cell_type", **QUIET)
    without.obs["kind"] = None
    query.obs["kind"] = "a"
    with refused(CovariateError, "calibration.obs['kind']", "missing", of=query):
        tl.outliers(query, model, without, groupby="kind", **QUIET)
    with refused(KeyError, "groupby='cell_typ'", "'cell_type'", of=query):
        tl.outliers(query, model, calibration, groupby="cell_typ", **QUIET)


def test_wrong_arguments_are_refused():
    model = trained_on_counts()
    query, calibration = _cells()
    with refused(ValueError, "score", "'combined'", "'likelihood'", "'latnt'", of=query):
        tl.outliers(query, model, calibration, score="latnt", **QUIET)
    with refused(ValueError, "conditions='best'", "no categorical condition", of=query):
        tl.outliers(query, model, calibration, conditions="best", **QUIET)
    with refused(ValueError, "conditions", "'own'", of=query):
        tl.outliers(query, model, calibration, conditions="any", **QUIET)
    with refused(TypeError, "model", "AnnData", of=query):
        tl.outliers(query, calibration, model, **QUIET)
    with refused(TypeError, "adjust", of=query):
        tl.outliers(query, model, calibration, adjust="library", **QUIET)
    with refused(ValueError, "adata has no cells", of=calibration):
        tl.outliers(query[:0].copy(), model, calibration, **QUIET)
    NBVAE.setup_anndata(query)
    with refused(RuntimeError, "not trained"):
        tl.outliers(query, NBVAE(query, **TINY), calibration, **QUIET)
    taken = calibration.copy()
    taken.obs[NAMES[0]] = 1
    with refused(ValueError, "taken", "overwrite=True", of=taken):
        tl.outliers(taken, model, query, n_samples=1, **QUIET)


def test_cells_that_were_trained_on_are_warned_of():
    model = trained_on_counts()
    _, calibration = _cells()
    with warned(DataQualityWarning, "trained on 8", "of 90", "too large"):
        found = tl.outliers(make_cells(), model, calibration, n_samples=1, **QUIET)
    assert (found.obs["exprgen_split"] == "train").sum() >= 80


def test_cells_far_outside_the_calibration_cells_are_named(left_out):
    """Of an emptied and a much deeper cell p-values say nothing; of all others they do."""
    model, calibration, query, is_out = left_out
    query = query[~is_out][:60].copy()
    values = query.layers["counts"].toarray()
    values[7], values[23] = 0, 40 * values[23]
    query.layers["counts"] = values
    with warned(DataQualityWarning, "2 cells of adata", f"{query.obs_names[7]!r}", "adjust=False"):
        found = tl.outliers(query, model, calibration, score="likelihood", **QUIET).obs
    np.testing.assert_array_equal(np.flatnonzero(found["exprgen_outlier_outside"]), [7, 23])
    without = tl.outliers(
        query, model, calibration, score="likelihood", adjust=False, copy=True, **QUIET
    ).obs
    assert not without["exprgen_outlier_outside"].any()
    assert without[NAMES[0]].iloc[23] == 1 / (calibration.n_obs + 1)


def test_few_calibration_cells_are_warned_of():
    model = trained_on_counts()
    query, calibration = _cells()
    with warned(DataQualityWarning, "25 calibration cells", "0.038", "77 % of all"):
        tl.outliers(query, model, calibration[:25].copy(), n_samples=1, adjust=False, **QUIET)


# Genes -----------------------------------------------------------------------------------


def test_tail_p_values_are_ranks_among_draws():
    rng = np.random.default_rng(0)
    draws, x = rng.poisson(2, (99, 3)), rng.poisson(2, (40, 3))
    got = tail_p_values(np.sort(draws, 0), x, 0.5)
    for i, j in np.ndindex(x.shape):
        below, ties = (draws[:, j] < x[i, j]).sum(), (draws[:, j] == x[i, j]).sum()
        rank = (below + (ties + 1) / 2) / 100
        assert got[i, j] == pytest.approx(2 * min(rank, 1 - rank))
    extreme = tail_p_values(np.sort(draws, 0), np.full((1, 3), 1000), 0.5)
    np.testing.assert_allclose(extreme, 1 / 100)


def test_tail_p_values_of_the_models_own_cells_are_uniform_and_rare_values_are_seen():
    model = trained_on_counts()
    cells = model.sample(n_obs=600, seed=1, progress_bar=False)
    cells.layers["counts"] = cells.X.copy()
    options = {"n_samples": 2000, "overwrite": True, **QUIET}
    found = tl.tail_pvalues(cells, model, randomised=True, **options)
    p_values = found.layers["exprgen_tail_pvalue"]
    for level in (0.05, 0.2, 0.5):
        rate = (p_values <= level).mean(0)
        # Cells' own noise, and that of the draws they share.
        sd = np.sqrt(level * (1 - level) * (1 / 600 + 1 / 2000))
        assert np.abs(rate - level).max() < 4 * sd
    mid = tl.tail_pvalues(cells, model, copy=True, **options).layers["exprgen_tail_pvalue"]
    assert ((mid > 0) & (mid <= 1)).all()
    dense = cells.X.toarray()
    dense[3, 5] = 10_000
    spiked = ad.AnnData(dense, obs=cells.obs, var=cells.var)[:, ::-1].copy()
    genes = [model.var_names[5], model.var_names[0]]
    tl.tail_pvalues(spiked, model, genes=genes, **options)
    some = spiked.obsm["exprgen_tail_pvalue"]
    assert some[3, 0] == pytest.approx(1 / 2001)
    rest = np.arange(600) != 3
    np.testing.assert_array_equal(some[rest], mid[rest][:, [5, 0]])


def test_tail_p_values_of_rows_go_to_their_rows():
    model = trained_on_all_roles()
    cells = make_cells()[::-1].copy()
    options = {"n_samples": 50, **QUIET}
    at_once = tl.tail_pvalues(cells, model, copy=True, **options).layers["exprgen_tail_pvalue"]
    one = cells[cells.obs["cell_type"] == "type_1"].copy()
    again = tl.tail_pvalues(one, model, **options).layers["exprgen_tail_pvalue"]
    assert at_once.shape == cells.shape
    rows = (cells.obs["cell_type"] == "type_1").to_numpy()
    assert np.corrcoef(at_once[rows].ravel(), again.ravel())[0, 1] > 0.9
    with refused(KeyError, "genes are unknown", of=cells):
        tl.tail_pvalues(cells, model, genes=["gene_x"], **options)


# The picture -----------------------------------------------------------------------------


def test_the_picture_shows_all_cells(left_out):
    model, calibration, query, _ = left_out
    query = query.copy()
    with refused(KeyError, "no outliers under 'exprgen'", "tl.outliers", of=query):
        pl.outliers(query)
    tl.outliers(query, model, calibration, **QUIET)
    left, right = pl.outliers(query, n_bins=10, alpha=0.2)
    heights = left.patches[0].get_data().values
    p_values = query.obs[NAMES[0]]
    np.testing.assert_array_equal(heights, np.histogram(p_values, np.linspace(0, 1, 11))[0])
    sizes = [len(dots.get_offsets()) for dots in right.collections]
    found = (query.obs[NAMES[1]] <= 0.2).sum()
    assert sizes == [calibration.n_obs, query.n_obs - found, found]
    assert right.get_title("left").startswith(f"{found} of {query.n_obs} cells")
