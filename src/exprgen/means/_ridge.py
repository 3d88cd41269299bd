r"""Ridge regression on encoded conditions, and its exact leave-one-out predictions.

With rows :math:`z_i = [1, x_i]` of the encoded conditions (:class:`~exprgen.means.Encoding`),
weights :math:`w_i` that are 1 on average, and a penalty :math:`\lambda` on all coefficients but
the intercept :cite:p:`hoerl1970`,

.. math::
    C = S^{-1} Z^\top W Y, \qquad S = Z^\top W Z + \lambda\,\mathrm{diag}(0, 1, …, 1).

A row's residual without the row itself follows from its leverage :cite:p:`allen1974`,

.. math::
    y_i - z_i C_{-i} = \frac{y_i - z_i C}{1 - h_i}, \qquad h_i = w_i\, z_i S^{-1} z_i^\top,

and that of a group u of rows, one donor say, from its block of the hat matrix,
:math:`(I - H_{uu})^{-1} (Y_u - Z_u C)`. By Woodbury's identity this is
:math:`Y_u - Z_u C_{-u}` with :math:`C_{-u} = (S - Z_u^\top W_u Z_u)^{-1}(Z^\top W Y - Z_u^\top W_u
Y_u)`: matrices of the size of the conditions, however many cells a donor has. Both are exact for
fixed weights, encoding and penalty.

An indicator of n cells keeps the share :math:`n/(n + \lambda)` of its label's deviation: the
penalty is a number of cells. One for all genes, it is chosen on a grid by the sum of squares of
these residuals, for which products of the size of the conditions suffice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from scipy import linalg

from exprgen._arguments import check_number
from exprgen.means._base import Mean
from exprgen.means._checks import check_training, left_out_units
from exprgen.means._encoding import Encoding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd

__all__ = ["RidgeMean"]

GRID = tuple(10.0 ** (k / 2) for k in range(8, -5, -1))
"""Penalties to choose from, in cells: 10,000 to 0.01. The largest first, which wins a tie."""


class RidgeMean(Mean):
    """Ridge regression :cite:p:`hoerl1970` on indicators of labels and standardised numbers.

    A label of n cells keeps the share n/(n + penalty) of its deviation, roughly: the penalty is a
    number of cells. Out-of-sample predictions are exact, from leverages :cite:p:`allen1974`.

    Parameters
    ----------
    penalty
        In cells, above 0; ``None`` to choose by the error on rows, or groups, that are left out.
    categorical_keys
        Columns that are labels; ``None`` for all that do not hold numbers.

    Raises
    ------
    TypeError, ValueError
        If ``penalty`` is no number above 0.
    """

    name = "ridge"

    def __init__(
        self, penalty: float | None = None, *, categorical_keys: Sequence[str] | None = None
    ) -> None:
        if penalty is not None:
            check_number(penalty, "penalty", "(0, inf)")
        self.penalty = penalty
        self.categorical_keys = categorical_keys
        self.chosen_penalty: float | None = None
        """The penalty of the last fit."""
        self._encoding: Encoding | None = None
        self._coefficients = np.zeros((1, 0))

    def fit(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Self:
        """Learn the coefficients; ``seed`` is not needed. See :meth:`Mean.fit`.

        With ``groups`` the penalty is the one that :meth:`out_of_sample` chooses for them.
        """
        rows, encoding, centre = self._rows(table, y, weights)
        penalty = self.penalty or _best_penalty(rows, left_out_units(groups, rows.mass))
        self._coefficients = _solve(rows.gram, rows.cross, penalty)
        self._coefficients[0] += centre
        self._encoding, self.chosen_penalty = encoding, penalty
        return self

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Linear prediction, ``(n_obs, n_vars)``. See :meth:`Mean.predict`."""
        if self._encoding is None:
            raise RuntimeError("RidgeMean has not been fitted: call fit(table, y) first.")
        return self._encoding(table) @ self._coefficients[1:] + self._coefficients[0]

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
        """Predict each row without itself, or without its ``groups`` label; exact.

        The penalty, one number for all genes, is chosen once, on all rows. See
        :meth:`Mean.out_of_sample`.
        """
        rows, _, centre = self._rows(table, y, weights)
        units = left_out_units(groups, rows.mass)
        penalty = self.penalty or _best_penalty(rows, units)
        if units is None:
            residuals = rows.y - rows.z @ _solve(rows.gram, rows.cross, penalty)
            leverage = (rows.z * _solve(rows.gram, rows.z.T, penalty).T).sum(1) * rows.mass
            return centre + rows.y - residuals / (1 - leverage)[:, None]
        predicted = np.empty_like(rows.y)
        for at, left_out in _by_unit(rows, units):
            coefficients = _solve(rows.gram - left_out.gram, rows.cross - left_out.cross, penalty)
            predicted[at] = left_out.z @ coefficients
        return centre + predicted

    def state(self) -> dict[str, Any]:
        """Labels, scales and coefficients. See :meth:`Mean.state`."""
        if self._encoding is None:
            raise RuntimeError("RidgeMean has not been fitted; there is no state.")
        return {
            "kind": self.name,
            "encoding": self._encoding.to_dict(),
            "coefficients": self._coefficients,
            "penalty": self.penalty,
            "chosen_penalty": self.chosen_penalty,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Undo :meth:`state`."""
        encoding = Encoding.from_dict(state["encoding"])
        mean = cls(state["penalty"], categorical_keys=encoding.schema.categorical_keys)
        mean._encoding, mean.chosen_penalty = encoding, state["chosen_penalty"]
        mean._coefficients = np.array(state["coefficients"])
        return mean

    def _rows(
        self, table: pd.DataFrame, y: np.ndarray, weights: np.ndarray | None
    ) -> tuple[_Rows, Encoding, np.ndarray]:
        """Encoded rows, and the mean that ``y`` was centred by, ``(n_vars,)``.

        The intercept takes up the mean exactly; without it, sums of squares keep their digits.
        """
        table, y, mass = check_training(table, y, weights)
        encoding = Encoding.fit(table, categorical_keys=self.categorical_keys)
        centre = mass @ y / mass.sum()
        z = np.column_stack([np.ones(len(table)), encoding(table)])
        return _rows(z, y - centre, mass), encoding, centre


class _Rows(NamedTuple):
    """Rows and their products, which is all that a fit reads of them."""

    z: np.ndarray  # (n, 1 + n_inputs)
    y: np.ndarray  # (n, n_vars)
    mass: np.ndarray  # (n,)
    gram: np.ndarray  # Z'WZ
    cross: np.ndarray  # Z'WY


def _rows(z: np.ndarray, y: np.ndarray, mass: np.ndarray) -> _Rows:
    weighted = z * mass[:, None]
    return _Rows(z, y, mass, weighted.T @ z, weighted.T @ y)


def _by_unit(rows: _Rows, units: np.ndarray) -> Iterator[tuple[np.ndarray, _Rows]]:
    """Positions and rows of each unit."""
    order = np.argsort(units, kind="stable")
    for at in np.split(order, np.cumsum(np.bincount(units))[:-1]):
        yield at, _rows(rows.z[at], rows.y[at], rows.mass[at])


def _solve(gram: np.ndarray, right: np.ndarray, penalty: float) -> np.ndarray:
    """Solve S C = right, where S has the penalty but for the intercept."""
    penalised = gram.copy()
    penalised.flat[len(gram) + 1 :: len(gram) + 1] += penalty
    return linalg.solve(penalised, right, assume_a="pos")


def _best_penalty(rows: _Rows, units: np.ndarray | None) -> float:
    """The penalty of the least squared error on what is left out."""
    errors = _errors_of_rows(rows) if units is None else _errors_of_units(rows, units)
    return GRID[int(np.argmin(errors))]


def _errors_of_rows(rows: _Rows) -> np.ndarray:
    """Weighted squared error of rows left out, summed over genes, for each of the penalties.

    |y - z C|² = |y|² - 2 t (y B')' + t B B' t' with t = z S⁻¹ and B = Z'WY: no pass over genes.
    """
    squares = np.einsum("ig,ig->i", rows.y, rows.y)
    with_cross, crosses = rows.y @ rows.cross.T, rows.cross @ rows.cross.T
    errors = []
    for penalty in GRID:
        t = _solve(rows.gram, rows.z.T, penalty).T
        residuals = squares - 2 * (t * with_cross).sum(1) + ((t @ crosses) * t).sum(1)
        leverage = (rows.z * t).sum(1) * rows.mass
        errors.append(rows.mass @ (residuals.clip(min=0) / (1 - leverage) ** 2))
    return np.array(errors)


def _errors_of_units(rows: _Rows, units: np.ndarray) -> np.ndarray:
    """Weighted squared error of units left out, summed over genes, for each of the penalties."""
    errors = np.zeros(len(GRID))
    for _, unit in _by_unit(rows, units):
        squares = unit.mass @ np.einsum("ig,ig->i", unit.y, unit.y)
        for i, penalty in enumerate(GRID):
            fitted = _solve(rows.gram - unit.gram, rows.cross - unit.cross, penalty)
            errors[i] += squares - 2 * (fitted * unit.cross).sum()
            errors[i] += (fitted * (unit.gram @ fitted)).sum()
    return errors
