"""Training: the plan (what a step does), the data (which cells a step sees), the best weights.

The plan follows scvi-tools' :class:`~scvi.train.TrainingPlan` with what count models were
measured to need: AdamW whose rates differ by role (the dispersion and the density converge too
slowly at the networks' rate), one cycle of the learning rate, a KL warm-up that is a fraction of
the run, validation with fixed noise, and sums that are logged once per epoch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from scvi.train import TrainingPlan
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler

from exprgen._arguments import check_number
from exprgen._errors import TrainingDivergedError
from exprgen._random import generator

if TYPE_CHECKING:
    from collections.abc import Iterable

    from exprgen.module import ExpressionModule

__all__ = [
    "MONITOR",
    "CellDataModule",
    "CellDataset",
    "GenerativeTrainingPlan",
    "KeepBestWeights",
    "check_plan",
    "default_batch_size",
    "default_max_epochs",
]

MONITOR = "elbo_validation"
"""The quantity that early stopping and the choice of the best weights watch (lower is better)."""


def default_batch_size(n_train: int) -> int:
    """128 cells per step, or fewer for an epoch to have eight steps, but at least 32."""
    return min(128, max(32, n_train // 8))


def default_max_epochs(n_train: int) -> int:
    """25 epochs to 1,000 cells, growing with their logarithm to 40 at 10,000, then falling.

    More would overfit the smaller sets, and stopping them early takes weights from before the
    learning rate has come down. From 10,000 cells on epochs fall with the root of their number.
    """
    if n_train <= 10_000:
        return 25 + round(15 * max(0.0, math.log10(n_train / 1_000)))
    return max(4, math.ceil(40 * math.sqrt(10_000 / n_train)))


class CellDataset(Dataset):
    """Batches of cells by their row numbers, read from any matrix form.

    Parameters
    ----------
    reader
        Has ``rows(index) -> (n, n_vars) float32`` and ``shape``.
    conditions
        Encoded conditions, ``(n_obs, width)`` float32.
    library
        Totals of the counts, or the size factors, ``(n_obs,)``.
    """

    def __init__(self, reader: Any, conditions: np.ndarray, library: np.ndarray) -> None:
        self.reader = reader
        self.conditions = torch.from_numpy(np.ascontiguousarray(conditions, dtype=np.float32))
        self.library = torch.from_numpy(np.ascontiguousarray(library, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.library)

    def __getitem__(self, index: list[int] | np.ndarray) -> dict[str, Tensor]:
        rows = np.asarray(index)
        return {
            "x": torch.from_numpy(self.reader.rows(rows)),
            "c": self.conditions[rows],
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
        self, dataset: CellDataset, train_idx: np.ndarray, val_idx: np.ndarray, batch_size: int
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


class KeepBestWeights(Callback):
    """Remember the weights of the best validation epoch and put them back at the end."""

    def __init__(self) -> None:
        self.best = math.inf
        self.best_epoch: int | None = None
        self._weights: dict[str, Tensor] | None = None

    def restore(self, module: torch.nn.Module) -> bool:
        """Load the best weights, or those of the start; say whether an epoch was finished."""
        if self._weights is not None:
            module.load_state_dict(self._weights)
        return self.best_epoch is not None

    def _keep(self, module: torch.nn.Module) -> None:
        self._weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what there is, so that a run that diverges at once can be tried again."""
        self._keep(pl_module.module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's weights if its validation is the best so far.

        This hook runs after the validation loop. Without validation the last epoch is the best.
        """
        value = float(trainer.callback_metrics.get(MONITOR, -trainer.current_epoch))
        if value < self.best:
            self.best, self.best_epoch = value, trainer.current_epoch
            self._keep(pl_module.module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back."""
        self.restore(pl_module.module)


_INTERVALS = {"lr": "(0, inf)", "kl_warmup": "[0, 1]", "lr_warmup": "[0, 1]"}
"""Of the plan's numbers; the others lie in [0, inf)."""


def check_plan(**numbers: Any) -> None:
    """Refuse numbers that no :class:`GenerativeTrainingPlan` can train with.

    Raises
    ------
    TypeError, ValueError
        If one is no number, not finite, or outside its range.
    """
    for name, value in numbers.items():
        check_number(value, f"plan_kwargs[{name!r}]", _INTERVALS.get(name, "[0, inf)"))


class GenerativeTrainingPlan(TrainingPlan):
    """One stage of training a density and its space together.

    Parameters
    ----------
    module
        The module to train.
    n_obs_training
        Training cells, for the terms of the loss that belong to all of them.
    lr
        Largest learning rate of the networks.
    density_lr_factor, dispersion_lr_factor, donor_lr_factor, offset_lr_factor
        Rates of the density, of the likelihood's own parameters, and of the effects of donors, of
        conditions and batch, as multiples of ``lr``: each has its own scale and is slow to
        converge at the networks' rate.
    weight_decay
        AdamW's, on weight matrices of the networks only.
    kl_warmup
        Fraction of the steps over which the weight of the KL term grows from 0 to 1.
    beta
        Final weight of the KL divergence of the latent state :cite:p:`higgins2017`: above 1 the
        state holds less of the data, below 1 more. What is logged, and what the best epoch is
        chosen by, is the ELBO itself, in which it weighs 1.
    lr_warmup
        Fraction of the steps over which the learning rate grows to ``lr``, before it falls to 0.
    seed
        Of the fixed validation noise.

    Raises
    ------
    TypeError, ValueError
        If a number is none, not finite, or outside its range.
    """

    module: ExpressionModule

    def __init__(
        self,
        module: ExpressionModule,
        *,
        n_obs_training: int,
        lr: float = 2e-3,
        density_lr_factor: float = 5.0,
        dispersion_lr_factor: float = 20.0,
        donor_lr_factor: float = 10.0,
        offset_lr_factor: float = 5.0,
        weight_decay: float = 1e-4,
        kl_warmup: float = 0.2,
        beta: float = 1.0,
        lr_warmup: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_plan(
            lr=lr,
            density_lr_factor=density_lr_factor,
            dispersion_lr_factor=dispersion_lr_factor,
            donor_lr_factor=donor_lr_factor,
            offset_lr_factor=offset_lr_factor,
            weight_decay=weight_decay,
            kl_warmup=kl_warmup,
            beta=beta,
            lr_warmup=lr_warmup,
        )
        self.kl_warmup, self.beta = kl_warmup, beta
        super().__init__(module, optimizer="AdamW", lr=lr, eps=1e-8, weight_decay=weight_decay)
        self.n_cells = n_obs_training
        self.density_lr_factor = density_lr_factor
        self.dispersion_lr_factor = dispersion_lr_factor
        self.donor_lr_factor = donor_lr_factor
        self.offset_lr_factor = offset_lr_factor
        self.lr_warmup = lr_warmup
        self.seed = seed
        self.last_loss = torch.tensor(math.nan)
        self._sums = {"train": torch.zeros(3), "validation": torch.zeros(3)}
        self._n_obs = {"train": 0, "validation": 0}

    @property
    def kl_weight(self) -> float:
        """Weight of the KL term at this step."""
        if self._trainer is None or self.kl_warmup == 0:
            return 1.0
        n_steps = self.kl_warmup * self.trainer.estimated_stepping_batches
        return min(1.0, (self.trainer.global_step + 1) / n_steps)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch; a loss that is not finite stops the training and says where."""
        losses = {
            "kl_weight": self.kl_weight,
            "beta": self.beta,
            "n_obs_training": self.n_cells,
        }
        _, _, output = self.module(batch, loss_kwargs=losses)
        if not torch.isfinite(output.loss):
            raise TrainingDivergedError(
                f"The training loss became {output.loss.item()} at epoch {self.current_epoch}, "
                f"step {self.global_step} (last finite loss {float(self.last_loss):.4g}, learning "
                f"rate {self.optimizers().param_groups[0]['lr']:.2g}). Train with a smaller "
                'learning rate, e.g. plan_kwargs={"lr": ' + f"{self.lr / 10:.2g}" + "}."
            )
        self.last_loss = output.loss.detach()
        self._add("train", output)
        return output.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """ELBO of a validation batch at full KL weight, with noise fixed by the batch number."""
        noise = generator(self.seed, batch_idx)
        _, _, output = self.module(
            batch,
            inference_kwargs={"generator": noise},
            generative_kwargs={"generator": noise},
            loss_kwargs={"n_obs_training": self.n_cells},
        )
        self._add("validation", output)

    def _add(self, mode: str, output: Any) -> None:
        n_obs = output.n_obs_minibatch
        terms = output.loss.detach() * n_obs, output.reconstruction_loss_sum, output.kl_local_sum
        self._sums[mode] = self._sums[mode] + torch.stack(terms).detach().cpu()
        self._n_obs[mode] += n_obs

    def _log_epoch(self, mode: str) -> None:
        """Log means per cell under scvi-tools' names; ``elbo`` is the negative ELBO, as there."""
        if self._n_obs[mode] == 0:
            return
        loss, reconstruction, kl = (self._sums[mode] / self._n_obs[mode]).tolist()
        name = {"train": "train_loss", "validation": "validation_loss"}[mode]
        self.log(name, loss, prog_bar=mode == "train")
        self.log(f"elbo_{mode}", reconstruction + kl)
        self.log(f"reconstruction_loss_{mode}", reconstruction)
        self.log(f"kl_local_{mode}", kl)
        self._sums[mode], self._n_obs[mode] = torch.zeros(3), 0

    def on_train_epoch_end(self) -> None:
        """Log the epoch."""
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        """Log the epoch."""
        self._log_epoch("validation")

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with rates by role, over one cycle of the learning rate."""
        space = self.module.space
        factors = {
            self.module.density: self.density_lr_factor,
            space.likelihood: self.dispersion_lr_factor,
            space.donors: self.donor_lr_factor,
            space.decoder.offset: self.offset_lr_factor,
        }
        special = [
            {"params": list(part.parameters()), "lr": self.lr * factor, "weight_decay": 0.0}
            for part, factor in factors.items()
            if part is not None
        ]
        taken = {id(p) for group in special for p in group["params"]}
        trained = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        networks = [(n, p) for n, p in trained if id(p) not in taken]
        # Decay shrinks weight matrices; biases and norms have their own scale.
        decayed = [p for n, p in networks if n.endswith(".weight") and p.dim() > 1]
        others = [p for n, p in networks if not (n.endswith(".weight") and p.dim() > 1)]
        groups: list[dict[str, Any]]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}, *special]
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )
        cycle = partial(
            one_cycle,
            n_steps=int(self.trainer.estimated_stepping_batches),
            warmup=self.lr_warmup,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cycle)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def one_cycle(step: int, *, n_steps: int, warmup: float) -> float:
    """Factor of the learning rate: half a cosine up from 1/25, half a cosine down to 0.

    One cycle :cite:p:`smith2019`, over ``n_steps`` of which the first share ``warmup`` rises.
    """
    at = min(step / max(n_steps, 1), 1.0)
    if at < warmup:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * at / warmup))
    return 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1 - warmup, 1e-9)))
