"""The fault catalogue, rows A01 to A46: what ``setup_anndata`` takes, and what it leaves alone.

A test per row, by its id. Where a row was decided differently, its test says so.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from anndata import AnnData
from anndata.io import sparse_dataset
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
    digest,
    fit,
    latent_of,
    layer_of,
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

from exprgen import NBVAE, ZINBVAE, CondVAE, ExprFlow, HybridResidualModel
from exprgen._errors import (
    CovariateError,
    DataQualityWarning,
    SetupError,
    UnseenCategoryError,
)
from exprgen.models import GenerativeModel

parametrize = pytest.mark.parametrize
of_continuous = parametrize("model_class", (CondVAE, *PATHS, HybridResidualModel))
"""A row about models that take logarithms, alone or as well as counts."""
IN_GENES = {"n_latent": 2, "density_hidden": 8, "density_layers": 1}
dense_csr_csc = parametrize(
    "form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"]
)


@pytest.fixture
def adata() -> AnnData:
    """Cells that no model has seen, and that the test may spoil."""
    return make_cells()


@pytest.fixture(params=MODELS, ids=lambda model_class: model_class.__name__)
def model_class(request: pytest.FixtureRequest) -> type[GenerativeModel]:
    return request.param


@pytest.fixture
def model(model_class) -> Any:
    return trained_on_all_roles(model_class)


@pytest.fixture
def plain() -> NBVAE:
    return trained_on_counts()


def having(role: str) -> Iterable[type[GenerativeModel]]:
    """Models whose setup takes a role."""
    return OF_COUNTS if role == "size_factor_key" else MODELS


def setup_is_refused(
    adata: Any,
    error: type[Exception],
    *names: Any,
    of: Iterable[type[GenerativeModel]] = MODELS,
    **setup: Any,
) -> None:
    for model_class in of:
        with refused(error, *names, of=adata):
            set_up(adata, model_class, **setup)


def densely(values: Any) -> np.ndarray:
    return values.toarray() if sparse.issparse(values) else values


def with_value(
    adata: AnnData,
    value: float,
    form: Callable = sparse.csr_matrix,
    place: tuple[int, int] = (7, 3),
) -> AnnData:
    for layer in ("counts", "log"):
        values = adata.layers[layer].toarray()
        values[place] = value
        adata.layers[layer] = form(values)
    return adata


@parametrize(
    "change",
    [
        lambda adata: adata.X.data.__setitem__(50, 9),
        lambda adata: adata.layers["counts"].indices.__setitem__(50, 9),
        lambda adata: adata.obs.isetitem(3, adata.obs["dose"].where(adata.obs_names != "cell_44")),
        lambda adata: adata.obs.isetitem(3, adata.obs["dose"].astype("float32")),
        lambda adata: adata.obs.isetitem(0, adata.obs["cell_type"].astype(object)),
        lambda adata: setattr(adata, "obs_names", adata.obs_names[::-1]),
        lambda adata: setattr(adata, "X", adata.X.tocsc()),
        lambda adata: adata.uns.update(key={"nested": 1}),
        lambda adata: random.random(),
        lambda adata: np.random.rand(),
        lambda adata: torch.rand(1),
    ],
)
def test_what_these_tests_notice(adata, change):
    with pytest.raises(AssertionError), untouched(adata):
        change(adata)


def test_A01_layer_missing(adata):
    names = "'conuts'", "'counts'", "Did you mean"
    setup_is_refused(adata, KeyError, *names, layer="conuts")


@parametrize(
    ("role", "key", "suggestion"),
    [
        ("batch_key", "bach", "batch"),
        ("donor_key", "donr", "donor"),
        ("categorical_condition_keys", ["cell_typ"], "cell_type"),
        ("continuous_condition_keys", ["dosis"], "dose"),
        ("size_factor_key", "doses", "dose"),
        ("condition_embedding_key", "X_drog", "X_drug"),
    ],
)
def test_A02_column_missing(adata, role, key, suggestion):
    adata.obsm["X_drug"] = np.ones((N_OBS, 2))
    given = key if isinstance(key, str) else key[0]
    names = role, repr(given), f"Did you mean '{suggestion}'?"
    setup_is_refused(adata, KeyError, *names, of=having(role), **{role: key})


@parametrize(
    ("role", "wrong", "names"),
    [
        ("categorical_condition_keys", "cell_type", ["list", "['cell_type']"]),
        ("continuous_condition_keys", "dose", ["list", "['dose']"]),
        ("categorical_condition_keys", [3], ["list of str", "3"]),
        ("batch_key", ["batch"], ["a str", "['batch']"]),
        ("donor_key", 3, ["a str", "int 3"]),
        ("condition_embedding_key", ["X_drug"], ["a str", "['X_drug']"]),
        ("size_factor_key", ["dose"], ["a str", "['dose']"]),
        ("layer", ["counts"], ["a str", "['counts']"]),
    ],
)
def test_A03_argument_of_the_wrong_type(adata, role, wrong, names):
    setup_is_refused(adata, TypeError, role, *names, of=having(role), **{role: wrong})


@parametrize(
    "values",
    [
        pd.Series(["a", None] * 45),
        pd.Series(["a", np.nan] * 45, dtype=object),
        pd.Series(["a", None] * 45, dtype="category"),
        pd.Series(["a", None] * 45, dtype="string"),
        pd.Series([1, None] * 45, dtype="Int64"),
        pd.Series([True, None] * 45, dtype="boolean"),
        pd.Series([1.0, np.nan] * 45),
    ],
    ids=lambda values: str(values.dtype),
)
@parametrize("role", ["categorical_condition_keys", "batch_key", "donor_key"])
def test_A04_missing_labels(adata, values, role):
    adata.obs["line"] = values.array
    names = "obs['line']", role, "45 missing values", "'cell_1', 'cell_3', 'cell_5'", "'unknown'"
    keys = ["line"] if role.endswith("s") else "line"
    setup_is_refused(adata, CovariateError, *names, **{role: keys})


@parametrize("dtype", ["float64", "Float64", "object"])
def test_A05_nan_in_continuous(adata, dtype):
    adata.obs["age"] = pd.Series([1.0, np.nan, *range(88)]).astype(dtype).array
    names = "obs['age']", "1 missing value ", "'cell_1'", "Fill in"
    setup_is_refused(adata, CovariateError, *names, continuous_condition_keys=["age"])


@parametrize("value", [np.inf, -np.inf])
def test_A06_infinite_continuous(adata, value):
    adata.obs["log_dose"] = np.where(np.arange(N_OBS) < 2, value, 1.0)
    names = "obs['log_dose']", "2 infinite values", "'cell_0', 'cell_1'", "log1p", "pseudo-dose"
    setup_is_refused(adata, CovariateError, *names, continuous_condition_keys=["log_dose"])


def test_A07_text_in_continuous(adata):
    adata.obs["level"] = np.where(np.arange(N_OBS) == 4, "high", "3.5")
    names = "obs['level']", "numeric", "1 other", "'high'", "'cell_4'"
    setup_is_refused(adata, CovariateError, *names, continuous_condition_keys=["level"])


def test_A08_numbers_as_text(adata, model_class):
    adata.obs["as_text"] = adata.obs["dose"].astype(str).astype(object)
    before = digest(adata.obs)
    with warned(DataQualityWarning, "obs['as_text']", "numbers as text", "pd.to_numeric"):
        set_up(adata, model_class, continuous_condition_keys=["as_text"])
    assert digest(adata.obs) == before
    conditions = model_class(adata, **TINY).conditions
    assert sorted(conditions["as_text"]) == [0.0, 1.0, 10.0]


def test_A09_constant_continuous(adata, model_class):
    adata.obs["age"] = 0.1
    with warned(DataQualityWarning, "obs['age']", "no effect", "0.1"):
        model = fit(adata, model_class=model_class, continuous_condition_keys=["age"])
    assert model.schema.quantities[0].std == 1
    assert np.isfinite(model.log_likelihood(n_samples=2)).all()


def test_A10_continuous_at_large_scale(adata, model_class):
    adata.obs["income"] = np.linspace(1e6, 3e6, N_OBS)
    model = fit(adata, model_class=model_class, max_epochs=3, continuous_condition_keys=["income"])
    encoded = model.schema.encode(*model.schema.parse(adata))
    assert encoded.mean() == pytest.approx(0, abs=1e-6)
    assert encoded.std() == pytest.approx(1)
    assert np.isfinite(model.log_likelihood(n_samples=2)).all()
    trained = adata.obs["income"].iloc[model.train_indices_]
    assert model.conditions["income_min"].tolist() == [trained.min()]
    assert model.conditions["income_max"].tolist() == [trained.max()]


def test_A11_one_negative_count(adata):
    with_value(adata, -1)
    names = "adata.layers['counts']", "1 value ", "negative", "cell 'cell_7'", "gene 'gene_3'"
    state = np.random.get_state()
    try:
        for seed in range(20):
            np.random.seed(seed)
            setup_is_refused(adata, SetupError, *names, of=OF_COUNTS, layer="counts")
    finally:
        np.random.set_state(state)


def test_A12_one_fraction(adata):
    with_value(adata, 0.5)
    where = "adata.layers['counts']", "1 value ", "integer", "'cell_7'", "'gene_3'"
    names = *where, "allow_non_integer=True"
    setup_is_refused(adata, SetupError, *names, of=OF_COUNTS, layer="counts")
    for model_class in OF_COUNTS:
        with warned(DataQualityWarning, *where):
            model = fit(
                adata, model_class=model_class, layer="counts", allow_non_integer=True,
                categorical_condition_keys=["cell_type"],
            )  # fmt: skip
        assert np.isfinite(model.log_likelihood(n_samples=2)).all()


WRONG_VALUES = {
    "A11 negative": (-1.0, OF_COUNTS, "negative"),
    "A12 fraction": (0.5, OF_COUNTS, "integer"),
    "A16 A17 NaN": (np.nan, MODELS, "missing (NaN)"),
}


@parametrize(("value", "of", "said"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_20_of_20_places_of_one_wrong_value(value, of, said):
    """Wherever it is, whatever the matrix' form and the random state."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cell, gene = int(rng.integers(N_OBS)), int(rng.integers(N_VARS))
        form = (np.asarray, sparse.csr_matrix, sparse.csc_matrix)[seed % 3]
        adata = with_value(make_cells(), value, form, (cell, gene))
        names = "1 value ", said, f"cell 'cell_{cell}'", f"gene 'gene_{gene}'"
        setup_is_refused(adata, SetupError, *names, of=of, layer="counts")


