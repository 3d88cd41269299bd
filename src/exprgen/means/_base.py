"""The contract of a mean predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["Mean"]


class Mean(ABC):
    """A predictor of expression from conditions.

    Tables have a row per cell and the raw columns of conditions, labels and numbers; ``y`` is the
    expression of these cells in the units that are to be predicted. Neither is ever changed.
    """

    came_fitted: bool = False
    """Whether it is never fitted here, so that its out-of-sample predictions have to be given."""

    var_names: list[str] | None = None
    """Genes that are predicted, in their order, where a model has said so: of DataFrames that a
    user's predictor returns, columns are put in this order."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call the predictor in messages and files."""

    @abstractmethod
    def fit(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Self:
        """Learn from all rows; a predictor that came fitted stays as it is.

        Parameters
        ----------
        table
            Raw columns of conditions, a row per cell.
        y
            Expression, ``(n_obs, n_vars)``, finite.
        weights
            What each row counts for, relative to others, ``(n_obs,)``, from 0 up; ``None`` for
            the same each.
        groups
            As in :meth:`out_of_sample`: what is chosen by leaving out, a penalty say, is chosen
            for rows of new groups.
        seed
            Of what the fit draws, if it draws.

        Raises
        ------
        TypeError, ValueError
            If an argument is not of this form.
        CovariateError
            If a column of the table has missing, infinite or otherwise unusable values.
        """

    @abstractmethod
    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Expected expression, ``(n_obs, n_vars)``, float64, finite, in the units of ``y``.

        Raises
        ------
        RuntimeError
            If it has not been fitted.
        CovariateError
            If the table lacks a column, or has unusable values or unseen labels
            (:class:`~exprgen._errors.UnseenCategoryError`).
        TypeError, ValueError
            If a user's predictor returns something else than a finite array of this shape.
        """

    @abstractmethod
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
        """Predict each row by a predictor that never saw it, ``(n_obs, n_vars)``, float64.

        The predictor itself stays as it is, fitted or not.

        Parameters
        ----------
        table, y, weights
            As in :meth:`fit`.
        groups
            Label of each row, ``(n_obs,)``, its donor say: a row is then predicted without any row
            of its group. ``None`` if rows are independent given their conditions.
        n_folds
            Parts that are left out in turn, at most one per row or group. A predictor with a
            closed form leaves out every row, or every group, by itself, and reads neither this
            nor ``seed``.
        seed
            Of the folds, and of what the fits draw; ``None`` as everywhere: the host's seed if it
            is set, else a fresh one.

        Raises
        ------
        TypeError, ValueError, CovariateError
            As :meth:`fit`; or if there are no two groups; or if the predictor came fitted and no
            out-of-sample predictions were given with it.
        """

    def parameter_variance(self, table: pd.DataFrame) -> np.ndarray | None:
        """Variance of :meth:`predict` from doubt about what was learned, ``(n_obs, n_vars)``.

        In squared units of ``y``; ``None`` of a predictor that does not know it.

        Raises
        ------
        RuntimeError, CovariateError
            As :meth:`predict`.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What was learned, as arrays and plain types, for files.

        Raises
        ------
        TypeError
            If the predictor is an object that a file cannot hold: it is passed again at load.
        """
        raise TypeError(
            f"{self.name} ({type(self).__name__}) is code, which a model file does not hold. Keep "
            "it yourself and pass it again: load(path, mean=...)."
        )
