"""What goes into a predictor and what comes out of it: shapes, finite values, folds."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from exprgen._arguments import check_positive_int
from exprgen._errors import CovariateError, name_some

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "check_groups",
    "check_training",
    "check_values",
    "fold_numbers",
    "left_out_units",
    "naming",
    "read_prediction",
]


def check_training(
    table: Any, y: Any, weights: Any = None
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return the table, ``y`` and weights that are 1 on average, the latter two as float64.

    Raises
    ------
    TypeError, ValueError
        If one is of another type, shape or length, or not finite.
    """
    check_table(table)
    expression = check_values(y, "y", len(table))
    if not len(table):
        raise ValueError("table has no rows; there is nothing to fit.")
    if weights is None:
        return table, expression, np.ones(len(table))
    mass = np.asarray(weights)
    if mass.dtype.kind not in "fiub" or mass.shape != (len(table),):
        raise ValueError(
            f"weights must be {len(table)} numbers, one for each row of table; got {mass.dtype} "
            f"of shape {mass.shape}."
        )
    mass = mass.astype(np.float64)
    if not (np.isfinite(mass).all() and (mass >= 0).all() and mass.any()):
        raise ValueError("weights must be finite numbers from 0 up, and not all 0.")
    return table, expression, mass / mass.mean()


def check_table(table: Any) -> None:
    """Refuse what is no table of conditions.

    Raises
    ------
    TypeError, ValueError
        If it is no DataFrame, or columns share a name.
    """
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"table must be a pandas DataFrame; got {type(table).__name__}.")
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()]
        raise ValueError(f"table has several columns of one name: {name_some(twice)}.")


def check_values(values: Any, what: str, n_obs: int, n_vars: int | None = None) -> np.ndarray:
    """Return a matrix as float64, ``(n_obs, n_vars)``, finite; any number of variables if None.

    Raises
    ------
    TypeError
        If it does not hold numbers.
    ValueError
        If it is of another shape, or a value is missing or infinite.
    """
    if hasattr(values, "toarray"):
        values = values.toarray()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{what} must be an array of numbers; got {_what_is(values, array)}.")
    if array.ndim != 2 or array.shape[0] != n_obs or n_vars not in (None, array.shape[1]):
        wanted = "n_vars" if n_vars is None else n_vars
        raise ValueError(
            f"{what} must be of shape ({n_obs}, {wanted}), rows x genes; got {array.shape}."
        )
    array = array.astype(np.float64, copy=False)
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{what} has missing or infinite values in {bad.sum()} rows, first in row "
            f"{int(bad.argmax())}."
        )
    return array


@contextmanager
def naming(name: str, table: pd.DataFrame) -> Iterator[None]:
    """Say with whatever a user's predictor raises that it was that, and what it was given."""
    try:
        yield
    except Exception as error:
        error.add_note(f"mean={name!r} was given the columns {list(table.columns)}.")
        raise


def _in_order(values: Any, var_names: list[str] | None, what: str) -> Any:
    """A DataFrame with its columns in the order of the genes; all else as it is.

    Raises
    ------
    ValueError
        If its columns have names of their own, which are not the genes'.
    """
    if not isinstance(values, pd.DataFrame) or var_names is None:
        return values
    columns = values.columns
    if columns.equals(pd.RangeIndex(len(columns))):
        return values
    if len(columns) != len(var_names) or set(columns) != set(var_names):
        raise ValueError(
            f"{what}: its {len(columns)} columns are not the genes of the model "
            f"({name_some(columns, 3)}, not {name_some(var_names, 3)}). Name them so, or give an "
            "array in the order of the model's genes."
        )
    return values[list(var_names)]


def read_prediction(
    values: Any,
    table: pd.DataFrame,
    n_vars: int | None,
    what: str,
    var_names: list[str] | None = None,
) -> np.ndarray:
    """Return what a user's predictor says of a table, ``(n_obs, n_vars)``, float64, finite.

    Arrays, tensors, sparse matrices and DataFrames will do; with one gene also one number per row.

    Raises
    ------
    TypeError, ValueError
        As :func:`check_values`; and if a DataFrame's rows are not those of the table.
    """
    if isinstance(values, pd.DataFrame | pd.Series) and not (
        values.index.equals(table.index) or values.index.equals(pd.RangeIndex(len(table)))
    ):
        raise ValueError(f"{what} must be in the order of the table's rows; its index differs.")
    values = _in_order(values, var_names, what)
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    if n_vars == 1 and np.shape(values) == (len(table),):
        values = np.reshape(values, (-1, 1))
    return check_values(values, what, len(table), n_vars)


def check_groups(groups: Any, n_obs: int, what: str = "groups") -> np.ndarray:
    """Return codes 0, 1, ... of the groups that are left out together, ``(n_obs,)``.

    ``what`` is what messages call them.

    Raises
    ------
    ValueError
        If there is not one group for each row, or there are no two groups.
    CovariateError
        If one is missing.
    """
    if groups is None:
        if n_obs < 2:
            raise ValueError("Leaving out one row needs at least 2 rows; table has 1.")
        return np.arange(n_obs)
    column = pd.Series(groups).reset_index(drop=True)
    if len(column) != n_obs:
        raise ValueError(f"{what} has {len(column)} entries; table has {n_obs} rows.")
    codes, labels = pd.factorize(column)
    if (codes < 0).any():
        raise CovariateError(
            f"{what} has {(codes < 0).sum()} missing values, first in row "
            f"{int((codes < 0).argmax())}. Give each such row a label of its own."
        )
    if len(labels) < 2:
        raise ValueError(
            f"{what} has one label only, {labels[0]!r}: without it no row is left to fit."
        )
    return codes


def left_out_units(groups: Any, mass: np.ndarray) -> np.ndarray | None:
    """Codes of what is left out together, ``(n_obs,)``; ``None`` for rows.

    Raises
    ------
    ValueError, CovariateError
        As :func:`check_groups`, or if weights leave nothing beside one row or group.
    """
    units = check_groups(groups, len(mass))
    if np.bincount(units, mass > 0).max() == np.count_nonzero(mass):
        raise ValueError("weights are 0 outside one row or group: nothing is left to fit.")
    return None if groups is None else units


def fold_numbers(units: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Number of the fold of each row, ``(n_obs,)``; rows of one unit share a fold.

    Folds are random, and as near to one size as the units allow: units in order of size, those of
    one size in random order, go each to the fold that has the fewest rows so far.

    Parameters
    ----------
    units
        Codes 0, 1, ... of what stays together, ``(n_obs,)``.
    n_folds
        Number of folds, from 2 up; fewer if there are fewer units.
    seed
        Of the order.
    """
    sizes = np.bincount(units)
    n_folds = min(check_positive_int(n_folds, "n_folds", minimum=2), len(sizes))
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of = np.empty(len(sizes), dtype=np.int64)
    if sizes.max() == 1:
        fold_of[order] = np.arange(len(sizes)) % n_folds
        return fold_of[units]
    rows = np.zeros(n_folds, dtype=np.int64)
    for unit in order:
        fold_of[unit] = rows.argmin()
        rows[fold_of[unit]] += sizes[unit]
    return fold_of[units]


def _what_is(values: Any, array: np.ndarray) -> str:
    """Say what was given instead of numbers."""
    kind = type(values).__name__
    return f"{kind} of {array.dtype}" if array.ndim else kind