def test_A05_20_of_20_places_of_nan_in_continuous():
    for seed in range(20):
        cell = int(np.random.default_rng(seed).integers(N_OBS))
        adata = make_cells()
        adata.obs.loc[f"cell_{cell}", "dose"] = np.nan
        names = "obs['dose']", "1 missing value ", f"'cell_{cell}'"
        setup_is_refused(adata, CovariateError, *names, continuous_condition_keys=["dose"])


@parametrize("model_class", PATHS)
def test_models_of_counts_share_one_setup(model_class):
    for method in ("setup_anndata", "setup_mudata", "_register"):
        assert getattr(model_class, method).__func__ is getattr(NBVAE, method).__func__
    assert model_class.needs_counts == NBVAE.needs_counts


def test_A13_logarithms(adata):
    adata.X = adata.X.log1p()
    adata.uns["log1p"] = {"base": None}
    names, of = ("adata.X", "uns['log1p']", 'layer="counts"'), (NBVAE, ZINBVAE)
    setup_is_refused(adata, SetupError, *names, of=of)
    for model_class in set(MODELS) - set(of):  # they take such values as they are
        model_class.setup_anndata(adata)
    NBVAE.setup_anndata(adata, layer="counts")  # the advice works


@parametrize(
    ("model_class", "shape", "training", "doubts"),
    [
        (CondVAE, TINY, {"max_epochs": 2}, []),
        *((path, IN_GENES, {"density_kwargs": {"max_epochs": 2}}, []) for path in PATHS),
        (HybridResidualModel, {}, {}, ["their gene's least"]),
    ],
)
def test_A14_logarithms_to_a_model_of_them(adata, model_class, shape, training, doubts, tmp_path):
    adata.uns["log1p"] = {"base": None}
    before = digest(adata.layers["log"])
    set_up(adata, model_class, layer="log")
    model = model_class(adata, seed=0, **shape)
    with warned(DataQualityWarning, *doubts) if doubts else nullcontext():
        model.train(progress_bar=False, **training)
    assert digest(adata.layers["log"]) == before
    assert model.adata_manager.get_state_registry("conditions")["data_kind"] == "continuous"
    assert not model.needs_counts
    model.save(tmp_path / "model")
    loaded = model_class.load(tmp_path / "model")
    assert not loaded.needs_counts
    for drawn in (model.sample(n_obs=50, seed=0).X, loaded.sample(n_obs=50, seed=0).X):
        assert np.isfinite(densely(drawn)).all()
        assert (densely(drawn) % 1 != 0).any()
    assert np.isfinite(model.log_likelihood(n_samples=2)).all()


