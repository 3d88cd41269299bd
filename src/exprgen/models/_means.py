"""What a mean predictor reads of a model's cells, and how its predictions reach the module."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from exprgen._errors import CheckpointError, DataQualityWarning
from exprgen.means import from_state

if TYPE_CHECKING:
    from exprgen._conditions import ConditionSchema
    from exprgen.means import Mean

__all__ = [
    "CodesWithMean",
    "check_residuals",
    "distinct_rows",
    "inputs_of",
    "restored_mean",
    "state_of",
]

# Relative to the largest of the values that are compared.
_ROUNDING = 1e-3
_MOST_PROBED = 50
# Errors in standard deviations of the median gene.
_LEAST_ERROR, _LARGEST_ERROR, _LARGEST_BIAS = 1e-6, 1.5, 0.3
_ENOUGH = 20
_MOST_AT_LEAST = 0.5
# Beyond the largest logarithm of the data; times e² no predictor means.
_BEYOND = 2.0


class CodesWithMean:
    """Encoded conditions ``(n, width)`` with, behind them, what is known of their mean.

    Rows are put together when they are read: cells of one condition share one row of ``known``.

    Parameters
    ----------
    codes
        Encoded conditions, ``(n, width)``.
    known
        What is known of means, ``(n_known, m)``, see :class:`~exprgen.spaces.KnownMean`.
    row
        Which row of ``known`` is each one's, ``(n,)``.
    """

    def __init__(self, codes: Any, known: np.ndarray, row: np.ndarray) -> None:
        self.codes = codes
        self.known = known
        self.row = row

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.concatenate([self.codes[index], self.known[self.row[index]]], axis=1)

    @property
    def keys(self) -> np.ndarray:
        """What tells rows apart, ``(n, width + 1)``."""
        return np.c_[self.codes, self.row]


def inputs_of(
    schema: ConditionSchema, table: pd.DataFrame, embedding: np.ndarray | None
) -> pd.DataFrame:
    """What a predictor reads: columns of conditions, and one column per embedding dimension.

    Labels are categoricals of all labels that the model knows.
    Batch and donor are not among them: new ones have no column of their own.
    """
    inputs = table[schema.categorical_keys + schema.continuous_keys].reset_index(drop=True)
    # The same type in training and in every verb, whatever a caller's column is of.
    for part in schema.labels:
        values = inputs[part.key].astype(object)
        inputs[part.key] = pd.Categorical(values, categories=list(part.labels))
    if embedding is None:
        return inputs
    names = [f"{schema.embedding_key}_{i}" for i in range(embedding.shape[1])]
    return pd.concat([inputs, pd.DataFrame(embedding, columns=names)], axis=1)


def distinct_rows(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the distinct rows, and of each row among them, ``(n,)``."""
    if not table.shape[1]:
        return np.zeros(min(1, len(table)), np.intp), np.zeros(len(table), np.intp)
    columns = [pd.factorize(table[key])[0] for key in table]
    _, first, row = np.unique(
        np.column_stack(columns), axis=0, return_index=True, return_inverse=True
    )
    return first, row.ravel()


