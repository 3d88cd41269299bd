"""``exprgen sample``: a model's folder to new cells."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from exprgen.cli._conditions import check_asked, read_conditions
from exprgen.cli._files import check_place, read_model, write_cells

if TYPE_CHECKING:
    from argparse import Namespace

__all__ = ["run"]

logger = logging.getLogger("exprgen")


def run(arguments: Namespace) -> str:
    """Draw and write; nothing is left to say."""
    check_asked(arguments)
    out, is_store = arguments.out, arguments.out.suffix.lower() == ".zarr"
    check_place(out, "--out", overwrite=arguments.overwrite, is_folder=is_store)
    model = read_model(arguments.model)
    drawn = model.sample(
        read_conditions(arguments, model.schema),
        arguments.n_obs,
        marginalize=arguments.marginalize,
        library="sampled" if arguments.library is None else arguments.library,
        backed=out if is_store else None,
        overwrite=arguments.overwrite,
        progress_bar=not arguments.quiet,
        seed=arguments.seed,
    )
    if is_store:
        logger.info("Wrote %s.", out)
    else:
        write_cells(drawn, out, overwrite=arguments.overwrite)
    logger.info("%d new cells.", drawn.n_obs)
    return ""