@of_continuous
def test_A15_depths_to_a_model_of_logarithms(adata, model_class):
    # Normalised, which is no count, and not yet a logarithm.
    adata.X = adata.X.toarray() / adata.X.sum(1).A1[:, None] * 1e4
    with warned(DataQualityWarning, "adata.X", f"maximum {adata.X.max():g}", "sc.pp.log1p"):
        model_class.setup_anndata(adata)


@of_continuous
def test_A15_raw_counts_to_a_model_of_logarithms(adata, model_class):
    if not model_class.takes_continuous:  # of logarithms only
        names = "adata.layers['counts']", f"maximum {adata.X.max():g}", "sc.pp.log1p"
        with warned(DataQualityWarning, *names):
            model_class.setup_anndata(adata, layer="counts")
        return
    model = fit(adata, model_class=model_class, layer="counts")
    assert model.adata_manager.get_state_registry("conditions")["data_kind"] == "counts"
    assert (densely(model.sample(n_obs=50, seed=0).X) % 1 == 0).all()


@parametrize(
    "form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"]
)
@parametrize(
    ("value", "said"), [(np.nan, "missing (NaN)"), (np.inf, "infinite"), (-np.inf, "infinite")]
)
def test_A16_A17_A18_not_finite(adata, form, value, said):
    with_value(adata, value, form)
    names = "1 value ", said, "cell 'cell_7'", "gene 'gene_3'"
    for model_class in MODELS:
        layer = layer_of(model_class)
        where = f"adata.layers['{layer}']"
        setup_is_refused(adata, SetupError, where, *names, of=[model_class], layer=layer)


