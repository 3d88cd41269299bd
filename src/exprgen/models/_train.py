"""``train``: split, start from the data, run the plan, keep the best weights."""

from __future__ import annotations

import logging
import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scvi.train import TrainRunner

from exprgen import _arguments
from exprgen._errors import closest
from exprgen._quiet import quiet_lightning
from exprgen._random import isolated
from exprgen.models._cells import cell_keys, split_labels
from exprgen.models._fields import check_unchanged
from exprgen.models._mudata import own_name
from exprgen.models._resume import ResumeMixin
from exprgen.models._train_arguments import (
    check_accelerator,
    checked_trainer,
    checked_words,
    known_words,
    said_of_trainer,
)
from exprgen.train import (
    FINISHED,
    WINDOW,
    CellDataModule,
    CellDataset,
    DensityTrainingPlan,
    EncodedDataset,
    GenerativeTrainingPlan,
    KeepBestWeights,
    KeepState,
    TrainingCheckpoint,
    check_plan,
    data_moments,
    default_batch_size,
    default_density_epochs,
    default_max_epochs,
    digest_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Callback

    from exprgen.train import StagePlan

__all__ = ["TrainMixin"]

logger = logging.getLogger("exprgen")

# Of the second stage: it is noisy, and costs as much as the steps of its short epochs.
_N_VALIDATIONS = 40


class TrainMixin(ResumeMixin):
    """Training of a :class:`~exprgen.models.GenerativeModel`."""

    @known_words
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
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
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
        checkpoint_dir
            Folder in which the state of the run is kept as it goes, to take it up again after
            whatever has ended it. It is written between epochs, at most a fiftieth of the time.
        resume
            Whether to go on from the checkpoint in ``checkpoint_dir``, with the same arguments,
            seed and cells; training begins if there is none yet, and has nothing to do where it
            was finished. On the same machine with one thread the result is, bit by bit, that of
            the run without interruption.
        plan_kwargs
            Arguments of :class:`~exprgen.train.GenerativeTrainingPlan`, e.g. ``{"lr": 1e-3}``.
        density_kwargs
            Of the second stage, where there is one: ``"max_epochs"`` (by default what 1,000 steps
            take, 400 in gene space), ``"batch_size"`` (256), and arguments of
            :class:`~exprgen.train.DensityTrainingPlan`.
        trainer_kwargs
            Arguments of :class:`scvi.train.Trainer`, of every stage.

        Raises
        ------
        TypeError, ValueError
            If an argument cannot be used; nothing has been trained then.
        CovariateError
            If the conditions were edited since setup.
        TrainingDivergedError
            If the loss stops being finite; the best weights until then are kept.
        RuntimeError
            If there is no such ``accelerator``.
        FileExistsError, PermissionError
            If ``checkpoint_dir`` holds a checkpoint and ``resume`` is False, or cannot be written
            to.
        CheckpointError, UntrustedFileError
            If the checkpoint is of another run, damaged, or not plain.

        Warns
        -----
        TrainingStoppedWarning
            If training was interrupted, as by Ctrl-C. It returns, with the best weights until
            then if an epoch was finished.
        """
        if self.adata is None:
            raise ValueError("This model was loaded without data: load(path, adata) to train it.")
        for name, value in (
            ("batch_size", batch_size),
            ("early_stopping_patience", early_stopping_patience),
        ):
            if value is not None:
                _arguments.check_positive_int(value, name)
        for name, flag in (("early_stopping", early_stopping), ("resume", resume)):
            _arguments.check_bool(flag, name)
        if not isinstance(checkpoint_dir, str | os.PathLike | None):
            raise TypeError(f"checkpoint_dir must be a path or None, got {checkpoint_dir!r}.")
        if checkpoint_dir == "":
            raise ValueError("checkpoint_dir must be a path or None, got ''.")
        if resume and checkpoint_dir is None:
            raise ValueError("resume=True needs checkpoint_dir, the folder of the checkpoint.")
        check_accelerator(accelerator)
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
        max_epochs = _arguments.check_positive_int(max_epochs, "max_epochs", minimum=0)
        if max_epochs == 0:
            return
        batch_size = batch_size or default_batch_size(len(train_idx))
        checkpoint = None
        if checkpoint_dir is not None:
            run = {
                **self._said(),
                "max_epochs": max_epochs,
                "batch_size": batch_size,
                "early_stopping": early_stopping,
                "early_stopping_patience": early_stopping_patience,
                "plan_kwargs": plan_kwargs,
                "density_kwargs": density_kwargs,
                "trainer_kwargs": said_of_trainer(trainer_kwargs),
                "cells": digest_rows(keys),
                "conditions": digest_rows(dataset.conditions),
                "library": digest_rows(dataset.library.numpy()),
                "split": [digest_rows(rows) for rows in (train_idx, val_idx)],
            }
            checkpoint = TrainingCheckpoint(checkpoint_dir, run, resume=resume)
        with self._returns_if_stopped(), self._all_or_nothing():
            fitted = self._fitted_rows(train_idx, val_idx)
            with isolated(self.seed_):  # a predictor may draw, and its leading axes do
                dataset = self._with_training_means(dataset, fitted, val_idx)
            stage = None if checkpoint is None else self._take_up(checkpoint, dataset)
            data = CellDataModule(dataset, train_idx, val_idx, batch_size, seed=self.seed_)
            module, callbacks = self.module, trainer_kwargs.pop("callbacks", [])
            # The scaled gradients of mixed precision cannot be clipped for a fused optimizer.
            clip = None if "mixed" in str(trainer_kwargs.get("precision")) else 10.0
            runner_kwargs = {
                "accelerator": accelerator,
                "devices": devices,
                "early_stopping": early_stopping,
                "enable_progress_bar": progress_bar,
                "log_every_n_steps": 1,
                "gradient_clip_val": trainer_kwargs.pop("gradient_clip_val", clip),
                **trainer_kwargs,
            }
            finish = partial(self._finish, data, keys, fitted)
            if stage == FINISHED:
                finish()
                return
            with isolated(self.seed_), quiet_lightning():
                # In gene space nothing is learned but of these cells, and the density of scores.
                if stage is None and not (module.initialized and module.space.is_learned):
                    module.space.initialize(data_moments(dataset, fitted, module.space))
                    module.initialized.fill_(True)
                has_autoencoder = not taken_over and module.space.is_learned
                if has_autoencoder and stage in (None, GenerativeTrainingPlan.stage):
                    self._run_stage(
                        GenerativeTrainingPlan(
                            module, n_obs_training=len(train_idx), seed=self.seed_, **plan_kwargs
                        ),
                        data,
                        max_epochs,
                        patience=early_stopping_patience or max_epochs,
                        callbacks=callbacks,
                        finish=finish,
                        checkpoint=checkpoint,
                        **runner_kwargs,
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
                        earlier=first,
                        callbacks=callbacks,
                        finish=finish,
                        checkpoint=checkpoint,
                        **runner_kwargs,
                    )
            finish()
            if checkpoint is not None:
                checkpoint.finish(module.state_dict(), self.history_)

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
        checkpoint: TrainingCheckpoint | None,
        earlier: dict[str, Any] | None = None,
        validate_every: int = 1,
        **runner_kwargs: Any,
    ) -> None:
        """Train one stage, and keep its best weights; ``earlier`` is the history before it.

        ``finish`` is called if it is stopped and the model can be used all the same.
        """
        several = self.module.has_density_stage
        before = self.history_, self.is_trained_
        keep_best = KeepBestWeights(plan.monitor if data.n_val else None)
        callbacks, resumed = [keep_best, *callbacks], None
        if checkpoint is not None:
            checkpoint.state["stage"] = plan.stage
            checkpoint.state["history"], checkpoint.state["is_trained"] = before
            callbacks = [KeepState(checkpoint), *callbacks]
            resumed = None if checkpoint.content is None else str(checkpoint.folder)
        if several:
            # The runner would join the stages' histories key by key, and drop what is not in both.
            self.history_, self.is_trained_ = None, False
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
                callbacks=callbacks,
                ckpt_path=resumed,
                **runner_kwargs,
            )
            if checkpoint is not None:
                runner.trainer.strategy.checkpoint_io = checkpoint
            runner()
            self.history_ = {**(earlier or {}), **(self.history_ or {})}
        except BaseException as error:
            # Whatever stopped it, a model that has weights to answer with can be used.
            if not keep_best.restore(self.module):
                self.history_, self.is_trained_ = before
            elif not (several and isinstance(plan, GenerativeTrainingPlan)):
                self.is_trained_ = True
                self.history_ = {**(earlier or {}), **(self.history_ or {})}
                finish()
            # Lightning exits the process instead.
            cause = error.__context__ if isinstance(error, SystemExit) else error
            if isinstance(cause, KeyboardInterrupt):
                where = f" of the {plan.stage}" if several else ""
                raise KeyboardInterrupt(
                    f"at epoch {plan.current_epoch} of {max_epochs}{where}"
                ) from None
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
                where = f"density_kwargs[{name!r}]"
                kwargs[name] = _arguments.check_positive_int(kwargs[name], where)
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
