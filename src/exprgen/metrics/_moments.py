r"""Do genes vary, and vary together, as they do in real cells?

All measures are taken *within groups* (cell types, say) where groups are given: the spread between
types is easy to get right from labels alone and would hide everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exprgen.metrics._features import dense

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exprgen.metrics._features import Matrix

__all__ = [
    "gene_correlation_agreement",
    "mean_correlation",
    "variance_ratio",
    "zero_fraction_difference",
]


def variance_ratio(
    synthetic: Matrix,
    real: Matrix,
    *,
    groups_synthetic: np.ndarray | None = None,
    groups_real: np.ndarray | None = None,
) -> float:
    """Median over genes and groups of the variance of synthetic over that of real cells.

    Parameters
    ----------
    synthetic, real
        Values on one scale, usually :func:`log_cp10k`; shapes ``(n_synthetic, n_vars)`` and
        ``(n_real, n_vars)``.
    groups_synthetic, groups_real
        Group of every cell, shapes ``(n_synthetic,)`` and ``(n_real,)``. Groups with fewer than
        two cells on either side are left out. Without groups, all cells are one.

    Returns
    -------
    float
        Not negative; 1 is best, below 1 the synthetic cells vary too little. A gene that is
        constant on both sides of a group does not count.

    Raises
    ------
    ValueError
        No group has two cells on both sides.
    """
    ratios = []
    for s, r in _pairs(synthetic, real, groups_synthetic, groups_real):
        var_s, var_r = s.var(axis=0, ddof=1), r.var(axis=0, ddof=1)
        varies = (var_s > 0) | (var_r > 0)
        with np.errstate(divide="ignore"):
            ratios.append(var_s[varies] / var_r[varies])
    return float(np.median(np.concatenate(ratios)))


def mean_correlation(
    synthetic: Matrix,
    real: Matrix,
    *,
    groups_synthetic: np.ndarray | None = None,
    groups_real: np.ndarray | None = None,
) -> float:
    """Pearson correlation over genes of the mean profiles, averaged over groups by size.

    Parameters
    ----------
    synthetic, real
        Values on one scale, shapes ``(n_synthetic, n_vars)`` and ``(n_real, n_vars)``.
    groups_synthetic, groups_real
        Group of every cell, as in :func:`variance_ratio`.

    Returns
    -------
    float
        In [-1, 1]; 1 is best. A guard, not a goal: gene means alone reach it.

    Raises
    ------
    ValueError
        No group has two cells on both sides.
    """
    pairs = list(_pairs(synthetic, real, groups_synthetic, groups_real))
    correlations = [_pearson(s.mean(axis=0), r.mean(axis=0)) for s, r in pairs]
    return float(np.average(correlations, weights=[len(r) for _, r in pairs]))


def zero_fraction_difference(synthetic: Matrix, real: Matrix) -> float:
    """Mean over genes of the absolute difference in the share of zeros.

    Parameters
    ----------
    synthetic, real
        Counts, shapes ``(n_synthetic, n_vars)`` and ``(n_real, n_vars)``.

    Returns
    -------
    float
        In [0, 1]; 0 is best, but two finite samples of one distribution differ too: compare with
        the value for real against real cells.
    """
    return float(np.abs(_zero_fraction(synthetic) - _zero_fraction(real)).mean())


def gene_correlation_agreement(
    synthetic: Matrix,
    real: Matrix,
    *,
    groups_synthetic: np.ndarray | None = None,
    groups_real: np.ndarray | None = None,
    n_genes: int = 200,
) -> float:
    """Do pairs of genes correlate within groups as they do in real cells?

    The group means are taken out, the gene-gene correlation matrix of what remains is computed on
    both sides, and the two are correlated over all pairs of genes.

    Parameters
    ----------
    synthetic, real
        Values on one scale, usually :func:`log_cp10k`; shapes ``(n_synthetic, n_vars)`` and
        ``(n_real, n_vars)``. Take equal numbers of cells: the value grows with them.
    groups_synthetic, groups_real
        Group of every cell, as in :func:`variance_ratio`.
    n_genes
        Only the genes with the highest within-group variance in ``real`` enter.

    Returns
    -------
    float
        In [-1, 1]; 1 is best, about 0 for genes drawn independently. ``nan`` if fewer than three
        genes vary on both sides.

    Raises
    ------
    ValueError
        No group has two cells on both sides.
    """
    pairs = list(_pairs(synthetic, real, groups_synthetic, groups_real))
    residual_s = np.concatenate([s - s.mean(axis=0) for s, _ in pairs])
    residual_r = np.concatenate([r - r.mean(axis=0) for _, r in pairs])
    variance = residual_r.var(axis=0)
    genes = np.argsort(-variance, kind="stable")[:n_genes]
    genes = genes[(variance[genes] > 0) & (residual_s[:, genes].var(axis=0) > 0)]
    if genes.size < 3:
        return float("nan")
    upper = np.triu_indices(genes.size, k=1)
    corr_s = np.corrcoef(residual_s[:, genes], rowvar=False)[upper]
    corr_r = np.corrcoef(residual_r[:, genes], rowvar=False)[upper]
    return _pearson(corr_s, corr_r)


def _pairs(
    synthetic: Matrix,
    real: Matrix,
    groups_synthetic: np.ndarray | None,
    groups_real: np.ndarray | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The two sides of every group that has two cells on both, dense float64."""
    if (groups_synthetic is None) != (groups_real is None):
        raise ValueError("groups_synthetic and groups_real must both be given, or neither.")
    if groups_synthetic is None or groups_real is None:
        groups_synthetic, groups_real = np.zeros(synthetic.shape[0]), np.zeros(real.shape[0])
    groups_synthetic, groups_real = np.asarray(groups_synthetic), np.asarray(groups_real)
    found = False
    for group in dict.fromkeys(groups_real.tolist()):
        in_s, in_r = groups_synthetic == group, groups_real == group
        if min(in_s.sum(), in_r.sum()) >= 2:
            found = True
            yield dense(synthetic[in_s]).astype(np.float64), dense(real[in_r]).astype(np.float64)
    if not found:
        raise ValueError("No group has at least two cells on both sides.")


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def _zero_fraction(counts: Matrix) -> np.ndarray:
    return 1 - np.asarray((counts != 0).sum(axis=0)).ravel() / counts.shape[0]