def test_A19_count_beyond_float32(adata):
    with_value(adata, 2.0**24 + 2)
    names = "adata.layers['counts']", "1 value above 2**24", "16777218"
    for model_class in OF_COUNTS:
        with warned(DataQualityWarning, *names):
            set_up(adata, model_class, layer="counts")


@parametrize("value", [1e39, -1e39, 1e300])
def test_a_value_beyond_float32_is_infinite(adata, plain, value):
    counts = adata.layers["counts"].toarray().astype(np.float64)
    counts[7, 3] = value
    adata.layers["counts"], adata.X = counts, counts
    names = "1 value that is infinite in float32 (above 3.4e38)", "'cell_7', gene 'gene_3'"
    for model in (NBVAE, CondVAE):
        with refused(SetupError, "adata.layers['counts']", *names, of=adata):
            model.setup_anndata(adata, layer="counts")
    with refused(SetupError, "adata.X", *names, of=adata):
        plain.log_likelihood(adata, n_samples=2)


@parametrize("factor", [1e16, -1e16, 1e30])
def test_values_whose_squares_are_no_numbers_are_refused(adata, factor):
    adata.X = adata.X.toarray().astype(np.float64) * factor
    with refused(SetupError, "adata.X", "values as large as", "up to 1e+15", "unit", of=adata):
        CondVAE.setup_anndata(adata)
    adata.X /= np.abs(adata.X).max() / 1e15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataQualityWarning)
        CondVAE.setup_anndata(adata)
    model = CondVAE(adata, seed=0, n_hidden=8, n_latent=2)
    model.train(1, progress_bar=False)
    predicted = model.predict(n_samples=20, copy=True)
    assert np.isfinite(predicted.layers["exprgen_mean"]).all()
    assert np.isfinite(predicted.layers["exprgen_std"]).all()


@parametrize("wrong", ["yes", 1, None])
def test_allow_non_integer_is_true_or_false(adata, wrong):
    names = "allow_non_integer must be True or False", repr(wrong)
    setup_is_refused(adata, TypeError, *names, allow_non_integer=wrong)


def test_A20_empty_cells(adata, model_class):
    keep = ~np.isin(np.arange(N_OBS), [2, 5])
    for values in (adata.X, adata.layers["log"]):
        values.data *= np.repeat(keep, np.diff(values.indptr))
    with warned(DataQualityWarning, "2 cells", "'cell_2', 'cell_5'", "filter_cells"):
        model = fit(adata, model_class=model_class)
    assert np.isfinite(latent_of(model)).all()
    assert np.isfinite(model.log_likelihood(n_samples=2)).all()
    denoised = model.denoise(copy=True, n_samples=2)
    assert np.isfinite(denoised.layers["exprgen_denoised"]).all()