def check_residuals(
    y: np.ndarray, predicted: np.ndarray, name: str, *, of_counts: bool, came_fitted: bool
) -> None:
    """Refuse or doubt out-of-sample predictions that cannot be what they are said to be.

    Parameters
    ----------
    y, predicted
        Of the training cells, ``(n_obs, n_vars)``.
    name
        Of the predictor.
    of_counts
        Whether both are logarithms of counts, which are mostly 0.
    came_fitted
        Whether the predictor was fitted elsewhere, on whatever scale.

    Raises
    ------
    ValueError
        If they are the data themselves, or no such logarithms.

    Warns
    -----
    DataQualityWarning
        If they are further off than the mean of the data is, or off on average.
    """
    if of_counts and came_fitted and predicted.max() > y.max() + _BEYOND:
        raise ValueError(
            f"mean={name!r} predicts values up to {predicted.max():.3g}, where the data reach "
            f"{y.max():.3g}. Of counts it must be log(1 + counts per ten thousand), as scanpy's "
            "normalize_total and log1p make it; with a size factor, log(1 + counts per average "
            "size factor)."
        )
    residuals, spread = y - predicted, y.std(axis=0)
    at_least = (y <= y.min(axis=0)).mean()
    if not of_counts and at_least > _MOST_AT_LEAST:
        warnings.warn(
            f"{at_least:.0%} of the values are their gene's least, which are no residuals around "
            "a mean: draws have too few of them. Give the counts, or use exprgen.CondVAE or "
            "exprgen.ExprFlow.",
            DataQualityWarning,
            stacklevel=5,
        )
    varies = spread > 0
    if not varies.any():
        return
    error = np.sqrt((residuals**2).mean(axis=0))[varies] / spread[varies]
    if np.median(error) < _LEAST_ERROR:
        raise ValueError(
            f"mean={name!r} predicts the data themselves, to {np.median(error):.1g} of their "
            "spread. The model needs predictions that never saw the cell they are of."
        )
    bias = np.median(np.abs(residuals.mean(axis=0))[varies] / spread[varies])
    if np.median(error) > _LARGEST_ERROR or (bias > _LARGEST_BIAS and len(y) >= _ENOUGH):
        warnings.warn(
            f"mean={name!r} is off by {np.median(error):.2g} standard deviations of the median "
            f"gene, {bias:.2g} on average: the mean of all cells would be off by 1 and 0. Is it "
            "on the scale of the layer (log, base, normalisation)? What it is off by on average "
            "stays in the mean of what is drawn.",
            DataQualityWarning,
            stacklevel=5,
        )


def state_of(mean: Mean, inputs: pd.DataFrame) -> dict[str, Any]:
    """What a file keeps of a predictor: what it learned, or what it is called.

    With it goes what it predicts of some conditions, to know it by.
    """
    try:
        state = mean.state()
    except TypeError:
        state = {"kind": "code"}
    state = {**state, "name": mean.name}
    if state["kind"] == "precomputed":
        return state
    probe = _probe(inputs)
    return {**state, "probe": probe, "predicted": mean.predict(probe)}


def _probe(inputs: pd.DataFrame) -> pd.DataFrame:
    """Every label once, some numbers between: conditions to know a predictor by, no cell's own."""
    labels = [key for key in inputs if isinstance(inputs[key].dtype, pd.CategoricalDtype)]
    some = inputs[labels].drop_duplicates()
    kept = np.zeros(len(some), bool)
    for key in labels:
        kept |= ~some[key].duplicated().to_numpy()
    probe = inputs.loc[some.index[kept][:_MOST_PROBED] if labels else inputs.index[:3]]
    probe = probe.reset_index(drop=True)
    for key in inputs.columns.difference(labels):
        middle = inputs[key].quantile([0.25, 0.5, 0.75]).to_numpy()
        probe[key] = middle[np.arange(len(probe)) % 3]
    return probe


def restored_mean(state: dict[str, Any], given: Mean | None) -> Mean:
    """The predictor of a saved model: from the file, or given again if it is code.

    Raises
    ------
    ValueError
        If it has to be given and was not, or was given and is in the file; or if it is another.
    CheckpointError
        If the file's cannot be used.
    """
    kind, name = state.get("kind"), state.get("name")
    if given is not None and kind != "code":
        raise ValueError(f"mean is in the model's file ({name}): leave it out of load().")
    if given is None and kind == "code":
        raise ValueError(
            f"This model's mean is {name}, code, which a model file does not hold. Give the same "
            "predictor again, fitted: load(path, mean=...)."
        )
    mean = from_state(state) if given is None else given
    if kind == "precomputed":
        return mean
    try:
        predicted = mean.predict(state["probe"])
    except RuntimeError as error:
        raise ValueError(
            f"mean={mean.name} is not fitted. Give the predictor that the model was trained with, "
            "model.mean.fitted of a scikit-learn regressor."
        ) from error
    expected = np.asarray(state["predicted"])
    if predicted.shape != expected.shape:
        differs = f"in shape, {predicted.shape}, not {expected.shape}"
    else:
        difference = np.abs(predicted - expected).max(initial=0)
        if difference <= _ROUNDING * np.abs(expected).max(initial=1e-12):
            return mean
        differs = f"by up to {difference:.3g}"
    message = f"{mean.name} does not predict what it did when trained: it differs {differs}."
    if given is not None:
        raise ValueError(f"mean is another predictor than the model was trained with. {message}")
    raise CheckpointError(message)
