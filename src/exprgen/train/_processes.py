"""Several processes as one: each has its part of every batch, and all do the same run.

Lightning averages the gradients over processes (distributed data parallel), which start with the
same weights and so keep them. Processes are started by running the script again, so that all else
is done by each of them, and must come out alike: the cells, their split, what is fitted to them in
closed form. Only noise is each process's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from exprgen._random import generator
from exprgen.train._checkpoint import digest_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SameRun", "SharedBatches"]


class SharedBatches:
    """Row numbers of one process's part of each batch, for cells in memory.

    There are as many batches as in a single process, of as many cells between all processes.

    Parameters
    ----------
    rows
        Row numbers of all cells.
    batch_size
        Cells per step, of all processes together.
    rank, n_ranks
        Which of the processes this is. Of a batch of fewer cells than processes some have the
        first cell as well.
    seed
        With the number of the epoch it decides the order; ``None`` is that of ``rows``.
    """

    def __init__(
        self, rows: np.ndarray, batch_size: int, rank: int, n_ranks: int, seed: int | None = None
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.rank = rank
        self.n_ranks = n_ranks
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Lightning does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        rows = self.rows
        if self.seed is not None:
            order = torch.randperm(len(rows), generator=generator(self.seed, self.epoch))
            rows = rows[order.numpy()]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            part = batch[self.rank :: self.n_ranks]
            yield part if len(part) else batch[:1]


class SameRun(Callback):
    """Refuse to train if the processes differ in what they are about to do.

    Parameters
    ----------
    run
        What the run is, by the names that an error has for it.
    conditions
        Encoded conditions, with what is known of the mean, ``(n_obs, width)``, by row numbers.
    """

    def __init__(self, run: dict[str, Any], conditions: Any) -> None:
        self.run = run
        self.conditions = conditions

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare; all processes refuse, or none."""
        if trainer.world_size == 1:
            return
        mine = {**self.run, "means": digest_rows(self.conditions)}
        runs: list[dict[str, Any]] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(runs, mine)
        first, *others = runs
        differ = [
            f"{name} ({first[name]!r} and {other[name]!r})"
            for name in first
            for other in others[:]
            if other[name] != first[name]
        ]
        if differ:
            raise ValueError(
                f"The {len(runs)} processes of this run differ in {', '.join(differ)}. Each of "
                "them runs the script from its beginning: give the model a seed, "
                f"{self.run['model']}(adata, seed=0), and let nothing before train() be random."
            )