def test_A21_empty_gene():
    adata = make_cells(2000)
    adata = adata[adata.layers["counts"][:, 1:].sum(1).A1 > 0].copy()
    adata.X = sparse.csr_matrix(adata.X.multiply(np.arange(N_VARS) != 0))
    with warned(DataQualityWarning, "adata.X", "1 genes", "'gene_0'", "filter_genes"):
        model = fit(adata)
    assert model.sample(n_obs=20_000, seed=0).X[:, 0].mean() < 1e-3


def test_A22_empty_matrix(adata):
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    adata.layers["log"] = adata.X.copy()
    setup_is_refused(adata, SetupError, "nothing but 0", adata.shape)


def test_A23_repeated_cell_names(adata, model_class, plain):
    unique = adata.copy()
    adata.obs_names = ["twin", "twin", *adata.obs_names[2:]]
    with warned(DataQualityWarning, "1 names", "adata.obs_names", "'twin'", "by position"):
        set_up(adata, model_class)
    repeated = plain.denoise(adata, n_samples=2, seed=0)
    expected = plain.denoise(unique, n_samples=2, seed=0)
    denoised = (a.layers["exprgen_denoised"] for a in (repeated, expected))
    np.testing.assert_array_equal(*denoised)
    assert list(repeated.obs_names[:2]) == ["twin", "twin"]


def test_A24_repeated_gene_names(adata):
    adata.var_names = ["twin", "twin", *adata.var_names[2:]]
    names = "1 names", "var_names", "'twin'", "adata.var_names_make_unique()"
    setup_is_refused(adata, SetupError, *names)


@parametrize("role", ["batch_key", "categorical_condition_keys"])
def test_A25_one_label(adata, model_class, role):
    adata.obs["only"] = "one"
    keys = ["only"] if role.endswith("s") else "only"
    with warned(DataQualityWarning, "obs['only']", role, "has no effect", "'one'"):
        model = fit(adata, model_class=model_class, **{role: keys})
    assert list(model.sample({"only": "one"}, n_obs=3).obs["only"]) == ["one"] * 3


def test_A26_label_of_one_cell(adata, model_class):
    adata.obs["tissue"] = ["skin", *["gut"] * 40, *["lung"] * 49]
    with warned(DataQualityWarning, "obs['tissue']", "batch_key", "1 cell", "'skin'"):
        set_up(adata, model_class, batch_key="tissue")


@parametrize(
    ("role", "values", "names"),
    [
        ("batch_key", np.arange(N_OBS) / 7, ["90 labels of type float"]),
        ("batch_key", [f"b{i // 2}" for i in range(N_OBS)], ["45 labels of type str"]),
        (
            "categorical_condition_keys",
            np.arange(N_OBS) % 3 + 0.5,
            ["3 labels of type float", "use continuous_condition_keys"],
        ),
    ],
)
def test_A27_labels_that_look_continuous(adata, model_class, role, values, names):
    # A nuisance is not told to become a condition.
    adata.obs["score"] = values
    keys = ["score"] if role.endswith("s") else "score"
    with warned(DataQualityWarning, "obs['score']", role, "looks continuous", *names):
        set_up(adata, model_class, **{role: keys})


def test_A28_declared_category_without_cells(adata, model_class):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories("ghost")
    before = digest(adata.obs)
    with warned(DataQualityWarning, "obs['cell_type']", "dropped", "'ghost'"):
        model = fit(adata, model_class=model_class, categorical_condition_keys=["cell_type"])
    assert digest(adata.obs) == before
    assert "ghost" not in set(model.conditions["cell_type"])
    with refused(UnseenCategoryError, "'cell_type'", "'ghost'"):
        model.sample({"cell_type": "ghost"})


def test_A29_mixed_types_of_labels(adata):
    adata.obs["plate"] = [1, "1"] * 45
    names = "obs['plate']", "str ('1')", "number (1)", ".astype(str)"
    setup_is_refused(adata, CovariateError, *names, categorical_condition_keys=["plate"])


