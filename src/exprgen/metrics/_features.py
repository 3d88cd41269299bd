"""What cells are compared in: normalised genes, principal components, per-cell quality.

Counts are first brought to a common scale, log(1 + 10^4 x / total). Principal components are
fitted on the *pooled* pair under comparison: fitted on training cells they separate even real
held-out cells from real training cells (measured: AUC .58 to .64 instead of .5), because they
were turned towards the training cells' noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from scipy import sparse

from exprgen.metrics._checks import at_least, dense, matrices
from exprgen.metrics._checks import counts as check_counts

if TYPE_CHECKING:
    Matrix: TypeAlias = np.ndarray | sparse.spmatrix | sparse.sparray

__all__ = ["QUALITY_FEATURES", "log_cp10k", "pooled_pcs", "quality_features"]

QUALITY_FEATURES = ("library", "genes_detected", "top20_share", "maximum", "ones_share")
"""Columns of :func:`quality_features`."""


def log_cp10k(counts: Matrix) -> Matrix:
    """Counts scaled to 10,000 per cell, then log(1 + x); empty cells stay zero.

    Parameters
    ----------
    counts
        Shape ``(n_obs, n_vars)``, dense or sparse; not modified.

    Returns
    -------
    numpy.ndarray or scipy.sparse.csr_matrix
        Same shape, float32, CSR where ``counts`` was sparse.

    Raises
    ------
    ValueError
        No values, or some that are negative or not finite.
    """
    counts = check_counts("counts", counts)
    if sparse.issparse(counts):
        values = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
        values.data = np.log1p(
            values.data * np.repeat(_scale(_row_totals(values)), np.diff(values.indptr))
        )
        return values.astype(np.float32)
    values = np.asarray(counts, dtype=np.float64)
    return np.log1p(values * _scale(values.sum(axis=1))[:, None]).astype(np.float32)


def pooled_pcs(
    a: Matrix, b: Matrix, *, n_pcs: int = 50, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of two samples, fitted on both together.

    Parameters
    ----------
    a, b
        Normalised values (:func:`log_cp10k`), shapes ``(n_a, n_vars)`` and ``(n_b, n_vars)``.
    n_pcs
        Components kept; fewer if the data have fewer dimensions.
    seed
        Of the randomised decomposition used on large matrices.

    Returns
    -------
    tuple of numpy.ndarray
        Scores, shapes ``(n_a, n_pcs)`` and ``(n_b, n_pcs)``.

    Raises
    ------
    ValueError
        Different numbers of genes, no cells, or values that are not finite.
    """
    from sklearn.decomposition import PCA

    at_least("n_pcs", n_pcs, 1)
    a, b = matrices({"a": a, "b": b})
    pooled = np.concatenate([dense(a), dense(b)])
    n_pcs = min(n_pcs, pooled.shape[0] - 1, pooled.shape[1])
    # Of cells that are all alike, the shares of variance (not used here) are 0 / 0.
    with np.errstate(invalid="ignore"):
        scores = PCA(n_pcs, random_state=seed).fit_transform(pooled)
    return scores[: a.shape[0]], scores[a.shape[0] :]


def quality_features(counts: Matrix) -> np.ndarray:
    """Five numbers per cell that a quality-control plot would show.

    Parameters
    ----------
    counts
        Counts, shape ``(n_obs, n_vars)``.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_obs, 5)``, columns :data:`QUALITY_FEATURES`: total counts; genes detected; share
        of the counts in the cell's 20 highest genes; highest count; share of the detected genes
        that have exactly one count. Shares of an empty cell are 0.

    Raises
    ------
    ValueError
        No values, or some that are negative or not finite.
    """
    rows = sparse.csr_matrix(check_counts("counts", counts), dtype=np.float64, copy=True)
    rows.eliminate_zeros()
    n_obs = rows.shape[0]
    detected = np.diff(rows.indptr)
    row = np.repeat(np.arange(n_obs), detected)
    # Each row's values, highest first; their position in the row is then their rank.
    values = rows.data[np.lexsort((-rows.data, row))]
    rank = np.arange(values.size) - np.repeat(rows.indptr[:-1], detected)
    first, highest = rank < 20, rank == 0
    library = _row_totals(rows)
    top = np.bincount(row[first], values[first], n_obs) / np.maximum(library, 1e-300)
    maximum = np.bincount(row[highest], values[highest], n_obs)
    ones = np.bincount(row[values == 1], minlength=n_obs) / np.maximum(detected, 1)
    return np.column_stack([library, detected, top, maximum, ones])


def _row_totals(values: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(values.sum(axis=1), dtype=np.float64).ravel()


def _scale(totals: np.ndarray) -> np.ndarray:
    return np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
