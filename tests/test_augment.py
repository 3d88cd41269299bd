"""Filling up rare groups, and whether that helps: the test itself must be able to say no."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import f1_score

import exprgen
from exprgen import tl
from exprgen._errors import CovariateError, ReproducibilityWarning
from exprgen.tl._augment import shortages
from exprgen.tl._paired_bootstrap import compared, f1_of_draws, weights_of_units


@pytest.fixture(scope="module")
def cells():
    """A rare type of 15 cells among two common ones; test cells; a model of the former."""
    adata = exprgen.datasets.simulate_latent(1200, n_vars=40, n_types=3, n_donors=6, seed=3)
    held = adata.obs["donor"].isin(["donor_4", "donor_5"]).to_numpy()
    rare = np.flatnonzero((adata.obs["cell_type"] == "type_2") & ~held)
    train = adata[np.setdiff1d(np.flatnonzero(~held), rare[15:])].copy()
    exprgen.NBVAE.setup_anndata(
        train, layer="counts", categorical_condition_keys=["cell_type"], donor_key="donor"
    )
    model = exprgen.NBVAE(train, seed=0, n_hidden=32)
    model.train(12, accelerator="cpu", progress_bar=False)
    return train, adata[held].copy(), model


def test_groups_are_filled_and_real_cells_kept(cells, tmp_path):
    train, _, model = cells
    full = tl.augment(train, model, groupby="cell_type", n_obs="max", seed=0)
    sizes = full.obs["cell_type"].value_counts()
    assert set(sizes) == {train.obs["cell_type"].value_counts().max()}
    real = full[~full.obs["synthetic"]]
    assert real.obs_names.tolist() == train.obs_names.tolist()
    assert (real.layers["counts"] != train.layers["counts"]).nnz == 0
    added = full[full.obs["synthetic"]]
    assert set(added.obs["donor"]) <= set(train.obs["donor"])
    counts = added.layers["counts"].toarray()
    assert (counts == np.rint(counts)).all()
    # Drawn cells have the mean of their type's real cells, up to what 15 of these say.
    of_type = added.obs["cell_type"] == "type_1"
    means = [
        np.log1p(part[(part.obs["cell_type"] == "type_1").to_numpy()].layers["counts"].mean(0))
        for part in (added, train)
    ]
    assert of_type.any()
    assert np.corrcoef(np.asarray(means[0]).ravel(), np.asarray(means[1]).ravel())[0, 1] > 0.95
    again = tl.augment(train, model, groupby="cell_type", n_obs="max", seed=0)
    assert (again.layers["counts"] != full.layers["counts"]).nnz == 0
    full.write_h5ad(tmp_path / "full.h5ad")
    assert ad.read_h5ad(tmp_path / "full.h5ad").n_obs == full.n_obs


def test_cells_drawn_for_another_donor_do_not_bear_a_real_ones_name(cells, tmp_path):
    train, test, model = cells
    options = {"groupby": "cell_type", "n_obs": "max", "progress_bar": False, "seed": 0}

    def donors_of(adata, model):
        full = tl.augment(adata, model, **options)
        return set(full.obs.loc[full.obs["synthetic"], "donor"])

    model.save(tmp_path / "coded")
    coded = exprgen.NBVAE.load(tmp_path / "coded", adata=False)
    real = set(train.obs["donor"])
    assert donors_of(train, coded) == {f"new_donor_{i}" for i in range(len(real))}
    # Of a model in memory those donors that it was not trained on.
    both = ad.concat([train, test])
    both.obs["donor"] = both.obs["donor"].cat.rename_categories({"donor_5": "new_donor_0"})
    found = donors_of(both, model)
    assert found == real | {"new_donor_1", "new_donor_2"}
    with (
        pytest.warns(ReproducibilityWarning, match="No cell of test was in its training"),
        pytest.raises(ValueError, match="test has 2 donor"),
    ):
        tl.augmentation_test(train, test, coded, split_key="donor", **options)
    model.save(tmp_path / "named", donor_labels=True)
    named = exprgen.NBVAE.load(tmp_path / "named", adata=False)
    first, second = (tl.augment(train, one, **options) for one in (model, named))
    assert (first.X != second.X).nnz == 0
    assert first.obs["donor"].tolist() == second.obs["donor"].tolist()
    alike = train.copy()
    alike.obs["donor"] = alike.obs["donor"].astype(str).where(np.arange(train.n_obs) > 3)
    with pytest.raises(CovariateError, match="missing value"):
        tl.augment(alike, model, **options)


def test_sizes_that_can_be_asked_for(cells):
    train, _, model = cells
    labels = np.array(["a"] * 9 + ["b"] * 2 + ["c"] * 4)
    assert shortages(labels, "median") == {"b": 2}
    assert shortages(labels, "max") == {"b": 7, "c": 5}
    assert shortages(labels, 3) == {"b": 1}
    assert shortages(labels, {"c": 10}) == {"c": 6}
    assert shortages(labels, 0) == {}
    with pytest.raises(KeyError, match="without a cell: 'd'"):
        shortages(labels, {"d": 3})
    with pytest.raises(ValueError, match="n_obs must be one of"):
        shortages(labels, "mean")
    with pytest.raises(TypeError, match="n_obs must be an integer"):
        shortages(labels, 3.5)
    nothing = tl.augment(train, model, groupby="cell_type", n_obs=1, seed=0)
    assert nothing.n_obs == train.n_obs
    assert not nothing.obs["synthetic"].any()


def test_bootstrapped_f1_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice(list("abc"), (2, 60))
    unit = np.repeat(np.arange(12), 5)
    weights = weights_of_units(unit, 100, rng)
    scores = f1_of_draws(predicted, truth, np.array(list("abc")), unit, weights)
    for draw in (0, 1, 57):
        w = weights[draw][unit]
        expected = f1_score(truth, predicted, labels=list("abc"), average=None, sample_weight=w)
        np.testing.assert_allclose(scores[draw], expected, rtol=1e-6)


def test_intervals_cover_and_no_difference_is_none():
    """Two classifiers of equal accuracy: the interval of their difference covers 0 as promised."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        truth = rng.random(150) < 0.4
        wrong = rng.random((2, 150)) < 0.2
        labels = [np.where(truth ^ w, "x", "y") for w in wrong]
        known = np.where(truth, "x", "y")
        unit = np.arange(150)
        weights = weights_of_units(unit, 200, rng)
        first, second = (
            f1_of_draws(p, known, np.array(["x"]), unit, weights)[:, 0] for p in labels
        )
        found = compared(first, second, 0.9)
        covered.append(found["lower"] <= 0 <= found["upper"])
    assert np.mean(covered) == pytest.approx(0.9, abs=0.07)


