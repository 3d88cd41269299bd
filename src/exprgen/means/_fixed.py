"""Predictors that come fitted: a torch module, a callable, a layer of predictions.

They are never fitted here. What they predict of the cells at hand is out of sample only if the
user says so or gives predictions that are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch

from exprgen._arguments import check_positive_int
from exprgen._errors import name_some
from exprgen.means._base import Mean
from exprgen.means._checks import (
    check_table,
    check_training,
    check_values,
    naming,
    read_prediction,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd
    from numpy.typing import ArrayLike

__all__ = ["CallableMean", "FixedMean", "OutOfSample", "PrecomputedMean", "TorchMean", "given"]

OutOfSample: TypeAlias = "ArrayLike | str | None"


class FixedMean(Mean):
    """The contract of a predictor that comes fitted, and is never refitted.

    Parameters
    ----------
    out_of_sample
        Its out-of-sample predictions of the training cells, ``(n_obs, n_vars)``; or ``"predict"``,
        the user's word that it never saw these cells, so that what it predicts of them is out of
        sample; or ``None`` if there are none.
    """

    came_fitted = True

    def __init__(self, out_of_sample: OutOfSample = None) -> None:
        self._given = out_of_sample
        self._n_vars: int | None = None

    def fit(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Self:
        """Change nothing, but see whether predictions are of the shape of ``y``."""
        table, y, _ = check_training(table, y, weights)
        self._n_vars = y.shape[1]
        self.predict(table.iloc[:1])
        return self

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
        """Return the predictions that were given; no fold is ever fitted."""
        table, y, _ = check_training(table, y, weights)
        return given(self, self._given, table, y.shape[1])


def given(mean: Mean, predictions: OutOfSample, table: pd.DataFrame, n_vars: int) -> np.ndarray:
    """Out-of-sample predictions of a fitted predictor, ``(n_obs, n_vars)``.

    Raises
    ------
    ValueError
        If there are none, or they are of another shape or not finite.
    """
    if predictions is None:
        raise ValueError(
            f"{mean.name} is fitted, and is not refitted here: residuals of cells that it was "
            "fitted to would be too small. Give its out-of-sample predictions of these cells, "
            "out_of_sample=(an array, or the name of a layer); or out_of_sample='predict' if it "
            "never saw them; or give it unfitted."
        )
    if isinstance(predictions, str):
        if predictions != "predict":
            raise ValueError(f"out_of_sample must be an array or 'predict'; got {predictions!r}.")
        return check_values(mean.predict(table), mean.name, len(table), n_vars)
    return check_values(
        predictions, f"The out-of-sample prediction of {mean.name!r}", len(table), n_vars
    )


class CallableMean(FixedMean):
    """Any function of the table of conditions.

    Parameters
    ----------
    function
        Takes the table, a copy of it, and returns ``(n_obs, n_vars)`` in the units of the data: an
        array, tensor or DataFrame.
    out_of_sample
        See :class:`FixedMean`.

    Raises
    ------
    TypeError
        If ``function`` cannot be called.
    """

    def __init__(
        self, function: Callable[[pd.DataFrame], Any], *, out_of_sample: OutOfSample = None
    ) -> None:
        super().__init__(out_of_sample)
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"function must be callable on a table; got {function!r}.")
        self.function = function

    @property
    def name(self) -> str:
        """The function's name, or that of its class."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Call the function, ``(n_obs, n_vars)``. See :meth:`Mean.predict`."""
        check_table(table)
        what = f"What {self.name} returns"
        with naming(self.name, table):
            values = self.function(table.copy())
        return read_prediction(values, table, self._n_vars, what, self.var_names)