@parametrize(
    "values",
    [
        pd.Series([True, False, True] * 30),
        pd.Series([True, False, True] * 30, dtype="boolean"),
        pd.Series([3, 1, 2] * 30),
        pd.Series([3, 1, 2] * 30, dtype="Int64"),
        pd.Series(["z", "x", "y"] * 30, dtype="string"),
        pd.Series(pd.Categorical(["z", "x", "y"] * 30, ["z", "x", "y"], ordered=True)),
        pd.Series(pd.Categorical([3, 1, 2] * 30, [3, 1, 2], ordered=True)),
    ],
    ids=lambda values: str(values.dtype),
)
def test_A30_dtypes_come_back(adata, model_class, values):
    adata.obs["label"] = values.array
    model = fit(adata, model_class=model_class, categorical_condition_keys=["label"])
    synthetic = model.sample(adata, seed=0)
    pd.testing.assert_series_equal(
        synthetic.obs["label"].reset_index(drop=True), adata.obs["label"].reset_index(drop=True)
    )
    drawn = model.sample(n_obs=200, seed=0).obs["label"]
    assert drawn.dtype == adata.obs["label"].dtype
    assert set(drawn) == set(values)


def answers(matrix: Any, kind: type[GenerativeModel] = NBVAE) -> tuple[np.ndarray, ...]:
    """Everything a model says when trained on a matrix."""
    adata = AnnData(matrix, obs=make_cells().obs)
    with untouched(matrix):
        model = fit(adata, model_class=kind, categorical_condition_keys=["cell_type"])
        said = (
            latent_of(model),
            model.log_likelihood(n_samples=2, seed=0),
            model.sample({"cell_type": "type_0"}, 50, seed=0).X.toarray(),
            model.denoise(n_samples=2, seed=0).layers["exprgen_denoised"],
        )
    assert adata.X is matrix or type(matrix) is not np.ndarray
    return said


@pytest.fixture(scope="session")
def counts() -> np.ndarray:
    return make_cells().X.toarray()


@pytest.fixture(scope="session", params=[NBVAE, ExprFlow, HybridResidualModel])
def kind(request: pytest.FixtureRequest) -> type[GenerativeModel]:
    """One of each kind: what reads cells is the same in all."""
    return request.param


@pytest.fixture(scope="session")
def expected(counts, kind) -> tuple[np.ndarray, ...]:
    return answers(sparse.csr_matrix(counts), kind)


