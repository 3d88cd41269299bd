"""What stands in front of every public method.

Data that can be modelled, genes that are those of the model, arguments that mean what they say.
Everything is checked before anything is changed, on all values and always the same way; an error
or warning says what is wrong, in which cell and gene, and what to do.
"""

from __future__ import annotations

import logging
import warnings
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from exprgen._arguments import (
    check_choice,
    check_genes,
    check_indices,
    check_positive_int,
    check_quantiles,
)
from exprgen._errors import (
    DataQualityWarning,
    GeneMismatchError,
    SetupError,
    closest,
    name_some,
)
from exprgen._matrix import scan
from exprgen._tables import key_list, refuse_lazy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData

    from exprgen._matrix import MatrixSummary

__all__ = [
    "align_genes",
    "check_anndata",
    "check_choice",
    "check_genes",
    "check_indices",
    "check_positive_int",
    "check_quantiles",
    "check_query_data",
    "check_setup_data",
    "embedding_of",
    "matrix_of",
]

logger = logging.getLogger("exprgen")

LARGEST = 1e15  # a variance may be a thousand times its square
LARGEST_LOG = 50.0  # log1p of any expression stays far below
RESERVED = ("_exprgen", "_scvi_conditions")


def check_anndata(adata: object, *, method: str = "setup_anndata") -> None:
    """Refuse what is not an AnnData, saying how to get there.

    Raises
    ------
    TypeError
        For a table, a MuData, a path, anything else.
    SetupError
        For an AnnData that is read lazily.
    """
    from anndata import AnnData

    if isinstance(adata, AnnData):
        refuse_lazy(adata)
        return
    if isinstance(adata, (str, PathLike)):
        advice = "Read it first: anndata.read_h5ad(path)."
    elif isinstance(adata, (pd.DataFrame, np.ndarray)):
        advice = "Make one of it: anndata.AnnData(...)."
    elif hasattr(adata, "mod"):
        advice = "Give one modality, e.g. mdata['rna']; for several there is setup_mudata."
    else:
        advice = "Cells are its rows, genes its columns."
    raise TypeError(f"{method} wants an AnnData, got {type(adata).__name__}. {advice}")


def matrix_of(adata: AnnData, layer: str | None) -> Any:
    """Find the matrix to model: ``adata.X``, or a layer.

    Raises
    ------
    KeyError
        If there is no such layer.
    SetupError
        If ``layer`` is None and there is no ``X``.
    TypeError
        If ``layer`` is no str.
    """
    key_list(layer, "layer", many=False)
    if layer is None:
        if adata.X is None:
            raise SetupError(
                f"adata.X is None, shape {adata.shape}. Name a layer, layer=...; there are: "
                f"{name_some(filter(None, adata.layers), 20) or 'none'}."
            )
        return adata.X
    if layer not in adata.layers:
        present = list(filter(None, adata.layers))  # anndata 0.13 lists X as None
        raise KeyError(
            f"layer={layer!r} is not in adata.layers; there are: "
            f"{name_some(present, 20) or 'none'}.{closest(layer, present)}"
        )
    return adata.layers[layer]


def embedding_of(adata: AnnData, key: str | None) -> tuple[str, np.ndarray] | None:
    """Find the vectors to condition on, ``(n_obs, n_dims)``, and their key; None if ``key`` is.

    Raises
    ------
    KeyError
        If there is no such key.
    TypeError
        If it is no str.
    """
    if key is None:
        return None
    key_list(key, "condition_embedding_key", many=False)
    if key not in adata.obsm:
        raise KeyError(
            f"condition_embedding_key={key!r} is not in adata.obsm; there are: "
            f"{name_some(adata.obsm, 20) or 'none'}.{closest(key, adata.obsm)}"
        )
    values = adata.obsm[key]
    return key, values.toarray() if hasattr(values, "toarray") else np.asarray(values)


