"""Results per gene in the layout of :func:`scanpy.tl.rank_genes_groups`.

A table with a row per group and gene becomes record arrays with a field per group, genes by
decreasing score, which :func:`scanpy.get.rank_genes_groups_df` and scanpy's plots read; columns
that scanpy does not know are kept beside them in the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen._slots import check_key
from exprgen._validate import check_anndata

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["check_ranked_key", "signed_scores", "store_ranked"]


def signed_scores(p_values: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Standard normal values whose two-sided p-values these are, ``(n,)``."""
    from scipy.special import ndtri

    return np.where(positive, 1.0, -1.0) * -ndtri(p_values / 2)


def check_ranked_key(adata: AnnData, key: str | None, method: str) -> None:
    """Refuse, before anything is computed, what could not be written or is someone else's.

    Raises
    ------
    TypeError
        If ``adata`` is no AnnData.
    ValueError
        If it is a view, or ``uns[key]`` holds something that ``method`` did not write.
    """
    check_anndata(adata, method="adata=")
    if key is None:
        return
    check_key(key)
    if adata.is_view:
        raise ValueError(
            "adata is a view, whose .uns cannot be written to; pass adata.copy(), or "
            "key_added=None."
        )
    entry = adata.uns.get(key, {})
    params = entry.get("params") if isinstance(entry, Mapping) else None
    ours = isinstance(params, Mapping) and params.get("method") == method
    if key in adata.uns and not ours:
        raise ValueError(
            f"adata.uns[{key!r}] is taken, and not by results of {method}. Choose another "
            "key_added=...."
        )


def store_ranked(adata: AnnData, key: str, table: pd.DataFrame, params: Mapping[str, Any]) -> None:
    """Write a table with columns ``group``, ``names``, ``scores`` ... to ``uns[key]``.

    Every group has the same number of genes, in the order in which they are to be.
    """
    of_group = dict(list(table.groupby("group", sort=False)))
    n_genes = len(table) // len(of_group)
    entry: dict[str, Any] = {"params": dict(params)}
    for column in table.columns.drop("group"):
        values = table[column].to_numpy()
        kind = object if values.dtype.kind in "OUT" else values.dtype
        records = np.empty(n_genes, dtype=[(str(group), kind) for group in of_group])
        for group, part in of_group.items():
            records[str(group)] = part[column].to_numpy()
        entry[column] = records
    adata.uns[key] = entry
