"""Rows of an expression matrix, whatever holds it, and one look at all of it.

AnnData keeps cells x genes in many forms: numpy, CSR or CSC (matrix or array), dask, a data set
in an open h5ad or zarr file. Here all of them answer one question, *the rows i, j, k as float32*,
with the same values, in the order asked, repeats included. Files want increasing, unrepeated
indices: they are read so and put back into the order asked (P-19). Rows that lie close together
in a file are read as one slice. The caller's matrix is never written to, not even to sort its
indices.

Rows of a CSC matrix cost a pass over all of it: :func:`as_reader` turns it into CSR, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

__all__ = ["MatrixSummary", "Reader", "as_reader", "read_rows", "scan"]

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_INTEGERS = 2**24  # float32 holds every integer up to here, and not beyond
BLOCK_VALUES = 2**24  # dense values looked at in one go, 128 MiB in float64
BLOCK_ROWS = 1024
# A slice of a file costs as much as some rows apart: of so many rows one is enough to read it.
WORTH_A_SLICE = 256


@dataclass(frozen=True)
class Reader:
    """Fast access to rows; made by :func:`as_reader`.

    Parameters
    ----------
    matrix
        Anything two-dimensional whose rows can be taken by an increasing index.
    """

    matrix: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return tuple(map(int, self.matrix.shape))  # type: ignore[return-value]

    @property
    def in_memory(self) -> bool:
        """Whether any row is as near as any other: numpy and scipy, not dask or a file."""
        return isinstance(self.matrix, np.ndarray) or sparse.issparse(self.matrix)

    def held(self, index: np.ndarray) -> Reader:
        """Read rows into memory, sparse ones as CSR; ``index`` increases, without repeats."""
        if self.in_memory:
            return Reader(self.matrix[index])
        values = self._take(np.asarray(index, dtype=np.intp))
        if sparse.issparse(values):
            return Reader(values.astype(np.float32))
        return Reader(np.asarray(values, dtype=np.float32))

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Read rows.

        Parameters
        ----------
        index
            Rows from 0 to n_obs - 1, in any order, repeats allowed.

        Returns
        -------
        numpy.ndarray
            ``(len(index), n_vars)``, float32, C-contiguous, the caller's own.

        Raises
        ------
        IndexError
            If a row is negative or beyond the last.
        """
        index = np.asarray(index, dtype=np.intp)
        n_obs, n_vars = self.shape
        if index.size == 0:
            return np.zeros((0, n_vars), dtype=np.float32)
        if index.min() < 0 or index.max() >= n_obs:
            raise IndexError(
                f"Rows 0 to {n_obs - 1} exist, {index.min()} to {index.max()} were asked for."
            )
        if self.in_memory:
            return _dense(self.matrix[index])
        increasing, place = np.unique(index, return_inverse=True)
        values = _dense(self._take(increasing))
        return values if np.array_equal(index, increasing) else values[place]

    def block(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read the rows ``start`` to ``stop - 1`` as CSR in float64, the caller's own."""
        values = self._take(np.arange(start, stop))
        if not sparse.issparse(values):
            values = np.asarray(values, dtype=np.float64)
        block = sparse.csr_matrix(values, dtype=np.float64, copy=True)
        block.sum_duplicates()
        return block

    def _take(self, increasing: np.ndarray) -> Any:
        """Take rows by an increasing index, in as few slices as are worth it, for speed."""
        if len(increasing) == 0 or increasing[-1] - increasing[0] + 1 == len(increasing):
            return self._near(increasing)
        block = np.diff(increasing // _block_rows(self.shape[1]))
        parts = [self._near(part) for part in np.split(increasing, np.flatnonzero(block) + 1)]
        if len(parts) == 1:
            return parts[0]
        return sparse.vstack(parts, "csr") if sparse.issparse(parts[0]) else np.concatenate(parts)

    def _near(self, increasing: np.ndarray) -> Any:
        """Take rows of one block."""
        if len(increasing) == 0:
            return self._read(slice(0, 0))
        first, last = int(increasing[0]), int(increasing[-1])
        if last - first + 1 > WORTH_A_SLICE * len(increasing):
            return self._read(increasing)
        values = self._read(slice(first, last + 1))
        if last - first + 1 == len(increasing):
            return values
        return values[increasing - first]

    def _read(self, rows: slice | np.ndarray) -> Any:
        values = self.matrix[rows]
        values = values.compute() if hasattr(values, "compute") else values
        return _as_csr(values) if sparse.issparse(values) else values


def as_reader(matrix: Any) -> Reader:
    """Prepare any form of matrix for reading rows, many times.

    Parameters
    ----------
    matrix
        ``(n_obs, n_vars)``: numpy array, any scipy sparse matrix or array, dask array (chunks
        dense or sparse), h5py or zarr array, anndata's backed sparse data set; or a
        :class:`Reader`, which is returned. CSC is converted to CSR in memory.

    Raises
    ------
    TypeError
        If it is something else, or does not hold real numbers.
    """
    if isinstance(matrix, Reader):
        return matrix
    if len(getattr(matrix, "shape", ())) != 2 or not hasattr(matrix, "dtype"):
        raise TypeError(
            f"Rows of a {type(matrix).__name__} cannot be read; give a matrix, numpy or scipy "
            "sparse, for example by .to_memory()."
        )
    if np.dtype(matrix.dtype).kind not in "buif":
        raise TypeError(f"The matrix must hold real numbers, but holds {matrix.dtype}.")
    if getattr(matrix, "format", None) == "csc" and not sparse.issparse(matrix):
        matrix = matrix.to_memory()
    if sparse.issparse(matrix):
        return Reader(_as_csr(matrix))
    return Reader(np.asarray(matrix) if isinstance(matrix, np.ndarray) else matrix)


def read_rows(matrix: Any, index: np.ndarray) -> np.ndarray:
    """Read rows once: ``as_reader(matrix).rows(index)``, ``(len(index), n_vars)`` float32."""
    return as_reader(matrix).rows(index)


def _block_rows(n_vars: int, at_most: int = BLOCK_ROWS) -> int:
    """Rows to read at once; fewer where there are many genes."""
    return max(1, min(at_most, BLOCK_VALUES // max(n_vars, 1)))


def _as_csr(matrix: Any) -> sparse.csr_matrix:
    """View CSR as a plain ``csr_matrix`` on the same values; convert any other form."""
    if matrix.format not in ("csr", "csc"):
        return sparse.csr_matrix(matrix)
    plain = sparse.csr_matrix if matrix.format == "csr" else sparse.csc_matrix
    data = matrix.data
    if data.dtype == np.float16:  # scipy cannot take rows of it
        data = data.astype(np.float32)
    return plain((data, matrix.indices, matrix.indptr), shape=matrix.shape).tocsr()


def _dense(values: Any) -> np.ndarray:
    """Make rows dense, float32 and C-contiguous, in memory of their own."""
    if sparse.issparse(values):
        return values.astype(np.float32).toarray(order="C")
    return np.array(values, dtype=np.float32, order="C")


@dataclass(frozen=True)
class MatrixSummary:
    """What :func:`scan` saw.

    Parameters
    ----------
    n_obs, n_vars
        Shape of the matrix.
    minimum, maximum
        Over all values but NaN.
    n_negative, n_non_integer, n_nan, n_inf
        How many values are so; infinite are those that float32, in which rows are read, holds as
        infinite, and they count as integers if they are.
    first_negative, first_non_integer, first_nan, first_inf
        Row and column of the first of them in reading order, None if there is none.
    n_non_zero
        How many values are not 0.
    n_above_2_24
        How many values lie above 2^24, where float32 loses integers.
    row_totals
        Sum of each row in float64, ``(n_obs,)``.
    zero_genes
        Which columns hold nothing but 0, ``(n_vars,)``.
    """

    n_obs: int
    n_vars: int
    minimum: float
    maximum: float
    n_negative: int
    first_negative: tuple[int, int] | None
    n_non_integer: int
    first_non_integer: tuple[int, int] | None
    n_nan: int
    first_nan: tuple[int, int] | None
    n_inf: int
    first_inf: tuple[int, int] | None
    n_non_zero: int
    n_above_2_24: int
    row_totals: np.ndarray
    zero_genes: np.ndarray

    @property
    def is_fractional(self) -> bool:
        """Whether most values that are not 0 are no integers: measured on another scale."""
        return 2 * self.n_non_integer > self.n_non_zero


def scan(matrix: Any, *, block: int = BLOCK_ROWS) -> MatrixSummary:
    """Look at every value once, block of rows by block of rows, and count what can be wrong.

    Parameters
    ----------
    matrix
        Anything :func:`as_reader` takes, ``(n_obs, n_vars)``; of sparse forms only the stored
        values are looked at.
    block
        Rows read at once, at most; fewer where there are many genes.

    Raises
    ------
    TypeError
        If the matrix cannot be read, see :func:`as_reader`.
    """
    reader = as_reader(matrix)
    n_obs, n_vars = reader.shape
    block = _block_rows(n_vars, block)
    minimum, maximum = np.inf, -np.inf
    counts = dict.fromkeys(("negative", "non_integer", "nan", "inf"), 0)
    first: dict[str, tuple[int, int] | None] = dict.fromkeys(counts)
    n_non_zero = n_above = 0
    totals = np.zeros(n_obs)
    zero_genes = np.ones(n_vars, dtype=bool)
    for start in range(0, n_obs, block):
        part = reader.block(start, min(start + block, n_obs))
        data = part.data
        with np.errstate(invalid="ignore"):  # inf - inf
            totals[start : start + block] = np.asarray(part.sum(axis=1)).ravel()
        zero_genes[part.indices[data != 0]] = False
        blank = np.inf if data.size == part.shape[0] * n_vars else 0.0  # are there unstored zeros?
        minimum = min(minimum, np.fmin.reduce(data, initial=blank))
        maximum = max(maximum, np.fmax.reduce(data, initial=-blank))
        n_non_zero += int(np.count_nonzero(data))
        n_above += int((data > FLOAT32_INTEGERS).sum())
        nan = np.isnan(data)
        for name, wrong in {
            "negative": data < 0,
            "non_integer": (np.rint(data) != data) & ~nan,
            "nan": nan,
            "inf": np.abs(data) > FLOAT32_MAX,
        }.items():
            counts[name] += int(wrong.sum())
            if first[name] is None and wrong.any():
                place = int(wrong.argmax())
                row = int(np.searchsorted(part.indptr, place, side="right")) - 1
                first[name] = (start + row, int(part.indices[place]))
    return MatrixSummary(
        n_obs=n_obs,
        n_vars=n_vars,
        minimum=float(minimum),
        maximum=float(maximum),
        n_non_zero=n_non_zero,
        n_above_2_24=n_above,
        row_totals=totals,
        zero_genes=zero_genes,
        **{f"n_{name}": n for name, n in counts.items()},  # type: ignore[arg-type]
        **{f"first_{name}": place for name, place in first.items()},  # type: ignore[arg-type]
    )
