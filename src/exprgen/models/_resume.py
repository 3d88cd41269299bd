"""What a run of training can be taken up from, and what it leaves behind if it is stopped."""

from __future__ import annotations

import signal
import warnings
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pandas as pd

from exprgen._errors import ReproducibilityWarning, TrainingStoppedWarning
from exprgen.models._core import ModelCore, fingerprint
from exprgen.models._save import fill, naming
from exprgen.train import digest_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exprgen.train import CellDataset, TrainingCheckpoint

__all__ = ["ResumeMixin"]


class ResumeMixin(ModelCore):
    """The state of a model around a run of training."""

    _has_finished: bool
    """Whether the run has come to weights that answer."""

    def _said(self) -> dict[str, Any]:
        """What this model is, apart from its weights; JSON-able."""
        learned_before = self.module.space if self.autoencoder_taken_over_ else None
        return {
            **self.init_params_["non_kwargs"],
            "setup": self._setup_args,
            "model": type(self).__name__,
            "seed": self.seed_,
            "genes": digest_rows(pd.util.hash_array(self.var_names.to_numpy())),
            "autoencoder": learned_before and fingerprint(learned_before),
        }

    def _take_up(self, checkpoint: TrainingCheckpoint, dataset: CellDataset) -> str | None:
        """Be what a checkpoint says; the stage it is of, or ``None`` if training begins."""
        means = digest_rows(dataset.conditions)
        checkpoint.state["means"] = means
        content = checkpoint.content
        if content is None:
            return None
        with naming(checkpoint.folder, "weights"):
            fill(self.module, content["weights"])
        self.module.eval()  # as after the stage before
        with naming(checkpoint.folder, "state"):
            self.history_, self.is_trained_ = content["history"], content["is_trained"]
            before = content["means"]
        if means != before:
            warnings.warn(
                "The predictor of the mean was fitted again to go on with training, and predicts "
                "otherwise than it did: the model will not be what it had been without the "
                "interruption. Give a predictor that is deterministic, or fitted.",
                ReproducibilityWarning,
                stacklevel=4,
            )
        return content["stage"]

    @contextmanager
    def _returns_if_stopped(self) -> Iterator[None]:
        """Inside, an interruption ends what is done, and a warning says what is left."""
        handler = signal.getsignal(signal.SIGINT)
        try:
            yield
        except KeyboardInterrupt as stop:
            if handler is not None:  # Lightning has the process ignore the next one
                signal.signal(signal.SIGINT, handler)
            if self._has_finished:
                left = "The best weights until then are kept."
            elif self.is_trained_:
                left = "The model is what it was before."
            else:
                left = "The model is not trained."
            warnings.warn(
                f"Training was stopped {str(stop) or 'outside its epochs'}. {left} With "
                "checkpoint_dir=, train(..., resume=True) goes on from there.",
                TrainingStoppedWarning,
                stacklevel=5,
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Inside, a model that was trained before is what it was, until it is trained anew."""
        names = [name for name in ("history_", "mean", "mean_state_") if hasattr(self, name)]
        before = {name: getattr(self, name) for name in names}
        was_trained = self.is_trained_
        weights = deepcopy(self.module.state_dict()) if was_trained else None
        self._has_finished = False
        try:
            yield
        except BaseException:
            if not self._has_finished:
                self.is_trained_ = was_trained
                if weights is not None:
                    self.module.load_state_dict(weights)
                    self.module.eval()
                    for name, value in before.items():
                        setattr(self, name, value)
            raise
