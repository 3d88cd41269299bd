"""Columns of numbers, and blocks of them: standardised, with their range remembered.

A quantity :math:`v` becomes :math:`(v - m) / s`, with the mean and the standard deviation (1 if it
is constant) over the registered cells; an embedding does so in each dimension.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype, is_numeric_dtype

from exprgen._columns import Column, refuse_values
from exprgen._errors import CovariateError, DataQualityWarning, name_some

__all__ = ["Embedding", "Quantity", "text_doubt"]

FLOAT32 = np.finfo(np.float32)
_FINITE = (
    " Replace them; the logarithm of a zero dose, for one, is finite as np.log1p(dose) or with a "
    "small pseudo-dose in place of 0."
)


@dataclass(frozen=True)
class Quantity(Column):
    """A column of numbers, with the mean, standard deviation and range seen at setup."""

    mean: float
    std: float
    minimum: float
    maximum: float
    dtype: str

    @classmethod
    def fit(cls, column: pd.Series, where: str) -> Quantity:
        """Learn the scale; raises as :meth:`values` does."""
        values = cls.values(column, where)
        mean, std = _scale(values)
        return cls(
            key=str(column.name),
            mean=float(mean),
            std=float(std),
            minimum=float(values.min()),
            maximum=float(values.max()),
            dtype=str(column.dtype) if is_numeric_dtype(column.dtype) else "float64",
        )

    @staticmethod
    def values(column: pd.Series, where: str) -> np.ndarray:
        """Read the column as float64, shape (n,), all finite.

        Raises
        ------
        CovariateError
            If a value is not a number, missing or infinite.
        """
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        if column.dtype.kind in "mMc" or infer_dtype(column) == "complex":
            raise CovariateError(f"{where} is of type {column.dtype}. Make it real numbers.")
        values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        missing = column.isna().to_numpy()
        bad = np.isnan(values) & ~missing
        if bad.any():
            raise CovariateError(
                f"{where} must be numeric, but has {bad.sum()} other values, first "
                f"{column[bad].iloc[0]!r} (cells {name_some(column.index[bad])}). Convert them, "
                f"or use categorical_condition_keys."
            )
        refuse_values(column.index, missing, where, "missing value", " Fill in or leave out.")
        refuse_values(column.index, np.abs(values) > FLOAT32.max, where, "infinite value", _FINITE)
        return values

    @property
    def tolerance(self) -> float:
        """Values nearer than this are one: float32 and float64 of one number must agree."""
        return 1e-6 * max(abs(self.minimum), abs(self.maximum))

    def encode(self, column: pd.Series, where: str) -> np.ndarray:
        """(v - mean) / std, shape (n,); raises as :meth:`values` does, warns of text."""
        values = self.values(column, where)
        for doubt in text_doubt(column, where):
            warnings.warn(doubt, DataQualityWarning, stacklevel=3)
        return (values - self.mean) / self.std

    def outside(self, values: np.ndarray) -> np.ndarray:
        """Which values lie outside the trained range, shape (n,)."""
        return (values < self.minimum - self.tolerance) | (values > self.maximum + self.tolerance)

    def restore(self, column: pd.Series) -> pd.Series:
        """Cast back to the dtype seen at setup, unless that would change a value."""
        values = self.values(column, f"column {self.key!r}")
        whole = (values % 1 == 0) | self.dtype.lower().startswith("float")
        fits = bool(np.all(whole & ~self.outside(values)))
        return pd.Series(values, column.index, self.dtype if fits else None, self.key)


@dataclass(frozen=True)
class Embedding(Column):
    """A block of quantities, one per dimension, shape (n, d)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reach: float = float("inf")
    """Largest standardised distance of a registered vector from their mean."""

    @classmethod
    def fit(cls, key: str, values: Any, index: pd.Index) -> Embedding:
        """Learn the scale of each dimension; raises as :meth:`values` does."""
        matrix = cls.values(values, index, f"obsm[{key!r}] (condition_embedding_key)")
        mean, std = _scale(matrix)
        reach = float(np.linalg.norm((matrix - mean) / std, axis=1).max())
        return cls(key, tuple(mean.tolist()), tuple(std.tolist()), reach)

    def outside(self, values: Any) -> np.ndarray:
        """Which vectors lie further from the mean than any registered one, shape (n,)."""
        standardised = (np.asarray(values, np.float64) - self.mean) / np.array(self.std)
        return np.linalg.norm(standardised, axis=1) > self.reach * (1 + 1e-6)

    def __len__(self) -> int:
        return len(self.mean)

    @staticmethod
    def values(values: Any, index: pd.Index, where: str) -> np.ndarray:
        """Read the embedding as float64, shape (n, d), all finite.

        Raises
        ------
        CovariateError
            If it is not an (n, d) array of finite numbers, one row for each name in ``index``.
        """
        array = values.toarray() if hasattr(values, "toarray") else np.asarray(values)
        fits = array.ndim == 2 and array.shape[0] == len(index) and array.shape[1] > 0
        if not fits or array.dtype.kind not in "fiub":
            raise CovariateError(
                f"{where} must be an array of numbers with {len(index)} rows, one for each cell "
                f"or condition; got {array.dtype} of shape {array.shape}."
            )
        values = array.astype(np.float64)
        bad = ~(np.abs(values) <= FLOAT32.max).all(axis=1)
        refuse_values(index, bad, where, "row", " It must be finite: leave out these cells.")
        return values

    def encode(self, values: Any, index: pd.Index, where: str) -> np.ndarray:
        """(v - mean) / std per dimension, shape (n, d); raises as :meth:`values` does."""
        matrix = self.values(values, index, where)
        if matrix.shape[1] != len(self):
            raise CovariateError(
                f"{where} has {matrix.shape[1]} dimensions; training had {len(self)}."
            )
        return (matrix - np.array(self.mean)) / np.array(self.std)


def text_doubt(column: pd.Series, where: str) -> list[str]:
    """Say so if numbers are held as text."""
    values = column.cat.categories if column.dtype == "category" else column
    if infer_dtype(values) not in {"string", "mixed", "mixed-integer"}:
        return []
    return [f"{where} holds numbers as text, read as numbers. Convert it with pd.to_numeric."]


def _scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the first axis; 1 where float32 sees no spread."""
    # Told apart by comparison: the mean of many 0.1 is not quite 0.1.
    constant = values.min(axis=0) == values.max(axis=0)
    mean = np.where(constant, values[0], values.mean(axis=0))
    std = values.std(axis=0)
    return mean, np.where(constant | (std < FLOAT32.tiny), 1.0, std)
