"""Which cells a step sees: batches of expression, or of what an encoder made of it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler

from exprgen.train._blocks import BlockLoader, Shuffle, some_of
from exprgen.train._processes import SharedBatches

if TYPE_CHECKING:
    from collections.abc import Iterable

    from exprgen.spaces import Space

__all__ = [
    "CellDataModule",
    "CellDataset",
    "EncodedDataset",
    "default_batch_size",
    "default_density_epochs",
    "default_max_epochs",
]

# Fewer teach the mean of every label, but not how genes vary together within it.
_N_STEPS = 750
_N_DENSITY_STEPS = 1000
# Effects on single genes overfit sooner.
_N_GENE_STEPS = 400


def default_batch_size(n_train: int) -> int:
    """128 cells per step, or fewer for an epoch to have eight steps, but at least 32."""
    return min(128, max(32, n_train // 8))


def default_max_epochs(n_train: int) -> int:
    """What 750 steps take, and at 10,000 cells 40 epochs; fewer beyond.

    In between epochs grow with the logarithm of the number of cells, from 10,000 on they fall with
    its root.
    """
    if n_train > 10_000:
        return max(4, math.ceil(40 * math.sqrt(10_000 / n_train)))
    n_batches = math.ceil(n_train / default_batch_size(n_train))
    return max(math.ceil(_N_STEPS / n_batches), 40 + round(15 * math.log10(n_train / 10_000)))


def default_density_epochs(n_train: int, batch_size: int, in_genes: bool = False) -> int:
    """As many as 1,000 steps take, in gene space 400, or two where that is less."""
    n_steps = _N_GENE_STEPS if in_genes else _N_DENSITY_STEPS
    return max(2, math.ceil(n_steps / math.ceil(n_train / batch_size)))


class CellDataset(Dataset):
    """Batches of cells by their row numbers, read from any matrix form.

    Parameters
    ----------
    reader
        Has ``rows(index) -> (n, n_vars) float32``, ``shape``, ``in_memory``, and where that is
        False ``held(index)``, a reader of some rows that is in memory.
    conditions
        Encoded conditions, ``(n_obs, width)``, read by row numbers.
    library
        Totals of the counts, or the size factors, ``(n_obs,)``.
    """

    def __init__(self, reader: Any, conditions: Any, library: Any) -> None:
        self.reader = reader
        self.conditions = conditions
        self.library = torch.from_numpy(np.ascontiguousarray(library, dtype=np.float32))

    @property
    def in_memory(self) -> bool:
        """Whether any cell is as near as any other."""
        return self.reader.in_memory

    def held(self, rows: np.ndarray) -> CellDataset:
        """Some of the cells, in memory; ``rows`` increase."""
        return CellDataset(self.reader.held(rows), self.conditions[rows], self.library[rows])

    def __len__(self) -> int:
        return len(self.library)

    def __getitem__(self, index: list[int] | np.ndarray) -> dict[str, Tensor]:
        rows = np.asarray(index)
        return {
            "x": torch.from_numpy(self.reader.rows(rows)),
            "c": torch.from_numpy(np.ascontiguousarray(self.conditions[rows], np.float32)),
            "library": self.library[rows],
        }


class CellDataModule(LightningDataModule):
    """Training and validation batches over one fixed split.

    Training cells that are in memory are shuffled one by one, those in a file as
    :class:`BlockLoader` says. Of many validation cells in a file some are validated on, always
    the same, which are held in memory.

    Parameters
    ----------
    dataset
        All cells.
    train_idx, val_idx
        Row numbers of the training and the validation cells.
    batch_size
        Cells per step, of all processes together.
    seed
        Of the order of cells in a file, and of any where there are several processes.
    """

    def __init__(
        self,
        dataset: CellDataset | EncodedDataset,
        train_idx: np.ndarray,
        val_idx: np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.train_idx = train_idx
        self.val_idx = val_idx
        self.test_idx = np.setdiff1d(np.arange(len(dataset)), np.r_[train_idx, val_idx])
        self.batch_size = batch_size
        self.seed = seed

    @property
    def n_train(self) -> int:
        """Number of training cells."""
        return len(self.train_idx)

    @property
    def n_val(self) -> int:
        """Number of validation cells."""
        return len(self.val_idx)

    def train_dataloader(self) -> DataLoader | BlockLoader:
        """Shuffled batches of training cells."""
        rank, n_ranks = self._place
        if self._in_file is not None:
            batch_size = math.ceil(self.batch_size / n_ranks)
            shuffle = Shuffle(self.train_idx, batch_size, self.seed, rank, n_ranks)
            return BlockLoader(self._in_file, shuffle)
        if n_ranks > 1:
            return self._loader(self.dataset, self._shared(self.train_idx, self.seed))
        rows = SubsetRandomSampler(self.train_idx.tolist())
        return self._loader(self.dataset, BatchSampler(rows, self.batch_size, drop_last=False))

    def val_dataloader(self) -> DataLoader | list:
        """Batches of validation cells in a fixed order."""
        if not self.n_val:
            return []
        held = self._held
        rows = self.val_idx if held is None else np.arange(len(held))
        return self._loader(self.dataset if held is None else held, self._shared(rows))

    @property
    def _place(self) -> tuple[int, int]:
        """Which of how many processes this is."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _shared(self, rows: np.ndarray, seed: int | None = None) -> SharedBatches:
        return SharedBatches(rows, self.batch_size, *self._place, seed)

    def _loader(self, dataset: Dataset, batches: Iterable[Any]) -> DataLoader:
        # Without a batch size of its own the loader hands whole batches of rows to the dataset.
        return DataLoader(dataset, sampler=batches, batch_size=None)

    @property
    def _in_file(self) -> CellDataset | None:
        """The cells, if they are not in memory."""
        cells = self.dataset
        return cells if isinstance(cells, CellDataset) and not cells.in_memory else None

    @cached_property
    def _held(self) -> CellDataset | None:
        """What is validated on, of cells that are not in memory."""
        return self._in_file and self._in_file.held(some_of(self.val_idx, self.seed))


class EncodedDataset(Dataset):
    """Batches of the latent state that an encoder sees in cells, and of their conditions.

    Parameters
    ----------
    cells
        All cells.
    space
        Its encoder is applied once; in evaluation mode.
    device
        Where the space is.
    """

    @torch.no_grad()
    def __init__(
        self, cells: CellDataset, space: Space, device: torch.device, block: int = 512
    ) -> None:
        tensors: list[Tensor] = []
        for start in range(0, len(cells), block):
            rows = np.arange(start, min(start + block, len(cells)))
            batch = cells[rows]
            x, c, library = (batch[key].to(device) for key in ("x", "c", "library"))
            parts = (*space.encode(x, c, library), space.density_features(c))
            # Filled rather than collected, as the moments are.
            tensors = tensors or [torch.empty(len(cells), part.shape[1]) for part in parts]
            for tensor, part in zip(tensors, parts, strict=True):
                tensor[rows] = part.cpu()
        self.mean, self.sd, self.features = tensors

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: list[int] | np.ndarray) -> dict[str, Tensor]:
        return {"mean": self.mean[index], "sd": self.sd[index], "features": self.features[index]}
