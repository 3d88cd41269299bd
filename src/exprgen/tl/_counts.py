"""Counts of several AnnData objects on one list of genes: what every comparison begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from exprgen._errors import GeneMismatchError, name_some
from exprgen._matrix import as_reader
from exprgen._tables import key_list

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["gene_positions", "read_counts"]


def read_counts(adata: AnnData, layer: str | None, *, name: str) -> sp.csr_matrix:
    """Counts as CSR float32, shape ``(n_obs, n_vars)``; refuses what cannot be counts.

    Of an object that is open in a file, they are read into memory.

    Raises
    ------
    TypeError
        The layer is no name.
    KeyError
        It is missing.
    ValueError
        Values are negative, not finite or not whole numbers.
    """
    key_list(layer, "layer", many=False)
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"{name} has no layer {layer!r}; its layers are {sorted(filter(None, adata.layers))}. "
            "Name the layer with counts, or layer=None for .X."
        )
    values = adata.X if layer is None else adata.layers[layer]
    if values is None:
        raise KeyError(f"{name} has no .X; name the layer with counts as layer=.")
    if not (sp.issparse(values) or isinstance(values, np.ndarray)) and adata.n_obs:
        values = as_reader(values).block(0, adata.n_obs)
    counts = sp.csr_matrix(values, dtype=np.float32)
    bad = ~np.isfinite(counts.data) | (counts.data < 0) | (counts.data != np.rint(counts.data))
    if bad.any():
        where = ".X" if layer is None else f".layers[{layer!r}]"
        raise ValueError(
            f"{name}{where} does not hold counts: {int(bad.sum())} values are negative, not "
            f"finite or not whole numbers (first: {counts.data[bad][0]:g}). "
            "Name the layer with raw counts as layer=."
        )
    return counts


def gene_positions(genes: pd.Index, wanted: pd.Index, *, name: str, exact: bool) -> np.ndarray:
    """Where each of the ``wanted`` genes stands among ``genes``, shape ``(len(wanted),)``.

    Raises
    ------
    GeneMismatchError
        A name occurs twice, a wanted gene is missing, or (``exact``) there are others.
    """
    for index, owner in ((genes, name), (wanted, "the other side")):
        if not index.is_unique:
            twice = index[index.duplicated()].unique()
            raise GeneMismatchError(
                f"Gene names of {owner} are not unique: {name_some(twice)}. "
                "Call .var_names_make_unique() on both sides first."
            )
    missing = wanted.difference(genes, sort=False)
    extra = genes.difference(wanted, sort=False) if exact else genes[:0]
    if len(missing) or len(extra):
        parts = [f"lacks {name_some(missing)}"] if len(missing) else []
        parts += [f"has besides them {name_some(extra)}"] if len(extra) else []
        raise GeneMismatchError(
            f"Genes differ: of {len(wanted)} genes, {name} {' and '.join(parts)}. "
            "Subset both sides to the same genes by name."
        )
    return genes.get_indexer(wanted)
