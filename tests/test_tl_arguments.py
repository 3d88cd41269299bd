"""What tools are given: several modalities, other seeds, cells that were seen, wrong types."""

from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from faults import refused, warned
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline

import exprgen
from exprgen import pl, tl
from exprgen._errors import CovariateError, DataQualityWarning, GeneMismatchError
from exprgen.models._mudata import quietly
from exprgen.tl._classifier import fit

TEST = {"groupby": "cell_type", "n_obs": "max", "n_repeats": 1, "n_bootstrap": 100}
QUIET = {"progress_bar": False, "seed": 0}
COMPARE = {"likelihoods": ["nb"], "max_epochs": 1, "n_samples": 2, "accelerator": "cpu", **QUIET}


@pytest.fixture(scope="module")
def parts():
    """Cells of four donors to train on, few of one type among them, and cells of two others."""
    adata = exprgen.datasets.simulate_latent(500, n_vars=20, n_types=2, n_donors=6, seed=3)
    held = adata.obs["donor"].isin(["donor_4", "donor_5"]).to_numpy()
    rare = np.flatnonzero((adata.obs["cell_type"] == "type_1") & ~held)
    return adata[np.setdiff1d(np.flatnonzero(~held), rare[20:])].copy(), adata[held].copy()


def _trained(cells, seed=0, **setup):
    setup = {"categorical_condition_keys": ["cell_type"], "donor_key": "donor", **setup}
    is_one = isinstance(cells, ad.AnnData)
    set_up = exprgen.NBVAE.setup_anndata if is_one else exprgen.NBVAE.setup_mudata
    set_up(cells, layer="counts", **setup)
    model = exprgen.NBVAE(cells, seed=seed, n_hidden=8, n_latent=2)
    model.train(2, accelerator="cpu", progress_bar=False)
    return model


@pytest.fixture(scope="module")
def model(parts):
    return _trained(parts[0])


def _with_protein(rna):
    protein = ad.AnnData(np.ones((rna.n_obs, 2), np.float32), obs=rna.obs[["donor"]].copy())
    protein.var_names = ["p0", "p1"]
    cells = ad.AnnData(
        obs=rna.obs[["cell_type"]], var=pd.DataFrame(index=rna.var_names), layers=dict(rna.layers)
    )
    with quietly():
        return mudata.MuData({"rna": cells, "prot": protein})


def test_a_model_of_a_modality_takes_a_mudata(parts):
    """Conditions are in two modalities; results are those of one AnnData, and go to the one."""
    mdata, test = (_with_protein(part) for part in parts)
    model = _trained(mdata, modality="rna", donor_key="prot:donor")
    setup = {"donor_key": "prot:donor"}
    assert model.schema.donor_key == setup["donor_key"]
    renamed = [part.copy() for part in parts]
    for part in renamed:
        part.obs = part.obs.rename(columns={"donor": "prot:donor"})
    full = tl.augment(mdata, model, groupby="cell_type", n_obs=300, **QUIET)
    alone = tl.augment(renamed[0], model, groupby="cell_type", n_obs=300, **QUIET)
    assert (full.layers["counts"] != alone.layers["counts"]).nnz == 0
    assert set(full.obs["cell_type"].value_counts()) == {300}
    options = {**TEST, **QUIET, "split_key": None}
    table = tl.augmentation_test(mdata, test, model, **options)
    pd.testing.assert_frame_equal(table, tl.augmentation_test(*renamed, model, **options))
    with refused(ValueError, "trained on donors of test"):
        tl.augmentation_test(
            mdata, _known_donors(test), model, **options | {"split_key": "prot:donor"}
        )
    sides = ({"cell_type": name} for name in ("type_0", "type_1"))
    tl.effect(model, *sides, level=None, n_samples=10, adata=mdata, seed=0)
    assert "effect" in mdata["rna"].uns
    assert "effect" not in mdata.uns
    one = parts[1][(parts[1].obs["donor"] == "donor_4").to_numpy()].copy()
    sample = _with_protein(one)
    tl.nof1_de(sample, model, groupby="cell_type", inflation=1.0, n_samples=10, seed=0)
    assert "nof1" in "".join(sample["rna"].uns)


