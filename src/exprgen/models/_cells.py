"""An AnnData's cells as the module reads them: counts, encoded conditions, library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from exprgen._errors import CovariateError, closest, name_some
from exprgen._matrix import BLOCK_VALUES, as_reader
from exprgen._tables import key_list

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from exprgen.models._means import CodesWithMean

__all__ = ["Cells", "GeneReader", "cell_keys", "library_of", "split_labels"]


class GeneReader:
    """Rows of a matrix with the genes in the model's order.

    Parameters
    ----------
    matrix
        Any matrix form, ``(n_obs, n)``.
    order
        Column of each of the model's genes, ``(n_vars,)``; ``None`` if already in order.
    """

    def __init__(self, matrix: Any, order: np.ndarray | None = None) -> None:
        self._reader = as_reader(matrix)
        self._order = order
        n_vars = self._reader.shape[1] if order is None else len(order)
        self.shape = self._reader.shape[0], n_vars

    @property
    def in_memory(self) -> bool:
        """Whether any row is as near as any other."""
        return self._reader.in_memory

    def held(self, index: np.ndarray) -> GeneReader:
        """Some rows in memory; ``index`` increases."""
        return GeneReader(self._reader.held(index), self._order)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Dense rows in the order asked for, ``(len(index), n_vars)`` float32."""
        rows = self._reader.rows(index)
        return rows if self._order is None else np.ascontiguousarray(rows[:, self._order])

    def totals(self, block: int = 4096) -> np.ndarray:
        """Row sums over the model's genes, ``(n_obs,)`` float64."""
        block = max(1, min(block, BLOCK_VALUES // max(self._reader.shape[1], 1)))
        starts = range(0, self.shape[0], block)
        index = np.arange(self.shape[0])
        sums = [self.rows(index[i : i + block]).sum(1, dtype=np.float64) for i in starts]
        return np.concatenate(sums) if sums else np.zeros(0)


@dataclass(frozen=True)
class Cells:
    """Some of an AnnData's cells, checked and encoded.

    ``given`` is what the caller gave, ``adata`` that, or the modality of it that is modelled.
    ``rows`` ``(n,)`` are their positions in ``adata``; ``codes`` ``(n, width)`` and ``library``
    ``(n,)`` are theirs.
    """

    given: AnnData | MuData
    adata: AnnData
    reader: GeneReader
    rows: np.ndarray
    codes: np.ndarray | CodesWithMean
    library: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def tensors(self, part: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, encoded conditions and library of some of the cells."""
        x = torch.from_numpy(self.reader.rows(self.rows[part]))
        c = torch.from_numpy(self.codes[part])
        library = torch.from_numpy(self.library[part]).float()
        return x.to(device), c.to(device), library.to(device)


def library_of(adata: AnnData, size_factor_key: str | None, totals: np.ndarray) -> np.ndarray:
    """Depth of each cell, ``(n_obs,)`` float64: the size factors where given, or the totals.

    Raises
    ------
    TypeError, KeyError
        If the key is no str, or the column missing.
    CovariateError
        If a size factor is not a positive, finite number.
    """
    if not key_list(size_factor_key, "size_factor_key", many=False):
        return np.asarray(totals, dtype=np.float64)
    if size_factor_key not in adata.obs:
        raise KeyError(
            f"size_factor_key={size_factor_key!r} is no column of obs."
            f"{closest(size_factor_key, adata.obs.columns)}"
        )
    values = pd.to_numeric(adata.obs[size_factor_key], errors="coerce").to_numpy(np.float64)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        raise CovariateError(
            f"obs[{size_factor_key!r}] (size_factor_key) must be positive and finite; it is not "
            f"in {bad.sum()} cells: {name_some(adata.obs_names[bad])}. Remove these cells or "
            "mend the values."
        )
    return values


def cell_keys(adata: AnnData, reader: GeneReader) -> np.ndarray:
    """A 64-bit key of each cell from its name and total, ``(n_obs,)``.

    Barcodes repeat between experiments, totals hardly do at the same barcode: together they say
    whether a cell was trained on, without keeping its name.
    """
    # Rounded, because the order of genes changes the last digits of a sum of fractions.
    totals = reader.totals().astype(np.float32)
    names = pd.util.hash_array(adata.obs_names.to_numpy(dtype=object))
    return names ^ pd.util.hash_array(totals)


def split_labels(keys: np.ndarray, known: dict[str, np.ndarray]) -> pd.Categorical:
    """Whether each cell was trained on, validated on, or is new to the model."""
    labels = np.full(len(keys), "new", dtype=object)
    for name, members in known.items():
        labels[np.isin(keys, members)] = name
    return pd.Categorical(labels, categories=["train", "validation", "new"])