class TorchMean(FixedMean):
    """A trained ``torch.nn.Module``, in evaluation mode and without gradients.

    Parameters
    ----------
    module
        Maps ``(n, n_inputs)`` to ``(n, n_vars)`` in the units of the data. It is neither trained
        nor copied; its device, its data type and the mode of its parts stay as they are.
    inputs
        Maps a table to the module's inputs, an array or a tensor whose first axis is the rows; an
        :class:`~exprgen.means.Encoding`, say, that the module was trained with. ``None`` for the
        columns as they are, which must be numbers then: how labels were encoded when the module
        was trained cannot be guessed.
    batch_size
        Rows per call.
    out_of_sample
        See :class:`FixedMean`.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        inputs: Callable[[pd.DataFrame], Any] | None = None,
        batch_size: int = 1024,
        out_of_sample: OutOfSample = None,
    ) -> None:
        super().__init__(out_of_sample)
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}.")
        if inputs is not None and not callable(inputs):
            raise TypeError(f"inputs must be callable on a table; got {type(inputs).__name__}.")
        self.module = module
        self.inputs = inputs
        self.batch_size = check_positive_int(batch_size, "batch_size")

    @property
    def name(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Run the module, ``(n_obs, n_vars)``. See :meth:`Mean.predict`."""
        check_table(table)
        with naming(self.name, table):
            inputs = self._encode(table)
        modes = {part: part.training for part in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad():
                outputs = [self.module(part) for part in inputs.split(self.batch_size)]
        finally:
            for part, mode in modes.items():
                part.training = mode
        what = f"What {self.name} returns"
        for output in outputs:
            if not isinstance(output, torch.Tensor):
                raise TypeError(f"{what} must be a tensor; got {type(output).__name__}.")
        return read_prediction(torch.cat(outputs), table, self._n_vars, what)

    def _encode(self, table: pd.DataFrame) -> torch.Tensor:
        """The module's inputs, floating point ones in its data type, on its device."""
        if self.inputs is not None:
            values = self.inputs(table.copy())
        else:
            texts = [key for key in table.columns if table[key].dtype.kind not in "fiub"]
            if texts:
                raise TypeError(
                    f"{self.name} needs numbers, and {name_some(texts)} hold labels. Give the "
                    "encoding it was trained with: TorchMean(module, inputs=...), a function of "
                    "the table such as means.Encoding.fit(table)."
                )
            values = table.to_numpy(np.float64)
        tensor = torch.as_tensor(values)
        if not tensor.ndim or len(tensor) != len(table):
            raise ValueError(
                f"inputs must return a row for each of the table's {len(table)}; got shape "
                f"{tuple(tensor.shape)}."
            )
        like = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if like is None:
            return tensor.float() if tensor.is_floating_point() else tensor
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)


class PrecomputedMean(FixedMean):
    """Predictions of the training cells that were made elsewhere, out of sample.

    Parameters
    ----------
    values
        ``(n_obs, n_vars)``, in the order of the training cells; ``None`` of a saved model, which
        keeps no training cells.
    name
        What they are called, a layer say.
    """

    def __init__(self, values: ArrayLike | None, *, name: str = "precomputed") -> None:
        super().__init__(values)
        self._name = name

    @property
    def name(self) -> str:
        """What they are called."""
        return self._name

    def fit(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Self:
        """Change nothing, but see whether the predictions are of the shape of ``y``."""
        self._n_vars = self.out_of_sample(table, y, weights=weights).shape[1]
        return self

    def predict(self, table: pd.DataFrame, mean: ArrayLike | None = None) -> np.ndarray:
        """Return ``mean``, what the same predictor says of these rows, checked.

        Raises
        ------
        ValueError
            If there is none, or it is of another shape or not finite.
        """
        check_table(table)
        if mean is None:
            raise ValueError(
                f"The mean is precomputed ({self.name!r}) and knows the training cells only. Give "
                f"what the predictor says of these {len(table)} conditions: mean=array, of shape "
                f"({len(table)}, {self._n_vars or 'n_vars'})."
            )
        return check_values(mean, "mean", len(table), self._n_vars)

    def state(self) -> dict[str, Any]:
        """The name, and for how many genes. See :meth:`Mean.state`."""
        return {"kind": "precomputed", "name": self._name, "n_vars": self._n_vars}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Undo :meth:`state`; the predictions themselves are not kept."""
        mean = cls(None, name=str(state["name"]))
        mean._n_vars = int(state["n_vars"])
        return mean