def _known_donors(test):
    with quietly():
        test = test.copy()
    test["prot"].obs["donor"] = "donor_0"
    return test


def test_a_model_of_one_anndata_refuses_a_mudata(parts, model):
    mdata = _with_protein(parts[0])
    calls = [
        lambda: tl.augment(mdata, model, groupby="cell_type"),
        lambda: tl.augmentation_test(parts[0], mdata, model, **TEST),
        lambda: tl.compare_likelihoods(mdata, **COMPARE),
        lambda: tl.effect(
            model, {"cell_type": "type_0"}, {"cell_type": "type_1"}, level=None, adata=mdata
        ),
        lambda: tl.nof1_de(mdata, model, groupby="cell_type"),
    ]
    for call in calls:
        with refused(TypeError, "wants an AnnData, got MuData", "mdata['rna']"):
            call()


def test_classifiers_without_a_seed_are_given_one(parts, model):
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(60, 5)), rng.choice(list("ab"), 60)
    forest = RandomForestClassifier(3)
    known = fit(RandomForestClassifier(3, random_state=7), values, labels, 7).predict_proba(values)
    np.testing.assert_array_equal(fit(forest, values, labels, 7).predict_proba(values), known)
    assert forest.random_state is None
    fixed = fit(RandomForestClassifier(3, random_state=7), values, labels, 8)
    np.testing.assert_array_equal(fixed.predict_proba(values), known)
    piped = fit(make_pipeline(forest), values, labels, 2**40 + 1)
    assert piped[-1].random_state == 1
    again = [
        tl.augmentation_test(*parts, model, classifier=forest, **TEST, **QUIET) for _ in range(2)
    ]
    pd.testing.assert_frame_equal(*again)


def test_a_generator_that_knows_more_than_the_classifier_is_named(parts, model):
    train, test = parts
    donors = train.obs["donor"].to_numpy()
    some = train[donors != "donor_0"].copy()
    n = int((donors == "donor_0").sum())
    with warned(DataQualityWarning, f"trained on {n} cells (of {train.n_obs})", "not in train"):
        tl.augmentation_test(some, test, model, **TEST, **QUIET)
    # Under another name a cell is not known again, which the same warning covers.
    renamed = train.copy()
    renamed.obs_names = [f"other_{i}" for i in range(train.n_obs)]
    with warned(DataQualityWarning, f"{train.n_obs} cells (of {train.n_obs})", "renamed"):
        tl.augmentation_test(renamed, test, model, **TEST, **QUIET)


def test_what_is_no_classifier_or_no_test_set(parts, model):
    train, test = parts
    for given in ("forest", RandomForestClassifier, LinearRegression(), object()):
        with refused(TypeError, "classifier must be an unfitted", "got", of=(train, test)):
            tl.augmentation_test(train, test, model, classifier=given, **TEST)
    tl.augmentation_test(*parts, model, classifier=LogisticRegression(), **TEST, **QUIET)
    with refused(GeneMismatchError, "test lacks", "and 7 more", of=(train, test)):
        tl.augmentation_test(train, test[:, :10].copy(), model, **TEST)
    one = train[(train.obs["cell_type"] == "type_0").to_numpy()].copy()
    with refused(ValueError, "has 1 labels", "two or more", of=(one, test)):
        tl.augmentation_test(one, test, model, **TEST)
    with refused(TypeError, "split_key must be the name of one column", "['donor']"):
        tl.augmentation_test(train, test, model, split_key=["donor"], **TEST)
    for name in (["cell_type"], None):
        with refused(ValueError, f"groupby={name!r} is no categorical condition", "'cell_type'"):
            tl.augment(train, model, groupby=name)


