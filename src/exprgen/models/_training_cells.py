"""Which cells a model is trained and validated on, and how they are read."""

from __future__ import annotations

import math

import numpy as np

from exprgen import _arguments
from exprgen._errors import closest
from exprgen.models._cells import cell_keys, split_labels
from exprgen.models._core import ModelCore
from exprgen.models._fields import check_unchanged
from exprgen.models._mudata import own_name
from exprgen.train import WINDOW, CellDataset

__all__ = ["TrainingCellsMixin"]


class TrainingCellsMixin(ModelCore):
    """The cells of a run of training."""

    def _training_cells(self) -> tuple[CellDataset, np.ndarray]:
        """All registered cells, checked to be what setup saw, and their keys."""
        size_factor_key = self._setup_args["size_factor_key"]
        check_unchanged(
            self.schema,
            self._setup_state["digests"],
            self._readable(self.adata),
            size_factor_key,
            self.registry_["setup_method_name"],
        )
        cells = self._cells(None, training=True)
        dataset = CellDataset(cells.reader, cells.codes, cells.library)
        if not dataset.in_memory:
            if len(dataset) <= WINDOW:
                dataset = dataset.held(np.arange(len(dataset)))
            elif self._holds_all_genes:
                raise ValueError(
                    f"This {type(self).__name__} holds all genes of all {len(dataset)} cells in "
                    "memory while it is trained, but they lie in a file: set up and train it on "
                    "adata.to_memory(), or use a model of the counts."
                )
        return dataset, cell_keys(cells.adata, dataset.reader)

    @property
    def _holds_all_genes(self) -> bool:
        """Whether training needs all cells x genes at once: in gene space scores of all."""
        return not self.module.space.is_learned

    def _split_taken_over(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the cells that the autoencoder was trained and validated on."""
        labels = split_labels(keys, self.cell_keys_)
        train, validation = (np.flatnonzero(labels == name) for name in ("train", "validation"))
        if len(train) != len(self.cell_keys_["train"]):
            raise ValueError(
                "This model's autoencoder was taken over trained, and these are not the cells "
                f"that it was trained on: {len(train)} of {len(self.cell_keys_['train'])} are "
                "among them. Train an exprgen.NBVAE on these cells, and take it over by "
                "from_autoencoder()."
            )
        return train, validation

    def _split(
        self, train_size: float, validation_size: float | None, split_key: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of training and validation cells."""
        adata = self._readable(self.adata, *([] if split_key is None else [split_key]))
        n_obs = adata.n_obs
        if split_key is not None:
            name = own_name(split_key, self.registry_["setup_args"])
            if name not in list(adata.obs):
                hint = closest(split_key, adata.obs.columns)
                raise KeyError(f"split_key={split_key!r} is no column of obs.{hint}")
            labels = adata.obs[name].astype(str).to_numpy()
            train, validation = (np.flatnonzero(labels == k) for k in ("train", "validation"))
            if len(train) == 0:
                raise ValueError(
                    f"obs[{split_key!r}] (split_key) has no cell labelled 'train'; its labels "
                    f"are {sorted(set(labels))[:5]}."
                )
            return train, validation
        for name, value in (("train_size", train_size), ("validation_size", validation_size)):
            if value is None:
                continue
            _arguments.check_number(value, name, "[0, 1]")
        if validation_size is None:
            validation_size = 1 - train_size
        if train_size == 0 or train_size + validation_size > 1 + 1e-9:
            raise ValueError(
                "train_size must be positive and train_size + validation_size at most 1, got "
                f"{train_size} and {validation_size}."
            )
        order = np.random.default_rng(self.seed_).permutation(n_obs)
        n_validation = math.floor(n_obs * validation_size + 1e-9)
        n_train = min(math.ceil(n_obs * train_size - 1e-9), n_obs - n_validation)
        return np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_validation])

    def _fitted_rows(self, train_idx: np.ndarray, val_idx: np.ndarray) -> np.ndarray:
        """Row numbers of the cells that a space and a mean are fitted to."""
        return train_idx

    def _with_training_means(
        self, dataset: CellDataset, fitted: np.ndarray, val_idx: np.ndarray
    ) -> CellDataset:
        """The cells, with what is known of their mean where a model has a predictor."""
        return dataset
