"""Training plans: what a step of a stage does.

The plans follow scvi-tools' :class:`~scvi.train.TrainingPlan` with what generative models were
measured to need: AdamW whose rates differ by role (the dispersion and the density converge too
slowly at the networks' rate), one cycle of the learning rate, a KL warm-up that is a fraction of
the run, validation with fixed noise, and sums that are logged once per epoch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from scvi.train import TrainingPlan
from torch import Tensor, nn

from exprgen._arguments import check_number
from exprgen._errors import TrainingDivergedError
from exprgen._random import generator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from exprgen.densities import Centred, Path
    from exprgen.module import ExpressionModule
    from exprgen.spaces import Autoencoder

__all__ = ["DensityTrainingPlan", "GenerativeTrainingPlan", "StagePlan", "check_plan"]

_INTERVALS = {
    "lr": "(0, inf)",
    "kl_warmup": "[0, 1]",
    "lr_warmup": "[0, 1]",
    "ema_decay": "[0, 1)",
}
"""Of the plans' numbers; the others lie in [0, inf)."""


def check_plan(argument: str = "plan_kwargs", **numbers: Any) -> None:
    """Refuse numbers that no plan can train with.

    Raises
    ------
    TypeError, ValueError
        If one is no number, not finite, or outside its range.
    """
    for name, value in numbers.items():
        check_number(value, f"{argument}[{name!r}]", _INTERVALS.get(name, "[0, inf)"))


