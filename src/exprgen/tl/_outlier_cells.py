"""Cells that are judged, and those that they are compared with: which may be so."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from exprgen._errors import DataQualityWarning, name_some
from exprgen.models._cells import cell_keys, split_labels
from exprgen.tl._names import text_labels
from exprgen.tl._same_cells import repeated_cells, shared_cells

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from exprgen.models import GenerativeModel

__all__ = ["check_cells", "groups_of"]

# A regression of six coefficients would leave little of fewer.
MIN_CALIBRATION = 20


def groups_of(
    query: AnnData, reference: AnnData, groupby: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Group of each cell of both, as text; one for all without ``groupby``.

    Raises
    ------
    TypeError, KeyError, CovariateError
        If the column is no name, missing, or has missing values.
    ValueError
        If there are no cells, or too few calibration cells, all in all or of a group.
    """
    if not query.n_obs:
        raise ValueError("adata has no cells: there is nothing to judge.")
    if reference.n_obs < MIN_CALIBRATION:
        raise ValueError(
            f"calibration has {reference.n_obs} cells, at least {MIN_CALIBRATION} are needed. Set "
            "some aside before training."
        )
    if groupby is None:
        return np.zeros(query.n_obs), np.zeros(reference.n_obs)
    found = [
        text_labels(cells.obs, groupby, "groupby", f"{name}.obs")
        for cells, name in ((query, "adata"), (reference, "calibration"))
    ]
    without = np.setdiff1d(found[0], found[1])
    if without.size:
        raise ValueError(
            f"calibration has no cell of {without.size} groups of adata.obs[{groupby!r}]: "
            f"{name_some(without)}. Add some, leave out those of adata, or groupby=None."
        )
    return found[0], found[1]


def check_cells(model: GenerativeModel, query: AnnData, reference: AnnData) -> pd.Categorical:
    """Say whether the query cells were trained on.

    Raises
    ------
    ValueError
        If calibration cells were, are query cells, or are repeated.

    Warns
    -----
    DataQualityWarning
        If query cells were.
    """
    readers = model._reader(query), model._reader(reference)
    keys = cell_keys(query, readers[0]), cell_keys(reference, readers[1])
    split, of_reference = (split_labels(of_cells, model.cell_keys_) for of_cells in keys)
    trained = np.asarray(of_reference == "train")
    if trained.any():
        raise ValueError(
            f"calibration has {trained.sum()} cells that the model was trained on: "
            f"{name_some(reference.obs_names[trained])}. They look more ordinary than new cells "
            "do. Give cells that were set aside, or those of validation."
        )
    repeated = repeated_cells(keys[1], readers[1])
    if repeated:
        raise ValueError(
            f"{len(repeated)} calibration cells are there more than once: "
            f"{name_some(reference.obs_names[repeated])}. They would count as so many: leave the "
            "repeats out."
        )
    shared = shared_cells(keys, readers)
    if shared:
        raise ValueError(
            f"{len(shared)} cells of adata are in calibration as well: "
            f"{name_some(query.obs_names[shared])}. Each would be compared with itself: leave "
            "them out of one of the two."
        )
    trained = np.asarray(split == "train")
    if trained.any():
        warnings.warn(
            f"The model was trained on {trained.sum()} of {len(trained)} cells of adata: they "
            "look more ordinary than new cells do, and their p-values are too large (a column of "
            "obs says which they are).",
            DataQualityWarning,
            stacklevel=4,
        )
    return split