def check_setup_data(
    adata: AnnData,
    layer: str | None,
    *,
    needs_counts: bool | None,
    allow_non_integer: bool = False,
    minimum_cells: int = 10,
) -> MatrixSummary:
    """Check an AnnData before a model is set up on it; it is not changed.

    Parameters
    ----------
    adata
        Cells x genes.
    layer
        Layer to be modelled, None for ``X``.
    needs_counts
        Whether the model's likelihood is one of counts; ``None`` if the values decide, see
        :attr:`~exprgen._matrix.MatrixSummary.is_fractional`.
    allow_non_integer
        Whether corrected counts, which need not be integers, are meant to be modelled as counts.
    minimum_cells
        Fewest cells a model can be trained and validated on.

    Returns
    -------
    MatrixSummary
        What the one full scan of the matrix saw.

    Raises
    ------
    TypeError
        If it is not an AnnData.
    KeyError
        If the layer does not exist.
    SetupError
        If the data cannot be modelled: shape, names, missing, negative or non-integer values.

    Warns
    -----
    DataQualityWarning
        If they can, but look wrong: empty cells or genes, repeated names, unlikely scale.
    """
    check_anndata(adata)
    _check_container(adata)
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    matrix = matrix_of(adata, layer)
    try:
        summary = scan(matrix)
    except TypeError as error:
        raise SetupError(f"{where}: {error} Bring the data into memory: .to_memory().") from error
    if adata.n_obs < minimum_cells:
        raise SetupError(f"adata has {adata.n_obs} cells, the minimum is {minimum_cells}.")
    _check_finite(adata, summary, where)
    if (largest := max(summary.maximum, -summary.minimum)) > LARGEST:
        raise SetupError(
            f"{where} has values as large as {largest:.3g}; up to {LARGEST:.0e} can be modelled, "
            "as their squares must be float32 numbers. Choose another unit, or mend the values."
        )
    if summary.zero_genes.all():
        raise SetupError(f"{where} holds nothing but 0, shape {adata.shape}.")
    if needs_counts is None:
        needs_counts = not summary.is_fractional
    if needs_counts:
        _check_counts(adata, summary, where, layer, allow_non_integer)
    else:
        _check_continuous(summary, where)
    _check_empty(adata, summary, where)
    return summary


def check_query_data(
    adata: AnnData, layer: str | None, *, needs_counts: bool, allow_non_integer: bool
) -> MatrixSummary:
    """Check cells that a trained model is asked about; they are not changed.

    Parameters
    ----------
    adata, layer, needs_counts, allow_non_integer
        As in :func:`check_setup_data`.

    Raises
    ------
    TypeError, KeyError, SetupError
        If it is no AnnData, lacks the layer, or holds values that the model cannot take.
    """
    check_anndata(adata, method="adata")
    where = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    summary = scan(matrix_of(adata, layer))
    _check_finite(adata, summary, where)
    if needs_counts:
        with warnings.catch_warnings():
            # Setup has warned of what these say.
            warnings.simplefilter("ignore", DataQualityWarning)
            _check_counts(adata, summary, where, layer, allow_non_integer)
    elif summary.n_non_integer == 0:
        _check_continuous(summary, where)
    return summary


def _check_container(adata: AnnData) -> None:
    """Check all of an AnnData but its values."""
    if adata.is_view:
        raise SetupError(
            "adata is a view of another AnnData, and setup writes to it. Set up a copy: "
            "adata = adata.copy()."
        )
    if 0 in adata.shape:
        raise SetupError(f"adata is empty: shape {adata.shape}, cells x genes.")
    if not adata.var_names.is_unique:
        names = adata.var_names[adata.var_names.duplicated()].unique()
        raise SetupError(
            f"{len(names)} names in adata.var_names are repeated: {name_some(names)}. Make them "
            "unique: adata.var_names_make_unique()."
        )
    ours = "_scvi_uuid" in adata.uns  # a set-up has been here before
    reserved = [] if ours else [
        f"adata.{store}[{key!r}]"
        for store in ("obs", "obsm")
        for key in getattr(adata, store)
        if str(key).startswith(RESERVED)
    ]  # fmt: skip
    if reserved:
        raise SetupError(
            f"{', '.join(reserved[:3])} ({len(reserved)} in all) would be overwritten. "
            "Rename or delete it."
        )
    if not adata.obs_names.is_unique:
        names = adata.obs_names[adata.obs_names.duplicated()].unique()
        _warn(
            f"{len(names)} names in adata.obs_names are repeated: {name_some(names)}. Results "
            "go by position; adata.obs_names_make_unique() makes them unique."
        )


def _check_finite(adata: AnnData, summary: MatrixSummary, where: str) -> None:
    """Check what no model can take."""
    for n, first, what in (
        (summary.n_nan, summary.first_nan, "missing (NaN)"),
        (summary.n_inf, summary.first_inf, "infinite in float32 (above 3.4e38)"),
    ):
        if first is not None:
            raise SetupError(
                f"{where} has {_values(n)} that {_are(n)} {what}, first in "
                f"{_place(adata, first)}. Remove these cells or genes, or fill the values."
            )


