r"""The scale of residuals as a function of conditions, gene by gene.

.. math::
    R_{ig} \sim \mathcal N\big(0, s_{ig}^2\big), \qquad \log s_{ig} = w_{0g} + w_g^\top f_i,

fitted by maximum likelihood with a normal prior on all w but the intercept: Fisher scoring, whose
information :math:`2 F^\top F` plus the prior's precision is the same for all genes
:cite:p:`smyth1989`. The precision, one for all genes, is chosen by the likelihood of parts of
the cells that were left out; the largest says that a gene's scale is the same in all conditions.

A scale that was fitted to a residual is too close to it. What residuals are divided by, to see
what law they have, is therefore the scale that a fit without their part of the cells says.
"""

from __future__ import annotations

import numpy as np

__all__ = ["fit_log_scale", "left_out_log_scale"]

PRECISIONS = (1e4, 300.0, 100.0, 30.0, 10.0, 3.0)
"""Precisions of the prior to choose from, in half cells. The largest first, which wins a tie."""

_N_PARTS = 5
_MOST_STEPS = 40
_TOLERANCE = 1e-2
# Cells that are enough to choose the precision with.
_ENOUGH = 2000
# A constant gene's residuals are this share of the typical gene's.
_SMALLEST = 1e-3


def fit_log_scale(
    features: np.ndarray, residuals: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Coefficients of log scales, and the precision of their prior that was chosen.

    Parameters
    ----------
    features
        ``(n_obs, n_features)``, the first constant.
    residuals
        ``(n_obs, n_vars)``, of mean 0.
    rng
        Of the cells that the precision is chosen with.

    Returns
    -------
    Coefficients ``(n_features, n_vars)``, and the precision, in half cells.
    """
    squares = _squares(residuals)
    some = rng.permutation(len(squares))[:_ENOUGH]
    errors = [_left_out_error(features[some], squares[some], p) for p in PRECISIONS]
    precision = PRECISIONS[int(np.argmin(errors))]
    return _fit(features, squares, precision), precision


def left_out_log_scale(
    features: np.ndarray,
    residuals: np.ndarray,
    coefficients: np.ndarray,
    precision: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Log scales of the cells, ``(n_obs, n_vars)``, by fits without their random part of them.

    ``coefficients`` and ``precision`` are what :func:`fit_log_scale` says of all cells.
    """
    parts = rng.permutation(len(residuals)) % _N_PARTS
    return _left_out(features, _squares(residuals), precision, parts, coefficients)


def _squares(residuals: np.ndarray) -> np.ndarray:
    """Squared residuals, none of them 0."""
    spread = np.sqrt((residuals**2).mean(axis=0))
    typical = np.median(spread[spread > 0]) if (spread > 0).any() else 1.0
    squares: np.ndarray = residuals**2 + (_SMALLEST * typical) ** 2
    return squares


def _left_out_error(features: np.ndarray, squares: np.ndarray, precision: float) -> float:
    """Mean negative log-likelihood of cells that are left out, per gene and cell."""
    parts = np.arange(len(squares)) % _N_PARTS
    log_scale = _left_out(features, squares, precision, parts, None)
    return float((log_scale + 0.5 * squares * np.exp(-2 * log_scale)).mean())


def _left_out(
    features: np.ndarray,
    squares: np.ndarray,
    precision: float,
    parts: np.ndarray,
    start: np.ndarray | None,
) -> np.ndarray:
    """Log scales of all cells, each by a fit without its part, ``(n_obs, n_vars)``."""
    log_scale = np.empty_like(squares)
    for part in np.unique(parts):
        out = parts == part
        rest = ~out if not out.all() else out
        fitted = _fit(features[rest], squares[rest], precision, start)
        log_scale[out] = features[out] @ fitted
    return log_scale


def _fit(
    features: np.ndarray, squares: np.ndarray, precision: float, start: np.ndarray | None = None
) -> np.ndarray:
    """Coefficients of log scales, ``(n_features, n_vars)``."""
    prior = np.full(features.shape[1], precision)
    prior[0] = 0.0
    information = np.linalg.inv(2 * features.T @ features + np.diag(prior + 1e-8))
    if start is None:
        coefficients = np.zeros((features.shape[1], squares.shape[1]))
        coefficients[0] = 0.5 * np.log(squares.mean(axis=0))
    else:
        coefficients = start.copy()
    for _ in range(_MOST_STEPS):
        excess = squares * np.exp(-2 * (features @ coefficients)) - 1
        step = information @ (features.T @ excess - prior[:, None] * coefficients)
        coefficients += step.clip(-1, 1)
        if np.abs(step).max() < _TOLERANCE:
            break
    return coefficients