def compare(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@parametrize("sparsely", [False, True], ids=["dense", "csr"])
@parametrize("dtype", ["int64", "int32", "uint8", "uint16", "float16", "float64"])
def test_A31_dtypes_of_x(counts, kind, expected, dtype, sparsely):
    assert counts.max() < 255
    values = counts.astype(dtype)
    if sparsely:
        # scipy has no constructor for half precision, but holds it.
        matrix = sparse.csr_matrix(counts)
        matrix.data = matrix.data.astype(dtype)
        values = matrix
    compare(answers(values, kind), expected)


def test_A31_truth_values(counts):
    compare(answers(counts > 0), answers((counts > 0).astype(np.float32)))


@parametrize(
    "form",
    [
        sparse.csc_matrix,
        sparse.csr_array,
        sparse.csc_array,
        np.ascontiguousarray,
        np.asfortranarray,
        np.asmatrix,
    ],
    ids=lambda form: form.__name__,
)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore:X should not be a np.matrix")  # AnnData makes it an array
def test_A32_forms_of_x(counts, kind, expected, form):
    compare(answers(form(counts), kind), expected)


def test_A33_coo_is_refused_by_anndata(adata):
    with refused(ValueError, "CSR and CSC", of=adata):
        adata.layers["coo"] = sparse.coo_matrix(adata.X)


@parametrize("chunk", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_A34_dask(counts, kind, expected, chunk):
    blocks = da.from_array(counts, chunks=(40, N_VARS)).map_blocks(chunk)
    adata = AnnData(blocks, obs=make_cells().obs)
    model = fit(adata, model_class=kind, categorical_condition_keys=["cell_type"])
    np.testing.assert_array_equal(latent_of(model), expected[0])
    np.testing.assert_array_equal(model.log_likelihood(n_samples=2, seed=0), expected[1])
    assert isinstance(adata.X, da.Array)


@parametrize(
    "form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"]
)
def test_A35_backed_h5ad(counts, kind, expected, form, tmp_path):
    AnnData(form(counts), obs=make_cells().obs).write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = fit(adata, model_class=kind, categorical_condition_keys=["cell_type"])
    np.testing.assert_array_equal(latent_of(model), expected[0])
    np.testing.assert_array_equal(model.log_likelihood(n_samples=2, seed=0), expected[1])
    assert adata.isbacked
    adata.file.close()


@parametrize("form", [sparse.csr_matrix, sparse.csc_matrix], ids=["csr", "csc"])
def test_A35_zarr_sparse_dataset(counts, kind, expected, form, tmp_path):
    write_zarr(AnnData(form(counts), obs=make_cells().obs), tmp_path / "cells.zarr")
    group = zarr.open_group(tmp_path / "cells.zarr", mode="r")
    adata = AnnData(sparse_dataset(group["X"]), obs=make_cells().obs)
    model = fit(adata, model_class=kind, categorical_condition_keys=["cell_type"])
    np.testing.assert_array_equal(latent_of(model), expected[0])


def test_A35_lazy(adata, model, tmp_path):
    write_zarr(adata, tmp_path / "cells.zarr")
    lazy = ad.experimental.read_lazy(tmp_path / "cells.zarr")
    with refused(SetupError, "lazily", ".to_memory()"):
        NBVAE.setup_anndata(lazy)
    for verb in VERBS.values():
        with refused(SetupError, "lazily", ".to_memory()"):
            verb(model, lazy)


def test_A36_view_at_setup(adata):
    parent = adata
    view = parent[5:60]
    setup_is_refused(view, SetupError, "view", "adata.copy()")
    assert view.is_view
    NBVAE.setup_anndata(view.copy())  # the advice works


@parametrize("verb", VERBS.values(), ids=VERBS)
def test_A36_view_given_to_a_verb(adata, model, verb):
    view = adata[5:60]
    with untouched(adata, view):
        from_view = verb(model, view)
        from_copy = verb(model, view.copy())
    assert view.is_view
    assert not isinstance(from_view, AnnData) or not from_view.is_view
    dense = [a.todense() if hasattr(a, "todense") else a for a in (from_view, from_copy)]
    assert_same(*dense)


@parametrize("shape", [(0, N_VARS), (N_OBS, 0)])
def test_A37_empty(adata, shape):
    setup_is_refused(adata[: shape[0], : shape[1]].copy(), SetupError, shape, "empty")


def test_A37_no_x(adata):
    adata.X = None
    names = "adata.X is None", adata.shape, "'counts'"
    setup_is_refused(adata, SetupError, *names, of=OF_COUNTS)


def test_A38_one_gene(adata):
    most = int(adata.X.sum(0).argmax())
    gene = adata[adata.X[:, [most]].toarray().ravel() > 0, [most]].copy()
    model = fit(gene, categorical_condition_keys=["cell_type"])
    synthetic = model.sample({"cell_type": "type_0"}, n_obs=10)
    assert synthetic.shape == (10, 1)
    assert np.isfinite(model.log_likelihood(n_samples=2)).all()


@parametrize("n_obs", [1, 9])
def test_A39_too_few_cells(adata, n_obs):
    setup_is_refused(adata[:n_obs].copy(), SetupError, f"{n_obs} cells", "minimum is 10")


def test_A40_no_anndata(adata, tmp_path, model):
    mudata = pytest.importorskip("mudata")
    table = adata.to_df()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its own next version
        multi = mudata.MuData({"rna": adata.copy()})
    setup_is_refused(table, TypeError, "AnnData", "DataFrame", "anndata.AnnData(")
    for given, names in {
        tmp_path / "cells.h5ad": ["AnnData", type(tmp_path).__name__, "read_h5ad"],
        multi: ["AnnData", "MuData", "setup_mudata"],
        None: ["AnnData", "NoneType"],
    }.items():
        with refused(TypeError, *names):
            NBVAE.setup_anndata(given)
        for verb in (model.denoise, model.log_likelihood, partial(latent_of, model)):
            if given is not None:
                with refused(TypeError, *names[:2]):
                    verb(given)


@parametrize(("store", "key"), [("obs", "_exprgen_split"), ("obsm", "_scvi_conditions")])
def test_A41_reserved_key(adata, store, key):
    getattr(adata, store)[key] = np.ones((N_OBS, 2)) if store == "obsm" else "mine"
    setup_is_refused(adata, SetupError, f"adata.{store}['{key}']", "Rename")


@parametrize("role", ["categorical_condition_keys", "batch_key"])
def test_A41_condition_named_like_a_result(adata, role):
    adata.obs["n_train"] = adata.obs["batch"]
    keys = ["n_train"] if role.endswith("s") else "n_train"
    setup_is_refused(adata, SetupError, "'n_train'", role, "Rename", **{role: keys})


@parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_A42_size_factor(adata, value):
    adata.obs["depth"] = np.where(np.arange(N_OBS) == 6, value, 100.0)
    names = "obs['depth']", "size_factor_key", "1 cells", "'cell_6'", "positive"
    setup_is_refused(adata, CovariateError, *names, of=OF_COUNTS, size_factor_key="depth")


def test_A43_only_setup_adds_keys(adata, model_class):
    before = digest(adata)
    set_up(adata, model_class, **ROLES)
    assert set(adata.uns) == {"_scvi_uuid", "_scvi_manager_uuid"}
    after_setup = digest(adata)
    assert {k: v for k, v in after_setup.items() if k != "uns"} == {
        k: v for k, v in before.items() if k != "uns"
    }
    model = model_class(adata, seed=0, **TINY)
    model.train(1, progress_bar=False)
    assert digest(adata) == after_setup


@parametrize("verb", VERBS.values(), ids=VERBS)
def test_A43_verbs_add_only_what_was_asked_for(adata, model, verb):
    before, own = digest(adata), digest(model.adata)
    verb(model, adata)
    after = digest(adata)
    if verb in [VERBS[name] for name in WRITING]:
        assert set(adata.uns) == {"exprgen"}
        slots = set(adata.uns["exprgen"]["slots"])
        added = {f"obs/{k}" for k in adata.obs}
        added |= {f"layers/{k}" for k in adata.layers if k is not None}  # X, from anndata 0.13
        given = {"layers/counts", "layers/log", *(f"obs/{k}" for k in make_cells().obs)}
        assert added - slots == given
        for slot in slots:
            store, _, name = slot.partition("/")
            del getattr(adata, store)[name]
        del adata.uns["exprgen"]
        after = digest(adata)
    assert after == before
    assert digest(model.adata) == own


def test_A44_random_states_untouched(adata, tmp_path, model_class):
    with untouched():
        model = fit(adata, model_class=model_class, **ROLES)
        for verb in VERBS.values():
            verb(model, adata.copy())
        model.sample(n_obs=5)
        model.sample({"cell_type": "type_0"}, 5, marginalize=["dose"], seed=3)
        model.save(tmp_path / "model")
        model_class.load(tmp_path / "model")


def test_A45_setup_again_under_a_live_model(adata, model_class):
    model = fit(adata, model_class=model_class, **ROLES)

    def said() -> list[np.ndarray]:
        cells = {"cell_type": "type_0", "dose": 1.0}
        return [
            latent_of(model),
            model.log_likelihood(n_samples=2, seed=0),
            densely(model.sample(cells, 20, seed=0).X),
            model.predict(n_samples=20, seed=0, copy=True).layers["exprgen_mean"],
        ]

    before = said()
    adata.X = adata.X * 2
    set_up(adata, model_class, batch_key="donor")
    model_class(adata, **TINY)
    for old, new in zip(before, said(), strict=True):
        np.testing.assert_array_equal(old, new)


@parametrize(
    "edit",
    [
        lambda obs: obs.assign(dose=obs["dose"] * 2),
        lambda obs: obs.assign(dose=np.nan),
        lambda obs: obs.assign(cell_type=obs["cell_type"].to_numpy()[::-1]),
        lambda obs: obs.assign(cell_type="new"),
        lambda obs: obs.assign(batch=obs["batch"].to_numpy()[::-1]),
        lambda obs: obs.assign(donor="new"),
        lambda obs: obs.drop(columns="cell_type"),
        lambda obs: obs.drop(columns="donor"),
    ],
    ids=["number", "nan", "label", "new label", "batch", "donor", "no label", "no donor"],
)
def test_A46_conditions_edited_after_setup(adata, model_class, edit):
    set_up(adata, model_class, **ROLES)
    model = model_class(adata, seed=0, **TINY)
    before = adata.obs
    adata.obs = edit(before)
    (changed,) = [k for k in before if k not in adata.obs or not before[k].equals(adata.obs[k])]
    with refused(CovariateError, repr(changed), "changed since setup_anndata", of=adata):
        model.train(1, progress_bar=False)
    assert not model.is_trained_
    adata.obs = before
    model.train(1, progress_bar=False)  # the values restored
    assert model.is_trained_
