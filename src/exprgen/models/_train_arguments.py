"""Dictionaries of settings that :meth:`train` passes on: refused before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from scvi.train import Trainer

from exprgen import _arguments
from exprgen._errors import closest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["checked_trainer", "checked_words"]

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
