"""The fault catalogue, rows C01 to C22 and D01 to D09: what verbs are asked, where results go.

A test per row, by its id. Not here: what C12 and D07 say about ``backed=``, which does not exist
yet. Where a row was decided differently, its test says so.
"""

from __future__ import annotations

import logging
import tracemalloc
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from faults import (
    MODELS,
    N_OBS,
    N_VARS,
    OF_COUNTS,
    PATHS,
    ROLES,
    TINY,
    VERBS,
    WRITING,
    assert_same,
    every_class,
    fit,
    latent_of,
    make_cells,
    refused,
    set_up,
    trained_on_all_roles,
    trained_on_counts,
    untouched,
    warned,
    write_zarr,
)
from scipy import sparse

from exprgen import NBVAE
from exprgen._errors import (
    CovariateError,
    ExtrapolationWarning,
    GeneMismatchError,
    UnseenCategoryError,
)
from exprgen.models import _progress

parametrize = pytest.mark.parametrize
of_counts = parametrize("model", OF_COUNTS, indirect=True, ids=lambda cls: cls.__name__)
T0 = {"cell_type": "type_0", "dose": 1.0}


@pytest.fixture
def adata() -> AnnData:
    """Cells that no model has seen, and that the test may spoil."""
    return make_cells()


@pytest.fixture(params=MODELS, ids=lambda model_class: model_class.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return trained_on_all_roles(request.param)


@pytest.fixture
def plain() -> NBVAE:
    return trained_on_counts()


def reading(conditions: Any) -> dict[str, Any]:
    """The verbs that take a table of conditions, by name, asked about ``conditions``."""
    return {
        "sample": lambda model, **kw: model.sample(conditions, seed=0, **kw),
        "predict": lambda model, **kw: model.predict(conditions, n_samples=20, seed=0, **kw),
    }


both = parametrize("verb", ["sample", "predict"])


# C. Sample and predict ---------------------------------------------------------------------


@both
def test_C01_unseen_label(model, verb):
    conditions = pd.DataFrame({"cell_type": ["type_1", "Type 1"], "dose": 1.0}, index=["p", "q"])
    names = "'cell_type'", "'Type 1'", "'q'", "'type_0', 'type_1', 'type_2'", "marginalize"
    with refused(UnseenCategoryError, *names, "Did you mean 'type_1'?", of=conditions):
        reading(conditions)[verb](model)


@both
def test_C01_unseen_batch(model, verb):
    conditions = T0 | {"batch": "batch_7"}
    with refused(UnseenCategoryError, "'batch'", "'batch_7'", "'batch_0', 'batch_1'", "'null'"):
        reading(conditions)[verb](model)
    assert reading(conditions)[verb](model, unseen="null").n_obs == 1


def test_C01_unseen_label_to_change_to(model, adata):
    with refused(UnseenCategoryError, "'cell_type'", "'type_x'", "'type_0'", of=adata):
        model.counterfactual(adata, to={"cell_type": "type_x"})


def test_C01_unseen_label_in_an_anndata(model, adata):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type_2": "type_z"})
    for verb in VERBS.values():
        with refused(UnseenCategoryError, "'cell_type'", "'type_z'", "'type_2'", of=adata):
            verb(model, adata)


def test_C01_names_at_most_20_labels(adata):
    adata.obs["clone"] = [f"clone_{i % 25:02}" for i in range(N_OBS)]
    model = fit(adata, categorical_condition_keys=["clone"])
    with refused(UnseenCategoryError, "'clone_00'", "'clone_19' and 5 more"):
        model.sample({"clone": "zzz"})


@both
@parametrize("label", [0, "", False, 0.0])
def test_C02_falsy_unseen_label(model, verb, label):
    for key in ("cell_type", "batch"):
        with refused(UnseenCategoryError, repr(key), repr(label), "Known: "):
            reading(T0 | {key: label})[verb](model)


@both
@parametrize("form", [dict, lambda c: pd.DataFrame([c])], ids=["mapping", "table"])
def test_C03_unknown_column(model, verb, form):
    names = "'cell_typ'", "Did you mean 'cell_type'?", "'dose'", "'batch'", "'donor'"
    with refused(KeyError, "conditions", *names):
        reading(form({"cell_typ": "type_0", "dose": 1.0}))[verb](model)


def test_C03_unknown_column_elsewhere(model, adata):
    with refused(KeyError, "to", "'cel_type'", "'cell_type'", of=adata):
        model.counterfactual(adata, to={"cel_type": "type_0"})
    with refused(KeyError, "marginalize", "'doze'", "'dose'"):
        model.sample(T0, marginalize=["doze"])
    with refused(TypeError, "marginalize", "['dose']"):
        model.sample(T0, marginalize="dose")
    with refused(ValueError, "to", "'cell_type'", of=adata):
        model.counterfactual(adata, to={})
    with refused(ValueError, "to['cell_type']", f"{adata.n_obs} cells", "got 2", of=adata):
        model.counterfactual(adata, to={"cell_type": ["type_0", "type_1"]})


@both
@parametrize("form", [dict, lambda c: pd.DataFrame([c])], ids=["mapping", "table"])
def test_C04_missing_condition(model, verb, form):
    with refused(CovariateError, "lack 'dose'", "'cell_type', 'dose'", "marginalize="):
        reading(form({"cell_type": "type_0"}))[verb](model)
    drawn = model.sample(form({"cell_type": "type_0"}), 50, marginalize=["dose"], seed=0)
    assert set(drawn.obs["dose"]) == {0.0, 1.0, 10.0}  # the advice works


def test_C04_missing_condition_in_an_anndata(model, adata):
    del adata.obs["dose"]
    for verb in VERBS.values():
        with refused(CovariateError, "lack 'dose'", "'cell_type', 'dose'", of=adata):
            verb(model, adata)


@both
@parametrize(
    ("labels", "asked"), [([0, 1, 2], "1"), (["0", "1", "2"], 1), ([True, False], "True")]
)
def test_C05_label_of_another_type(adata, verb, labels, asked):
    adata.obs["plate"] = np.resize(labels, N_OBS)
    model = fit(adata, categorical_condition_keys=["plate"])
    with refused(
        UnseenCategoryError, "'plate'", repr(asked), type(asked).__name__, "types differ"
    ):
        reading({"plate": asked})[verb](model)


@parametrize("dose", [-1.0, 12.0, 150.0])
def test_C06_outside_the_trained_range(model, dose):
    names = "'dose'", f"{dose}", "trained on 0 to 10"
    conditions = pd.DataFrame({"cell_type": "type_0", "dose": [1.0, dose]})
    with untouched(conditions), warned(ExtrapolationWarning, *names):
        drawn = model.sample(conditions, 2, seed=0)
    assert drawn.obs["extrapolated"].tolist() == [False, False, True, True]
    assert drawn.obs["support"].tolist()[2:] == ["outside range"] * 2
    assert np.isfinite(drawn.X.data).all()
    with warned(ExtrapolationWarning, *names):
        predicted = model.predict(conditions, n_samples=20, seed=0)
    assert np.isfinite(predicted.layers["exprgen_mean"]).all()


@both
@parametrize("dose", [-1.0, 150.0])
def test_C07_extrapolation_refused_or_ignored(model, verb, dose):
    asked = partial(reading(T0 | {"dose": dose})[verb], model)
    with refused(CovariateError, "'dose'", f"{dose}", "0 to 10", "on_extrapolation='warn'"):
        asked(on_extrapolation="raise")
    asked(on_extrapolation="ignore")
    with refused(ValueError, "on_extrapolation", "'rise'", "'raise'"):
        asked(on_extrapolation="rise")


@both
@parametrize(
    ("key", "value", "what"),
    [
        ("dose", np.nan, "missing"),
        ("dose", None, "missing"),
        ("dose", np.inf, "infinite"),
        ("dose", "high", "'high'"),
        ("cell_type", None, "missing"),
        ("cell_type", np.nan, "missing"),
        ("batch", None, "missing"),
        ("donor", None, "missing"),
    ],
)
def test_C08_value_missing_or_infinite(model, verb, key, value, what):
    conditions = pd.DataFrame([T0 | {"batch": "batch_0", "donor": "donor_0"}] * 2, ["p", "q"])
    conditions[key] = pd.Series([conditions[key].iloc[0], value], ["p", "q"], dtype=object)
    with refused(CovariateError, repr(key), what, "'q'", of=conditions):
        reading(conditions)[verb](model)


@both
def test_C09_combination_never_seen(adata, verb):
    cells = adata[~((adata.obs["cell_type"] == "type_1") & (adata.obs["batch"] == "batch_0"))]
    cells = cells.copy()
    model = fit(cells, categorical_condition_keys=["cell_type", "batch"])
    asked = {"cell_type": ["type_0", "type_1"], "batch": "batch_0"}
    with warned(ExtrapolationWarning, "never seen together", "cell_type=type_1, batch=batch_0"):
        result = reading(asked)[verb](model)
    if verb == "sample":
        assert result.obs["support"].tolist() == ["seen", "unseen combination"]
        assert result.obs["n_train"].iloc[1] == 0
    with refused(CovariateError, "never seen together", "cell_type=type_1, batch=batch_0"):
        reading(asked)[verb](model, on_extrapolation="raise")


@parametrize("conditions", [T0, None, pd.DataFrame(T0, index=["p"])], ids=["map", "none", "table"])
def test_C10_no_cells(model, conditions):
    nothing = model.sample(conditions, 0, seed=0)
    some = model.sample(conditions, 3, seed=0)
    assert nothing.shape == (0, N_VARS)
    assert type(nothing.X) is type(some.X)
    assert nothing.obs.dtypes.astype(str).to_dict() == some.obs.dtypes.astype(str).to_dict()
    assert list(nothing.var_names) == list(some.var_names) == list(model.var_names)
    assert set(nothing.layers) == set(some.layers)


def test_C10_no_rows(model, adata):
    nothing = pd.DataFrame(T0, index=["p"]).iloc[:0]
    assert model.sample(nothing, 5).shape == (0, N_VARS)
    assert model.predict(nothing, n_samples=5).shape == (0, N_VARS)
    empty = adata[:0].copy()
    assert latent_of(model, empty).shape == (0, TINY["n_latent"])
    assert model.log_likelihood(empty).shape == (0,)
    assert model.denoise(empty).layers["exprgen_denoised"].shape == (0, N_VARS)
    assert model.posterior_predictive_sample(empty).shape == (0, N_VARS)
    assert model.counterfactual(empty, to={"cell_type": "type_0"}).shape == (0, N_VARS)


@parametrize(
    ("n_obs", "error"),
    [(-1, ValueError), (2.0, TypeError), (True, TypeError), ("3", TypeError), (None, TypeError)],
)
def test_C11_number_of_cells(model, n_obs, error):
    with refused(error, "n_obs", repr(n_obs)):
        model.sample(T0, n_obs)


def test_C12_memory_grows_with_the_output_only(plain):
    def peak_and_size(n_obs: int) -> np.ndarray:
        tracemalloc.start()
        counts = plain.sample(n_obs=n_obs, seed=0, progress_bar=False).X
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return np.array([peak, counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes])

    plain.sample(n_obs=10, seed=0)  # what is imported and cached at first
    peak, size = peak_and_size(30_000) - peak_and_size(10_000)
    # Counts in blocks and once together, a name for each cell, and a few columns; were the
    # latent states or the means kept, or several draws, it would be more.
    per_cell = 400
    assert size < peak < 2 * size + 20_000 * per_cell


def test_C12_progress_bar(model, monkeypatch):
    shown = []

    def tqdm(items, **kwargs):
        shown.append(kwargs)
        return items

    monkeypatch.setattr(_progress, "tqdm", tqdm)
    model.sample(T0, 1500, seed=0)
    model.sample(T0, 1500, seed=0, progress_bar=False)
    assert [kwargs["disable"] for kwargs in shown] == [False, True]
    assert [kwargs["total"] for kwargs in shown] == [3, 3]


@parametrize("conditions", [T0, None], ids=["given", "drawn"])
def test_C13_seed(model, conditions):
    with untouched():
        a, b = (model.sample(conditions, 700, seed=4) for _ in range(2))
        c = model.sample(conditions, 700, seed=5)
    assert_same(a, b)
    assert (_array(a.X) != _array(c.X)).sum() > 100
    assert a.uns["exprgen"]["seed"] == 4


def test_C13_seed_of_verbs(model, adata):
    for name in VERBS:
        a, b = (VERBS[name](model, make_cells()) for _ in range(2))
        assert_same(*(x.todense() if hasattr(x, "todense") else x for x in (a, b)))
    for seeds, same in (((1, 1), True), ((1, 2), False)):
        values = [model.log_likelihood(adata, n_samples=2, seed=seed) for seed in seeds]
        assert np.array_equal(*values) == same


def test_C13_without_a_seed(model):
    with untouched():
        a, b = (model.sample(T0, 100) for _ in range(2))
    assert (_array(a.X) != _array(b.X)).any()
    again = model.sample(T0, 100, seed=a.uns["exprgen"]["seed"])  # it was recorded
    assert_same(a, again)
    for seed, error in ((-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with refused(error, "seed", repr(seed)):
            model.sample(T0, seed=seed)


def test_C13_blocks(model):
    # The noise of a block of 512 cells does not depend on how many follow.
    short, long = (_array(model.sample(T0, n, seed=0).X) for n in (512, 1300))
    np.testing.assert_array_equal(long[:512], short)
    assert (long[:512] != long[512:1024]).any()


@every_class
def test_C14_untrained(adata, model_class):
    set_up(adata, model_class, **ROLES)
    model = model_class(adata, **TINY)
    for verb in [*VERBS.values(), lambda model, _: model.sample(T0)]:
        with refused(RuntimeError, model_class.__name__, "not trained", "train()", of=adata):
            verb(model, adata)


@parametrize("name", VERBS)
def test_C15_genes_in_another_order(model, adata, name, caplog):
    order = np.random.default_rng(0).permutation(N_VARS)
    shuffled = adata[:, order].copy()
    with caplog.at_level(logging.INFO, logger="exprgen"):
        found = VERBS[name](model, shuffled)
    said = [r for r in caplog.records if "order of the model" in r.message]
    assert len(said) == (name not in {"sample"})
    expected = VERBS[name](model, adata)
    if name in WRITING:
        assert list(found.var_names) == list(shuffled.var_names)
        expected = expected[:, order]
        for layer in expected.layers:
            np.testing.assert_allclose(
                *(_array(a.layers[layer]) for a in (found, expected)), rtol=1e-5, atol=1e-6
            )
    elif isinstance(found, AnnData):
        assert_same(found, expected)
    else:
        np.testing.assert_allclose(*map(_array, (found, expected)), rtol=1e-5)


def _array(values: Any) -> np.ndarray:
    for name in ("toarray", "todense"):
        if hasattr(values, name):
            return getattr(values, name)()
    return np.asarray(values)


COUNTING = [name for name in VERBS if name not in {"sample", "predict"}]


@parametrize("name", [*COUNTING, "predict"])
def test_C16_genes_missing(model, adata, name):
    few = adata[:, :5].copy()
    gone = ", ".join(repr(f"gene_{i}") for i in range(5, 10))
    with refused(GeneMismatchError, "7 of the model's 12 genes", gone + " and 2 more", of=few):
        VERBS[name](model, few)


def with_extra_genes(adata: AnnData) -> AnnData:
    extra = adata[:, :3].copy()
    extra.var_names = ["extra_0", "extra_1", "extra_2"]
    return ad.concat([extra, adata], axis="var", merge="same")


@parametrize("name", COUNTING)
def test_C16_genes_extra(model, adata, name, caplog):
    more = with_extra_genes(adata)
    if name in WRITING:  # no layer has room for results of some genes
        names = "15 genes", "12", "adata[:, model.var_names].copy()", "genes="
        with refused(GeneMismatchError, *names, of=more):
            VERBS[name](model, more)
        return
    with caplog.at_level(logging.INFO, logger="exprgen"), untouched(more):
        found = VERBS[name](model, more)
    assert any("12 genes of the data's 15" in r.message for r in caplog.records)
    expected = VERBS[name](model, adata)
    if isinstance(found, AnnData):
        assert_same(found, expected)
    else:
        np.testing.assert_allclose(*map(_array, (found, expected)), rtol=1e-5)


def test_C16_genes_extra_with_genes_named(model, adata):
    genes = ["gene_7", "gene_2"]
    kwargs = {"genes": genes, "n_samples": 2, "seed": 0}
    found = model.denoise(with_extra_genes(adata), **kwargs).obsm["exprgen_denoised"]
    expected = model.denoise(adata, **kwargs).obsm["exprgen_denoised"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@parametrize("name", [*COUNTING, "predict"])
def test_C17_as_many_other_genes(model, adata, name):
    adata.var_names = [f"ENSG{i}" for i in range(N_VARS)]
    first = "'gene_0', 'gene_1', 'gene_2', 'gene_3', 'gene_4' and 7 more"
    with refused(GeneMismatchError, "12 of the model's 12 genes", first, "'ENSG0'", of=adata):
        VERBS[name](model, adata)


INDICES = {
    "unsorted": [40, 3, 77],
    "repeated": [5, 5, 2, 5],
    "negative": [-1, 0, -90],
    "mask": np.arange(N_OBS) % 7 == 2,
    "slice": slice(60, 20, -9),
    "empty": [],
    "empty mask": np.zeros(N_OBS, bool),
}


@parametrize("backed", [False, True], ids=["memory", "backed"])
@parametrize("indices", INDICES.values(), ids=INDICES)
def test_C18_indices(model, adata, indices, backed, tmp_path):
    rows = np.arange(N_OBS)[
        indices
        if len(np.shape(indices)) == 0
        else np.array(indices, dtype=None if len(indices) else int)
    ]
    whole = latent_of(model, adata)
    if backed:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    found = latent_of(model, adata, indices)
    assert found.shape == (len(rows), TINY["n_latent"])
    np.testing.assert_allclose(found, whole[rows], rtol=1e-5, atol=1e-6)
    bound = model.log_likelihood(adata, indices=indices, n_samples=2, seed=0)
    assert bound.shape == (len(rows),)
    drawn = model.posterior_predictive_sample(adata, indices, seed=0)
    assert drawn.shape == (len(rows), N_VARS)
    changed = model.counterfactual(adata, to={"dose": 0}, indices=indices, n_samples=2, seed=0)
    assert list(changed.obs["source"]) == [f"cell_{i}" for i in rows]
    if backed:
        adata.file.close()


@parametrize(
    ("indices", "error", "names"),
    [
        ([0, 90], IndexError, ["indices", "90", "n_obs is 90"]),
        ([-91], IndexError, ["indices", "-91", "n_obs is 90"]),
        ([True, False], IndexError, ["mask of 2", "n_obs is 90"]),
        (["cell_3"], TypeError, ["indices", "positions", "get_indexer"]),
        ([0.0], TypeError, ["indices", "positions"]),
    ],
)
def test_C18_indices_that_do_not_exist(model, adata, indices, error, names):
    for verb in (
        partial(latent_of, model),
        model.log_likelihood,
        model.posterior_predictive_sample,
        partial(model.counterfactual, to={"dose": 0}),
    ):
        with refused(error, *names, of=adata):
            verb(adata, indices=indices)


def test_C18_some_genes_and_several_draws(model, adata):
    one, some = (
        model.posterior_predictive_sample(adata, [3, 1], n, ["gene_7", "gene_2"], seed=0)
        for n in (1, 3)
    )
    assert (one.shape, some.shape) == ((2, 2), (2, 2, 3))
    np.testing.assert_array_equal(some.todense()[..., 0], one.todense())
    whole = model.posterior_predictive_sample(adata, [3, 1], seed=0).todense()
    np.testing.assert_array_equal(one.todense(), whole[:, [7, 2]])


def test_C19_unknown_gene(model, adata):
    names = "1 of genes", "'gen_3'", "Did you mean 'gene_3'?"
    genes = ["gene_1", "gen_3"]
    changes = dict.fromkeys(genes, 1.0)
    for asked in (
        lambda: model.predict(adata, genes=genes),
        lambda: model.denoise(adata, genes=genes),
        lambda: model.posterior_predictive_sample(adata, gene_list=genes),
        *([lambda: model.sample(T0, log_fold_change=changes)] if model.needs_counts else []),
    ):
        with refused(KeyError, *names, of=adata):
            asked()
    with refused(TypeError, "genes", "['gene_1']", of=adata):
        model.predict(adata, genes="gene_1")


@parametrize(
    ("n_samples", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)],
)
def test_C20_number_of_draws(model, adata, n_samples, error):
    for verb in (
        model.predict,
        model.denoise,
        model.log_likelihood,
        model.posterior_predictive_sample,
        partial(model.counterfactual, to={"dose": 0}),
    ):
        with refused(error, "n_samples", repr(n_samples), of=adata):
            verb(adata, n_samples=n_samples)


@of_counts
def test_C21_counts(model):
    drawn = model.sample(T0, 500, seed=0)
    for counts in (drawn.X, drawn.layers["counts"]):
        assert isinstance(counts, sparse.csr_matrix)
        assert counts.dtype == np.float32
        assert counts.data.min() > 0
        assert (counts.data % 1 == 0).all()
    np.testing.assert_array_equal(drawn.obs["library"], drawn.X.sum(1).A1)


def test_C21_zeros(plain):
    # The share of zeros against the model's probability of one, (theta / (theta + mu))^theta,
    # averaged over as many draws of its means.
    n_obs = 4000
    zeros = 1 - plain.sample(n_obs=n_obs, seed=0).X.getnnz(0) / n_obs
    likelihood = plain.module.space.likelihood
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        _, (location, _) = plain.module.sample(torch.zeros(n_obs, 0), noise)
        theta = likelihood.log_dispersion.exp()
        clean = (theta / (theta + location.exp())).pow(theta).mean(0)
        expected = ((1 - likelihood.outlier_rate) * clean).numpy()
    se = np.sqrt(2 * expected * (1 - expected) / n_obs)
    assert (np.abs(zeros - expected) < 4 * se).all()


paths = parametrize("model", PATHS, indirect=True)


@parametrize(
    ("n_steps", "error"),
    [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("5", TypeError)],
)
@both
@paths
def test_C22_number_of_steps(model, verb, n_steps, error):
    with refused(error, "n_steps", repr(n_steps)):
        reading(T0)[verb](model, n_steps=n_steps)
    with refused(error, "n_steps", repr(n_steps)):
        type(model)(make_set_up(type(model)), n_steps=n_steps)


@parametrize(
    ("solver", "where"),
    [("heun", "in step 1 of 3"), ("ddpm", "in step 1 of 3"), ("ode", "in its first step")],
)
@paths
def test_C22_a_solver_that_meets_nan(model, solver, where, monkeypatch):
    bias = model.module.density.network.output.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.nan))
    for verb in reading(T0).values():
        with refused(RuntimeError, "solver", where, "guidance", "learning rate"):
            verb(model, solver=solver, n_steps=3)


@paths
def test_C22_a_solver_that_meets_nan_later(model, monkeypatch):
    network, calls = model.module.density.network, []
    forward = type(network).forward

    def spoilt(self, *args, **kwargs):
        calls.append(None)
        output = forward(self, *args, **kwargs)
        return output / 0 if len(calls) == 3 else output

    monkeypatch.setattr(type(network), "forward", spoilt)
    # The third evaluation of Heun's method is the first of its second step.
    with refused(RuntimeError, "in step 2 of 4"):
        model.sample(T0, n_steps=4, seed=0)


def make_set_up(model_class: Any) -> AnnData:
    adata = make_cells()
    model_class.setup_anndata(adata, **ROLES)
    return adata


# D. Where results go -----------------------------------------------------------------------


def test_D01_own_slots_are_replaced(model, adata):
    model.predict(adata, n_samples=20, quantiles=(0.05, 0.5, 0.95), seed=0)
    model.denoise(adata, n_samples=2, seed=0)
    assert "exprgen_q50" in adata.layers
    model.predict(adata, n_samples=30, seed=1)
    assert "exprgen_q50" not in adata.layers
    assert "exprgen_denoised" in adata.layers
    fresh = model.predict(make_cells(), n_samples=30, seed=1)
    for layer in fresh.layers:
        assert_same(adata.layers[layer], fresh.layers[layer])
    assert {s.split("/")[1] for s in adata.uns["exprgen"]["slots"]} == (
        {*adata.layers, *adata.obs} - {*make_cells().layers, *make_cells().obs}
    )


@parametrize(
    ("store", "key", "value"),
    [
        ("layers", "exprgen_mean", np.zeros((N_OBS, N_VARS))),
        ("obs", "exprgen_split", "mine"),
        ("uns", "exprgen", "mine"),
        ("uns", "exprgen", {"mine": 1}),
    ],
)
def test_D01_other_keys_are_not(model, adata, store, key, value):
    getattr(adata, store)[key] = value
    named = key if store != "uns" else "adata.uns['exprgen']"
    with refused(ValueError, named, "overwrite=True", "key_added", of=adata):
        model.predict(adata, n_samples=20)
    model.predict(adata, n_samples=20, key_added="mine", seed=0)
    model.predict(adata, n_samples=20, overwrite=True, seed=0)
    assert_same(adata.layers["exprgen_mean"], adata.layers["mine_mean"])


def test_D01_results_of_another_model(model, adata):
    model.predict(adata, n_samples=20)
    adata.uns["exprgen"]["model"] = "ScoreVAE"
    with refused(
        ValueError, "ScoreVAE", type(model).__name__, "key_added", "overwrite=True", of=adata
    ):
        model.predict(adata, n_samples=20)


def test_D01_keys_of_arrays_returned(model, adata):
    adata.obs["mine_log_likelihood"] = 0.0
    with refused(ValueError, "mine_log_likelihood", "overwrite=True", of=adata):
        model.log_likelihood(adata, n_samples=2, key_added="mine")
    adata.obsm["X_mine"] = np.zeros((N_OBS, 2))
    with refused(ValueError, "X_mine", "overwrite=True", of=adata):
        latent_of(model, adata, key_added="mine")


def test_D02_results_follow_the_cells(model, adata):
    order = np.random.default_rng(1).permutation(N_OBS)
    shuffled = adata[order].copy()
    n_samples = 5 if isinstance(model, PATHS) else 200  # each draw of a path is exact, and dear
    for cells in (adata, shuffled):
        model.predict(cells, n_samples=50, seed=0)
        latent_of(model, cells, key_added="z")
        model.log_likelihood(cells, n_samples=n_samples, key_added="ll", seed=0)
        model.denoise(cells, n_samples=100, seed=0, batch="observed")
    back = shuffled[adata.obs_names]
    for layer in ("exprgen_mean", "exprgen_q95"):  # of equal conditions, equal to the last bit
        assert_same(back.layers[layer], adata.layers[layer])
    np.testing.assert_allclose(back.obsm["X_z"], adata.obsm["X_z"], rtol=1e-4, atol=1e-5)
    # These draw noise by position: every cell must be nearest to itself.
    bound, again = adata.obs["ll_log_likelihood"], back.obs["ll_log_likelihood"]
    assert np.corrcoef(bound, again)[0, 1] > 0.98
    denoised, again = (a.layers["exprgen_denoised"] for a in (adata, back))
    scale = np.log1p if model.needs_counts else np.asarray
    distance = np.linalg.norm(scale(denoised)[:, None] - scale(again)[None], axis=-1)
    assert (distance.argmin(1) == np.arange(N_OBS)).mean() > (0.95 if model.needs_counts else 0.5)


def test_D02_one_marked_cell(plain, adata):
    # A cell ten times as deep as any other is where its results are, wherever it stands.
    for place in (0, 41, 89):
        cells = adata.copy()
        counts = cells.X.toarray()
        counts[place] = 10 * counts.max(0)
        cells.X = sparse.csr_matrix(counts)
        plain.denoise(cells, n_samples=5)
        assert cells.layers["exprgen_denoised"].sum(1).argmax() == place


@parametrize("name", WRITING)
def test_D03_view(model, adata, name):
    view = adata[10:50]
    with untouched(adata, view):
        written = VERBS[name](model, view)
    assert written is not view
    assert not written.is_view
    assert list(written.obs_names) == [f"cell_{i}" for i in range(10, 50)]
    assert "exprgen" in written.uns
    assert VERBS[name](model, adata) is adata


def test_D03_view_and_arrays_returned(model, adata):
    view = adata[10:50]
    for verb in (model.log_likelihood, partial(latent_of, model)):
        with refused(ValueError, "key_added='k'", "view", ".copy()", of=(adata, view)):
            verb(view, key_added="k")
        with refused(ValueError, "key_added='k'", "indices", ".copy()", of=adata):
            verb(adata, indices=[1, 2], key_added="k")


@parametrize("name", WRITING)
def test_D04_some_genes(model, adata, name):
    genes = ["gene_7", "gene_2", "gene_11"]
    whole = VERBS[name](model, make_cells())
    kwargs = {"n_samples": {"predict": 20, "denoise": 2}[name], "seed": 0, "genes": genes}
    assert getattr(model, name)(adata, **kwargs) is adata
    assert set(adata.layers) == {"counts", "log"}
    names = whole.layers.keys() - adata.layers.keys()
    assert set(adata.obsm) == names
    for key in names:
        assert_same(adata.obsm[key], np.asarray(whole[:, genes].layers[key]))
    assert list(adata.uns["exprgen"][name]["var_names"]) == genes


def test_D05_sizes_that_do_not_fit(model, adata):
    table = pd.DataFrame([T0] * 3)
    shift = pd.DataFrame({"gene_1": [1.0, 2.0]})
    of_counts = [
        ((2, 3), lambda: model.sample(table, library=np.array([10.0, 20.0]))),
        ((2, 3), lambda: model.predict(table, library=np.array([10.0, 20.0]))),
        ((2, 3), lambda: model.sample(table, log_fold_change=shift)),
    ]
    for names, asked in (
        ((2, 3), lambda: model.sample({"cell_type": ["type_0"] * 2, "dose": [0.0] * 3})),
        ((7, 90), lambda: model.counterfactual(adata, to={"dose": [0.0] * 7})),
        *(of_counts if model.needs_counts else []),
    ):
        with refused(ValueError, *names, of=(adata, table)):
            asked()


@pytest.fixture
def written(model, adata) -> list[AnnData]:
    """Everything that verbs write."""
    model.predict(adata, n_samples=20, seed=0)
    model.predict(adata, n_samples=20, seed=0, genes=["gene_3"], key_added="few")
    model.denoise(adata, n_samples=2, seed=0)
    model.log_likelihood(adata, n_samples=2, key_added="exprgen")
    latent_of(model, adata, key_added="exprgen")
    changed = model.counterfactual(adata, to={"dose": 0}, n_samples=2, seed=0)
    return [adata, changed, model.sample(T0, 5), model.predict(T0, n_samples=20)]


@parametrize("form", ["h5ad", "zarr"])
def test_D06_files(written, form, tmp_path):
    for i, adata in enumerate(written):
        path = tmp_path / f"{i}.{form}"
        if form == "h5ad":
            adata.write_h5ad(path)
            back = ad.read_h5ad(path)
        else:
            write_zarr(adata, path)
            back = ad.read_zarr(path)
        assert_same(back, adata)


def test_D06_written_cells_can_be_written_to_again(model, written, tmp_path):
    written[0].write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    model.predict(back, n_samples=20, seed=0)
    for name in ("layers", "obsm", "obs"):
        assert_same(getattr(back, name), getattr(written[0], name))
    assert_same(back.uns["exprgen"]["slots"], written[0].uns["exprgen"]["slots"])


@parametrize(
    ("name", "n_obs", "n_times", "n_layers"), [("predict", 150, 200, 5), ("denoise", 6000, 20, 2)]
)
def test_D07_memory(name, n_obs, n_times, n_layers):
    simulated = make_cells(n_obs)
    counts = sparse.csr_matrix(np.tile(simulated.X.toarray(), n_times))
    cells = AnnData(counts, obs=simulated.obs)
    cells.obs["dose"] = np.linspace(0, 10, n_obs)  # no two cells share a computation
    model = fit(cells, continuous_condition_keys=["dose"])
    verb = partial(getattr(model, name), n_samples=10, progress_bar=False)
    verb(cells[:20].copy())
    tracemalloc.start()
    verb(cells)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    layer = 4 * n_obs * counts.shape[1]
    chunk = 2 * 4 * 4096 * counts.shape[1] if name == "denoise" else layer
    assert n_layers * layer < peak < n_layers * layer + chunk


def test_D08_bounds(model, adata):
    model.predict(adata, n_samples=500, quantiles=(0.05, 0.5, 0.95), seed=0)
    model.denoise(adata, n_samples=5, seed=0)
    latent_of(model, adata, key_added="exprgen")
    given = make_cells().layers
    layers = {k.removeprefix("exprgen_"): v for k, v in adata.layers.items() if k not in given}
    assert set(layers) == {
        *("mean", "std", "std_latent", "std_donor", "q05", "q50", "q95"),
        *("denoised", "denoised_std"),
    }
    for values in layers.values():
        assert np.isfinite(values).all()
        assert (values >= 0).all()
    assert (layers["q05"] <= layers["q50"]).all()
    assert (layers["q50"] <= layers["q95"]).all()
    assert (layers["q05"] <= layers["mean"]).all()
    assert (layers["std"] >= np.hypot(layers["std_latent"], layers["std_donor"]) - 1e-5).all()
    assert (adata.obsm["X_exprgen_std"] > 0).all()


def test_D08_std_is_that_of_samples(plain):
    # At one depth, for the tails of depth make the moments of few draws vague.
    drawn = plain.sample(n_obs=20_000, library=90.0, seed=0).X.toarray()
    row = pd.DataFrame(index=["any"])
    predicted = plain.predict(row, library=90.0, n_samples=20_000, seed=1)
    for name, found in (("mean", drawn.mean(0)), ("std", drawn.std(0))):
        said = predicted.layers[f"exprgen_{name}"][0]
        np.testing.assert_allclose(said, found, rtol=0.1, atol=0.1)


@parametrize("name", WRITING)
@parametrize("again", [False, True], ids=["first", "again"])
def test_D09_failure_half_way(model, adata, name, again, monkeypatch):
    if again:
        VERBS[name](model, adata)
    set_item = type(adata.layers).__setitem__
    n_written = 0

    def fail_at_second(self, key, value):
        nonlocal n_written
        n_written += 1
        if n_written == 2:
            raise OSError("no space left")
        set_item(self, key, value)

    monkeypatch.setattr(type(adata.layers), "__setitem__", fail_at_second)
    with refused(OSError, "no space left", of=adata):
        VERBS[name](model, adata)
    assert n_written >= 2


@parametrize("given", [5, [1], np.ones(N_VARS), "gene_0"], ids=str)
def test_log_fold_changes_of_the_wrong_type(given):
    names = "log_fold_change must be a mapping or Series by gene", type(given).__name__
    with refused(TypeError, *names):
        trained_on_all_roles().sample(T0, log_fold_change=given)
    with refused(TypeError, "log_fold_change must hold numbers", "'x'"):
        trained_on_all_roles().sample(T0, log_fold_change={"gene_0": "x"})
