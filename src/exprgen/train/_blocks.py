"""Shuffled batches of cells that lie in a file, which is fast only at reading neighbours.

An epoch goes through all training cells once. Blocks of 512 neighbouring rows come in a random
order; the cells of some 32 blocks, the window, are shuffled and make up batches, while the next
window is read. A batch so mixes cells of 32 places in the file, wherever those of one type or
donor lie together. The order is a function of the seed and the number of the epoch alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from exprgen.train._data import CellDataset

__all__ = ["WINDOW", "BlockLoader", "Shuffle", "some_of"]

BLOCK = 512
WINDOW = 32 * BLOCK
N_VALIDATED = 20_000

# Streams of random numbers under one seed.
_ORDER, _VALIDATED = range(2)


class Shuffle:
    """The order in which an epoch goes through rows of a file.

    Parameters
    ----------
    rows
        Row numbers of the training cells, increasing.
    batch_size
        Cells per step.
    seed
        With the number of the epoch it decides the order.
    rank, n_ranks
        Which of several processes this is. Each has its share of the rows, all have as many
        steps: a few rows come twice where the shares are not equal.
    """

    def __init__(
        self, rows: np.ndarray, batch_size: int, seed: int, rank: int = 0, n_ranks: int = 1
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.n_ranks = n_ranks
        self.epoch = 0
        # Whole batches, so that none needs cells of two windows.
        self._window = max(1, WINDOW // batch_size) * batch_size

    @property
    def n_rows(self) -> int:
        """Rows of this process in an epoch."""
        return -(-len(self.rows) // self.n_ranks)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Lightning does."""
        self.epoch = epoch

    def windows(self) -> list[np.ndarray]:
        """Row numbers of this epoch in their order, cut into windows."""
        rng = _rng(self.seed, _ORDER, self.epoch)
        blocks = np.split(self.rows, np.flatnonzero(np.diff(self.rows // BLOCK)) + 1)
        order = np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])
        start = self.rank * self.n_rows
        mine = np.resize(order, self.n_ranks * self.n_rows)[start : start + self.n_rows]
        return [
            rng.permutation(mine[start : start + self._window])
            for start in range(0, len(mine), self._window)
        ]


class BlockLoader:
    """Batches of training cells from a file.

    Parameters
    ----------
    dataset
        All cells.
    sampler
        Their order; a data loader's sampler is what Lightning tells the number of the epoch.
    """

    def __init__(self, dataset: CellDataset, sampler: Shuffle) -> None:
        self.dataset = dataset
        self.sampler = sampler

    def __len__(self) -> int:
        return -(-self.sampler.n_rows // self.sampler.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = self.sampler.batch_size
        with ThreadPoolExecutor(1, thread_name_prefix="cells") as pool:
            windows = self.sampler.windows()
            # One window ahead, and no more.
            coming = pool.submit(self._read, windows[0])
            for following in [*windows[1:], None]:
                cells, order = coming.result()
                if following is not None:
                    coming = pool.submit(self._read, following)
                for start in range(0, len(order), size):
                    yield cells[order[start : start + size]]

    def _read(self, window: np.ndarray) -> tuple[CellDataset, np.ndarray]:
        """The cells of a window in memory, and their order."""
        rows, order = np.unique(window, return_inverse=True)
        return self.dataset.held(rows), order


def some_of(rows: np.ndarray, seed: int) -> np.ndarray:
    """Validation cells to hold in memory: all, or 20,000 at random, increasing."""
    if len(rows) <= N_VALIDATED:
        return rows
    return np.sort(_rng(seed, _VALIDATED).choice(rows, N_VALIDATED, replace=False))


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
