r"""Means of groups of cells that share all their labels.

With weights :math:`w_i` (1 each by default) the mean of group k is
:math:`\bar y_k = \sum_{i \in k} w_i y_i / \sum_{i \in k} w_i`. Without the rows of a unit u (one
row, or one donor) it is, exactly,

.. math::
    \bar y_{k, -u} = \frac{\sum_{i \in k} w_i y_i - \sum_{i \in k \cap u} w_i y_i}
                          {\sum_{i \in k} w_i - \sum_{i \in k \cap u} w_i}.

Means are not shrunk. A group without rows, or with none but the unit's, has the mean of all rows,
or of all the other units' rows.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from scipy import sparse

from exprgen._errors import DataQualityWarning, ExtrapolationWarning, name_some
from exprgen.means._base import Mean
from exprgen.means._checks import check_groups, check_training
from exprgen.means._encoding import Encoding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

__all__ = ["GroupMeans"]


class GroupMeans(Mean):
    """Mean expression of the cells that share all their labels; numbers are not used.

    Parameters
    ----------
    categorical_keys
        Columns that are labels; ``None`` for all that do not hold numbers.
    """

    name = "group"

    def __init__(self, *, categorical_keys: Sequence[str] | None = None) -> None:
        self.categorical_keys = categorical_keys
        self._encoding: Encoding | None = None
        self._groups = np.zeros(0, dtype=np.int64)
        self._means = np.zeros((0, 0))
        self._grand = np.zeros(0)

    def fit(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Self:
        """Learn the means; ``groups`` and ``seed`` are not needed. See :meth:`Mean.fit`.

        Warns
        -----
        DataQualityWarning
            If the table has numbers, which group means do not use.
        """
        table, y, mass = check_training(table, y, weights)
        encoding = Encoding.fit(table, categorical_keys=self.categorical_keys)
        if numbers := encoding.schema.continuous_keys:
            warnings.warn(
                f"Group means do not use the numbers in {name_some(numbers)}; mean='ridge' does, "
                "and categorical_keys reads them as labels.",
                DataQualityWarning,
                stacklevel=2,
            )
        of_row = _numbers(encoding, table)
        known, row_group = np.unique(of_row[mass > 0], return_inverse=True)
        y, mass = y[mass > 0], mass[mass > 0]
        centre = y.mean(axis=0)
        totals = _totals(row_group, mass, y - centre, len(known))
        self._encoding, self._groups = encoding, known
        self._means = centre + totals / np.bincount(row_group, mass)[:, None]
        self._grand = centre + totals.sum(axis=0) / mass.sum()
        return self

    def seen(self, table: pd.DataFrame) -> np.ndarray:
        """Which rows are of a group that had rows to learn from, boolean, ``(n_obs,)``.

        Raises
        ------
        RuntimeError, CovariateError
            As :meth:`predict`.
        """
        return self._find(table) >= 0

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Mean of each row's group, ``(n_obs, n_vars)``. See :meth:`Mean.predict`.

        Warns
        -----
        ExtrapolationWarning
            If known labels come in a combination that had no rows: it has the grand mean.
        """
        at = self._find(table)
        if (new := at < 0).any():
            _warn(
                f"{new.sum()} of {len(table)} rows are of combinations of labels without training "
                f"cells (first row {name_some(table.index[new], 1)}): predicted by the mean of "
                "all cells."
            )
        return np.where(new[:, None], self._grand, self._means[np.maximum(at, 0)])

    def out_of_sample(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        groups: np.ndarray | None = None,
        *,
        weights: np.ndarray | None = None,
        n_folds: int = 5,
        seed: int | None = None,
    ) -> np.ndarray:
        """Mean of each row's group without the row, or its ``groups`` label; exact.

        See :meth:`Mean.out_of_sample`.

        Warns
        -----
        ExtrapolationWarning
            If a group has no other rows: the mean of all others stands in.
        """
        table, y, mass = check_training(table, y, weights)
        unit = check_groups(groups, len(table))
        encoding = Encoding.fit(table, categorical_keys=self.categorical_keys)
        group = np.unique(_numbers(encoding, table), return_inverse=True)[1]
        part = np.unique(group * (unit.max() + 1) + unit, return_inverse=True)[1]
        centre = y.mean(axis=0)  # differences of sums lose no digits to a large mean
        means, others = _without(part, group, mass, y - centre)
        if not others.all():
            grand, any_other = _without(unit, np.zeros_like(unit), mass, y - centre)
            if not any_other.all():
                raise ValueError("weights are 0 outside one row or group: nothing is left to fit.")
            means = np.where(others[:, None], means, grand)
            _warn(
                f"{(~others).sum()} of {len(table)} rows have no others of their combination of "
                f"labels (first row {name_some(table.index[~others], 1)}): their out-of-sample "
                "prediction is the mean of all other cells."
            )
        return centre + means

    def state(self) -> dict[str, Any]:
        """Labels and means. See :meth:`Mean.state`."""
        if self._encoding is None:
            raise RuntimeError("GroupMeans has not been fitted; there is no state.")
        return {
            "kind": self.name,
            "encoding": self._encoding.to_dict(),
            "groups": self._groups,
            "means": self._means,
            "grand": self._grand,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Undo :meth:`state`."""
        encoding = Encoding.from_dict(state["encoding"])
        mean = cls(categorical_keys=encoding.schema.categorical_keys)
        mean._encoding = encoding
        mean._groups, mean._means = np.array(state["groups"]), np.array(state["means"])
        mean._grand = np.array(state["grand"])
        return mean

    def _find(self, table: pd.DataFrame) -> np.ndarray:
        """Position of each row's group, -1 if it is new, ``(n_obs,)``."""
        if self._encoding is None:
            raise RuntimeError("GroupMeans has not been fitted: call fit(table, y) first.")
        number = _numbers(self._encoding, table)
        at = np.minimum(np.searchsorted(self._groups, number), len(self._groups) - 1)
        return np.where(self._groups[at] == number, at, -1)


def _numbers(encoding: Encoding, table: pd.DataFrame) -> np.ndarray:
    """One number for each combination of labels, ``(n_obs,)``, int64."""
    number = np.zeros(len(table), dtype=np.int64)
    for codes, part in zip(encoding.codes(table).T, encoding.schema.labels, strict=True):
        number = number * len(part) + codes
    return number


def _totals(
    label: np.ndarray, mass: np.ndarray, y: np.ndarray, n_labels: int | None = None
) -> np.ndarray:
    """Weighted sums of rows by label, ``(n_labels, n_vars)``."""
    shape = (n_labels or label.max() + 1, len(label))
    return sparse.csr_matrix((mass, (label, np.arange(len(label)))), shape=shape) @ y


def _without(
    part: np.ndarray, whole: np.ndarray, mass: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over each row's ``whole`` without its ``part``, and whether there is any other row.

    Rows are counted, as a difference of weights is rarely 0 when it should be.
    """
    rows = np.bincount(whole, mass > 0)[whole] - np.bincount(part, mass > 0)[part]
    weight = np.bincount(whole, mass)[whole] - np.bincount(part, mass)[part]
    sums = _totals(whole, mass, y)[whole] - _totals(part, mass, y)[part]
    return sums / np.where(rows > 0, weight, 1)[:, None], rows > 0


def _warn(message: str) -> None:
    warnings.warn(message, ExtrapolationWarning, stacklevel=3)
