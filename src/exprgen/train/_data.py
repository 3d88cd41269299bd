"""Which cells a step sees: batches of expression, or of what an encoder made of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler

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
        Has ``rows(index) -> (n, n_vars) float32`` and ``shape``.
    conditions
        Encoded conditions, ``(n_obs, width)``, read by row numbers.
    library
        Totals of the counts, or the size factors, ``(n_obs,)``.
    """

    def __init__(self, reader: Any, conditions: Any, library: Any) -> None:
        self.reader = reader
        self.conditions = conditions
        self.library = torch.from_numpy(np.ascontiguousarray(library, dtype=np.float32))

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

    Parameters
    ----------
    dataset
        All cells.
    train_idx, val_idx
        Row numbers of the training and the validation cells.
    batch_size
        Cells per step.
    """

    def __init__(
        self,
        dataset: CellDataset | EncodedDataset,
        train_idx: np.ndarray,
        val_idx: np.ndarray,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.train_idx = train_idx
        self.val_idx = val_idx
        self.test_idx = np.setdiff1d(np.arange(len(dataset)), np.r_[train_idx, val_idx])
        self.batch_size = batch_size

    @property
    def n_train(self) -> int:
        """Number of training cells."""
        return len(self.train_idx)

    @property
    def n_val(self) -> int:
        """Number of validation cells."""
        return len(self.val_idx)

    def _loader(self, rows: Iterable[int]) -> DataLoader:
        batches = BatchSampler(rows, self.batch_size, drop_last=False)
        # Without a batch size of its own the loader hands whole batches of rows to the dataset.
        return DataLoader(self.dataset, sampler=batches, batch_size=None)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of training cells."""
        return self._loader(SubsetRandomSampler(self.train_idx.tolist()))

    def val_dataloader(self) -> DataLoader | list:
        """Batches of validation cells in a fixed order."""
        return self._loader(self.val_idx.tolist()) if self.n_val else []


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
        parts = []
        for start in range(0, len(cells), block):
            batch = cells[np.arange(start, min(start + block, len(cells)))]
            x, c, library = (batch[key].to(device) for key in ("x", "c", "library"))
            parts.append((*space.encode(x, c, library), space.density_features(c)))
        tensors = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        self.mean, self.sd, self.features = tensors

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: list[int] | np.ndarray) -> dict[str, Tensor]:
        return {"mean": self.mean[index], "sd": self.sd[index], "features": self.features[index]}
