r"""What a model must beat: cells made from training cells by rules that anybody can write down.

``independent NB``
    Every gene of every group is negative binomial, independent of all others, with the mean
    :math:`m` and variance :math:`v` of the training cells, so
    :math:`\theta = m^2 / (v - m)` (Poisson where :math:`v \le m`).
``NB + copula``
    The same marginals, tied by a Gaussian copula, the idea of scDesign :cite:p:`song2024`: each
    training count becomes a normal score :math:`\Phi^{-1}(u)`, :math:`u` uniform on
    :math:`[F(x - 1), F(x)]`, and :math:`x' = F^{-1}(\Phi(z'))` with :math:`z'` normal with the
    scores' correlations. With the standardised scores :math:`Z` of :math:`n` cells,
    :math:`z' = Z^\top \xi / \sqrt n`, :math:`\xi \sim N(0, I_n)`, has exactly these correlations,
    and no matrix of genes by genes is formed.
``training cells``
    Drawn without replacement. They are real, but no upper bound: the model's cells must be like
    the *held-out* cells, and these, being copies, must fail the memorisation rows.
``group mean``
    Every cell is the mean of its group: right in every mean, and wrong in all else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from exprgen.tl._halves import Cells
from exprgen.tl._names import check_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exprgen.tl._halves import Sizes

__all__ = ["BASELINES", "baseline_cells", "check_baselines", "independent_nb", "nb_copula"]

BASELINES = ("independent NB", "NB + copula", "training cells", "group mean")
"""Names of the baselines, as rows of the report call them."""

_COPULA_MIN = 10  # of fewer cells there is no correlation to speak of: genes stay independent
_COPULA_MAX = 2000  # cells of a group that its correlations are taken from


def check_baselines(baselines: bool | Sequence[str]) -> list[str]:
    """Names of the baselines that are asked for."""
    if isinstance(baselines, bool):
        return list(BASELINES) if baselines else []
    names = check_names(baselines, "baselines", "True, False")
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise ValueError(f"baselines has {unknown[0]!r}; allowed are {', '.join(BASELINES)}.")
    return names


def baseline_cells(name: str, train: Cells, sizes: Sizes, *, seed: int) -> tuple[Cells, str]:
    """Cells of a baseline, ``sizes`` of each group that ``train`` has, and a remark.

    Parameters
    ----------
    name
        One of :data:`BASELINES`.
    train
        Training cells.
    sizes
        Cells per group.
    seed
        The same seed gives the same cells.
    """
    rng = np.random.default_rng([seed, BASELINES.index(name)])
    counts, labels, n_twice = [], [], 0
    for group, size in sizes.items():
        rows = np.flatnonzero(train.groups == group)
        if not rows.size:
            continue
        if name == "training cells":
            drawn = np.concatenate([rng.permutation(rows) for _ in range(-(-size // rows.size))])[
                :size
            ]
            n_twice += size - min(size, rows.size)
            counts.append(train.counts[drawn])
        elif name == "group mean":
            mean = np.asarray(train.counts[rows].mean(axis=0), dtype=np.float64)
            counts.append(sparse.csr_matrix(np.repeat(mean.reshape(1, -1), size, axis=0)))
        else:
            make = independent_nb if name == "independent NB" else nb_copula
            counts.append(make(train.counts[rows], size, rng))
        labels.append(np.repeat(group, size))
    remark = ""
    if name == "training cells":
        remark = "real cells, but copies: no upper bound"
        remark += f"; {n_twice} cells occur twice" if n_twice else ""
    return Cells(sparse.vstack(counts, format="csr"), np.concatenate(labels)), remark


def independent_nb(
    counts: sparse.csr_matrix, size: int, rng: np.random.Generator
) -> sparse.csr_matrix:
    """``(size, n_vars)`` counts, genes independent, with the mean and variance of ``counts``."""
    mean, theta = _moments(counts)
    rate = np.tile(mean, (size, 1))
    over = np.isfinite(theta)
    rate[:, over] = rng.gamma(theta[over], mean[over] / theta[over], (size, int(over.sum())))
    return sparse.csr_matrix(rng.poisson(rate).astype(np.float32))


def nb_copula(counts: sparse.csr_matrix, size: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """``(size, n_vars)`` counts with NB marginals and the rank correlations of ``counts``."""
    if counts.shape[0] < _COPULA_MIN:
        return independent_nb(counts, size, rng)
    mean, theta = _moments(counts)
    scores = _normal_scores(
        counts[rng.permutation(counts.shape[0])[:_COPULA_MAX]], mean, theta, rng
    )
    scores -= scores.mean(axis=0)
    scores /= np.maximum(scores.std(axis=0), 1e-12)
    n = len(scores)
    z = rng.standard_normal((size, n)) @ scores / np.sqrt(n)
    return _quantiles(z, mean, theta)


def _moments(counts: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse dispersion of every gene; infinite (Poisson) without overdispersion."""
    n = counts.shape[0]
    mean = np.asarray(counts.mean(axis=0), dtype=np.float64).ravel()
    squares = np.asarray(counts.multiply(counts).sum(axis=0), dtype=np.float64).ravel()
    excess = np.maximum(squares - n * mean**2, 0) / max(n - 1, 1) - mean
    over = excess > 1e-8 * mean
    theta = np.full(mean.shape, np.inf)
    theta[over] = mean[over] ** 2 / excess[over]
    return mean, theta


def _normal_scores(
    counts: sparse.csr_matrix, mean: np.ndarray, theta: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Normal scores of counts, ties broken at random; dense, ``(n_obs, n_vars)``."""
    from scipy.special import ndtri

    entries = counts.tocoo()
    genes = entries.col
    u = rng.random(counts.shape)
    at_zero = _cdf(np.zeros_like(mean), mean, theta)
    found = u[entries.row, genes]
    high = _cdf(entries.data, mean[genes], theta[genes])
    low = _cdf(entries.data - 1, mean[genes], theta[genes])
    u *= at_zero
    u[entries.row, genes] = low + found * (high - low)
    return ndtri(np.clip(u, 1e-9, 1 - 1e-9))


def _quantiles(z: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> sparse.csr_matrix:
    """Counts at the normal scores ``z``; only those above 0 need the inverse."""
    from scipy import stats
    from scipy.special import ndtr

    u = ndtr(z)
    rows, genes = np.nonzero(u > _cdf(np.zeros_like(mean), mean, theta))
    u = np.minimum(u[rows, genes], 1 - 1e-9)
    m, t = mean[genes], theta[genes]
    over = np.isfinite(t)
    x = np.empty(len(u))
    x[over] = stats.nbinom.ppf(u[over], t[over], t[over] / (t[over] + m[over]))
    x[~over] = stats.poisson.ppf(u[~over], m[~over])
    return sparse.csr_matrix((x.astype(np.float32), (rows, genes)), shape=z.shape)


def _cdf(x: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """P(X <= x) of negative binomial, or Poisson, counts; elementwise."""
    from scipy import special

    over = np.isfinite(theta)
    out = np.empty(x.shape)
    t, m = theta[over], mean[over]
    x = np.asarray(x, dtype=np.float64)
    # nbdtr takes whole numbers of failures only: the incomplete beta function behind it.
    out[over] = special.betainc(t, np.maximum(x[over], 0) + 1, t / (t + m))
    out[~over] = special.pdtr(np.maximum(x[~over], 0), mean[~over])
    out[x < 0] = 0
    return out
