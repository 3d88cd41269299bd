"""``exprgen predict``: a model's folder, and conditions, to statistics of each gene."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from exprgen.cli._conditions import check_asked, read_conditions
from exprgen.cli._files import check_place, read_cells, read_model, write_cells, write_table
from exprgen.cli._words import TABLES

if TYPE_CHECKING:
    from argparse import Namespace

    import pandas as pd
    from anndata import AnnData

    from exprgen.models import GenerativeModel

__all__ = ["run"]

logger = logging.getLogger("exprgen")

_KEY = "exprgen"


def run(arguments: Namespace) -> str:
    """Predict and write; nothing is left to say."""
    check_asked(arguments)
    asked = bool(arguments.condition) or arguments.conditions is not None
    if asked == (arguments.cells is not None):
        arguments.parser.error("give either cells, or conditions by --condition or --conditions")
    out, overwrite = arguments.out, arguments.overwrite
    is_store, is_table = (out.suffix.lower() in kind for kind in ((".zarr",), TABLES))
    check_place(out, "--out", overwrite=overwrite, is_folder=is_store)
    model = read_model(arguments.model)
    cells = read_conditions(arguments, model.schema) if asked else read_cells(arguments.cells)
    predicted = model.predict(
        cells,
        of=arguments.of,
        n_cells=arguments.n_cells,
        genes=arguments.genes,
        library=arguments.library,
        n_samples=arguments.n_samples,
        quantiles=arguments.quantiles,
        backed=out if is_store else None,
        overwrite=overwrite,
        progress_bar=not arguments.quiet,
        seed=arguments.seed,
    )
    if is_table:
        table = _by_gene(predicted, model)
        write_table(table, out, overwrite=overwrite, index=False)
    elif is_store:
        logger.info("Wrote %s.", out)
    else:
        write_cells(predicted, out, overwrite=overwrite)
    return ""


def _by_gene(predicted: AnnData, model: GenerativeModel) -> pd.DataFrame:
    """One row per row of conditions and gene: name, conditions, gene, statistics."""
    import numpy as np
    import pandas as pd

    entry = predicted.uns[_KEY]["predict"]
    genes = list(entry.get("var_names", predicted.var_names))
    asked = predicted.obs[[key for key in model.schema.column_keys if key in predicted.obs]]
    rows = np.repeat(np.arange(predicted.n_obs), len(genes))
    table = asked.iloc[rows].reset_index(names="row")
    table["gene"] = np.tile(genes, predicted.n_obs)
    for slot in entry["slots"]:
        place, _, name = slot.partition("/")
        if place != "obs":
            table[name.removeprefix(f"{_KEY}_")] = np.ravel(getattr(predicted, place)[name])
    return pd.DataFrame(table)