class StagePlan(TrainingPlan):
    """One stage of training.

    Parameters
    ----------
    module
        The module to train.
    lr
        Largest learning rate.
    weight_decay
        AdamW's, on weight matrices.
    lr_warmup
        Fraction of the steps over which the learning rate grows to ``lr``, before it falls to 0.
    seed
        Of the fixed validation noise.
    """

    module: ExpressionModule

    monitor: ClassVar[str]
    """What early stopping and the choice of the best weights watch (lower is better)."""

    terms: ClassVar[tuple[str, ...]]
    """What is logged, means per cell; ``{}`` is train or validation."""

    stage: ClassVar[str]
    """What is trained."""

    remedy: ClassVar[str]
    """How a caller asks for the learning rate ``{}``."""

    def __init__(
        self,
        module: ExpressionModule,
        *,
        lr: float,
        weight_decay: float,
        lr_warmup: float,
        seed: int,
    ) -> None:
        super().__init__(module, optimizer="AdamW", lr=lr, eps=1e-8, weight_decay=weight_decay)
        self.lr_warmup = lr_warmup
        self.seed = seed
        self.last_loss = torch.tensor(math.nan)
        self._sums = {mode: torch.zeros(len(self.terms)) for mode in ("train", "validation")}
        self._n_obs = {"train": 0, "validation": 0}

    @abstractmethod
    def step(
        self, batch: dict[str, Tensor], noise: torch.Generator | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss to minimise, ``()``, and the sum of each of the ``terms`` over the batch.

        ``noise`` is given in validation, where nothing is to warm up.
        """

    @property
    def warms_up(self) -> bool:
        """Whether training does not yet minimise what is validated."""
        return False

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained at which rate, as optimizers take it."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module has the weights that are to be kept."""
        yield

    @contextmanager
    def others_fixed(self) -> Iterator[None]:
        """Inside, what this stage does not train has no gradient, which processes wait for."""
        trained = {id(p) for group in self.parameter_groups() for p in group["params"]}
        others = [p for p in self.module.parameters() if p.requires_grad and id(p) not in trained]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch; a loss that is not finite stops the training and says where."""
        loss, sums = self.step(batch, None)
        # In place, and over all processes, for one alone would leave the others waiting.
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        if not torch.isfinite(mean):
            raise self._diverged("The training loss", mean.item())
        self.last_loss = mean
        self._add("train", batch, sums)
        return loss

    def _diverged(self, what: str, value: float) -> TrainingDivergedError:
        return TrainingDivergedError(
            f"{what} became {value} at epoch {self.current_epoch}, step {self.global_step} (last "
            f"finite training loss {float(self.last_loss):.4g}, learning rate "
            f"{self.optimizers().param_groups[0]['lr']:.2g}). Train with a smaller learning rate, "
            f"e.g. {self.remedy.format(self.lr / 10)}."
        )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The terms of a validation batch, with noise fixed by the batch number."""
        noise = generator(self.seed, batch_idx * self._n_ranks + self.global_rank)
        with self.averaged():
            _, sums = self.step(batch, noise)
        self._add("validation", batch, sums)

    def _add(self, mode: str, batch: dict[str, Tensor], sums: list[Tensor]) -> None:
        self._sums[mode] = self._sums[mode] + torch.stack(sums).detach().cpu()
        self._n_obs[mode] += len(next(iter(batch.values())))

    def _log_epoch(self, mode: str) -> None:
        """Log means per cell, over all processes."""
        if self._n_obs[mode] == 0:
            return
        sums = torch.cat([self._sums[mode], torch.tensor([float(self._n_obs[mode])])])
        sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()
        means = (sums[:-1] / sums[-1]).tolist()
        if not all(map(math.isfinite, means)):
            # Early stopping would end the run as if it had been a good one.
            raise self._diverged(f"The {mode} loss", means[0])
        for i, (name, value) in enumerate(zip(self.terms, means, strict=True)):
            self.log(name.format(mode), value, prog_bar=mode == "train" and i == 0)
        self._sums[mode], self._n_obs[mode] = torch.zeros(len(self.terms)), 0

    def on_train_epoch_start(self) -> None:
        """Let several processes have noise of their own, by the number of the epoch."""
        self._part_streams(self.current_epoch, self.global_rank)

    def on_train_end(self) -> None:
        """What follows is the same in all processes."""
        self._part_streams()

    @property
    def _n_ranks(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    def _part_streams(self, *key: int) -> None:
        if self._n_ranks > 1:
            torch.manual_seed(generator(self.seed, *key).initial_seed())

    def on_train_epoch_end(self) -> None:
        """Log the epoch."""
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        """Log the epoch."""
        self._log_epoch("validation")

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over one cycle of the learning rate."""
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=self.lr,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
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


class GenerativeTrainingPlan(StagePlan):
    """Training a space, and a density with it: the evidence lower bound.

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
        Fraction of the steps over which the weight of the KL term grows from 0 to 1. A short one
        leaves how genes vary together within a condition to the dispersions.
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

    stage = "autoencoder"
    monitor = "elbo_validation"
    # Names of scvi-tools, where elbo is the negative ELBO.
    terms = ("{}_loss", "elbo_{}", "reconstruction_loss_{}", "kl_local_{}")
    remedy = 'plan_kwargs={{"lr": {:.2g}}}'

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
        kl_warmup: float = 0.5,
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
        super().__init__(module, lr=lr, weight_decay=weight_decay, lr_warmup=lr_warmup, seed=seed)
        self.n_cells = n_obs_training
        self.density_lr_factor = density_lr_factor
        self.dispersion_lr_factor = dispersion_lr_factor
        self.donor_lr_factor = donor_lr_factor
        self.offset_lr_factor = offset_lr_factor

    @property
    def kl_weight(self) -> float:
        """Weight of the KL term at this step."""
        if self._trainer is None or self.kl_warmup == 0:
            return 1.0
        n_steps = self.kl_warmup * self.trainer.estimated_stepping_batches
        return min(1.0, (self.trainer.global_step + 1) / n_steps)

    @property
    def warms_up(self) -> bool:
        """Whether the weight of the KL term still grows."""
        return self.kl_weight < 1

    def step(
        self, batch: dict[str, Tensor], noise: torch.Generator | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The negative ELBO and its terms; in training at the weights of the KL terms."""
        weights = {} if noise is not None else {"kl_weight": self.kl_weight, "beta": self.beta}
        _, _, output = self.module(
            batch,
            inference_kwargs={"generator": noise},
            generative_kwargs={"generator": noise},
            loss_kwargs={"n_obs_training": self.n_cells, **weights},
        )
        reconstruction, kl = output.reconstruction_loss_sum, output.kl_local_sum
        loss = output.loss * output.n_obs_minibatch
        return output.loss, [loss, reconstruction + kl, reconstruction, kl]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Rates by role; decay for the networks."""
        module, space = self.module, cast("Autoencoder", self.module.space)
        factors = {
            module.autoencoder_prior: self.density_lr_factor,
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
        networks = [(n, p) for n, p in space.named_parameters() if id(p) not in taken]
        return [*_networks(networks), *special]


class DensityTrainingPlan(StagePlan):
    """Training a density on draws of the latent state of cells, the space being as it is.

    Validation, and what is kept, are of an average of the weights over the steps, exponentially
    weighted, which few-step solvers of noisily trained networks gain from :cite:p:`song2021`.

    Parameters
    ----------
    module
        The module, whose ``density`` is trained.
    lr, lr_warmup
        Largest learning rate, and the fraction of the steps over which it grows.
    weight_decay
        AdamW's, on weight matrices.
    offset_lr_factor
        Rate of effects of conditions on genes, where the density has such, as multiple of ``lr``.
    ema_decay
        What a step leaves of the average of the weights; 0 keeps the last weights.
    seed
        Of the fixed validation noise.

    Raises
    ------
    TypeError, ValueError
        If a number is none, not finite, or outside its range.
    """

    stage = "density"
    monitor = "density_loss_validation"
    terms = ("density_loss_{}",)
    remedy = 'density_kwargs={{"lr": {:.2g}}}'

    def __init__(
        self,
        module: ExpressionModule,
        *,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
        lr_warmup: float = 0.1,
        offset_lr_factor: float = 5.0,
        ema_decay: float = 0.995,
        seed: int = 0,
    ) -> None:
        numbers = {"lr": lr, "weight_decay": weight_decay, "lr_warmup": lr_warmup}
        others = {"offset_lr_factor": offset_lr_factor, "ema_decay": ema_decay}
        check_plan("density_kwargs", **others, **numbers)
        super().__init__(module, **numbers, seed=seed)
        self.offset_lr_factor = offset_lr_factor
        self.ema_decay = ema_decay
        self.n_averaged = 0
        self._trained = [p for p in module.density.parameters() if p.requires_grad]
        # Buffers go where the module goes, and into checkpoints.
        for i, parameter in enumerate(self._trained):
            self.register_buffer(f"average_{i}", parameter.detach().clone())

    @property
    def _average(self) -> list[Tensor]:
        return [self.get_buffer(f"average_{i}") for i in range(len(self._trained))]

    def get_extra_state(self) -> dict[str, int]:
        """What a checkpoint holds besides tensors."""
        return {"n_averaged": self.n_averaged}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """From a checkpoint."""
        self.n_averaged = state["n_averaged"]

    def step(
        self, batch: dict[str, Tensor], noise: torch.Generator | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The density's own loss at one draw of each cell's latent state."""
        mean, sd = batch["mean"], batch["sd"]
        y = self.module.space.draw(mean, sd, noise)
        losses = self.density.loss(y, batch["features"], noise)
        return losses.mean(), [losses.sum()]

    @property
    def density(self) -> Path | Centred:
        """What is trained."""
        return cast("Path | Centred", self.module.density)

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Average the weights; the first steps count as much as later ones would."""
        self.n_averaged += 1
        decay = min(self.ema_decay, self.n_averaged / (self.n_averaged + 10))
        for average, parameter in zip(self._average, self._trained, strict=True):
            average.lerp_(parameter, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the density has its averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._average, self._trained, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The density's network, with decay of its matrices; effects at a rate of their own."""
        named = dict(self.module.density.named_parameters())
        offsets = [named.pop(name) for name in list(named) if name.endswith(".offset")]
        groups = _networks(named.items())
        if offsets:
            rate = self.lr * self.offset_lr_factor
            groups.append({"params": offsets, "lr": rate, "weight_decay": 0.0})
        return groups


def _networks(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Decay shrinks weight matrices; biases and norms have their own scale."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            is_matrix = name.endswith(".weight") and parameter.dim() > 1
            (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def one_cycle(step: int, *, n_steps: int, warmup: float) -> float:
    """Factor of the learning rate: half a cosine up from 1/25, half a cosine down to 0.

    One cycle :cite:p:`smith2019`, over ``n_steps`` of which the first share ``warmup`` rises.
    """
    at = min(step / max(n_steps, 1), 1.0)
    if at < warmup:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * at / warmup))
    return 0.5 * (1 + math.cos(math.pi * (at - warmup) / max(1 - warmup, 1e-9)))
