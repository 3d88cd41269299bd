"""Fold changes between conditions, what their intervals hold, and ensembles of models."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import stats

import exprgen
from exprgen import tl
from exprgen._errors import GeneMismatchError
from exprgen.models._statistics import Predictive, mixture
from exprgen.tl._effect_law import LawOfChange, columns_of, law_of_change

A, B = {"cell_type": "type_0"}, {"cell_type": "type_1"}


@pytest.fixture(scope="module")
def models():
    """Three models of the same cells from different seeds."""
    adata = exprgen.datasets.simulate_nb(1200, n_vars=40, n_types=2, seed=2)
    adata.obs["donor"] = [f"d{i % 6}" for i in range(adata.n_obs)]
    trained = []
    for seed in range(3):
        exprgen.NBVAE.setup_anndata(
            adata, layer="counts", categorical_condition_keys=["cell_type"], donor_key="donor"
        )
        model = exprgen.NBVAE(adata, seed=seed, n_hidden=32, likelihood="nb")
        model.train(12, accelerator="cpu", progress_bar=False)
        trained.append(model)
    return trained


class _Fake:
    """All that the law of an effect asks of a model."""

    def __init__(self, donors=None):
        self.module = type("M", (), {"space": type("S", (), {"donors": donors})})


def test_interval_covers_what_one_more_seed_says():
    """Exactly, for normal seeds: a prediction interval of Student's t."""
    rng = np.random.default_rng(0)
    n_genes, n_models = 20_000, 4
    truth = rng.normal(0, 2, n_genes)
    said = truth + 0.3 * rng.standard_normal((n_models + 1, n_genes))
    parts = np.repeat(said[:n_models, None], 10, axis=1)
    law = law_of_change([_Fake()], parts, [np.ones(n_genes)] * 2, None, 0.1)
    table = columns_of(law, 0.0, 0.9)
    inside = (table["lower"] <= said[-1]) & (said[-1] <= table["upper"])
    assert inside.mean() == pytest.approx(0.9, abs=3 * np.sqrt(0.09 / n_genes))
    # Of no effect at all, as many p-values are below .1 as should be.
    none = law_of_change([_Fake()], parts - truth, [np.ones(n_genes)] * 2, None, 0.1)
    rejected = (columns_of(none, 0.0, 0.9)["pvals"] < 0.1).mean()
    assert rejected < 0.1  # a mean of four is surer than one more model


def test_monte_carlo_error_is_that_of_parts():
    rng = np.random.default_rng(1)
    parts = rng.normal(1, 0.5, (1, 10, 30_000))
    law = law_of_change([_Fake()], parts, [np.ones(30_000)] * 2, None, 0.1)
    assert (law.sampling**0.5).mean() == pytest.approx(0.5 / np.sqrt(10), rel=0.05)
    assert law.dof[0] == pytest.approx(9)
    table = columns_of(law, 0.0, 0.9)
    assert (table["pvals"] > 0).all()


def test_donor_term_is_the_variance_of_studies_of_other_donors(models):
    """By brute force: effects drawn for each donor from a normal law of the model's variance."""
    (model, *_), n_donors = models, 3
    table = tl.effect(model, A, B, n_donors=n_donors, seed=0).set_index("names")
    table = table.loc[model.var_names]
    rng = np.random.default_rng(0)
    tau = np.sqrt(model.module.space.donors.variance().detach().numpy())
    means = []
    for side in ("mean_a", "mean_b"):
        u = tau * rng.standard_normal((4000, n_donors, len(tau)))
        means.append(np.log2(table[side].to_numpy() * np.exp(u) + 0.1).mean(1))
    brute = (means[0] - means[1]).std(0)
    np.testing.assert_allclose(table["std_donor"], brute, rtol=0.15)
    more = tl.effect(model, A, B, n_donors=4 * n_donors, seed=0).set_index("names")
    np.testing.assert_allclose(
        more["std_donor"].loc[model.var_names], table["std_donor"] / 2, rtol=1e-6
    )


def test_donor_term_of_several_models_is_the_mean_of_theirs(models):
    options = {"n_donors": 3, "seed": 0}
    alone = [
        tl.effect(model, A, B, **options).set_index("names").loc[model.var_names, "std_donor"]
        for model in models
    ]
    together = tl.effect(models, A, B, **options).set_index("names").loc[models[0].var_names]
    variance = np.mean([std**2 for std in alone], 0)
    assert np.ptp(alone, axis=0).max() > 0.01  # they differ
    np.testing.assert_allclose(together["std_donor"], np.sqrt(variance), rtol=1e-6)
    turned = tl.effect(models[::-1], A, B, **options).set_index("names")
    np.testing.assert_allclose(
        turned["std_donor"].loc[together.index], together["std_donor"], rtol=1e-6
    )


