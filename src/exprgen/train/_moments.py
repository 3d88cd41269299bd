"""What spaces start from: sums over the training cells, read block by block."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from exprgen.spaces import DataMoments

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from exprgen.spaces import Space
    from exprgen.train._data import CellDataset

__all__ = ["data_moments"]


def data_moments(
    dataset: CellDataset, rows: np.ndarray, space: Space, block: int = 512
) -> DataMoments:
    """Sums over the training cells, and least values, block by block."""
    n_vars = dataset.reader.shape[1]
    minimum = torch.full((n_vars,), math.inf, dtype=torch.float64)
    x, x_square, library_x = (torch.zeros(n_vars, dtype=torch.float64) for _ in range(3))
    inputs_x = torch.zeros(space.n_inputs, n_vars, dtype=torch.float64)
    conditions, library = dataset.conditions[rows], dataset.library[rows].double()
    inputs = space.inputs(conditions)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        counts = dataset[rows[part]]["x"].double()
        x += counts.sum(0)
        x_square += counts.square().sum(0)
        minimum = torch.minimum(minimum, counts.amin(0))
        library_x += library[part] @ counts
        inputs_x += inputs[part].double().T @ counts
    donors = space.features.donor(conditions)
    sums = inputs_x, x, x_square, library_x, minimum
    return DataMoments(library, inputs, donors, *sums, values=partial(_values, dataset, rows))


def _values(dataset: CellDataset, rows: np.ndarray, at_most: int = 10_000) -> Tensor:
    """Values of training cells, ``(n, n_vars)``; of many cells, of some at random."""
    chosen = torch.randperm(len(rows))[:at_most].sort().values.numpy()
    return dataset[rows[chosen]]["x"]