def test_likelihoods_are_compared_on_what_models_can_know(parts):
    adata = parts[0]
    for wrong in (None, "cells.h5ad"):
        with refused(TypeError, "adata= wants an AnnData", type(wrong).__name__):
            tl.compare_likelihoods(wrong, **COMPARE)
    for epochs, error in ((0, ValueError), (1.5, TypeError)):
        with refused(error, "max_epochs must be", epochs):
            tl.compare_likelihoods(adata, **COMPARE | {"max_epochs": epochs})
    with refused(TypeError, "layer must be a str"):
        tl.compare_likelihoods(adata, layer=["counts"], **COMPARE)
    conditions = {"categorical_condition_keys": ["cell_type"]}
    with refused(ValueError, "obs['cell_type'] has labels in held-out cells only", of=adata):
        tl.compare_likelihoods(
            adata, split_key="cell_type", **conditions, **COMPARE, test_size=0.5
        )
    with refused(ValueError, "obs['donor'] has labels in held-out cells only", of=adata):
        tl.compare_likelihoods(adata, split_key="donor", batch_key="donor", **COMPARE)
    with warned(DataQualityWarning, "One label of obs['donor']", "difference_se is NaN"):
        table = tl.compare_likelihoods(
            adata, split_key="donor", **COMPARE | {"likelihoods": ["nb", "poisson"]}
        )
    assert table["difference_se"].isna().all()


def test_an_ensemble_of_models_of_other_cells_is_named(parts, model):
    train, test = parts
    same, other = _trained(train.copy(), seed=1), _trained(train[5:].copy(), seed=2)
    options = {"n_samples": 5, **QUIET}
    tl.predict_ensemble([model, same], test.copy(), **options)
    with warned(DataQualityWarning, f"different cells: 5 of {train.n_obs}"):
        tl.predict_ensemble([model, other], test.copy(), **options)
    with warned(DataQualityWarning, "different cells"):
        tl.effect(
            [model, other], {"cell_type": "type_0"}, {"cell_type": "type_1"}, n_samples=10, seed=0
        )


def test_names_that_are_lists_and_results_that_are_elsewhere(parts, model):
    test = parts[1].copy()
    model.predict(test, n_samples=20, **QUIET)
    of_groups = [
        lambda: pl.calibration(test, groupby=["cell_type"]),
        lambda: pl.pit(test, groupby=["cell_type"]),
        lambda: pl.uncertainty(test, test.var_names[:1], groupby=["cell_type"]),
        lambda: pl.latent_variance(test, groupby=["cell_type"]),
        lambda: tl.outliers(test[:20], model, test[20:], groupby=["cell_type"]),
    ]
    for call in of_groups:
        with refused(TypeError, "groupby must be the name of one column of adata.obs", of=test):
            call()
    with refused(TypeError, "layer must be a str", of=test):
        tl.conformalize(test, test, layer=["counts"])
    with refused(TypeError, "key must be the key_added", of=test):
        pl.calibration(test, key=["exprgen"])
    with refused(TypeError, "seed must be an integer", of=test):
        pl.pit(test, seed="x")
    with refused(TypeError, "genes must be a list of names, got 3", of=test):
        tl.tail_pvalues(test, model, genes=3, n_samples=2)
    with refused(TypeError, "adata= wants an AnnData, got NoneType"):
        tl.tail_pvalues(None, model, n_samples=2)
    for name in ("copy", "overwrite"):
        with refused(TypeError, f"{name} must be True or False", of=test):
            model.predict(test, n_samples=2, **QUIET, **{name: "no"})
    with refused(TypeError, "adata=...", "wants an AnnData, got str"):
        tl.effect(model, {"cell_type": "type_0"}, {"cell_type": "type_1"}, level=None, adata="x")
    gaps = test.copy()
    gaps.obs["cell_type"] = gaps.obs["cell_type"].where(np.arange(gaps.n_obs) > 2)
    with refused(CovariateError, "adata.obs['cell_type'] (groupby) has 3 missing", of=gaps):
        pl.uncertainty(gaps, gaps.var_names[:1], groupby="cell_type")
