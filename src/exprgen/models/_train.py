"""``train``: split, start from the data, run the plan, keep the best weights."""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scvi.train import TrainRunner

from exprgen import _arguments
from exprgen._errors import closest
from exprgen._quiet import quiet_lightning
from exprgen._random import isolated
from exprgen.models._cells import cell_keys, split_labels
from exprgen.models._core import ModelCore
from exprgen.models._fields import check_unchanged
from exprgen.models._mudata import own_name
from exprgen.models._train_arguments import (
    check_checkpoints,
    checked_trainer,
    checked_words,
    without_checkpoints,
)
from exprgen.train import (
    CellDataModule,
    CellDataset,
    DensityTrainingPlan,
    EncodedDataset,
    GenerativeTrainingPlan,
    KeepBestWeights,
    check_plan,
    data_moments,
    default_batch_size,
    default_density_epochs,
    default_max_epochs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch import Callback

    from exprgen.train import StagePlan

__all__ = ["TrainMixin"]

logger = logging.getLogger("exprgen")

# Of the second stage: it is noisy, and costs as much as the steps of its short epochs.
_N_VALIDATIONS = 40


class TrainMixin(ModelCore):
    """Training of a :class:`~exprgen.models.GenerativeModel`."""

    def train(
        self,
        max_epochs: int | None = None,
        *,
        batch_size: int | None = None,
        train_size: float = 0.9,
        validation_size: float | None = None,
        split_key: str | None = None,
        early_stopping: bool = True,
        early_stopping_patience: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        progress_bar: bool = True,
        plan_kwargs: dict[str, Any] | None = None,
        density_kwargs: dict[str, Any] | None = None,
        trainer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Train on the registered cells.

        The weights of the epoch with the best validation ELBO after the warm-up are kept. The
        caller's random streams are not touched; the same seed on the same machine gives the same
        weights.

        Flow and diffusion models are trained in two stages, on one split: an autoencoder, with a
        mixture as its prior, and then the density, on what the encoder made of the cells. The
        first six arguments that follow are about the autoencoder and the split. In gene space,
        where flow and diffusion models have continuous values, there is no autoencoder: its
        arguments are refused, and the one stage that is left takes ``density_kwargs``.

        Parameters
        ----------
        max_epochs
            Length of the run, over which the learning rate rises and falls; ``None`` is what 750
            steps take, 40 at 10,000 cells and fewer beyond.
        batch_size
            Cells per step; ``None`` is 128, or less where an epoch would have under eight steps.
        train_size, validation_size
            Shares of the cells, drawn at random; ``validation_size=None`` is the rest. Cells in
            neither are not used.
        split_key
            Column of obs with the values ``"train"`` and ``"validation"``, instead of a random
            split; cells with any other value are not used.
        early_stopping
            Whether to stop when the validation ELBO has not improved for a while.
        early_stopping_patience
            Epochs to wait for an improvement; ``None`` is the whole run, for what the fall of the
            learning rate gains comes last, and the best weights are kept however long it is.
        accelerator, devices
            As Lightning takes them.
        progress_bar
            Whether to show one.
        plan_kwargs
            Arguments of :class:`~exprgen.train.GenerativeTrainingPlan`, e.g. ``{"lr": 1e-3}``.
        density_kwargs
            Of the second stage, where there is one: ``"max_epochs"`` (by default what 1,000 steps
            take, 400 in gene space), ``"batch_size"`` (256), and arguments of
            :class:`~exprgen.train.DensityTrainingPlan`.
        trainer_kwargs
            Arguments of :class:`scvi.train.Trainer`, of every stage; but of checkpoints of whole
            models, as by :class:`scvi.train.SaveCheckpoint`, which the last stage alone can make.

        Raises
        ------
        TypeError, ValueError
            If an argument cannot be used; nothing has been trained then.
        CovariateError
            If the conditions were edited since setup.
        TrainingDivergedError
            If the loss stops being finite; the best weights until then are kept.
        """
        if self.adata is None:
            raise ValueError("This model was loaded without data: load(path, adata) to train it.")
        for name, value in (
            ("batch_size", batch_size),
            ("early_stopping_patience", early_stopping_patience),
        ):
            if value is not None:
                _arguments.check_positive_int(value, name)
        _arguments.check_bool(early_stopping, "early_stopping")
        plan_kwargs = checked_words(plan_kwargs, "plan_kwargs", GenerativeTrainingPlan)
        check_plan(**plan_kwargs)
        taken_over = self.autoencoder_taken_over_
        if taken_over or not self.module.space.is_learned:
            given = {
                "max_epochs": max_epochs is not None,
                "batch_size": batch_size is not None,
                "train_size": taken_over and train_size != 0.9,
                "validation_size": taken_over and validation_size is not None,
                "split_key": taken_over and split_key is not None,
                "early_stopping_patience": early_stopping_patience is not None,
                "plan_kwargs": bool(plan_kwargs),
            }
            if useless := [name for name, is_given in given.items() if is_given]:
                why = (
                    "the autoencoder of this model was taken over trained, with its split"
                    if taken_over
                    else "a model of continuous values in gene space has no autoencoder"
                )
                left = "What is left to train takes density_kwargs."
                if not self.module.has_density_stage:
                    left = "All of this one is fitted in closed form."
                raise ValueError(f"{', '.join(useless)}: {why}. {left}")
        density_kwargs = self._checked_density(density_kwargs)
        trainer_kwargs = checked_trainer(trainer_kwargs)
        has_second = self.module.has_density_stage
        last = DensityTrainingPlan if has_second else GenerativeTrainingPlan
        check_checkpoints(trainer_kwargs, last)
        dataset, keys = self._training_cells()
        if taken_over:
            train_idx, val_idx = self._split_taken_over(keys)
        else:
            train_idx, val_idx = self._split(train_size, validation_size, split_key)
        learns = self.module.space.is_learned or self.module.has_density_stage
        if early_stopping and learns and len(val_idx) == 0:
            cause = f"train_size={train_size}" if split_key is None else f"split_key={split_key!r}"
            raise ValueError(
                f"early_stopping=True needs validation cells, but {cause} leaves none. Leave "
                "some, or give early_stopping=False."
            )
        if max_epochs is None:
            max_epochs = default_max_epochs(len(train_idx))
        elif _arguments.check_positive_int(max_epochs, "max_epochs", minimum=0) == 0:
            return
        batch_size = batch_size or default_batch_size(len(train_idx))
        with self._all_or_nothing():
            fitted = self._fitted_rows(train_idx, val_idx)
            dataset = self._with_training_means(dataset, fitted, val_idx)
            data = CellDataModule(dataset, train_idx, val_idx, batch_size)
            module = self.module
            # The scaled gradients of mixed precision cannot be clipped for a fused optimizer.
            clip = None if "mixed" in str(trainer_kwargs.get("precision")) else 10.0
            runner_kwargs = {
                "accelerator": accelerator,
                "devices": devices,
                "early_stopping": early_stopping,
                "enable_progress_bar": progress_bar,
                "log_every_n_steps": 1,
                "gradient_clip_val": trainer_kwargs.pop("gradient_clip_val", clip),
                "callbacks": [],
                **trainer_kwargs,
            }
            finish = partial(self._finish, data, keys, fitted)
            with isolated(self.seed_), quiet_lightning():
                # In gene space nothing is learned but of these cells, and the density of scores.
                if not (module.initialized and module.space.is_learned):
                    module.space.initialize(data_moments(dataset, fitted, module.space))
                    module.initialized.fill_(True)
                has_autoencoder = not taken_over and module.space.is_learned
                if has_autoencoder:
                    self._run_stage(
                        GenerativeTrainingPlan(
                            module, n_obs_training=len(train_idx), seed=self.seed_, **plan_kwargs
                        ),
                        data,
                        max_epochs,
                        patience=early_stopping_patience or max_epochs,
                        finish=finish,
                        **(without_checkpoints(runner_kwargs) if has_second else runner_kwargs),
                    )
                if not (has_autoencoder or module.has_density_stage):
                    # All of it is in closed form.
                    self.history_, self.is_trained_ = {}, True
                    module.eval()
                if module.has_density_stage:
                    first = {}
                    if has_autoencoder:
                        # What density there is belongs to the space as it was before.
                        first, self.is_trained_ = self.history_ or {}, False
                    self._train_density(
                        EncodedDataset(dataset, module.space, self._device),
                        train_idx,
                        val_idx,
                        density_kwargs,
                        finish=finish,
                        **runner_kwargs,
                    )
                    self.history_ = {**first, **(self.history_ or {})}
            finish()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Inside, a model that was trained before is what it was, until it is trained anew."""
        names = [name for name in ("history_", "mean", "mean_state_") if hasattr(self, name)]
        before = {name: getattr(self, name) for name in names}
        weights = deepcopy(self.module.state_dict()) if self.is_trained_ else None
        self._has_finished = False
        try:
            yield
        except BaseException:
            if weights is not None and not self._has_finished:
                self.module.load_state_dict(weights)
                self.module.eval()
                for name, value in {**before, "is_trained_": True}.items():
                    setattr(self, name, value)
            raise

    def _with_training_means(
        self, dataset: CellDataset, fitted: np.ndarray, val_idx: np.ndarray
    ) -> CellDataset:
        """The cells, with what is known of their mean where a model has a predictor."""
        return dataset

    def _run_stage(
        self,
        plan: StagePlan,
        data: CellDataModule,
        max_epochs: int,
        *,
        patience: int,
        callbacks: list[Callback],
        finish: Callable[[], None],
        validate_every: int = 1,
        **runner_kwargs: Any,
    ) -> None:
        """Train one stage, and keep its best weights.

        ``finish`` is called if it is stopped and the model can be used all the same.
        """
        several = self.module.has_density_stage
        before = self.history_, self.is_trained_
        if several:
            # The runner would join the stages' histories key by key, and drop what is not in both.
            self.history_, self.is_trained_ = None, False
        keep_best = KeepBestWeights(plan.monitor if data.n_val else None)
        try:
            # Lightning leaves the mode as it is, and a trained module is in evaluation mode.
            self.module.train()
            runner = TrainRunner(
                self,
                training_plan=plan,
                data_splitter=data,
                max_epochs=max_epochs,
                early_stopping_monitor=plan.monitor,
                early_stopping_patience=patience,
                check_val_every_n_epoch=validate_every if data.n_val else None,
                callbacks=[keep_best, *callbacks],
                **runner_kwargs,
            )
            runner()
        except BaseException as error:
            # Whatever stopped it, a model that has weights to answer with can be used.
            if not keep_best.restore(self.module):
                self.history_, self.is_trained_ = before
            elif not (several and isinstance(plan, GenerativeTrainingPlan)):
                self.is_trained_ = True
                finish()
            if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # Lightning exits the process instead
            raise
        finally:
            self.module.eval()

    def _train_density(
        self,
        encoded: EncodedDataset,
        train_idx: np.ndarray,
        val_idx: np.ndarray,
        density_kwargs: dict[str, Any],
        **stage_kwargs: Any,
    ) -> None:
        """The second stage: the density, on what the encoder made of the cells."""
        batch_size = density_kwargs.pop("batch_size", 256)
        in_genes = not self.module.space.is_learned
        default = default_density_epochs(len(train_idx), batch_size, in_genes)
        max_epochs = density_kwargs.pop("max_epochs", default)
        mean, sd = encoded.mean[train_idx], encoded.sd[train_idx]
        plan = DensityTrainingPlan(self.module, seed=self.seed_, **density_kwargs)
        if not in_genes:  # normal scores are standard as they are
            plan.density.standardise(self.module.space.draw(mean, sd).to(self._device))
        validate_every = math.ceil(max_epochs / _N_VALIDATIONS)
        self._run_stage(
            plan,
            CellDataModule(encoded, train_idx, val_idx, batch_size),
            max_epochs,
            patience=math.ceil(_N_VALIDATIONS / 2),
            validate_every=validate_every,
            **stage_kwargs,
        )

    def _checked_density(self, kwargs: dict[str, Any] | None) -> dict[str, Any]:
        """Refuse what the second stage cannot be trained with, or any if there is none."""
        if not self.module.has_density_stage:
            if kwargs:
                where = "is trained in one, see plan_kwargs"
                if not self.module.space.is_learned:
                    where = "of this density is fitted in closed form"
                raise TypeError(
                    "density_kwargs is for models with a second stage; "
                    f"{type(self).__name__} {where}."
                )
            return {}
        sizes = ("max_epochs", "batch_size")
        kwargs = checked_words(kwargs, "density_kwargs", DensityTrainingPlan, also=sizes)
        for name in sizes:
            if kwargs.get(name) is not None:
                _arguments.check_positive_int(kwargs[name], f"density_kwargs[{name!r}]")
        check_plan("density_kwargs", **{k: v for k, v in kwargs.items() if k not in sizes})
        return {name: value for name, value in kwargs.items() if value is not None}

    def _fitted_rows(self, train_idx: np.ndarray, val_idx: np.ndarray) -> np.ndarray:
        """Row numbers of the cells that a space and a mean are fitted to."""
        return train_idx

    def _finish(self, data: CellDataModule, keys: np.ndarray, fitted: np.ndarray) -> None:
        """Record which cells were used, and what they were."""
        self._has_finished = True
        validation = np.setdiff1d(data.val_idx, fitted)
        self.train_indices_, self.validation_indices_ = fitted, validation
        self.test_indices_ = data.test_idx
        self.cell_keys_ = {"train": keys[fitted], "validation": keys[validation]}
        self._observe(fitted)

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
        return dataset, cell_keys(cells.adata, cells.reader)

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
