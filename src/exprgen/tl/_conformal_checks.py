"""What a calibration set must be, before anything is computed from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exprgen._errors import name_some
from exprgen.metrics._conformal import units_needed
from exprgen.tl._counts import gene_positions

if TYPE_CHECKING:
    from anndata import AnnData

    from exprgen.tl._predicted import Predicted

__all__ = ["check_alike", "check_sizes", "check_split", "check_target"]

# A gene with a threshold of its own covers a share that varies with a standard deviation of
# sqrt(alpha (1 - alpha) / (n + 2)) over calibration sets: 2 of these must stay within 3 points.
_SPREAD = 0.015


def check_alike(target: Predicted, source: Predicted) -> None:
    """Both were predicted in the same way, of the same genes."""
    pairs = {
        "model": (target.model, source.model),
        "of": (target.of, source.of),
        "n_cells": (target.n_cells or None, source.n_cells or None),
        "quantiles": (target.levels.tolist(), source.levels.tolist()),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ValueError(
                f"adata was predicted with {name}={ours!r}, calibration with {theirs!r}: predict "
                "both in the same way."
            )
    gene_positions(source.genes, target.genes, name="calibration", exact=True)


def check_target(predicted: Predicted, donor_key: str | None) -> None:
    if donor_key is None and predicted.of == "mean":
        raise ValueError(
            "The predictions are of means (predict(of='mean')), which are calibrated on donors: "
            "give donor_key. For intervals of cells predict(of='cell') under another key_added."
        )
    if donor_key is not None and predicted.of == "cell":
        raise ValueError(
            f"donor_key={donor_key!r} asks for intervals of donors' means, and the predictions "
            "are of cells: run predict(of='mean') on both, or leave donor_key out."
        )


def check_split(calibration: AnnData, key: str) -> None:
    """Calibration cells are not training cells, whose values the model knows."""
    column = f"{key}_split"
    if column not in calibration.obs:
        raise KeyError(
            f"calibration.obs has no {column!r}, which says whether training used a cell. predict "
            "writes it where the AnnData has the layer that was modelled."
        )
    trained = (calibration.obs[column] == "train").to_numpy()
    if trained.any():
        raise ValueError(
            f"{trained.sum()} of {len(trained)} calibration cells were trained on: "
            f"{name_some(calibration.obs_names[trained])}. Give cells that training has not seen, "
            f"calibration[calibration.obs[{column!r}] != 'train']."
        )


def check_sizes(
    sizes: dict[str, int], alpha: float, per_gene: bool, unit: str, groupby: str | None
) -> None:
    """Every group has the units that its promise needs."""
    absent = [name for name, n in sizes.items() if n == 0]
    if absent:
        raise ValueError(
            f"{len(absent)} of the groups of adata are not in calibration: {name_some(absent)} "
            f"(groupby={groupby!r}). There is no guarantee for what calibration does not have: "
            "leave these cells out, or use a coarser groupby."
        )
    needed, why = units_needed(alpha), "1/alpha - 1"
    if per_gene and unit == "cells":
        needed = max(needed, int(np.ceil(alpha * (1 - alpha) / _SPREAD**2 - 2 - 1e-9)))
        why = "per_gene=True, so that a gene's coverage varies by three points at most"
    few = {name or "all": n for name, n in sizes.items() if n < needed}
    if few:
        got = ", ".join(f"{name} has {n}" for name, n in list(few.items())[:3])
        more = f" and {len(few) - 3} more groups" if len(few) > 3 else ""
        raise ValueError(
            f"alpha={alpha:g} needs at least {needed} calibration {unit} per group ({why}): {got}"
            f"{more}. Give more {unit}, a larger alpha, "
            + ("per_gene=False." if why.startswith("per_gene") else "or a coarser groupby.")
        )