def test_columns_of_a_known_law():
    law = LawOfChange(
        np.array([1.0, -0.2]), np.array([0.04, 0.04]), *np.zeros((2, 2)), np.full(2, 5.0)
    )
    table = columns_of(law, 0.5, 0.95)
    t = stats.t(5)
    np.testing.assert_allclose(table["upper"] - table["lower"], 2 * t.ppf(0.975) * 0.2)
    above = t.sf((0.5 - law.mean) / 0.2) + t.cdf((-0.5 - law.mean) / 0.2)
    np.testing.assert_allclose(table["probability"], above)
    p = t.sf((np.abs(law.mean) - 0.5) / 0.2) + t.sf((np.abs(law.mean) + 0.5) / 0.2)
    np.testing.assert_allclose(table["pvals"], p)
    assert (columns_of(law, 0.0, 0.95)["probability"] == 1).all()


def test_fold_changes_are_the_simulators(models):
    truth = models[0].adata.varm["proportion"]
    change = np.log2((1e4 * truth["type_0"] + 0.1) / (1e4 * truth["type_1"] + 0.1))
    table = tl.effect(models, A, B, seed=0).set_index("names").loc[models[0].var_names]
    assert np.corrcoef(change, table["logfoldchanges"])[0, 1] > 0.99
    assert np.polyfit(change, table["logfoldchanges"], 1)[0] == pytest.approx(1, abs=0.06)
    back = tl.effect(models, B, A, seed=0).set_index("names").loc[models[0].var_names]
    np.testing.assert_allclose(back["logfoldchanges"], -table["logfoldchanges"], atol=1e-6)
    np.testing.assert_allclose(back["upper"], -table["lower"], atol=1e-6)


def test_depth_is_none_of_it(models):
    """At another depth the same fold changes, where the pseudocount goes along."""
    one = tl.effect(models[0], A, B, level=None, seed=0)
    two = tl.effect(models[0], A, B, level=None, library=2e4, pseudocount=0.2, seed=0)
    np.testing.assert_allclose(one["logfoldchanges"], two["logfoldchanges"], rtol=1e-4)
    np.testing.assert_allclose(2 * one["mean_a"], two["mean_a"], rtol=1e-4)


def test_scanpy_reads_it(models):
    adata = models[0].adata[:5].copy()
    table = tl.effect(models, A, B, adata=adata, seed=0)
    tl.effect(models, A, B, adata=adata, seed=0)
    read = sc.get.rank_genes_groups_df(adata, "type_0", key="effect")
    np.testing.assert_array_equal(read["pvals_adj"], table["pvals_adj"])
    assert adata.uns["effect"]["params"]["reference"] == "type_1"


def test_an_interval_of_nothing_is_refused(models):
    with pytest.raises(ValueError, match="One model gives a fold change, and no interval"):
        tl.effect(models[0], A, B)
    table = tl.effect(models[0], A, B, level=None, seed=0)
    assert table[["pvals", "lower", "upper", "std"]].isna().all(axis=None)
    assert table["logfoldchanges"].notna().all()
    with pytest.raises(ValueError, match="the same conditions"):
        tl.effect(models, A, A)
    with pytest.raises(ValueError, match="a names a donor"):
        tl.effect(models, A | {"donor": "d1"}, B)
    with pytest.raises(ValueError, match="one row of conditions, got 2"):
        tl.effect(models, {"cell_type": ["type_0", "type_1"]}, B)
    with pytest.raises(ValueError, match="one model twice"):
        tl.effect([models[0], models[0]], A, B)
    taken = models[0].adata[:5].copy()
    taken.uns["effect"] = 1
    with pytest.raises(ValueError, match="is taken"):
        tl.effect(models, A, B, adata=taken)
    cells = models[0].adata
    with pytest.raises(GeneMismatchError, match="3 of the model's 40 genes are missing"):
        tl.effect(models, A, B, adata=cells[:, 3:].copy())
    with pytest.raises(ValueError, match="adata is a view"):
        tl.effect(models, A, B, adata=cells[:5])
    with pytest.raises(TypeError, match="wants an AnnData, got DataFrame"):
        tl.effect(models, A, B, adata=cells.obs)
    with pytest.raises(ValueError, match=r"library must lie in \(0, 1e\+15\], got 1e\+300"):
        tl.effect(models, A, B, library=1e300)
    assert "effect" not in cells.uns


