"""``exprgen train``: cells to a model's folder."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from exprgen._errors import TrainingStoppedWarning
from exprgen.cli._files import check_place, read_cells, write_table

if TYPE_CHECKING:
    from argparse import Namespace

    from exprgen.models import GenerativeModel

__all__ = ["run"]

logger = logging.getLogger("exprgen")

_ROLES = (
    "layer", "categorical_condition_keys", "continuous_condition_keys", "condition_embedding_key",
    "batch_key", "donor_key", "size_factor_key", "allow_non_integer",
)  # fmt: skip


def run(arguments: Namespace) -> str:
    """Train and save; nothing is left to say."""
    if arguments.mean is not None and arguments.model != "HybridResidualModel":
        arguments.parser.error("argument --mean: only --model hybrid has one")
    if arguments.resume and arguments.checkpoint_dir is None:
        arguments.parser.error("argument --resume: give --checkpoint-dir, where the state is")
    overwrite = arguments.overwrite
    check_place(arguments.out, "--out", overwrite=overwrite, is_folder=True)
    if arguments.history is not None:
        check_place(arguments.history, "--history", overwrite=overwrite)
    cells = read_cells(arguments.cells, backed=arguments.backed)

    from exprgen import models

    kind = getattr(models, arguments.model)
    kind.setup_anndata(cells, **{role: getattr(arguments, role) for role in _ROLES})
    mean = {} if arguments.mean is None else {"mean": arguments.mean}
    model = kind(cells, seed=arguments.seed, **mean)
    logger.info("Training %s with seed %d.", arguments.model, arguments.seed)
    epochs = arguments.density_epochs
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingStoppedWarning)
        try:
            model.train(
                arguments.max_epochs,
                split_key=arguments.split_key,
                accelerator=arguments.accelerator,
                checkpoint_dir=arguments.checkpoint_dir,
                resume=arguments.resume,
                density_kwargs=None if epochs is None else {"max_epochs": epochs},
                progress_bar=not arguments.quiet,
            )
        except TrainingStoppedWarning as stop:
            if model.is_trained_:
                _save(model, arguments)
            raise KeyboardInterrupt(str(stop)) from stop
    _save(model, arguments)
    return ""


def _save(model: GenerativeModel, arguments: Namespace) -> None:
    import pandas as pd

    overwrite = arguments.overwrite
    model.save(arguments.out, overwrite=overwrite, donor_labels=arguments.donor_labels)
    logger.info("Wrote %s.", arguments.out)
    if arguments.history is not None:
        history = pd.concat(list((model.history_ or {}).values()) or [pd.DataFrame()], axis=1)
        write_table(history, arguments.history, overwrite=overwrite, index=True)
