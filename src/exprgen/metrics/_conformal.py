r"""Ranks among exchangeable units, exact whatever the score.

Unit i (a cell, or a donor) has tails :math:`p_{ig}` for genes g; small is far out. For one gene
this is split conformal prediction :cite:p:`vovk2005`: among n + 1 exchangeable units each rank is
equally likely for the new one. With one threshold for many genes the exchangeable unit is still
the whole unit, not the pair of unit and gene. Its loss at a threshold t is the share of its genes
with :math:`p_{ig} < t`, and

.. math::
    \hat t = \sup\Big\{t : \tfrac{1}{n + 1}\Big(1 + \sum_{i=1}^{n}
    \tfrac1G \sum_g 1[p_{ig} < t]\Big) \le \alpha\Big\}

bounds the expected loss of the next unit by :math:`\alpha`: conformal risk control
:cite:p:`angelopoulos2024`. The 1 is the most that the next unit can lose, which costs up to
:math:`1/(n + 1)` of coverage; with its tails at hand its own loss stands there instead, and the
rank of a random gene of it is exactly uniform.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from exprgen.metrics._checks import numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["conformal_rank", "conformal_threshold", "units_needed"]


def units_needed(alpha: float) -> int:
    """Fewest units that allow a guarantee at all: 1 / alpha - 1, rounded up.

    Parameters
    ----------
    alpha
        Share of values that may lie outside, in (0, 1).
    """
    return max(int(np.ceil(1 / _share(alpha) - 1 - 1e-9)), 1)


def conformal_threshold(
    p: np.ndarray, alpha: float, *, units: Sequence[object] | np.ndarray | None = None
) -> float:
    """Largest tail that the next unit's values may be required to reach.

    Parameters
    ----------
    p
        Tails of the calibration units, ``(n_rows, n_vars)``, or ``(n_rows,)`` for one gene; small
        is far out.
    alpha
        Share of the next unit's values that may lie below the threshold, in (0, 1).
    units
        The unit of each row, ``(n_rows,)``; the rows of one are averaged. By default every row is
        a unit.

    Returns
    -------
    float
        One of ``p``. In expectation over units at most ``alpha`` of the next unit's values lie
        below; of a single gene without ties also at least alpha - 1 / (n + 1), n the number of
        units.

    Raises
    ------
    ValueError
        Fewer than 1 / alpha - 1 units, or values that are not finite.
    """
    values = np.asarray(numbers("p", p), dtype=np.float64)
    values = values.reshape(len(values), -1)
    codes = np.arange(len(values)) if units is None else pd.factorize(np.asarray(units))[0]
    sizes = np.bincount(codes)
    if len(sizes) < units_needed(alpha):
        raise ValueError(
            f"alpha={alpha} needs at least 1/alpha - 1 = {units_needed(alpha):.6g} calibration "
            f"units, got {len(sizes)}."
        )
    weights = np.repeat(1 / (sizes[codes] * values.shape[1]), values.shape[1])
    order = np.argsort(values, axis=None)
    before = np.cumsum(weights[order]) - weights[order]
    budget = alpha * (len(sizes) + 1) - 1
    last = np.searchsorted(before, budget + 1e-9, side="right") - 1
    return float(values.ravel()[order[last]])


def conformal_rank(calibration: np.ndarray, p: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Randomised conformal p-values of new units' values; ties are broken at random.

    Parameters
    ----------
    calibration
        Tails of the calibration units, ``(n, n_vars)``; small is far out.
    p
        Tails of the new units, ``(n_new, n_vars)``; each unit is judged by itself.
    seed
        Of the randomisation.

    Returns
    -------
    numpy.ndarray
        ``(n_new, n_vars)``, in (0, 1]. Of a random gene of a unit that is exchangeable with the
        calibration units: *exactly* uniform, at any n. Ranks of several units depend on each other
        through the calibration units.

    Raises
    ------
    ValueError
        Shapes that do not fit, or values that are not finite.
    """
    pool = np.asarray(numbers("calibration", calibration), dtype=np.float64)
    new = np.asarray(numbers("p", p), dtype=np.float64)
    if pool.ndim != 2 or new.ndim != 2 or pool.shape[1] != new.shape[1]:
        raise ValueError(
            "calibration and p must have shapes (n, n_vars) and (n_new, n_vars), got "
            f"{pool.shape} and {new.shape}."
        )
    n, n_vars = pool.shape
    pool = np.sort(pool, axis=None)
    below = np.searchsorted(pool, new, side="left").astype(np.float64)
    upto = np.searchsorted(pool, new, side="right").astype(np.float64)
    for row, values in enumerate(new):
        own = np.sort(values)
        below[row] += np.searchsorted(own, values, side="left")
        upto[row] += np.searchsorted(own, values, side="right")
    v = 1 - np.random.default_rng(seed).random(new.shape)
    return (below + v * (upto - below)) / ((n + 1) * n_vars)


def _share(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}; it is .1 for 90 %.")
    return float(alpha)