def _check_counts(
    adata: AnnData,
    summary: MatrixSummary,
    where: str,
    layer: str | None,
    allow_non_integer: bool,
) -> None:
    """Check that values can be counts."""
    counts_are_there = "counts" in adata.layers and layer != "counts"
    advice = ' Use layer="counts".' if counts_are_there else " Give the layer with raw counts."
    if summary.first_negative is not None:
        n = summary.n_negative
        raise SetupError(
            f"{where} has {_values(n)} that {_are(n)} negative, first in "
            f"{_place(adata, summary.first_negative)}; this model needs counts.{advice}"
        )
    if summary.first_non_integer is not None:
        n = summary.n_non_integer
        found = (
            f"{where} has {_values(n)} that {_are(n)} not an integer, first in "
            f"{_place(adata, summary.first_non_integer)}"
        )
        if not allow_non_integer:
            logged = "; adata.uns['log1p'] says they are logarithms" * ("log1p" in adata.uns)
            raise SetupError(
                f"{found}{logged}; this model needs counts.{advice} Corrected counts, which need "
                "not be integers: allow_non_integer=True."
            )
        _warn(f"{found}; modelled as counts all the same, as allow_non_integer=True asks.")
    if summary.n_above_2_24:
        _warn(
            f"{where} has {_values(summary.n_above_2_24)} above 2**24 (maximum "
            f"{summary.maximum:.0f}), where float32 does not hold every integer. Are they counts?"
        )


def _check_continuous(summary: MatrixSummary, where: str) -> None:
    """Warn if values that should be logarithms look like counts."""
    integers = summary.n_non_integer == 0 and summary.maximum > 1
    if summary.n_negative == 0 and (integers or summary.maximum > LARGEST_LOG):
        _warn(
            f"{where} looks like counts (maximum {summary.maximum:g}); this model is one of "
            "normalised, log-transformed values. Use sc.pp.normalize_total and sc.pp.log1p, or a "
            "model of counts."
        )


def _check_empty(adata: AnnData, summary: MatrixSummary, where: str) -> None:
    """Warn of cells and genes that hold nothing but 0."""
    no_counts = (summary.row_totals == 0) & (summary.minimum >= 0)  # else totals may cancel
    for empty, names, what, remedy in (
        (no_counts, adata.obs_names, "cells", "sc.pp.filter_cells(adata, min_counts=1)"),
        (summary.zero_genes, adata.var_names, "genes", "sc.pp.filter_genes(adata, min_cells=1)"),
    ):
        if empty.any():
            _warn(
                f"{where} has nothing but 0 in {empty.sum()} {what}: {name_some(names[empty])}. "
                f"{remedy} removes them."
            )


def _values(n: int) -> str:
    return f"{n} value{'s' * (n != 1)}"


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _place(adata: AnnData, place: tuple[int, int]) -> str:
    row, column = place
    return f"cell {adata.obs_names[row]!r}, gene {adata.var_names[column]!r}"


def _warn(message: str) -> None:
    warnings.warn(message, DataQualityWarning, stacklevel=6)


def align_genes(
    var_names: Iterable[str], model_var_names: Iterable[str], *, quiet: bool = False
) -> np.ndarray | None:
    """Find the model's genes, by name, among those of the data.

    Parameters
    ----------
    var_names
        Genes of the data, in their order.
    model_var_names
        Genes of the model.
    quiet
        Whether to log nothing, where the caller has been told.

    Returns
    -------
    numpy.ndarray or None
        Column of the data for each gene of the model, ``(n_vars,)``; None if the genes are the
        same in the same order. Another order, or genes to spare, are logged.

    Raises
    ------
    GeneMismatchError
        If a gene of the model is missing from the data, or a name is repeated there.
    """
    data, model = pd.Index(var_names), pd.Index(model_var_names)
    if data.equals(model):
        return None
    repeated = data[data.duplicated()].unique()
    repeated = repeated[repeated.isin(model)]
    if len(repeated):
        raise GeneMismatchError(
            f"{len(repeated)} genes of the model are named more than once in adata.var_names: "
            f"{name_some(repeated, 5)}. Keep one of each."
        )
    columns = pd.Series(np.arange(len(data)), index=data).groupby(level=0, sort=False).first()
    position = columns.reindex(model, fill_value=-1).to_numpy()
    missing = model[position < 0]
    if len(missing):
        raise GeneMismatchError(
            f"{len(missing)} of the model's {len(model)} genes are missing from adata.var_names: "
            f"{name_some(missing, 5)}. The data's genes begin {name_some(data, 3)}. Give data "
            "with the genes the model was trained on, under the same names."
        )
    if quiet:
        return position
    if len(data) > len(model):
        logger.info("Using the model's %d genes of the data's %d.", len(model), len(data))
    else:
        logger.info("Using the data's genes in the order of the model.")
    return position
