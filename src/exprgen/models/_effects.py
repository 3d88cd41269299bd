"""What moves the means of drawn cells: their donors, and fold changes that a caller plants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from exprgen import _arguments
from exprgen._random import generator
from exprgen.models._query import DONOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from exprgen.models._query import Query
    from exprgen.module import ExpressionModule

__all__ = ["donor_effects", "fold_changes"]


def donor_effects(
    module: ExpressionModule, codes: np.ndarray, donors: np.ndarray, seed: int
) -> Tensor | None:
    """Each row's donor effect, ``(n, n_vars)``: rows of one donor number share one draw."""
    space = module.space
    if space.donors is None:
        return None
    known = space.features.donor(torch.from_numpy(codes)).numpy()
    numbers, first, inverse = np.unique(donors, return_index=True, return_inverse=True)
    draws = [
        space.donors.draw(
            int(known[row]), 1, generator(seed, DONOR, int(number)), space.donor_depths
        )[0]
        for number, row in zip(numbers, first, strict=True)
    ]
    return torch.stack(draws)[torch.from_numpy(inverse)]


def fold_changes(
    log_fold_change: Mapping[str, float] | pd.Series | pd.DataFrame | None,
    query: Query,
    var_names: pd.Index,
) -> Callable[[slice], torch.Tensor] | None:
    """Function from a slice of cells to natural-log shifts of their means, ``(n, n_vars)``."""
    if log_fold_change is None:
        return None
    if isinstance(log_fold_change, pd.DataFrame):
        changes, rows = log_fold_change, query.rows
        if len(changes) != query.n_rows:
            raise ValueError(
                f"log_fold_change has {len(changes)} rows, conditions have {query.n_rows}: give "
                "one per row, or a mapping by gene."
            )
    else:
        if not isinstance(log_fold_change, Mapping | pd.Series):
            raise TypeError(
                "log_fold_change must be a mapping or Series by gene, or a DataFrame of rows of "
                f"conditions x genes; got {log_fold_change!r} ({type(log_fold_change).__name__})."
            )
        series = pd.Series(log_fold_change, dtype=object)
        changes = pd.DataFrame([series.to_numpy()], columns=list(series.index))
        rows = np.zeros(len(query.rows), dtype=np.int64)
    genes = _arguments.check_genes(changes.columns, var_names)
    try:
        values = changes.to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"log_fold_change must hold numbers: {error}.") from error
    if not np.isfinite(values).all():
        raise ValueError("log_fold_change must be finite.")
    table = np.zeros((len(values), len(var_names)), dtype=np.float32)
    table[:, genes] = values * np.log(2)
    return lambda part: torch.from_numpy(table[rows[part]])
