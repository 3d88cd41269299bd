"""What a mean predictor reads of a model's cells, and how its predictions reach the module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from exprgen._errors import CheckpointError
from exprgen.means import from_state

if TYPE_CHECKING:
    from exprgen._conditions import ConditionSchema
    from exprgen.means import Mean

__all__ = ["CodesWithMean", "distinct_rows", "inputs_of", "restored_mean", "state_of"]

# Relative to the largest of the values that are compared.
_ROUNDING = 1e-3


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
    """What a predictor reads: raw columns of conditions, and one column per embedding dimension.

    Batch and donor are not among them: new ones have no column of their own.
    """
    keys = schema.categorical_keys + schema.continuous_keys
    inputs = table[keys].reset_index(drop=True)
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


def state_of(mean: Mean, inputs: pd.DataFrame) -> dict[str, Any]:
    """What a file keeps of a predictor: what it learned, or what it is called.

    With it goes what it predicts of a typical condition, to know it by.
    """
    try:
        state = mean.state()
    except TypeError:
        state = {"kind": "code"}
    state = {**state, "name": mean.name}
    if state["kind"] == "precomputed":
        return state
    typical = {
        key: [values.median() if values.dtype.kind in "fiu" else values.mode()[0]]
        for key, values in inputs.items()
    }
    probe = pd.DataFrame(typical, index=pd.RangeIndex(1))
    return {**state, "probe": probe, "predicted": mean.predict(probe)}


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
    predicted, expected = mean.predict(state["probe"]), np.asarray(state["predicted"])
    if predicted.shape != expected.shape:
        differs = f"for {predicted.shape[1]} genes, not {expected.shape[1]}"
    else:
        difference = np.abs(predicted - expected).max(initial=0)
        if difference <= _ROUNDING * np.abs(expected).max(initial=1e-12):
            return mean
        differs = f"by up to {difference:.3g}"
    conditions = state["probe"].iloc[0].to_dict()
    message = f"{mean.name} does not predict of {conditions} what it did when trained: {differs}."
    if given is not None:
        raise ValueError(f"mean is another predictor than the model was trained with. {message}")
    raise CheckpointError(message)
