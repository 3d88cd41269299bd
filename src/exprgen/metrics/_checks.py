"""What all metrics ask of their arguments, so that a wrong one is named and not averaged in."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "at_least",
    "common_groups",
    "counts",
    "dense",
    "group_labels",
    "matrices",
    "matrix",
    "numbers",
    "points",
]


def dense(values: Any) -> np.ndarray:
    """The values as an ordinary array."""
    return np.asarray(values.toarray() if sparse.issparse(values) else values)


def numbers(name: str, values: Any) -> Any:
    """Finite numbers, at least one: CSR where sparse, else an array; of any shape.

    Lists, data frames and other sparse formats are converted; whole numbers, truth values and
    half precision, which wrap or overflow in sums and differences, become float64.

    Raises
    ------
    TypeError
        No numbers.
    ValueError
        No values, or some that are not finite; NaN passes through some sums and vanishes in
        others.
    """
    is_sparse = sparse.issparse(values)
    try:
        array: Any = values if is_sparse else np.asarray(values)
        if array.dtype.kind not in "buifO" or (array.dtype.kind == "O" and array.ndim == 0):
            raise TypeError
        array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
    except (TypeError, ValueError):
        got = f"{type(values).__name__}" + (f" of {array.dtype}" if _has_dtype(values) else "")
        raise TypeError(
            f"{name} must be an array of numbers, or a sparse matrix of them, got {got}."
        ) from None
    if is_sparse and array.ndim == 2:
        array = sparse.csr_matrix(array)
    if 0 in array.shape:
        raise ValueError(f"{name} is empty, of shape {array.shape}; give at least one value.")
    n_bad = int((~np.isfinite(array.data if is_sparse else array)).sum())
    if n_bad:
        raise ValueError(f"{name} has {n_bad} values that are not finite (NaN or infinite).")
    return array


def _has_dtype(values: Any) -> bool:
    return isinstance(values, np.ndarray) or sparse.issparse(values)


def matrix(name: str, values: Any, *, n_min: int = 1) -> Any:
    """:func:`numbers` of shape ``(n_obs, n_vars)``, with at least ``n_min`` rows."""
    array = numbers(name, values)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (n_obs, n_vars), got {array.shape}.")
    if array.shape[0] < n_min:
        raise ValueError(f"{name} has {array.shape[0]} cells; at least {n_min} are needed.")
    return array


def matrices(named: Mapping[str, Any], *, n_min: int = 1) -> list[Any]:
    """Named samples as :func:`matrix`, with the same number of columns."""
    arrays = [matrix(name, values, n_min=n_min) for name, values in named.items()]
    widths = [array.shape[1] for array in arrays]
    if len(set(widths)) > 1:
        listed = ", ".join(f"{name}: {n}" for name, n in zip(named, widths, strict=True))
        raise ValueError(f"the samples differ in their number of features ({listed}).")
    return arrays


def counts(name: str, values: Any) -> Any:
    """:func:`matrix` without negative values."""
    array = matrix(name, values)
    negative = (array.data if sparse.issparse(array) else array) < 0
    if negative.any():
        raise ValueError(f"{name} must be counts, but {int(negative.sum())} values are negative.")
    return array


def points(*, n_min: int = 1, **named: Any) -> list[np.ndarray]:
    """Named samples as dense float64 arrays with the same number of columns."""
    arrays = matrices(named, n_min=n_min)
    return [np.asarray(dense(array), dtype=np.float64) for array in arrays]


def group_labels(
    *, optional: bool = True, **named: tuple[np.ndarray | None, int]
) -> list[np.ndarray]:
    """Group of every cell, one array per sample; without groups, all cells are one.

    Each argument is a pair of the labels and the number of cells they belong to. Where groups are
    ``optional``, labels may be None, but only all of them.

    Raises
    ------
    ValueError
        Labels are left out, missing (NaN or None), or not one per cell.
    """
    import pandas as pd

    absent = [name for name, (labels, _) in named.items() if labels is None]
    if absent and not (optional and len(absent) == len(named)):
        others = ", or of none" if optional else ""
        raise ValueError(
            f"{' and '.join(absent)} must be given, got None; give the labels of all cells in "
            f"{' and '.join(named)}{others}."
        )
    arrays = []
    for name, (labels, n_obs) in named.items():
        given = np.zeros(n_obs) if labels is None else labels
        if np.shape(given) != (n_obs,):
            raise ValueError(
                f"{name} must have shape ({n_obs},), one label per cell, got {np.shape(given)}."
            )
        missing = pd.isna(np.asarray(given, dtype=object))  # before NaN can become text
        if missing.any():
            raise ValueError(
                f"{name} has {int(missing.sum())} missing labels (first: cell "
                f"{int(missing.argmax())}); fill them in, or leave out these cells."
            )
        arrays.append(np.asarray(given))
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


def at_least(name: str, value: object, lowest: int) -> None:
    """Refuse an argument that is no integer, or below its lowest value."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}.")
