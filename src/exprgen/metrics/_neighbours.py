r"""Do synthetic cells lie where real cells lie, and everywhere they do?

Around every cell lies a ball that reaches to its :math:`k`-th nearest neighbour in its own sample.
*Precision* is the share of synthetic cells inside some real cell's ball, *recall* the share of
real cells inside some synthetic cell's ball :cite:p:`kynkaanniemi2019`. Both are fooled by single
outliers, whose balls are huge. *Density* (how many real balls a synthetic cell lies in, over
:math:`k`) and *coverage* (the share of real cells whose ball holds a synthetic cell) use the balls
of real cells only :cite:p:`naeem2020`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from exprgen.metrics._checks import at_least, points
from exprgen.metrics._distances import squared_distances

if TYPE_CHECKING:
    from exprgen.metrics._features import Matrix

__all__ = ["PRDC", "local_mixing", "precision_recall_density_coverage"]


class PRDC(NamedTuple):
    """Precision, recall, density and coverage of synthetic cells."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(synthetic: Matrix, real: Matrix, *, k: int = 5) -> PRDC:
    r"""Fidelity (precision, density) and diversity (recall, coverage) by nearest neighbours.

    Parameters
    ----------
    synthetic, real
        Features on one scale, shapes ``(n_synthetic, n_features)`` and ``(n_real, n_features)``;
        principal components, usually.
    k
        Neighbours that a ball reaches to, the cell itself not counted.

    Returns
    -------
    PRDC
        ``precision``, ``recall`` and ``coverage`` in [0, 1], higher is better; ``density`` is not
        negative and may exceed 1, which is best (above it, synthetic cells crowd where real ones
        are dense). Real against real, density averages 1 and coverage

        .. math:: 1 - \prod_{i=1}^{k} \frac{n_\text{real} - i}{n_\text{real} + n_\text{synth} - i}
                  \approx 1 - 2^{-k}

        (.97 for ``k=5`` and equal sizes), whatever the distribution; precision and recall have no
        such value and need a real-vs-real control.

    Raises
    ------
    ValueError
        Different features, not more than ``k`` cells, or values that are not finite.
    """
    at_least("k", k, 1)
    synthetic, real = points(synthetic=synthetic, real=real, n_min=k + 1)
    centre = real.mean(axis=0)
    synthetic, real = synthetic - centre, real - centre
    radius_real, radius_synthetic = _squared_radii(real, k), _squared_radii(synthetic, k)
    balls = np.zeros(len(synthetic))  # of real cells, that hold this synthetic cell
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, squared in squared_distances(real, synthetic):
        in_real = squared <= radius_real[rows, None]
        balls += in_real.sum(axis=0)
        covered[rows] = in_real.any(axis=1)
        recalled[rows] = (squared <= radius_synthetic).any(axis=1)
    return PRDC(
        precision=float((balls > 0).mean()),
        recall=float(recalled.mean()),
        density=float(balls.mean() / k),
        coverage=float(covered.mean()),
    )


def local_mixing(a: Matrix, b: Matrix, *, k: int = 30) -> float:
    """Share of a cell's nearest neighbours that are of the other sample, over its expectation.

    Parameters
    ----------
    a, b
        Features on one scale, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``.
    k
        Neighbours of a cell among the pooled cells.

    Returns
    -------
    float
        The mean over the cells of both samples. Not negative; 1 is best and what real against
        real cells give, 0 if no cell has a neighbour of the other sample. Above 1 by more than
        noise, cells of one sample are copies of the other's. The expectation, the other sample's
        share of all cells but this one, is exact. After :cite:p:`schilling1986`.

    Raises
    ------
    ValueError
        Different features, fewer than ``k + 1`` cells in all, or values that are not finite.
    """
    from sklearn.neighbors import NearestNeighbors

    at_least("k", k, 1)
    a, b = points(a=a, b=b)
    pooled, is_a = np.concatenate([a, b]), np.repeat([True, False], [len(a), len(b)])
    at_least("the number of cells in a and b", len(pooled), k + 1)
    found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(pooled - pooled.mean(axis=0))
    other = is_a[found.kneighbors(return_distance=False)] != is_a[:, None]
    expected = np.where(is_a, len(b), len(a)) / (len(pooled) - 1)
    return float((other.mean(axis=1) / expected).mean())


def nearest_distances(of: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Distance of each row of ``of`` to the nearest row of ``among``."""
    centre = among.mean(axis=0)
    squared = squared_distances(of - centre, among - centre)
    return np.sqrt(np.concatenate([block.min(axis=1) for _, block in squared]))


def _squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its ``k``-th nearest other row."""
    # Entry k of the sorted distances: entry 0 is the row itself.
    return np.concatenate(
        [np.partition(block, k, axis=1)[:, k] for _, block in squared_distances(x, x)]
    )
