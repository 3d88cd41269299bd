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


@torch.no_grad()
def data_moments(
    dataset: CellDataset, rows: np.ndarray, space: Space, block: int = 512
) -> DataMoments:
    """Sums over the training cells, and least values, block by block."""
    n_vars = dataset.reader.shape[1]
    minimum = torch.full((n_vars,), math.inf, dtype=torch.float64)
    x, x_square, library_x = (torch.zeros(n_vars, dtype=torch.float64) for _ in range(3))
    inputs_x = torch.zeros(space.n_inputs, n_vars, dtype=torch.float64)
    library = dataset.library[rows].double()
    # Filled rather than collected: what small tensors leave between large ones is no use to these.
    inputs = torch.empty(len(rows), space.n_inputs)
    donors = torch.empty(len(rows), dtype=torch.long)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        batch = dataset[rows[part]]
        counts, c = batch["x"].double(), batch["c"]
        inputs[part] = space.inputs(c)
        donors[part] = space.features.donor(c)
        x += counts.sum(0)
        x_square += counts.square().sum(0)
        minimum = torch.minimum(minimum, counts.amin(0))
        library_x += library[part] @ counts
        inputs_x += inputs[part].double().T @ counts
    sums = inputs_x, x, x_square, library_x, minimum
    return DataMoments(library, inputs, donors, *sums, cells=partial(_cells, dataset, rows))


def _cells(
    dataset: CellDataset, rows: np.ndarray, at_most: int = 10_000
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, encoded conditions and library of training cells; of many cells, of some."""
    chosen = torch.randperm(len(rows))[:at_most].sort().values.numpy()
    batch = dataset[rows[chosen]]
    return batch["x"], batch["c"], batch["library"]
