"""A stage of training: one run of a plan, of which the best weights are kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from scvi.train import TrainRunner

from exprgen import _arguments
from exprgen.models._resume import ResumeMixin
from exprgen.models._train_arguments import checked_words
from exprgen.train import (
    CellDataModule,
    DensityTrainingPlan,
    EncodedDataset,
    GenerativeTrainingPlan,
    KeepBestWeights,
    KeepState,
    TrainingCheckpoint,
    check_plan,
    default_density_epochs,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from lightning.pytorch import Callback

    from exprgen.train import StagePlan

__all__ = ["StagesMixin"]

# Of the second stage: it is noisy, and costs as much as the steps of its short epochs.
_N_VALIDATIONS = 40


class StagesMixin(ResumeMixin):
    """The stages of training a model, one after the other."""

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
                use_distributed_sampler=False,  # the data module shares the cells out
                **runner_kwargs,
            )
            strategy = runner.trainer.strategy
            if strategy.launcher is not None and strategy.launcher.is_interactive_compatible:
                raise ValueError(
                    "devices: several processes as one run are started by running the script "
                    "again, and this is none. Put it into a file, or train on one device here."
                )
            if checkpoint is not None:
                strategy.checkpoint_io = checkpoint
            with plan.others_fixed():
                runner()
            history = strategy.broadcast(self.history_)  # the first process has written it
            self.history_ = {**(earlier or {}), **(history or {})}
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
            CellDataModule(encoded, train_idx, val_idx, batch_size, seed=self.seed_),
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
