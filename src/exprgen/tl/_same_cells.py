"""Cells that are the same: of one name, and of the same values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from exprgen.models._cells import GeneReader

__all__ = ["repeated_cells", "shared_cells"]


def shared_cells(
    keys: tuple[np.ndarray, np.ndarray], readers: tuple[GeneReader, GeneReader]
) -> list[int]:
    """Positions of the cells of the first that are also in the second.

    Parameters
    ----------
    keys
        Of the cells of either, see :func:`exprgen.models._cells.cell_keys`.
    readers
        Their values.
    """
    places = dict(zip(keys[1].tolist(), range(len(keys[1])), strict=True))
    pairs = [(int(i), places[int(keys[0][i])]) for i in np.flatnonzero(np.isin(*keys))]
    return [i for i, j in pairs if _equal(readers, i, j)]


def repeated_cells(keys: np.ndarray, reader: GeneReader) -> list[int]:
    """Positions of cells that stand further up as well."""
    first: dict[int, int] = {}
    pairs = [(i, first.setdefault(key, i)) for i, key in enumerate(keys.tolist())]
    return [i for i, j in pairs if i != j and _equal((reader, reader), i, j)]


def _equal(readers: tuple[GeneReader, GeneReader], i: int, j: int) -> bool:
    return np.array_equal(readers[0].rows(np.array([i])), readers[1].rows(np.array([j])))
