"""Every form a matrix can have reads the same values; one scan finds every oddity."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from exprgen._matrix import as_reader, read_rows, scan

DTYPES = ["int64", "int32", "uint8", "uint16", "float16", "float32", "float64", "bool"]


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.poisson(0.7, (40, 11)).astype(np.float64)


def _dask(chunk_type):
    da = pytest.importorskip("dask.array")
    return lambda x, _: da.from_array(x, chunks=(13, x.shape[1])).map_blocks(chunk_type)


def _stored(kind: str, file_format: str):
    """Write one layer to a file of its own and hand back what lies in the open file."""

    def make(x: np.ndarray, folder):
        values = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[kind](x)
        if file_format == "h5ad":
            ad.AnnData(values).write_h5ad(folder / "a.h5ad")
            return ad.read_h5ad(folder / "a.h5ad", backed="r").X
        zarr = pytest.importorskip("zarr")
        with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
            ad.AnnData(values).write_zarr(folder / "a.zarr")
        group = zarr.open_group(folder / "a.zarr", mode="r")
        return group["X"] if kind == "dense" else ad.io.sparse_dataset(group["X"])

    return make


def _unsorted(x: np.ndarray) -> sparse.csr_matrix:
    """CSR whose column indices run backwards within each row, and which stores a zero."""
    csr = sparse.csr_matrix(x)
    order = np.concatenate(
        [np.arange(a, b)[::-1] for a, b in zip(csr.indptr, csr.indptr[1:], strict=False)]
    )
    return sparse.csr_matrix((csr.data[order], csr.indices[order], csr.indptr), shape=x.shape)


FORMS = {
    "C": lambda x, _: np.ascontiguousarray(x),
    "F": lambda x, _: np.asfortranarray(x),
    "np.matrix": lambda x, _: np.asmatrix(x),
    "csr_matrix": lambda x, _: sparse.csr_matrix(x),
    "csc_matrix": lambda x, _: sparse.csc_matrix(x),
    "csr_array": lambda x, _: sparse.csr_array(x),
    "csc_array": lambda x, _: sparse.csc_array(x),
    "unsorted csr": lambda x, _: _unsorted(x),
    "dask dense": _dask(np.asarray),
    "dask csr": _dask(sparse.csr_matrix),
    "dask csc": _dask(sparse.csc_matrix),
} | {f"{f} {k}": _stored(k, f) for f in ("h5ad", "zarr") for k in ("dense", "csr", "csc")}

ORDERS = [[5, 3, 39, 3, 0], [2, 3, 4], [7], [], range(40), [39, 38]]


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("name", FORMS)
def test_every_form_reads_the_same_rows(name, counts, tmp_path):
    matrix = FORMS[name](counts, tmp_path)
    reader = as_reader(matrix)
    assert reader.shape == counts.shape
    for order in ORDERS:
        index = np.array(order, dtype=int)
        got = reader.rows(index)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got, counts[index])
        np.testing.assert_array_equal(read_rows(matrix, index), counts[index])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["C", "csr_matrix", "csc_array", "dask dense", "h5ad dense"])
def test_every_dtype_reads_the_same(name, dtype, counts, tmp_path):
    x = counts.astype(dtype)
    if name.startswith("cs"):  # scipy builds no float16 from dense, but can hold it
        matrix = FORMS[name](counts, None)
        matrix.data = matrix.data.astype(dtype)
    else:
        matrix = FORMS[name](x, tmp_path)
    index = np.array([9, 0, 9, 30])
    np.testing.assert_array_equal(read_rows(matrix, index), x.astype(np.float32)[index])
    np.testing.assert_array_equal(scan(matrix).row_totals, x.sum(axis=1, dtype=float))


@pytest.mark.parametrize("name", ["C", "F", "csr_matrix", "csc_matrix", "unsorted csr"])
def test_the_callers_matrix_is_never_changed(name, counts):
    matrix = FORMS[name](counts, None)
    parts = [matrix] if isinstance(matrix, np.ndarray) else [
        matrix.data, matrix.indices, matrix.indptr]  # fmt: skip
    before = [part.tobytes("A") for part in parts]
    scan(matrix)
    as_reader(matrix).rows(np.array([3, 1]))[:] = -1
    as_reader(matrix).rows(np.arange(40))[:] = -1
    assert [part.tobytes("A") for part in parts] == before


def test_stored_twice_is_the_sum():
    twice = sparse.csr_matrix((np.array([0.5, 0.5]), np.array([1, 1]), np.array([0, 2])), (1, 3))
    assert scan(twice).n_non_integer == 0
    assert read_rows(twice, np.array([0])).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("row", [-1, 40])
def test_rows_that_do_not_exist(row, counts):
    with pytest.raises(IndexError, match="0 to 39"):
        as_reader(counts).rows(np.array([row]))


@pytest.mark.parametrize(
    "thing", [None, "counts.h5ad", np.arange(3), np.array([["a"]]), np.array([[1j]])]
)
def test_what_is_no_matrix_is_named(thing):
    with pytest.raises(TypeError, match="matrix"):
        as_reader(thing)


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("name", ["C", "csr_matrix", "csc_matrix", "dask csr", "h5ad dense"])
def test_scan_agrees_with_numpy(name, block, counts, tmp_path):
    x = counts.copy()
    x[:, 4] = 0
    x[5, 2], x[5, 3], x[20, 1], x[21, 0] = -1, -2.5, 0.5, 2.0**25
    x[7, 8], x[30, 9], x[9, 1] = np.nan, np.inf, -np.inf
    summary = scan(FORMS[name](x, tmp_path), block=block)
    assert (summary.n_obs, summary.n_vars) == x.shape
    assert (summary.minimum, summary.maximum) == (-np.inf, np.inf)
    assert (summary.n_negative, summary.first_negative) == (3, (5, 2))
    assert (summary.n_non_integer, summary.first_non_integer) == (2, (5, 3))
    assert (summary.n_nan, summary.first_nan) == (1, (7, 8))
    assert (summary.n_inf, summary.first_inf) == (2, (9, 1))
    assert summary.n_above_2_24 == 2
    np.testing.assert_array_equal(summary.row_totals, x.sum(axis=1))
    np.testing.assert_array_equal(summary.zero_genes, (x == 0).all(axis=0))


def test_scan_of_extremes():
    positive = np.array([[2.0, 3.0]])
    assert (scan(positive).minimum, scan(positive).maximum) == (2, 3)
    assert (scan(-positive).minimum, scan(-positive).maximum) == (-3, -2)
    assert scan(sparse.csr_matrix([[0.0, 3.0]])).minimum == 0
    assert scan(sparse.csr_matrix([[0.0, -3.0]])).maximum == 0
    assert scan(np.array([[2**24 + 1]])).n_above_2_24 == 1  # not seen in float32