# Ensembles -----------------------------------------------------------------------------------


def test_a_mixture_has_the_moments_of_its_pooled_draws():
    rng = np.random.default_rng(0)
    means, sds = np.array([[0.0, 1], [2, 1], [3, -4]]), np.array([[1.0, 2], [0.5, 1], [2, 1]])
    laws = [
        Predictive(m, 0.3 * s**2, 0.7 * s**2, None, None, rng.normal(m, s, (40_000, 2)))
        for m, s in zip(means, sds, strict=True)
    ]
    law = mixture(laws)
    np.testing.assert_allclose(law.mean, law.draws.mean(0), atol=0.03)
    total = law.decoder + law.latent + law.parameter
    np.testing.assert_allclose(total, law.draws.var(0), rtol=0.02)
    slots = law.slots((0.05, 0.95), ("low", "high"))
    np.testing.assert_allclose(slots["std"] ** 2, total)
    inside = (slots["low"] <= law.draws) & (law.draws <= slots["high"])
    np.testing.assert_allclose(inside.mean(0), 0.9, atol=1e-3)


@pytest.mark.parametrize("of", ["cell", "mean"])
def test_ensemble_is_the_law_of_total_variance_of_its_models(models, of):
    options = {"of": of, "n_cells": 30 if of == "mean" else None, "n_samples": 100, "seed": 0}
    question = {"cell_type": ["type_1", "type_0", "type_1"]}
    together = tl.predict_ensemble(models, question, **options).layers
    single = [model.predict(question, **options).layers for model in models]
    means = np.stack([layers["exprgen_mean"] for layers in single])
    within = np.mean([layers["exprgen_std"] ** 2 for layers in single], 0)
    np.testing.assert_allclose(together["exprgen_mean"], means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(together["exprgen_std_parameter"], means.std(0), atol=1e-4)
    total = within + means.var(0)
    np.testing.assert_allclose(together["exprgen_std"] ** 2, total, rtol=1e-4)
    terms = sum(together[f"exprgen_std_{term}"] ** 2 for term in ("latent", "donor", "parameter"))
    assert (terms <= total * (1 + 1e-4)).all()


def test_models_loaded_without_donors_labels_go_with_those_in_memory(models, tmp_path):
    models[1].save(tmp_path / "coded")
    mixed = [models[0], exprgen.NBVAE.load(tmp_path / "coded", adata=False)]
    options = {"n_samples": 50, "seed": 0}
    same = models[:2]
    found, expected = (tl.predict_ensemble(m, A, of="mean", **options) for m in (mixed, same))
    np.testing.assert_array_equal(found.layers["exprgen_std"], expected.layers["exprgen_std"])
    found, expected = (tl.effect(m, A, B, n_donors=2, seed=0) for m in (mixed, same))
    pd.testing.assert_frame_equal(found, expected)
    known = A | {"donor": "d1"}
    with pytest.raises(ValueError, match="Donors 'd1' are known to some of the models"):
        tl.predict_ensemble(mixed, known, **options)
    tl.predict_ensemble(same, known, **options)
    tl.predict_ensemble(mixed, A | {"donor": "someone"}, **options)


def test_ensembles_of_what_does_not_go_together_are_refused(models):
    with pytest.raises(ValueError, match="at least 2 models, got 1"):
        tl.predict_ensemble(models[:1], A)
    with pytest.raises(TypeError, match="must be a list of models"):
        tl.predict_ensemble(models[0], A)
    other = exprgen.datasets.simulate_nb(100, n_vars=39, n_types=2, seed=2)
    exprgen.NBVAE.setup_anndata(other, layer="counts", categorical_condition_keys=["cell_type"])
    fewer = exprgen.NBVAE(other, seed=9, n_hidden=8)
    with pytest.raises(RuntimeError, match="not trained"):
        tl.predict_ensemble([models[0], fewer], A)
    fewer.train(1, accelerator="cpu", progress_bar=False)
    with pytest.raises(ValueError, match="same genes"):
        tl.predict_ensemble([models[0], fewer], A)
    wider = exprgen.NBVAE(other, seed=10, n_hidden=16)
    wider.train(1, accelerator="cpu", progress_bar=False)
    with pytest.raises(ValueError, match="same n_hidden; got 8 and 16"):
        tl.predict_ensemble([fewer, wider], A)
    with pytest.raises(ValueError, match="library"):
        tl.effect(models, A, A, library=0)
