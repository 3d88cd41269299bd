"""Arguments that mean what they say.

Each check returns the value in the form to compute with, or raises an error that names the
argument, what was got and what is allowed.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_list_like

from exprgen._errors import closest, name_some

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "check_bool",
    "check_choice",
    "check_genes",
    "check_indices",
    "check_number",
    "check_positive_int",
    "check_quantiles",
]


def check_positive_int(value: object, name: str, *, minimum: int = 1) -> int:
    """Return an integer of at least ``minimum``.

    Raises
    ------
    TypeError
        If it is no integer; True and 3.0 are none.
    ValueError
        If it is smaller than ``minimum``.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    return int(value)


def check_number(value: object, name: str, interval: str = "[0, inf)") -> float:
    """Return a number that lies in ``interval``, which is written as in mathematics.

    Raises
    ------
    TypeError
        If it is no real number; True is none.
    ValueError
        If it lies elsewhere; NaN does.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number in {interval}, got {value!r} ({type(value).__name__})."
        )
    low, high = map(float, interval[1:-1].split(","))
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.nan
    inside = low < number < high
    inside |= (interval[0] == "[" and number == low) or (interval[-1] == "]" and number == high)
    if not inside:
        raise ValueError(f"{name} must lie in {interval}, got {value!r}.")
    return number


def check_bool(value: object, name: str) -> bool:
    """Return True or False.

    Raises
    ------
    TypeError
        If it is something else, which may not mean what it says.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}).")
    return bool(value)


def check_indices(indices: Any, n_obs: int) -> np.ndarray:
    """Turn any way to name cells into their positions.

    Parameters
    ----------
    indices
        Positions in any order, repeats kept, negative ones counted from the end; a boolean mask of
        all cells; a slice; one position; or None for all cells.
    n_obs
        Number of cells.

    Returns
    -------
    numpy.ndarray
        Positions from 0 to n_obs - 1, ``(n,)``.

    Raises
    ------
    TypeError
        If they are no integers.
    IndexError
        If a cell does not exist, or the mask has another length.
    """
    if indices is None:
        return np.arange(n_obs)
    if isinstance(indices, slice):
        return np.arange(n_obs)[indices]
    index = np.atleast_1d(np.asarray(indices))
    if index.ndim != 1:
        raise IndexError(f"indices must be one-dimensional, got shape {index.shape}.")
    if index.dtype == bool:
        if len(index) != n_obs:
            raise IndexError(f"indices is a mask of {len(index)} cells, but n_obs is {n_obs}.")
        return np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, dtype=np.intp)
    if index.dtype.kind not in "iu":
        raise TypeError(
            f"indices must be positions or a boolean mask, got {index.dtype}. Names of cells: "
            "adata.obs_names.get_indexer(names)."
        )
    wrong = index[(index < -n_obs) | (index >= n_obs)]
    if wrong.size:
        raise IndexError(f"indices {name_some(wrong)} do not exist: n_obs is {n_obs}.")
    index = index.astype(np.intp)
    return np.where(index < 0, index + n_obs, index)


def check_genes(genes: Sequence[str] | None, var_names: Iterable[str]) -> np.ndarray:
    """Find genes by name.

    Parameters
    ----------
    genes
        Names, in the order wanted; None for all.
    var_names
        All genes.

    Returns
    -------
    numpy.ndarray
        Their positions in ``var_names``, ``(len(genes),)``.

    Raises
    ------
    TypeError
        If ``genes`` is no list of names.
    KeyError
        If a name is unknown.
    ValueError
        If there is none, or one is repeated.
    """
    known = pd.Index(var_names)
    if genes is None:
        return np.arange(len(known))
    if isinstance(genes, str):
        raise TypeError(f"genes must be a list of names, got {genes!r}. Did you mean [{genes!r}]?")
    if not is_list_like(genes):
        raise TypeError(f"genes must be a list of names, got {genes!r}.")
    wanted = pd.Index(list(genes))
    unknown = wanted[~wanted.isin(known)]
    if len(unknown):
        raise KeyError(
            f"{len(unknown)} of genes are unknown: {name_some(unknown)}."
            f"{closest(unknown[0], known)}"
        )
    if not wanted.is_unique:
        raise ValueError(f"genes are repeated: {name_some(wanted[wanted.duplicated()].unique())}.")
    if wanted.empty:
        raise ValueError("genes is empty; name some, or leave genes=None for all.")
    return known.get_indexer(wanted)


def check_choice(value: Any, name: str, options: Sequence[Any]) -> Any:
    """Return ``value`` if it is one of ``options``.

    Raises
    ------
    ValueError
        If it is not, naming the options.
    """
    if not any(type(value) is type(option) and value == option for option in options):
        raise ValueError(
            f"{name} must be one of {name_some(options, 20)}, got {value!r}."
            f"{closest(value, options)}"
        )
    return value


def check_quantiles(quantiles: Iterable[Any] | None) -> tuple[float, ...]:
    """Return quantiles in increasing order, each between 0 and 1; None means none.

    Raises
    ------
    TypeError
        If they are no numbers.
    ValueError
        If one is not strictly between 0 and 1, or is repeated.
    """
    if quantiles is None:
        return ()
    if isinstance(quantiles, (Real, str)):
        raise TypeError(f"quantiles must be a list of numbers, got {quantiles!r}.")
    values = list(quantiles)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"quantiles must be numbers, got {value!r}.")
        if not 0 < float(value) < 1:
            raise ValueError(f"quantiles must lie between 0 and 1, got {value!r}.")
    if len(set(values)) < len(values):
        raise ValueError(f"quantiles are repeated: {values}.")
    return tuple(sorted(map(float, values)))
