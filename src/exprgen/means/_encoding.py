r"""Tables of conditions to the numbers that a linear predictor or a network reads.

A column of labels becomes indicators, one for each of its labels; a column of numbers is
standardised, :math:`(v - m)/s`. What is learned for this (labels, :math:`m`, :math:`s`) does not
depend on expression, so it may be learned from all rows and kept when rows are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from exprgen._conditions import ConditionSchema
from exprgen._errors import closest, name_some
from exprgen._labels import Labels
from exprgen._quantities import Quantity
from exprgen._tables import key_list
from exprgen.means._checks import check_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

__all__ = ["Encoding"]


@dataclass(frozen=True)
class Encoding:
    """What the columns of a table are: labels, and numbers with their scale.

    Calling it encodes a table, so that it can be the ``inputs`` of a
    :class:`~exprgen.means.TorchMean`.

    Parameters
    ----------
    schema
        The columns, as learned by :meth:`fit`.
    """

    schema: ConditionSchema

    @classmethod
    def fit(
        cls, table: pd.DataFrame, *, categorical_keys: Sequence[str] | None = None
    ) -> Encoding:
        """Learn labels and scales of all columns.

        Parameters
        ----------
        table
            Raw columns of conditions.
        categorical_keys
            Columns to be read as labels; ``None`` for all that do not hold numbers.

        Raises
        ------
        TypeError, KeyError
            If an argument is of the wrong type, or names no column.
        CovariateError
            If values are missing, infinite, of mixed kinds or no numbers.
        """
        check_table(table)
        if categorical_keys is None:
            labels = [key for key in table.columns if _holds_labels(table[key])]
        else:
            labels = key_list(categorical_keys, "categorical_keys", many=True)
            if unknown := [key for key in labels if key not in table.columns]:
                raise KeyError(
                    f"categorical_keys: table has no column {name_some(unknown)}."
                    f"{closest(unknown[0], table.columns)}"
                )
        return cls(
            ConditionSchema(
                labels=tuple(Labels.fit(table[key], f"table[{key!r}]") for key in labels),
                quantities=tuple(
                    Quantity.fit(table[key], f"table[{key!r}]")
                    for key in table.columns
                    if key not in labels
                ),
            )
        )

    @property
    def names(self) -> list[str]:
        """Names of the inputs, such as ``"cell_type=B cell"`` and ``"dose"``, ``(n_inputs,)``."""
        indicators = [
            f"{part.key}={label}" for part in self.schema.labels for label in part.labels
        ]
        return indicators + self.schema.continuous_keys

    @property
    def n_inputs(self) -> int:
        """Width of the encoded table."""
        return sum(map(len, self.schema.labels)) + len(self.schema.quantities)

    def codes(self, table: pd.DataFrame) -> np.ndarray:
        """Codes of the labels, ``(n_obs, n_label_columns)``, int64; raises as a call does."""
        check_table(table)
        only_labels = ConditionSchema(labels=self.schema.labels)
        return only_labels.encode(table[_present(table, only_labels)]).astype(np.int64)

    def __call__(self, table: pd.DataFrame) -> np.ndarray:
        """Encode a table, ``(n_obs, n_inputs)``, float64; other columns are not read.

        Raises
        ------
        CovariateError
            If a column is lacking, or values are missing, infinite or no numbers.
        UnseenCategoryError
            If a label was not there when the encoding was learned.
        """
        check_table(table)
        # The range of numbers is the caller's matter, who warns once for all that read them.
        encoded = self.schema.encode(
            table[_present(table, self.schema)], on_extrapolation="ignore"
        )
        matrix = np.zeros((len(table), self.n_inputs))
        starts = accumulate(map(len, self.schema.labels), initial=0)
        rows = np.arange(len(table))
        for j, start in enumerate(list(starts)[:-1]):
            matrix[rows, start + encoded[:, j].astype(np.int64)] = 1
        n_numbers = len(self.schema.quantities)
        matrix[:, self.n_inputs - n_numbers :] = encoded[:, encoded.shape[1] - n_numbers :]
        return matrix

    def to_dict(self) -> dict[str, Any]:
        """Plain types that survive JSON, for files."""
        return self.schema.to_dict()

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Encoding:
        """Undo :meth:`to_dict`."""
        return cls(ConditionSchema.from_dict(state))


def _holds_labels(column: pd.Series) -> bool:
    return is_bool_dtype(column.dtype) or not is_numeric_dtype(column.dtype)


def _present(table: pd.DataFrame, schema: ConditionSchema) -> list[str]:
    return [key for key in schema.column_keys if key in table.columns]
