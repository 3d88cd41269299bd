"""What all metrics ask of their arguments, so that a wrong one is named and not averaged in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from exprgen.metrics._features import dense

if TYPE_CHECKING:
    from exprgen.metrics._features import Matrix

__all__ = ["at_least", "common_groups", "finite", "group_labels", "points"]


def points(*, n_min: int = 1, **named: Matrix) -> list[np.ndarray]:
    """Named samples as dense float64 arrays with the same number of columns.

    Raises
    ------
    ValueError
        Not two-dimensional, fewer than ``n_min`` rows, different columns, or values that are not
        finite; the argument is named.
    """
    arrays = []
    for name, values in named.items():
        array = np.asarray(dense(values), dtype=np.float64)
        if array.ndim != 2:
            raise ValueError(f"{name} must have shape (n_obs, n_vars), got {array.shape}.")
        if array.shape[0] < n_min:
            raise ValueError(f"{name} has {array.shape[0]} cells; at least {n_min} are needed.")
        finite(name, array)
        arrays.append(array)
    widths = [array.shape[1] for array in arrays]
    if len(set(widths)) > 1:
        listed = ", ".join(f"{name}: {n}" for name, n in zip(named, widths, strict=True))
        raise ValueError(f"the samples differ in their number of features ({listed}).")
    return arrays


def finite(name: str, values: Matrix) -> None:
    """Refuse NaN and infinity, which would pass through some sums and vanish in others."""
    stored: Any = sparse.csr_matrix(values).data if sparse.issparse(values) else values
    if not np.isfinite(stored).all():
        n = int((~np.isfinite(dense(values))).any(axis=1).sum())
        raise ValueError(f"{name} has values that are not finite in {n} cells.")


def group_labels(**named: tuple[np.ndarray | None, int]) -> list[np.ndarray]:
    """Group of every cell, one array per sample; without groups, all cells are one.

    Each argument is a pair of the labels (or None) and the number of cells they belong to.
    """
    missing = [name for name, (labels, _) in named.items() if labels is None]
    if missing and len(missing) < len(named):
        raise ValueError(f"{' and '.join(named)} must all be given (both of two), or none.")
    arrays = []
    for name, (labels, n_obs) in named.items():
        array = np.zeros(n_obs) if labels is None else np.asarray(labels)
        if array.shape != (n_obs,):
            raise ValueError(
                f"{name} must have shape ({n_obs},), one label per cell, got {array.shape}."
            )
        arrays.append(array)
    return arrays


def common_groups(*labels: np.ndarray, n_min: int = 2) -> list[object]:
    """Groups with ``n_min`` cells in every sample, in the order of the last one.

    Raises
    ------
    ValueError
        There is none.
    """
    found = [
        group
        for group in dict.fromkeys(labels[-1].tolist())
        if min(int((of == group).sum()) for of in labels) >= n_min
    ]
    if not found:
        number = {1: "one cell", 2: "two cells"}.get(n_min, f"{n_min} cells")
        where = "both sides" if len(labels) == 2 else "all sides"
        raise ValueError(f"No group has at least {number} on {where}.")
    return found


def at_least(name: str, value: int, lowest: int) -> None:
    """Refuse an integer argument below its lowest value."""
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}.")
