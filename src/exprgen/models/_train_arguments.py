"""Dictionaries of settings that :meth:`train` passes on: refused before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ModelCheckpoint
from scvi.train import Trainer

from exprgen import _arguments
from exprgen._errors import closest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exprgen.train import StagePlan

__all__ = ["check_checkpoints", "checked_trainer", "checked_words", "without_checkpoints"]

# What train() itself decides, by the name it has there.
_OWN_WORDS = {
    "accelerator": "accelerator=",
    "check_val_every_n_epoch": "early_stopping=",
    "devices": "devices=",
    "early_stopping": "early_stopping=",
    "early_stopping_monitor": "early_stopping=",
    "early_stopping_patience": "early_stopping_patience=",
    "enable_progress_bar": "progress_bar=",
    "log_every_n_steps": "progress_bar=",
    "max_epochs": "max_epochs=",
}


# What would leave epochs without training, or without validation.
_WITHOUT_EPOCHS = {
    "fast_dev_run",
    "limit_train_batches",
    "limit_val_batches",
    "max_steps",
    "max_time",
    "min_steps",
    "overfit_batches",
}


def checked_words(
    kwargs: dict[str, Any] | None, argument: str, *owners: type, also: Sequence[str] = ()
) -> dict[str, Any]:
    """Refuse unknown keywords before anything runs."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"{argument} must be a dict or None, got {kwargs!r}.")
    allowed = {word for owner in owners for word in inspect.signature(owner).parameters}
    allowed = allowed - {"module", "n_obs_training", "seed", "kwargs"} | {*also}
    for word in kwargs or {}:
        if word not in allowed:
            raise TypeError(
                f"{argument} has no {word!r}; it takes {sorted(allowed)}.{closest(word, allowed)}"
            )
    return dict(kwargs or {})


def checked_trainer(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Refuse what the trainer would, and what train() decides, before anything runs."""
    # scvi-tools' trainer hands what it does not know to Lightning's.
    kwargs = checked_words(kwargs, "trainer_kwargs", Trainer, LightningTrainer)
    for word in _WITHOUT_EPOCHS & kwargs.keys():
        raise TypeError(
            f"trainer_kwargs[{word!r}]: the best of whole, validated epochs is kept, so none can "
            "be cut short. Give max_epochs=, train_size= or split_key= to train()."
        )
    if kwargs.get("precision", "32-true") not in (32, "32", "32-true", "bf16-mixed", "16-mixed"):
        raise ValueError(
            "trainer_kwargs['precision'] must be '32-true', '16-mixed' or 'bf16-mixed', got "
            f"{kwargs['precision']!r}."
        )
    for word in _OWN_WORDS.keys() & kwargs.keys():
        raise TypeError(f"Give {_OWN_WORDS[word]} to train() instead of trainer_kwargs[{word!r}].")
    callbacks = kwargs.get("callbacks", [])
    known = isinstance(callbacks, list | tuple) and all(
        isinstance(callback, Callback) for callback in callbacks
    )
    if not known:
        raise TypeError(
            "trainer_kwargs['callbacks'] must be a list of lightning.pytorch.Callback, got "
            f"{callbacks!r}."
        )
    if kwargs.get("gradient_clip_val") is not None:
        _arguments.check_number(kwargs["gradient_clip_val"], "trainer_kwargs['gradient_clip_val']")
    return kwargs


def check_checkpoints(kwargs: Mapping[str, Any], last: type[StagePlan]) -> None:
    """Refuse to watch what the last stage does not log: until then there is no whole model."""
    logged = [term.format(mode) for term in last.terms for mode in ("train", "validation")]
    watched = {
        f"monitor={callback.monitor!r} of {type(callback).__name__}": callback.monitor
        for callback in kwargs.get("callbacks", [])
        if isinstance(callback, ModelCheckpoint)
    }
    if kwargs.get("enable_checkpointing") and not watched:
        monitor = kwargs.get("checkpointing_monitor", "validation_loss")
        watched = {f"trainer_kwargs['checkpointing_monitor']={monitor!r}": monitor}
    for said, monitor in watched.items():
        if monitor is not None and monitor not in logged:
            raise ValueError(
                f"{said} is not logged by the stage of training in which there are whole models "
                f"to save; it logs {logged}.{closest(monitor, logged)}"
            )


def without_checkpoints(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for a stage that ends without a whole model."""
    callbacks = [c for c in kwargs["callbacks"] if not isinstance(c, ModelCheckpoint)]
    return {**kwargs, "callbacks": callbacks, "enable_checkpointing": False}
