r"""Do genes vary, and vary together, as they do in real cells?

All measures are taken *within groups* (cell types, say) where groups are given: the spread between
types is easy to get right from labels alone and would hide everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from exprgen.metrics._checks import at_least, common_groups, counts, dense, group_labels, matrices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exprgen.metrics._features import Matrix

__all__ = [
    "MomentAgreement",
    "gene_correlation_agreement",
    "log_total_ratio",
    "mean_correlation",
    "moment_agreement",
    "variance_ratio",
    "zero_fraction_difference",
]


class MomentAgreement(NamedTuple):
    """Concordance of gene-wise means, standard deviations and shares of zeros."""

    mean: float
    sd: float
    zero_fraction: float


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
        Not negative; 1 is best and, up to noise, what real against real cells give; below 1 the
        synthetic cells vary too little. A gene that is constant on both sides of a group does not
        count; ``nan`` if all are.

    Raises
    ------
    ValueError
        Different numbers of genes, values that are not finite, labels that are missing or do not
        fit, or no group has two cells on both sides.
    """
    ratios = []
    for s, r in _pairs(synthetic, real, groups_synthetic, groups_real):
        var_s, var_r = _variance(s), _variance(r)
        varies = (var_s > 0) | (var_r > 0)
        with np.errstate(divide="ignore"):
            ratios.append(var_s[varies] / var_r[varies])
    of_all = np.concatenate(ratios)
    return float(np.median(of_all)) if of_all.size else float("nan")


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
        In [-1, 1]; 1 is best, and real against real cells are close below it. A guard, not a
        goal: gene means alone reach it.

    Raises
    ------
    ValueError
        Different numbers of genes, values that are not finite, labels that are missing or do not
        fit, or no group has two cells on both sides.
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

    Raises
    ------
    ValueError
        Different numbers of genes, no cells, or values that are not finite.
    """
    synthetic, real = matrices({"synthetic": synthetic, "real": real})
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
        Group of every cell, as in :func:`variance_ratio`. Without groups, correlations are those
        among all cells, which the differences between cell types dominate.
    n_genes
        Only the genes with the highest within-group variance in ``real`` enter.

    Returns
    -------
    float
        In [-1, 1]; 1 is best, about 0 for genes drawn independently. Real against real cells are
        below 1: sampling noise is part of every correlation. ``nan`` if fewer than three genes
        vary on both sides.

    Raises
    ------
    ValueError
        Different numbers of genes, values that are not finite, labels that are missing or do not
        fit, or no group has two cells on both sides.
    """
    at_least("n_genes", n_genes, 3)
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


def moment_agreement(
    synthetic: Matrix,
    real: Matrix,
    *,
    groups_synthetic: np.ndarray | None = None,
    groups_real: np.ndarray | None = None,
) -> MomentAgreement:
    """Concordance over genes of means, standard deviations and shares of zeros :cite:p:`lin1989`.

    Unlike a correlation, concordance falls if all values are too high or too spread.

    Parameters
    ----------
    synthetic, real
        Values on one scale, usually :func:`log_cp10k`; shapes ``(n_synthetic, n_vars)`` and
        ``(n_real, n_vars)``. Take equal numbers of cells: the values grow with them.
    groups_synthetic, groups_real
        Group of every cell, as in :func:`variance_ratio`.

    Returns
    -------
    MomentAgreement
        ``mean``, ``sd`` and ``zero_fraction``, each in [-1, 1] and averaged over groups by their
        number of real cells; 1 is best, and real against real cells are close below it. Guards,
        not goals: genes drawn independently reach it.

    Raises
    ------
    ValueError
        Different numbers of genes, values that are not finite, labels that are missing or do not
        fit, or no group has two cells on both sides.
    """
    found, sizes = [], []
    for s, r in _pairs(synthetic, real, groups_synthetic, groups_real):
        found.append(
            [
                _concordance(s.mean(axis=0), r.mean(axis=0)),
                _concordance(s.std(axis=0, ddof=1), r.std(axis=0, ddof=1)),
                _concordance((s == 0).mean(axis=0), (r == 0).mean(axis=0)),
            ]
        )
        sizes.append(len(r))
    return MomentAgreement(*np.average(found, axis=0, weights=sizes).tolist())


def log_total_ratio(
    counts_synthetic: Matrix,
    counts_real: Matrix,
    *,
    groups_synthetic: np.ndarray | None = None,
    groups_real: np.ndarray | None = None,
) -> float:
    """Variance of the log total counts within groups, synthetic over real.

    Parameters
    ----------
    counts_synthetic, counts_real
        Counts, shapes ``(n_synthetic, n_vars)`` and ``(n_real, n_vars)``.
    groups_synthetic, groups_real
        Group of every cell, as in :func:`variance_ratio`.

    Returns
    -------
    float
        Not negative; 1 is best and, up to noise, what real against real cells give. Below 1, cells
        are too alike in their depth. Variances, of log(1 + total), are averaged over groups by
        their number of real cells before the ratio is taken. ``nan`` if real totals do not vary.

    Raises
    ------
    ValueError
        Different numbers of genes, values that are not finite, labels that are missing or do not
        fit, or no group has two cells on both sides.
    """
    given = {"counts_synthetic": counts_synthetic, "counts_real": counts_real}
    totals = [
        np.log1p(np.asarray(counts(name, x).sum(axis=1), dtype=np.float64)).reshape(-1, 1)
        for name, x in given.items()
    ]
    pairs = list(_pairs(totals[0], totals[1], groups_synthetic, groups_real))
    of_synthetic = sum(len(r) * _variance(s).item() for s, r in pairs)
    of_real = sum(len(r) * _variance(r).item() for _, r in pairs)
    return float(of_synthetic / of_real) if of_real > 0 else float("nan")


def _pairs(
    synthetic: Matrix,
    real: Matrix,
    groups_synthetic: np.ndarray | None,
    groups_real: np.ndarray | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The two sides of every group that has two cells on both, dense float64."""
    synthetic, real = matrices({"synthetic": synthetic, "real": real})
    of_s, of_r = group_labels(
        groups_synthetic=(groups_synthetic, synthetic.shape[0]),
        groups_real=(groups_real, real.shape[0]),
    )
    for group in common_groups(of_s, of_r):
        s, r = dense(synthetic[of_s == group]), dense(real[of_r == group])
        yield s.astype(np.float64), r.astype(np.float64)


def _variance(x: np.ndarray) -> np.ndarray:
    """Variance of each column; of a constant one exactly 0, not what rounding makes of it."""
    return np.where(x.max(axis=0) > x.min(axis=0), x.var(axis=0, ddof=1), 0.0)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def _concordance(a: np.ndarray, b: np.ndarray) -> float:
    """Lin's concordance correlation coefficient; 1 where both are constant and equal."""
    a0, b0 = a - a.mean(), b - b.mean()
    spread = a0 @ a0 + b0 @ b0 + len(a) * (a.mean() - b.mean()) ** 2
    return float(2 * (a0 @ b0) / spread) if spread > 0 else 1.0


def _zero_fraction(values: Matrix) -> np.ndarray:
    return 1 - np.asarray((values != 0).sum(axis=0)).ravel() / values.shape[0]
