"""What a calibration set must be, before anything is computed from it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from exprgen._errors import DataQualityWarning, name_some
from exprgen.metrics._conformal import units_needed
from exprgen.models._cells import GeneReader, cell_keys
from exprgen.tl._counts import gene_positions
from exprgen.tl._same_cells import repeated_cells, shared_cells

if TYPE_CHECKING:
    from anndata import AnnData

    from exprgen.tl._predicted import Predicted

__all__ = [
    "check_alike",
    "check_cells",
    "check_donors",
    "check_sizes",
    "check_split",
    "check_target",
    "warn_of_few",
    "warn_of_sizes",
]

_SPLIT = ("train", "validation", "new")
# Calibration units that may lie outside a pooled threshold. None is the most extreme value of all
# genes; with three, intervals are about a quarter of alpha too wide.
_BUDGET = 3
# Cells of a mean that was observed over those of the mean that was predicted, or the inverse.
_RATIO = 2

# A gene with a threshold of its own covers a share that varies with a standard deviation of
# sqrt(alpha (1 - alpha) / (n + 2)) over calibration sets: 2 of these must stay within 3 points.
_SPREAD = 0.015


def check_alike(target: Predicted, source: Predicted) -> None:
    """Both were predicted in the same way, of the same genes."""
    settings = [{"model": side.model, **side.settings} for side in (target, source)]
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        ours, theirs = (of_side.get(name) or None for of_side in settings)
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
    unknown = ~calibration.obs[column].isin(_SPLIT).to_numpy()
    if unknown.any():
        raise ValueError(
            f"calibration.obs[{column!r}] must be one of {name_some(_SPLIT)}, got "
            f"{name_some(calibration.obs.loc[unknown, column].unique())} in {unknown.sum()} cells."
            " Run predict again, which writes it."
        )
    trained = (calibration.obs[column] == "train").to_numpy()
    if trained.any():
        raise ValueError(
            f"{trained.sum()} of {len(trained)} calibration cells were trained on: "
            f"{name_some(calibration.obs_names[trained])}. Give cells that training has not seen, "
            f"calibration[calibration.obs[{column!r}] != 'train']."
        )


def check_cells(
    adata: AnnData, calibration: AnnData, target: Predicted, layer: str | None
) -> None:
    """Calibration cells are there once, and are none of those that intervals are for.

    Rows without values, such as a table of conditions, are no cells.
    """
    readers = [_reader(cells, target, layer) for cells in (adata, calibration)]
    if readers[1] is None:
        return
    keys = cell_keys(calibration, readers[1])
    repeated = repeated_cells(keys, readers[1])
    if repeated:
        raise ValueError(
            f"{len(repeated)} calibration cells are there more than once: "
            f"{name_some(calibration.obs_names[repeated])}. They would count as so many: leave "
            "the repeats out."
        )
    if readers[0] is None:
        return
    shared = shared_cells((cell_keys(adata, readers[0]), keys), (readers[0], readers[1]))
    if shared:
        raise ValueError(
            f"{len(shared)} cells of adata are in calibration as well: "
            f"{name_some(adata.obs_names[shared])}. Their intervals would have seen them: leave "
            "them out of one of the two."
        )


def _reader(adata: AnnData, predicted: Predicted, layer: str | None) -> GeneReader | None:
    layer = (predicted.layer or None) if layer is None else layer
    matrix = adata.X if layer is None else adata.layers.get(layer)
    if matrix is None or not predicted.genes.isin(adata.var_names).all():
        return None
    columns = gene_positions(adata.var_names, predicted.genes, name="adata", exact=False)
    return GeneReader(matrix, columns)


def check_donors(adata: AnnData, donor_key: str, donors: np.ndarray, source: Predicted) -> None:
    """Calibration donors are new to the model, and none of those that intervals are for."""
    known = np.intersect1d(donors, list(source.known_donors))
    if known.size:
        raise ValueError(
            f"{known.size} calibration donors were trained on: {name_some(known)} "
            f"(donor_key={donor_key!r}). The model knows what they are like: give donors that "
            "are new to it."
        )
    if donor_key not in adata.obs:
        return
    shared = np.intersect1d(donors, adata.obs[donor_key].dropna().astype(str))
    if shared.size:
        raise ValueError(
            f"{shared.size} donors of adata are in calibration as well: {name_some(shared)} "
            f"(donor_key={donor_key!r}). The intervals are those of new donors: leave these out "
            "of one of the two."
        )


def check_sizes(
    sizes: dict[str, int],
    alpha: float,
    per_gene: bool,
    unit: str,
    groupby: str | None,
    known: np.ndarray,
) -> None:
    """Every group has the units that its promise needs."""
    absent = [name for name, n in sizes.items() if n == 0]
    if absent:
        raise ValueError(
            f"{len(absent)} of the groups of adata are not in calibration: {name_some(absent)} "
            f"(groupby={groupby!r}); calibration has {name_some(np.unique(known), 5)}. There is "
            "no guarantee for what it does not have: leave these cells out, or use a coarser "
            "groupby."
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
            f"alpha={alpha:g} needs at least {needed:.6g} calibration {unit}"
            f"{' per group' if groupby else ''} ({why}): {got}{more}. Give "
            + ", or ".join(
                [f"more {unit}", "a larger alpha"]
                + ["a coarser groupby"] * (groupby is not None)
                + ["per_gene=False"] * why.startswith("per_gene")
            )
            + "."
        )


def warn_of_few(sizes: dict[str, int], alpha: float, unit: str) -> None:
    """Say so if a threshold for all genes makes intervals much wider than their level."""
    enough = int(np.ceil((1 + _BUDGET) / alpha - 1 - 1e-9))
    few = {name: n for name, n in sizes.items() if n < enough}
    if few:
        name, n = min(few.items(), key=lambda pair: pair[1])
        budget = max(alpha * (n + 1) - 1, 0)
        where = f" of group {name!r}" if name else ""
        more = f" (and those of {len(few) - 1} more groups)" if len(few) > 1 else ""
        warnings.warn(
            f"{n} calibration {unit}{where}{more} make intervals wide: to allow for one more, "
            f"those for {100 * (1 - alpha):g} % hold {100 * (1 - budget / n):.3g} % of the "
            f"calibration values. {enough} {unit}{' per group' if name else ''} would be enough.",
            DataQualityWarning,
            stacklevel=3,
        )


def warn_of_sizes(sizes: np.ndarray, predicted: Predicted) -> None:
    """Say so if means of other numbers of cells were observed than were predicted.

    Of a mean of infinitely many cells, intervals come out wider than they need to be.
    """
    n_cells, median = predicted.n_cells, float(np.median(sizes))
    if n_cells and not n_cells / _RATIO <= median <= n_cells * _RATIO:
        warnings.warn(
            f"The calibration means are of {median:g} cells (median; {sizes.min()} to "
            f"{sizes.max()}), the predicted ones of n_cells={n_cells}: the intervals hold for the "
            f"former. Run predict(of='mean', n_cells={median:.0f}) on both.",
            DataQualityWarning,
            stacklevel=3,
        )
