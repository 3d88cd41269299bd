"""What is kept of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from torch import Tensor

    from exprgen.train._plans import StagePlan

__all__ = ["KeepBestWeights"]


class KeepBestWeights(Callback):
    """Remember the weights of the best validation epoch and put them back at the end.

    An epoch after the plan's warm-up is better than any before: until then training minimises
    something else than what is validated.

    Parameters
    ----------
    monitor
        What is validated (lower is better), in some epochs or in all; ``None`` where nothing is,
        and the last epoch is the best.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        # Whether the plan was still warming up, and the value.
        self.best = (True, math.inf)
        self.best_epoch: int | None = None
        self._weights: dict[str, Tensor] | None = None

    def restore(self, module: torch.nn.Module) -> bool:
        """Load the best weights, or those of the start; say whether an epoch was finished."""
        if self._weights is not None:
            module.load_state_dict(self._weights)
        return self.best_epoch is not None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best, "best_epoch": self.best_epoch, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]
        self._weights = state_dict["weights"]

    def _keep(self, plan: StagePlan) -> None:
        with plan.averaged():
            state = plan.module.state_dict()
            self._weights = {name: tensor.clone() for name, tensor in state.items()}

    def on_train_start(self, trainer: Trainer, pl_module: StagePlan) -> None:
        """Keep what there is, so that a run that diverges at once can be tried again."""
        if self._weights is None:  # else the run is taken up
            self._keep(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: StagePlan) -> None:
        """Keep this epoch's weights if its validation is the best so far.

        This hook runs after the validation loop. An epoch without one has the number of the last
        that had one, if any, which is not better than itself.
        """
        if self.monitor is None:
            value = -float(trainer.current_epoch)
        else:
            value = float(trainer.callback_metrics.get(self.monitor, math.inf))
        rank = pl_module.warms_up, value
        if value < math.inf and rank < self.best:
            self.best, self.best_epoch = rank, trainer.current_epoch
            self._keep(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: StagePlan) -> None:
        """Put the best weights back."""
        self.restore(pl_module.module)
