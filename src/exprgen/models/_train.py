"""``train``: split, start from the data, run the plan, keep the best weights."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Literal

import numpy as np

from exprgen import _arguments
from exprgen._quiet import quiet_lightning
from exprgen._random import isolated
from exprgen.models._stages import StagesMixin
from exprgen.models._train_arguments import (
    check_accelerator,
    check_checkpoints,
    check_strategy,
    checked_trainer,
    checked_words,
    known_words,
    said_of_trainer,
    without_checkpoints,
)
from exprgen.models._training_cells import TrainingCellsMixin
from exprgen.train import (
    FINISHED,
    CellDataModule,
    DensityTrainingPlan,
    EncodedDataset,
    GenerativeTrainingPlan,
    SameRun,
    TrainingCheckpoint,
    check_plan,
    data_moments,
    default_batch_size,
    default_max_epochs,
    digest_rows,
)

__all__ = ["TrainMixin"]


class TrainMixin(TrainingCellsMixin, StagesMixin):
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
        strategy: Literal["auto", "ddp"] = "auto",
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
            Cells per step, of all devices together; ``None`` is 128, or less where an epoch would
            have under eight steps.
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
            As Lightning takes them; ``"auto"`` is one device.
        strategy
            How several ``devices`` are used, which are one process each: ``"ddp"``, distributed
            data parallel, runs the script again in every process, and each has its part of every
            batch. ``"auto"`` is the same.
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
            Arguments of :class:`scvi.train.Trainer`, of every stage; but of checkpoints of whole
            models, as by :class:`scvi.train.SaveCheckpoint`, which the last stage alone can make.

        Raises
        ------
        TypeError, ValueError
            If an argument cannot be used, or several processes are not about to do the same;
            nothing has been trained then.
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
        check_strategy(strategy)
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
        max_epochs = _arguments.check_positive_int(max_epochs, "max_epochs", minimum=0)
        if max_epochs == 0:
            return
        batch_size = batch_size or default_batch_size(len(train_idx))
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
        checkpoint = None
        if checkpoint_dir is not None:
            checkpoint = TrainingCheckpoint(checkpoint_dir, run, resume=resume)
        with self._returns_if_stopped(), self._all_or_nothing():
            fitted = self._fitted_rows(train_idx, val_idx)
            with isolated(self.seed_):  # a predictor may draw, and its leading axes do
                dataset = self._with_training_means(dataset, fitted, val_idx)
            stage = None if checkpoint is None else self._take_up(checkpoint, dataset)
            data = CellDataModule(dataset, train_idx, val_idx, batch_size, seed=self.seed_)
            same_run = SameRun(run | {"stage": stage}, dataset.conditions)
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
                "callbacks": [same_run, *trainer_kwargs.pop("callbacks", [])],
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
                        finish=finish,
                        checkpoint=checkpoint,
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
                        earlier=first,
                        finish=finish,
                        checkpoint=checkpoint,
                        **runner_kwargs,
                    )
            finish()
            if checkpoint is not None:
                checkpoint.finish(module.state_dict(), self.history_)
                if (trainer := getattr(self, "trainer", None)) is not None:
                    trainer.strategy.barrier()  # no process looks before it is written

    def _finish(self, data: CellDataModule, keys: np.ndarray, fitted: np.ndarray) -> None:
        """Record which cells were used, and what they were."""
        self._has_finished = True
        validation = np.setdiff1d(data.val_idx, fitted)
        self.train_indices_, self.validation_indices_ = fitted, validation
        self.test_indices_ = data.test_idx
        self.cell_keys_ = {"train": keys[fitted], "validation": keys[validation]}
        self._observe(fitted)
