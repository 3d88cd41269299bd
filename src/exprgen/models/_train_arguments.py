"""Dictionaries of settings that :meth:`train` passes on: refused before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import ModelCheckpoint
from scvi.train import Trainer

from exprgen import _arguments
from exprgen._errors import closest
from exprgen.train import DensityTrainingPlan, GenerativeTrainingPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from exprgen.train import StagePlan

__all__ = [
    "check_accelerator",
    "check_checkpoints",
    "check_strategy",
    "checked_trainer",
    "checked_words",
    "known_words",
    "said_of_trainer",
    "without_checkpoints",
]

P = ParamSpec("P")
R = TypeVar("R")

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
    "strategy": "strategy=",
    "use_distributed_sampler": "strategy=",
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


# Of the trainer's settings those that change what is learned.
_OF_TRAINING = (
    "accumulate_grad_batches",
    "early_stopping_min_delta",
    "early_stopping_mode",
    "early_stopping_warmup_epochs",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "precision",
    "reload_dataloaders_every_n_epochs",
    "val_check_interval",
)

_HOMES = {
    "plan_kwargs": (GenerativeTrainingPlan,),
    "density_kwargs": (DensityTrainingPlan,),
    "trainer_kwargs": (Trainer, LightningTrainer),
}


def known_words(method: Callable[P, R]) -> Callable[P, R]:
    """Refuse keywords that a method does not have, and say where they belong."""
    known = inspect.signature(method).parameters.keys()
    name = method.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for word in kwargs.keys() - known:
            homes = [home for home in _HOMES if home in known and word in _words(*_HOMES[home])]
            hint = closest(word, known)
            if homes:
                hint = f" Give it as {' or '.join(homes)}={{{word!r}: ...}}."
            raise TypeError(f"{name}() has no argument {word!r}.{hint}")
        return method(*args, **kwargs)

    return checked


def check_accelerator(accelerator: Any) -> None:
    """Refuse an accelerator that Lightning does not know, or that is not here.

    Raises
    ------
    ValueError
        If it has no such name.
    RuntimeError
        If there is none.
    """
    if not isinstance(accelerator, str) or accelerator == "auto":
        return
    names = AcceleratorRegistry.available_accelerators()
    here = [name for name in names if AcceleratorRegistry[name]["accelerator"].is_available()]
    if accelerator not in {"gpu", *names}:
        raise ValueError(
            f"accelerator must be 'auto', 'gpu' or one of {sorted(names)}, got {accelerator!r}."
            f"{closest(accelerator, names)}"
        )
    if not {"cuda", "mps"} & {*here} if accelerator == "gpu" else accelerator not in here:
        raise RuntimeError(
            f"accelerator={accelerator!r}: there is none here that torch can use. Available: "
            f"{', '.join(map(repr, here))}."
        )


def check_strategy(strategy: Any) -> None:
    """Refuse a way of training on several devices that is not offered.

    Raises
    ------
    ValueError
        If it has no such name.
    """
    names = ["auto", "ddp"]
    if strategy not in names:
        raise ValueError(
            f"strategy must be 'auto' or 'ddp', got {strategy!r}.{closest(str(strategy), names)} "
            "Both run the script in each of several processes; there is no other way here."
        )


def said_of_trainer(kwargs: Mapping[str, Any]) -> dict[str, str]:
    """What decides what is learned, among the trainer's settings."""
    return {name: str(kwargs[name]) for name in _OF_TRAINING if name in kwargs}


def _words(*owners: type) -> set[str]:
    words = {word for owner in owners for word in inspect.signature(owner).parameters}
    return words - {"module", "n_obs_training", "seed", "kwargs"}


def checked_words(
    kwargs: dict[str, Any] | None, argument: str, *owners: type, also: Sequence[str] = ()
) -> dict[str, Any]:
    """Refuse unknown keywords before anything runs."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"{argument} must be a dict or None, got {kwargs!r}.")
    allowed = _words(*owners) | {*also}
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