def test_a_useless_generator_is_not_recommended(cells, monkeypatch):
    """Cells of the wrong type under the rare type's label: the verdict must be no."""
    train, test, model = cells
    from exprgen.tl import _augmentation_test as tested

    def wrong(train, model, labels, missing, *, seed, progress_bar):
        rows = np.random.default_rng(seed).choice(
            np.flatnonzero(labels == "type_0"), sum(missing.values())
        )
        return train[rows].copy() if len(set(rows)) == len(rows) else _copies(train, rows)

    monkeypatch.setattr(tested, "synthetic_like", wrong)
    table = tl.augmentation_test(
        train, test, model, groupby="cell_type", n_obs={"type_2": 250}, n_repeats=1, seed=0
    )
    row = table.set_index(["metric", "comparison"]).loc[("macro", "synthetic - none")]
    assert row["upper"] < 0
    assert table.attrs["verdict"] == "do not use"


def _copies(adata, rows):
    parts = adata.X[rows]
    obs = adata.obs.iloc[rows].reset_index(drop=True)
    obs.index = obs.index.astype(str)
    return ad.AnnData(X=parts, obs=obs, var=adata.var, layers={"counts": parts.copy()})


def test_report(cells):
    train, test, model = cells
    options = {"groupby": "cell_type", "n_obs": "max", "progress_bar": False, "seed": 0}
    table = tl.augmentation_test(train, test, model, n_repeats=2, **options)
    assert table.attrs["verdict"] in ("use", "do not use")
    assert table.attrs["n_units"] == test.n_obs
    assert (table["lower"] <= table["difference"]).all()
    assert (table["difference"] <= table["upper"]).all()
    of = table[table["metric"] == "macro"].set_index("comparison")["difference"]
    gained = of["synthetic - duplicates"] + of["duplicates - none"]
    assert of["synthetic - none"] == pytest.approx(gained)
    forest = RandomForestClassifier(10, random_state=0)
    again = tl.augmentation_test(train, test, model, n_repeats=1, classifier=forest, **options)
    assert not hasattr(forest, "classes_")
    assert again["value"].between(0, 1).all()


def test_leaks_and_shortages_are_refused(cells):
    train, test, model = cells
    options = {"groupby": "cell_type", "n_obs": "max", "progress_bar": False, "seed": 0}
    with pytest.raises(ValueError, match="cells of test are in train"):
        tl.augmentation_test(train, train[:50].copy(), model, **options)
    half = train[::2].copy()
    with pytest.raises(ValueError, match="in the training or validation of the model"):
        tl.augmentation_test(half, train[1::2].copy(), model, **options)
    with pytest.raises(ValueError, match="labels in both train and test"):
        tl.augmentation_test(train, test, model, split_key="batch", **options)
    with pytest.raises(ValueError, match="test has 2 donor"):
        tl.augmentation_test(train, test, model, split_key="donor", **options)
    with pytest.raises(ValueError, match="nothing to fill up"):
        tl.augmentation_test(train, test, model, **(options | {"n_obs": 2}))
    with pytest.raises(ValueError, match="no categorical condition"):
        tl.augment(train, model, groupby="donor")
    full = tl.augment(train, model, groupby="cell_type", n_obs="max", seed=0)
    with pytest.raises(ValueError, match="cells of adata are synthetic"):
        tl.augment(full, model, groupby="cell_type")
    with pytest.raises(ValueError, match="cells of train are synthetic"):
        tl.augmentation_test(full, test, model, **options)
    lost = test.copy()
    lost.obs["donor"] = lost.obs["donor"].where(np.arange(lost.n_obs) > 3)
    with pytest.raises(CovariateError, match="split_key.* has 4 missing values"):
        tl.augmentation_test(train, lost, model, split_key="donor", **options)
    known = test.copy()
    known.obs["donor"] = "donor_0"
    apart = train[(train.obs["donor"] != "donor_0").to_numpy()].copy()
    with pytest.raises(ValueError, match="trained on donors of test: 'donor_0'"):
        tl.augmentation_test(apart, known, model, split_key="donor", **options)
