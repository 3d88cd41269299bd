"""Taking training up again: all that the next epoch depends on, in one folder.

What follows an epoch is a function of the weights and their average, of the states of optimizer,
schedule, early stopping and of the choice of the best epoch, and of where the random streams are.
Lightning collects most of that for a checkpoint and puts it back; :mod:`exprgen._files` writes it
in place of a pickle: whole or as before, verified, and read without running code. A run that is
taken up at the beginning of an epoch goes on, on the same machine with one thread, bit by bit as
if it had never been interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from exprgen._errors import CheckpointError
from exprgen._files import read_folder, write_folder
from exprgen._manifest import MANIFEST
from exprgen._random import random_states, set_random_states

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from exprgen.train._plans import StagePlan

__all__ = ["FINISHED", "KeepState", "TrainingCheckpoint", "digest_rows"]

logger = logging.getLogger("exprgen")

FINISHED = "finished"
"""The stage after the last."""

PREFIX = "checkpoint_"

# An epoch of few cells takes less time than a file does to reach the disk.
_MOST_OF_TIME = 0.02


class TrainingCheckpoint(CheckpointIO):
    """The checkpoint of one call of ``train()``.

    Parameters
    ----------
    folder
        Where it is, or will be.
    run
        What the run is: its arguments and sums of its data, by the names that an error has for
        them; ``"model"`` is the class. Whatever JSON can hold.
    resume
        Whether to take up what is there.

    Raises
    ------
    FileExistsError
        If there is a checkpoint that is not to be taken up.
    CheckpointError, UntrustedFileError
        If it is of another run, damaged, or more than plain tensors and types.
    OSError
        If the folder cannot be made, read or written to.
    """

    def __init__(
        self, folder: str | os.PathLike[str], run: dict[str, Any], *, resume: bool
    ) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self._class = f"{run['model']}.train"
        self._run = json.loads(json.dumps(run, default=np.generic.item))
        self._last, self._cost = -np.inf, 0.0
        self._has_warned = False
        self.content: dict[str, Any] | None = None
        """What is taken up; ``None`` if training begins, or when it has been taken up."""
        self.state: dict[str, Any] = {}
        """What is written besides: the stage, and what the model was before it."""
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"checkpoint_dir must be a folder; {self.folder} is a file.")
        places = (f"{PREFIX}{MANIFEST}", f".{PREFIX}saved")
        if not any((self.folder / name).exists() for name in places):
            if resume:
                logger.info("There is no checkpoint in %s: training begins.", self.folder)
        elif not resume:
            raise FileExistsError(
                f"{self.folder} (checkpoint_dir) holds a checkpoint. Go on from it by "
                "resume=True, or choose another folder."
            )
        else:
            self.content = self._read()
            stage = self.content["stage"]
            logger.info("Training is taken up from %s, stage: %s.", self.folder, stage)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            reason = "checkpoint_dir cannot be written to"
            raise PermissionError(errno.EACCES, reason, str(self.folder))

    def _read(self) -> dict[str, Any]:
        manifest, content = read_folder(self.folder, expected_class=None, prefix=PREFIX)
        theirs = manifest.get("run")
        if not isinstance(theirs, dict) or "stage" not in content:
            raise CheckpointError(f"{self.folder} holds no checkpoint of training.")
        differ = [
            f"{name} ({theirs.get(name)!r}, now {self._run.get(name)!r})"
            for name in self._run | theirs
            if theirs.get(name) != self._run.get(name)
        ]
        if differ:
            raise CheckpointError(
                f"{self.folder} (checkpoint_dir) holds the checkpoint of another run, which "
                f"differs in {', '.join(differ)}. Give what it was started with, or another "
                "folder."
            )
        return content

    @property
    def is_due(self) -> bool:
        """Whether another one would still leave 98 % of the time to training."""
        return time.monotonic() - self._last >= self._cost / _MOST_OF_TIME

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any = None, storage_options: Any = None
    ) -> None:
        """Replace the checkpoint; if that fails, keep it, and say so once."""
        begun = time.monotonic()
        payload = {**checkpoint, **self.state}
        manifest = {"class": self._class, "run": self._run}
        try:
            write_folder(
                self.folder, manifest=manifest, payload=payload, overwrite=True, prefix=PREFIX
            )
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"No checkpoint could be written ({error}). Training goes on, and what the "
                    "folder held is still there.",
                    UserWarning,
                    stacklevel=2,
                )
        self._last = time.monotonic()
        self._cost = self._last - begun

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What has been read."""
        content, self.content = self.content or {}, None
        return content

    @rank_zero_only
    def finish(self, weights: dict[str, Any], history: dict[str, Any] | None) -> None:
        """Write that the run is finished, and what came of it."""
        self.state |= {"stage": FINISHED, "history": history, "is_trained": True}
        self.save_checkpoint({"weights": weights})

    def remove_checkpoint(self, path: Any) -> None:
        """Keep it: it says that the run is finished."""


class KeepState(Callback):
    """Write a checkpoint where an epoch begins, and begin where one was written.

    To be the first of the callbacks: what others do at the beginning of an epoch they do again.

    Parameters
    ----------
    checkpoint
        Where to.
    """

    def __init__(self, checkpoint: TrainingCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._random: dict[str, Any] | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: StagePlan) -> None:
        """Go on from the checkpoint, or write one if it is time to."""
        if self._random is not None:
            set_random_states(self._random)
            self._random = None
            # Otherwise the first epoch has an order of cells that was drawn before.
            trainer.fit_loop._resuming_from_checkpoint = False
            return
        is_due = trainer.current_epoch == 0 or self.checkpoint.is_due
        if trainer.strategy.broadcast(is_due):  # clocks differ between processes
            trainer.save_checkpoint(self.checkpoint.folder, weights_only=False)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: StagePlan, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not know of."""
        for count in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            count["ready"] = count["processed"]  # the epoch that begins now is not half done
        checkpoint |= {
            "weights": pl_module.module.state_dict(),
            "random": random_states(),
            "log": dict(_log_of(trainer)),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: StagePlan, checkpoint: dict[str, Any]
    ) -> None:
        """Take back what Lightning does not know of."""
        self._random = checkpoint["random"]
        _log_of(trainer).update(checkpoint["log"])


def _log_of(trainer: Trainer) -> dict[str, Any]:
    """What scvi-tools' logger has written down; the first of several processes has it."""
    log = getattr(trainer.logger, "history", None)
    return log if isinstance(log, dict) else {}


def digest_rows(values: Any, block: int = 4096) -> str:
    """A short hash of anything with rows, read some at a time."""
    found = hashlib.blake2b(digest_size=8)
    for start in range(0, len(values), block):
        part = np.ascontiguousarray(values[np.arange(start, min(start + block, len(values)))])
        found.update(part.tobytes())
    return found.hexdigest()
