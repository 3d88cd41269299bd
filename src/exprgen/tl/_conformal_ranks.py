r"""P-values of cells by their rank among calibration cells, exact after a regression.

With scores s of n calibration cells and s* of a query cell, exchangeable if the query cell is like
the others,

.. math:: p = \frac{1 + \#\{i : s_i \ge s^*\}}{n + 1}

is at most α with probability at most α :cite:p:`vovk2005`; ties make it larger, never smaller.
Scores that are proxies of something technical are to be adjusted for it by a regression. Fitted on
the calibration cells alone it would treat the query cell unlike the others, whose residuals it has
made small. Here it is fitted on all n + 1 cells, which keeps them exchangeable, and is a rank-one
update: with A the design of the calibration cells, e their residuals, r that of the query cell
when it is left out, :math:`h = a^\top (A^\top A)^{-1} a`,

.. math::
    u = \frac{r}{1 + h}, \qquad e_i' = e_i - u\, a_i^\top (A^\top A)^{-1} a, \qquad
    \sigma^2 = \frac{\sum_i e_i^2 + r u}{n + 1}

are the query cell's residual, those of the others, and their mean square. Several scores count
alike: what is ranked is the sum over scores of residuals in units of σ.

A query cell far outside the calibration cells' covariates bends the regression towards itself: of
its score 1 / (1 + h) is left, and ranks, exact as they are, cannot find it. h is handed back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Ranked", "conformal_p_values"]

_BLOCK_VALUES = 2**22  # calibration x query cells looked at in one go


class Ranked(NamedTuple):
    """P-values of query cells ``(m,)``; adjusted scores of these and of the calibration cells.

    Scores are residuals of the regression on the calibration cells, in units of their standard
    deviation and summed: ``(m,)`` and ``(n,)``. ``leverage`` is h of the query cells, ``(m,)``.
    """

    p_values: np.ndarray
    scores: np.ndarray
    calibration_scores: np.ndarray
    leverage: np.ndarray


def conformal_p_values(
    calibration: np.ndarray,
    query: np.ndarray,
    calibration_covariates: np.ndarray,
    query_covariates: np.ndarray,
    calibration_groups: np.ndarray,
    query_groups: np.ndarray,
) -> Ranked:
    """P-value of each query cell among the calibration cells of its group.

    Parameters
    ----------
    calibration, query
        Scores, large for outliers, ``(n, n_scores)`` and ``(m, n_scores)``.
    calibration_covariates, query_covariates
        What to adjust for, up to squares and products, by one regression over all groups:
        ``(n, n_covariates)`` and ``(m, n_covariates)``; without columns, nothing.
    calibration_groups, query_groups
        Labels ``(n,)`` and ``(m,)``; all labels of the second occur in the first.
    """
    axes, of_query = _orthonormal(calibration_covariates, query_covariates)
    slopes = axes.T @ calibration
    residual = calibration - axes @ slopes  # e
    left_out = query - of_query @ slopes  # r
    leverage = np.square(of_query).sum(1)  # h
    inside = left_out / (1 + leverage)[:, None]  # u
    square = np.square(residual).sum(0)
    sigma = np.sqrt((square + left_out * inside) / (len(calibration) + 1))
    sigma[sigma == 0] = 1  # a score that is the same for all
    weights = inside / sigma
    p_values = np.empty(len(query))
    for group in np.unique(query_groups):
        peers = calibration_groups == group
        rows = np.flatnonzero(query_groups == group)
        step = max(1, _BLOCK_VALUES // int(peers.sum()))
        for part in (rows[i : i + step] for i in range(0, len(rows), step)):
            of_peers = (1 / sigma[part]) @ residual[peers].T
            of_peers -= (of_query[part] @ axes[peers].T) * weights[part].sum(1)[:, None]
            above = (of_peers >= weights[part].sum(1)[:, None]).sum(1)
            p_values[part] = (1 + above) / (peers.sum() + 1)
    scale = np.sqrt(square / len(calibration))
    scale[scale == 0] = 1
    return Ranked(p_values, (left_out / scale).sum(1), (residual / scale).sum(1), leverage)


def _orthonormal(calibration: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Designs ``(n, r)`` and ``(m, r)`` whose columns are orthonormal over calibration cells.

    The span is that of 1, the covariates, their squares and products; what is constant among
    calibration cells, or follows from others, drops out.
    """
    centre, spread = calibration.mean(0), calibration.std(0)
    spread[spread < 1e-9 * (1 + np.abs(centre))] = np.inf
    designs = [_up_to_products((part - centre) / spread) for part in (calibration, query)]
    _, size, right = np.linalg.svd(designs[0], full_matrices=False)
    kept = size > 1e-7 * size[0]
    axes, of_query = (design @ (right[kept].T / size[kept]) for design in designs)
    return axes, of_query


def _up_to_products(values: np.ndarray) -> np.ndarray:
    first, second = np.triu_indices(values.shape[1])
    return np.hstack([np.ones((len(values), 1)), values, values[:, first] * values[:, second]])
