"""Bad data and bad arguments: the error, what it names, and that nothing was changed."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from exprgen._arguments import (
    check_choice,
    check_genes,
    check_indices,
    check_positive_int,
    check_quantiles,
)
from exprgen._errors import DataQualityWarning, GeneMismatchError, SetupError
from exprgen._validate import align_genes, check_setup_data, embedding_of, matrix_of


def cells(n_obs: int = 20, n_vars: int = 6) -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(2, (n_obs, n_vars)) + 1
    adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32))
    adata.obs_names = [f"cell{i}" for i in range(n_obs)]
    adata.var_names = [f"gene{i}" for i in range(n_vars)]
    return adata


def check(adata, layer=None, *, needs_counts=True, **options):
    return check_setup_data(adata, layer, needs_counts=needs_counts, **options)


def with_value(value: float, row: int = 3, column: int = 2) -> ad.AnnData:
    adata = cells()
    adata.X[row, column] = value
    return adata


def test_good_counts_pass_silently_and_unchanged():
    adata = cells()
    adata.layers["counts"] = adata.X.copy()
    before = adata.copy()
    summary = check(adata, "counts")
    assert summary.minimum >= 1
    assert list(adata.uns) == list(adata.obsm) == list(adata.obs) == []
    assert (adata.X != before.X).nnz == (adata.layers["counts"] != before.X).nnz == 0


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (-1.0, ["adata.X", "1 value", "negative", "'cell3'", "'gene2'"]),
        (0.5, ["1 value", "integer", "'cell3'", "'gene2'", "allow_non_integer=True"]),
        (np.nan, ["NaN", "1 value", "'cell3'", "'gene2'"]),
        (np.inf, ["infinite", "'cell3'", "'gene2'"]),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_one_bad_value_is_found(value, names, dense):
    adata = with_value(value)
    if dense:
        adata.X = adata.X.toarray()
    with pytest.raises(SetupError) as error:
        check(adata)
    assert [name for name in names if name not in str(error.value)] == []


def test_logarithms_point_to_the_counts():
    adata = with_value(0.5)
    adata.uns["log1p"] = {"base": None}
    with pytest.raises(SetupError, match=r"log1p.*raw counts"):
        check(adata)
    adata.layers["counts"] = cells().X
    with pytest.raises(SetupError, match='log1p.*layer="counts"'):
        check(adata)
    check(adata, "counts")


def test_corrected_counts_are_allowed_when_asked():
    with pytest.warns(DataQualityWarning, match="allow_non_integer") as caught:
        check(with_value(0.5), allow_non_integer=True)
    assert len(caught) == 1
    with pytest.raises(SetupError, match="negative"):
        check(with_value(-0.5), allow_non_integer=True)


def test_continuous_models_take_logarithms_and_doubt_counts():
    adata = cells()
    with pytest.warns(DataQualityWarning, match=r"maximum \d+.*log1p"):
        check(adata, needs_counts=False)
    adata.X = adata.X.log1p()
    check(adata, needs_counts=False)
    adata.X = adata.X.toarray() - 1.0  # scaled data are negative, and fine
    check(adata, needs_counts=False)
    with pytest.warns(DataQualityWarning, match="looks like counts"):
        check(with_value(1e4 + 0.5), needs_counts=False)  # normalised, not logged


def test_doubtful_data_warn():
    with pytest.warns(DataQualityWarning, match=r"1 value above 2\*\*24"):
        check(with_value(2.0**25))
    adata = cells()
    adata.X = adata.X.toarray()
    adata.X[[4, 7]] = 0
    with pytest.warns(DataQualityWarning, match="2 cells: 'cell4', 'cell7'"):
        check(adata)
    adata = cells()
    adata.X = adata.X.toarray()
    adata.X[:, 1] = 0
    with pytest.warns(DataQualityWarning, match="1 genes: 'gene1'"):
        check(adata)
    adata = cells()
    adata.obs_names = ["a", "a", *adata.obs_names[2:]]
    with pytest.warns(DataQualityWarning, match="obs_names are repeated: 'a'"):
        check(adata)


def _lazy(tmp_path: Path) -> ad.AnnData:
    cells().write_h5ad(tmp_path / "a.h5ad")
    return ad.experimental.read_lazy(tmp_path / "a.h5ad")


def _backed(tmp_path: Path) -> ad.AnnData:
    cells().write_h5ad(tmp_path / "b.h5ad")
    return ad.read_h5ad(tmp_path / "b.h5ad", backed="r")


def _reserved(tmp_path: Path) -> ad.AnnData:
    adata = cells()
    adata.obs["_exprgen_split"] = 1
    return adata


def _repeated(tmp_path: Path) -> ad.AnnData:
    adata = cells()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.var_names = ["g", "g", "h", "h", "i", "j"]
    return adata


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: cells()[:15], r"adata\.copy\(\)"),
        (_lazy, r"\.to_memory\(\)"),
        (lambda _: cells(0), r"shape \(0, 6\)"),
        (lambda _: ad.AnnData(np.zeros((20, 0))), r"shape \(20, 0\)"),
        (lambda _: ad.AnnData(obs=cells().obs, var=cells().var), r"X is None, shape \(20, 6\)"),
        (lambda _: cells(9), "9 cells, the minimum is 10"),
        (_repeated, r"2 names in adata.var_names.*'g', 'h'.*var_names_make_unique\(\)"),
        (lambda _: ad.AnnData(np.zeros((20, 6))), "nothing but 0"),
        (_reserved, r"adata.obs\['_exprgen_split'\]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_what_cannot_be_set_up(make, message, tmp_path):
    with pytest.raises(SetupError, match=message):
        check(make(tmp_path))


def test_what_can_be_set_up(tmp_path):
    assert check(_backed(tmp_path)).n_obs == 20
    assert check(cells(20, 1)).n_vars == 1
    again = _reserved(tmp_path)
    again.uns["_scvi_uuid"] = "ours"
    check(again)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (pd.DataFrame({"g": [1.0]}), r"got DataFrame.*anndata\.AnnData"),
        ("cells.h5ad", "got str.*read_h5ad"),
        (Path("cells.h5ad"), "got PosixPath.*read_h5ad"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_anndata(thing, message):
    with pytest.raises(TypeError, match=message):
        check(thing)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mudata_points_to_its_setup():
    with pytest.raises(TypeError, match="got MuData.*setup_mudata"):
        check(mudata.MuData({"rna": cells()}))


def test_missing_layers_and_embeddings_are_named():
    adata = cells()
    adata.layers["counts"] = adata.X
    adata.obsm["X_pca"] = np.zeros((20, 2))
    with pytest.raises(KeyError, match=r"'count'.*there are: 'counts'.*Did you mean 'counts'"):
        matrix_of(adata, "count")
    with pytest.raises(KeyError, match="'X_pcs'.*Did you mean 'X_pca'"):
        embedding_of(adata, "X_pcs")
    assert embedding_of(adata, None) is None
    assert embedding_of(adata, "X_pca")[1].shape == (20, 2)


def test_genes_align_by_name(caplog):
    model = ["a", "b", "c"]
    assert align_genes(pd.Index(model), model) is None
    with caplog.at_level(logging.INFO, logger="exprgen"):
        assert align_genes(["c", "a", "b"], model).tolist() == [1, 2, 0]
        assert align_genes(["x", "c", "b", "x", "a"], model).tolist() == [4, 2, 1]
    assert len(caplog.records) == 2
    with pytest.raises(GeneMismatchError, match=r"2 of the model's 3 .*'b', 'c'.*begin 'a', 'x'"):
        align_genes(["a", "x"], model)
    with pytest.raises(GeneMismatchError, match="6 .*'0', '1', '2', '3', '4' and 1 more"):
        align_genes(["x"] * 6, list("012345"))
    with pytest.raises(GeneMismatchError, match="more than once.*'a'"):
        align_genes(["a", "a", "b", "c"], model)


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([4, 0, 4, -1], [4, 0, 4, 9]),
        (slice(None, 3), [0, 1, 2]),
        (slice(None, None, -4), [9, 5, 1]),
        (np.arange(10) % 5 == 1, [1, 6]),
        (pd.Series([True] + [False] * 9, index=list("abcdefghij")), [0]),
        ([], []),
        (np.array([], dtype=bool)[:0].astype(int), []),
        (np.uint8([3, 1]), [3, 1]),
        (3, [3]),
        (None, list(range(10))),
    ],
)
def test_indices(indices, expected):
    assert check_indices(indices, 10).tolist() == expected


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 10], IndexError, "10 .*n_obs is 10"),
        ([-11], IndexError, "-11 .*n_obs is 10"),
        ([True] * 9, IndexError, "9 cells.*n_obs is 10"),
        ([0.0, 1.0], TypeError, "float64"),
        (["cell0"], TypeError, "get_indexer"),
        ([[0, 1]], IndexError, r"\(1, 2\)"),
    ],
)
def test_bad_indices(indices, error, message):
    with pytest.raises(error, match=message):
        check_indices(indices, 10)


def test_genes():
    names = ["CD3D", "CD8A", "MS4A1"]
    assert check_genes(None, names).tolist() == [0, 1, 2]
    assert check_genes(["MS4A1", "CD3D"], pd.Index(names)).tolist() == [2, 0]
    with pytest.raises(KeyError, match="1 of genes.*'CD8a'.*Did you mean 'CD8A'"):
        check_genes(["CD3D", "CD8a"], names)
    with pytest.raises(TypeError, match=r"\['CD3D'\]"):
        check_genes("CD3D", names)
    with pytest.raises(ValueError, match="repeated: 'CD3D'"):
        check_genes(["CD3D", "CD3D"], names)
    with pytest.raises(ValueError, match="empty"):
        check_genes([], names)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, "3", None])
def test_not_integers(value):
    with pytest.raises(TypeError, match="n_obs"):
        check_positive_int(value, "n_obs")


def test_integers():
    assert type(check_positive_int(np.int64(3), "n_obs")) is int
    assert check_positive_int(0, "n_obs", minimum=0) == 0
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"n_obs must be at least 1, got {value}"):
            check_positive_int(value, "n_obs")


def test_choices():
    assert check_choice("mean", "of", ("cell", "mean")) == "mean"
    with pytest.raises(ValueError, match="of must be .*'cell', 'mean', got 'cells'. Did you mean"):
        check_choice("cells", "of", ("cell", "mean"))
    with pytest.raises(ValueError, match="got None"):
        check_choice(None, "of", ("cell", "mean"))


def test_quantiles():
    assert check_quantiles((0.95, 0.05)) == (0.05, 0.95)
    assert check_quantiles(None) == check_quantiles(()) == ()
    for wrong in (0.5, "0.5", ["a"], [True]):
        with pytest.raises(TypeError, match="quantiles"):
            check_quantiles(wrong)
    for wrong in ([0.0], [1.0], [5], [np.nan], [0.1, 0.1]):
        with pytest.raises(ValueError, match="quantiles"):
            check_quantiles(wrong)
