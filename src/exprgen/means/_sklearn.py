"""Any scikit-learn regressor: cross-fitted if it comes unfitted, left alone if it comes fitted.

Cross-fitting :cite:p:`chernozhukov2018`: rows are parted into K folds, donors whole where groups
are given, and each fold is predicted by a clone that was fitted to the others.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from exprgen._arguments import check_choice
from exprgen._errors import CovariateError, name_some
from exprgen._random import isolated, resolve_seed
from exprgen.means._base import Mean
from exprgen.means._checks import (
    check_groups,
    check_table,
    check_training,
    fold_numbers,
    naming,
    read_prediction,
)
from exprgen.means._encoding import Encoding
from exprgen.means._fixed import given

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from exprgen.means._fixed import OutOfSample

__all__ = ["SklearnMean"]

logger = logging.getLogger("exprgen")


class SklearnMean(Mean):
    """A regressor that predicts all genes from a table of conditions.

    One that comes unfitted is cloned for every fit and stays unfitted itself; one that comes
    fitted is never refitted, and reads the table as it is.

    Parameters
    ----------
    regressor
        Has ``fit`` and ``predict``; for several genes at once. One that knows a single output only
        can be wrapped: ``sklearn.multioutput.MultiOutputRegressor(regressor)``.
    inputs
        What the regressor reads: ``"raw"`` for the table as it is; ``"encoded"`` for indicators of
        labels and standardised numbers, by scikit-learn's own transformers in a pipeline.
        ``None`` for ``"raw"`` if it is fitted or has a transformer among its parts, as pipelines
        do, else ``"encoded"``.
    categorical_keys
        Columns that are labels when they are encoded; ``None`` for all that do not hold numbers.
    out_of_sample
        For a fitted regressor, as in :class:`~exprgen.means.FixedMean`.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these.
    """

    def __init__(
        self,
        regressor: Any,
        *,
        inputs: Literal["raw", "encoded"] | None = None,
        categorical_keys: Sequence[str] | None = None,
        out_of_sample: OutOfSample = None,
    ) -> None:
        _check_regressor(regressor)
        came_fitted = _is_fitted(regressor)
        check_choice(inputs, "inputs", (None, "raw", "encoded"))
        if came_fitted and inputs == "encoded":
            raise ValueError(
                "inputs must be 'raw' for a regressor that is fitted: it reads what it was fitted "
                "to. Give it unfitted to have the conditions encoded."
            )
        if not came_fitted and out_of_sample is not None:
            raise ValueError(
                "out_of_sample is for regressors that are fitted; this one is not, and will be "
                "cross-fitted."
            )
        self.regressor = regressor
        self.inputs = inputs or ("raw" if came_fitted or _transforms(regressor) else "encoded")
        self.categorical_keys = categorical_keys
        self.came_fitted = came_fitted
        self.fitted = regressor if came_fitted else None
        """What predicts: a scikit-learn object that reads the raw table, to be kept for load."""
        self._given = out_of_sample
        self._encoding: Encoding | None = None
        self._n_vars: int | None = None

    @property
    def name(self) -> str:
        """The regressor's class."""
        return type(self.regressor).__name__

    def fit(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Self:
        """Fit a clone to all rows; do nothing if it came fitted. See :meth:`Mean.fit`."""
        table, y, mass = check_training(table, y, weights)
        if self.came_fitted:
            self._n_vars = y.shape[1]
            self.predict(table.iloc[:1])
            return self
        encoding = self._learn_encoding(table)
        some = mass > 0
        # Rows without weight are left out: most regressors take no weights.
        of_some = None if np.ptp(mass[some]) == 0 else mass[some]
        with isolated(resolve_seed(seed)):
            self.fitted = self._fit_clone(table[some], y[some], of_some, encoding)
        self._n_vars, self._encoding = y.shape[1], encoding
        return self

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """What the regressor predicts, ``(n_obs, n_vars)``. See :meth:`Mean.predict`."""
        check_table(table)
        if self.fitted is None:
            raise RuntimeError(f"{self.name} has not been fitted: call fit(table, y) first.")
        if self._encoding is not None:
            self._encoding(table)  # names unseen labels and missing columns as elsewhere
        return self._predict(self.fitted, table, self._n_vars)

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
        """Cross-fit; logs first how many fits that takes. See :meth:`Mean.out_of_sample`."""
        table, y, mass = check_training(table, y, weights)
        if self.came_fitted:
            return given(self, self._given, table, y.shape[1])
        units = check_groups(groups, len(table))
        seed = resolve_seed(seed)
        folds = fold_numbers(units, n_folds, seed)
        encoding = self._learn_encoding(table)
        n_fits = folds.max() + 1
        logger.info(
            "Cross-fitting %s: %d fits to about %d cells x %d genes each%s.",
            self.name,
            n_fits,
            len(table) * (n_fits - 1) // n_fits,
            y.shape[1],
            "" if groups is None else ", groups whole",
        )
        predicted = np.empty_like(y)
        with isolated(seed):
            for fold in range(n_fits):
                out = folds == fold
                if not mass[~out].any():
                    raise ValueError("weights are 0 outside one fold: nothing is left to fit.")
                part = None if weights is None else mass[~out]
                fitted = self._fit_clone(table[~out], y[~out], part, encoding)
                predicted[out] = self._predict(fitted, table[out], y.shape[1])
        return predicted

    def state(self) -> dict[str, Any]:
        """What was fitted, by skops, if it is of types that skops reads without being told to.

        Linear models and pipelines are; ensembles of trees are not. See :meth:`Mean.state`.
        """
        from skops import io
        from skops.io.exceptions import UnsupportedTypeException

        if self.fitted is None:
            raise RuntimeError(f"{self.name} has not been fitted; there is no state.")
        try:
            written = io.dumps(self.fitted)
        except UnsupportedTypeException:
            return super().state()
        if io.get_untrusted_types(data=written):
            return super().state()
        stored = np.frombuffer(written, np.uint8)
        return {"kind": "sklearn", "skops": stored, "n_vars": self._n_vars}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Undo :meth:`state`; types that skops does not trust by itself are refused."""
        from skops import io

        written = np.asarray(state["skops"], np.uint8).tobytes()
        mean = cls(io.loads(written, trusted=[]))
        mean._n_vars = int(state["n_vars"])
        return mean

    def _learn_encoding(self, table: pd.DataFrame) -> Encoding | None:
        if self.inputs == "raw":
            return None
        return Encoding.fit(table, categorical_keys=self.categorical_keys)

    def _fit_clone(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None,
        encoding: Encoding | None,
    ) -> Any:
        """A clone that is fitted; with its encoder before it if it needs one."""
        from sklearn.base import clone
        from sklearn.pipeline import make_pipeline

        fresh = clone(self.regressor)
        if encoding is not None:
            fresh = make_pipeline(_encoder(encoding), fresh)
        options = {}
        if weights is not None:
            options = {_weight_name(fresh): np.asarray(weights, np.float64)}
        try:
            return fresh.fit(table.copy(), y[:, 0] if y.shape[1] == 1 else y, **options)
        except (TypeError, ValueError) as error:
            hints = [f"mean: {self.name} could not be fitted to {y.shape} values: {error}"]
            if y.shape[1] > 1:
                hints.append(
                    "If it predicts one gene only: "
                    "sklearn.multioutput.MultiOutputRegressor(regressor)."
                )
            if encoding is None:
                hints.append(
                    "If it needs numbers: SklearnMean(regressor, inputs='encoded') encodes labels."
                )
            raise ValueError(" ".join(hints)) from error

    def _predict(self, fitted: Any, table: pd.DataFrame, n_vars: int | None) -> np.ndarray:
        """Predict by the columns that it was fitted to, in their order."""
        names = getattr(fitted, "feature_names_in_", None)
        inputs: Any = table
        if names is not None:
            if missing := [name for name in names if name not in table.columns]:
                raise CovariateError(
                    f"conditions lack {name_some(missing, 20)}, which {self.name} was fitted to."
                )
            inputs = table[list(names)]
        elif hasattr(fitted, "n_features_in_"):
            inputs = table.to_numpy()  # it was fitted to an array, and warns of names
        with naming(self.name, table):
            values = fitted.predict(inputs)
        return read_prediction(values, table, n_vars, f"What {self.name} predicts", self.var_names)


def _check_regressor(regressor: Any) -> None:
    """Refuse classes, classifiers, and what cannot predict."""
    from sklearn.base import is_classifier

    if isinstance(regressor, type):
        raise TypeError(
            f"regressor must be an object, not a class. Did you mean {regressor.__name__}()?"
        )
    if not (hasattr(regressor, "fit") and hasattr(regressor, "predict")):
        raise TypeError(
            "regressor must be a scikit-learn regressor, with fit and predict; got "
            f"{type(regressor).__name__}."
        )
    if not hasattr(regressor, "get_params"):
        raise TypeError(
            f"regressor {type(regressor).__name__} cannot be cloned: it has no get_params. Derive "
            "it from sklearn.base.BaseEstimator, or, if it is fitted, give its predict method."
        )
    if is_classifier(regressor):
        raise TypeError(
            f"regressor must predict numbers; {type(regressor).__name__} is a classifier."
        )


def _is_fitted(regressor: Any) -> bool:
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    try:
        check_is_fitted(regressor)
    except NotFittedError:
        return False
    return True


def _transforms(regressor: Any) -> bool:
    """Whether the regressor, or a part of it, transforms its inputs."""
    return any(hasattr(part, "transform") for part in regressor.get_params().values())


def _encoder(encoding: Encoding) -> Any:
    """scikit-learn's own encoder, so that what is fitted needs nothing of ours to be kept."""
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    schema = encoding.schema
    # All labels are named, as a fold may lack some.
    one_hot = OneHotEncoder(
        categories=[sorted(part.labels) for part in schema.labels], sparse_output=False
    )
    return ColumnTransformer(
        [
            ("labels", one_hot, schema.categorical_keys),
            ("numbers", StandardScaler(), schema.continuous_keys),
        ]
    )


def _weight_name(regressor: Any) -> str:
    """What ``fit`` calls the weights of rows.

    Raises
    ------
    ValueError
        If it takes none.
    """
    from sklearn.pipeline import Pipeline
    from sklearn.utils.validation import has_fit_parameter

    if isinstance(regressor, Pipeline):
        name, last = regressor.steps[-1]
        return f"{name}__{_weight_name(last)}"
    if not has_fit_parameter(regressor, "sample_weight"):
        raise ValueError(
            f"weights: {type(regressor).__name__} takes none. Give weights=None, or a regressor "
            "whose fit has sample_weight."
        )
    return "sample_weight"
