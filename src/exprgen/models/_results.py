"""Statistics of rows x genes as they come, one law after the other: in memory, or in a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen import _slots
from exprgen._random import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from exprgen._stores import CellStore

__all__ = ["InMemory", "InStore"]

# Of one statistic, to be kept until they are written: 16 MiB.
_PENDING_VALUES = 2**22


class InMemory:
    """Arrays ``(n_rows, n_genes)``, float32, by name."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self.arrays: dict[str, Any] = {}

    def add(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Take in ``(n_genes,)`` statistics that some rows share."""
        for name, value in values.items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((self.n_rows, len(value)), np.float32)
            self.arrays[name][rows] = value

    def close(self) -> Mapping[str, Any]:
        """All arrays, complete."""
        return self.arrays


class InStore(InMemory):
    """The same as layers of a store.

    Some laws are kept until they are written, each block of rows once for them all. Where every
    law is of few neighbouring rows, or there are few laws, a block is written about once.
    """

    def __init__(self, n_rows: int, store: CellStore, key: str) -> None:
        super().__init__(n_rows)
        self.store = store
        self.key = key
        self._pending: list[tuple[np.ndarray, Mapping[str, np.ndarray]]] = []

    def add(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Take in ``(n_genes,)`` statistics that some rows share."""
        self._pending.append((rows, {k: v.astype(np.float32) for k, v in values.items()}))
        n_genes = max(1, len(next(iter(values.values()))))
        if len(self._pending) >= min(BLOCK_SIZE, max(1, _PENDING_VALUES // n_genes)):
            self._flush()

    def close(self) -> Mapping[str, Any]:
        """All arrays, complete."""
        self._flush()
        return self.arrays

    def _flush(self) -> None:
        if not self._pending:
            return
        groups, laws = zip(*self._pending, strict=True)
        self._pending.clear()
        rows = np.concatenate(groups)
        law = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        order = np.argsort(rows)
        blocks = np.flatnonzero(np.diff(rows[order] // BLOCK_SIZE)) + 1
        for name in laws[0]:
            values = np.stack([slots[name] for slots in laws])
            _slots.check_values(name, values, values.shape)
            if name not in self.arrays:
                shape = self.n_rows, values.shape[1]
                self.arrays[name] = self.store.dense(f"layers/{self.key}_{name}", shape)
            for part in np.split(order, blocks):
                start = rows[part[0]] // BLOCK_SIZE * BLOCK_SIZE
                place = slice(start, min(start + BLOCK_SIZE, self.n_rows))
                block = self.arrays[name][place]
                block[rows[part] - start] = values[law[part]]
                self.arrays[name][place] = block
