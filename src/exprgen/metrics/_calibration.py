"""Do intervals hold what they promise?"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

__all__ = ["coverage"]


def coverage(lower: np.ndarray, upper: np.ndarray, x: np.ndarray) -> float:
    """Share of values inside their closed intervals ``[lower, upper]``.

    Parameters
    ----------
    lower, upper, x
        Arrays that broadcast against each other, usually ``(n_obs, n_vars)``; sparse ones too.

    Returns
    -------
    float
        In [0, 1]; best is the nominal level. Counts are discrete, so closed intervals between
        exact quantiles cover *at least* the nominal level.

    Raises
    ------
    ValueError
        A lower end above its upper end.
    """
    given: tuple[Any, ...] = lower, upper, x
    dense = (v.toarray() if sparse.issparse(v) else v for v in given)
    lower, upper, x = np.broadcast_arrays(*dense)
    n_crossed = int((lower > upper).sum())
    if n_crossed:
        raise ValueError(
            f"{n_crossed} of {lower.size} intervals have lower > upper; swap or fix the bounds."
        )
    return float(((lower <= x) & (x <= upper)).mean())
