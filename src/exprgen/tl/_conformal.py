r"""Predicted intervals corrected on held-out cells, or on donors: split conformal prediction.

Every calibration value gets a tail p, how far out it lies under its prediction
(:mod:`!exprgen._levels`). The threshold :math:`\hat t` is the tail that all but a share
:math:`\alpha` of them reach (:func:`~exprgen.metrics.conformal_threshold`), and the interval
written is all values whose tail may reach it. A model that is right has :math:`\hat t = \alpha`.
The correction acts on levels, not on counts: it moves all genes by the same share of probability,
where a count more or less is nothing to an abundant gene and all there is to a rare one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from exprgen import _arguments, _slots
from exprgen._random import resolve_seed
from exprgen._tables import key_list
from exprgen.metrics import conformal_threshold
from exprgen.tl._conformal_checks import (
    check_alike,
    check_cells,
    check_donors,
    check_sizes,
    check_split,
    check_target,
    warn_of_few,
    warn_of_sizes,
)
from exprgen.tl._counts import gene_positions
from exprgen.tl._names import text_labels
from exprgen.tl._predicted import Predicted, observed, read_predicted

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["conformalize", "group_means"]


def conformalize(
    adata: AnnData,
    calibration: AnnData,
    *,
    key: str = "exprgen",
    alpha: float = 0.1,
    groupby: str | None = None,
    per_gene: bool | None = None,
    donor_key: str | None = None,
    layer: str | None = None,
    overwrite: bool = False,
    copy: bool = False,
    seed: int | None = None,
) -> AnnData:
    r"""Intervals that hold their level on cells, or donors, like those of a calibration set.

    Writes layers ``{key}_lower`` and ``{key}_upper``, closed intervals of level 1 - alpha. What is
    promised: of a new unit that is *exchangeable* with the calibration units (of its group), at
    most a share alpha of the values lies outside, in expectation over units and calibration sets
    :cite:p:`angelopoulos2024`. This holds whatever the model. It does not hold

    - for each gene, where genes share a threshold: they differ as they do in the model;
    - across conditions, perturbations or laboratories that the calibration set does not have;
    - for each calibration set: with n units the coverage varies around its level, at worst with a
      standard deviation of :math:`\sqrt{\alpha(1 - \alpha)/n}`.

    **Two targets.** Without ``donor_key`` the unit is a cell and the interval one of a cell's
    values: ``predict(of="cell")``. With ``donor_key`` the unit is a donor and the interval one of
    the mean of a new donor's cells: ``predict(of="mean")``, the calibration donors being new to
    the model as well. A promise needs :math:`1/\alpha - 1` units at least: nine donors for 90 %,
    four for 80 %. With so few it rests on the most extreme of them.

    Bounds of counts are whole numbers: closed intervals cover more than their level, above all
    those of rare genes. What is exact is the randomised rank,
    :func:`exprgen.metrics.conformal_rank`.

    Parameters
    ----------
    adata
        Cells to write to, with ``model.predict(adata, key_added=key)``. Observed values of these
        are not read.
    calibration
        Cells that training has not seen, none of them in ``adata``, predicted in the same way: by
        the same model, with the same arguments (but for the seed).
    key
        The ``key_added`` of both.
    alpha
        Share of values that may lie outside, in (0, 1).
    groupby
        Column of obs, such as the condition: a threshold for each of its groups. None is one
        threshold for all; its promise is one about all groups together. A group's threshold
        allows for the worst that one more unit could do, which widens intervals by up to
        1 / (n + 1) of coverage, n the group's units.
    per_gene
        A threshold for every gene, of which the promise then holds too; by default for donors and
        not for cells. Of cells there are enough to pool genes; a gene's own threshold makes its
        coverage worse unless the set is large, and is refused where it would vary by more than
        three points (two standard deviations): below about 400 cells for 90 %. Of donors there
        are few: allowing for one more, a threshold for all genes would be the most extreme of
        all genes.
    donor_key
        Column of obs with donors: calibrate means of donors. The cells of a donor that share a
        prediction are averaged. The donors must be new to the model, and none of ``adata``'s.
    layer
        Observed values of ``calibration``. By default what was modelled, as ``predict`` recorded;
        another layer is refused.
    overwrite, copy
        As in the models' ``predict``.
    seed
        Of the ties, which counts have many of.

    Returns
    -------
    AnnData
        The object that carries the results: ``adata``, or a copy if it was a view or ``copy``.
        ``uns[key]["conformalize"]`` has the ``groups``, their numbers of units ``n_units``,
        ``(n_groups,)``, the ``cells_per_mean`` of donors, ``(n_means,)``, and ``threshold``,
        ``(n_groups,)``, or ``(n_groups, n_genes)`` if ``per_gene``: 1 - threshold is the level of
        the model's own interval that is written. Running ``predict`` again removes it all.

    Raises
    ------
    KeyError
        Predictions, layers or columns are missing.
    ValueError
        Too few units, training cells or donors in ``calibration``, cells or donors on both sides,
        predictions that differ in kind, groups without calibration units, or values that are not
        finite. Nothing is written then.

    Warns
    -----
    DataQualityWarning
        If a group has fewer units than 4/alpha - 1 and genes share a threshold: its intervals
        are valid and wide, at 1/alpha - 1 units as wide as the most extreme value of all genes. If
        the means of donors' cells are of half as many cells as ``n_cells``, or twice.
    """
    alpha = _arguments.check_number(alpha, "alpha", "(0, 1)")
    if per_gene is None:
        per_gene = donor_key is not None
    _arguments.check_bool(per_gene, "per_gene")
    key_list(layer, "layer", many=False)
    seed = resolve_seed(seed)
    target = read_predicted(adata, key, name="adata")
    source = read_predicted(calibration, key, name="calibration")
    check_alike(target, source)
    check_target(target, donor_key)
    check_split(calibration, key)
    check_cells(adata, calibration, target, layer)
    groups = _groups(adata, groupby, "adata")
    source_groups = _groups(calibration, groupby, "calibration")
    if donor_key is None:
        units, labels = np.arange(calibration.n_obs), source_groups
        values = cells_per_mean = None
    else:
        donors = text_labels(calibration.obs, donor_key, "donor_key", "calibration.obs")
        check_donors(adata, donor_key, donors, source)
        rows, cells_per_mean, values = group_means(
            calibration, layer, source, donors, source_groups
        )
        units, labels = donors[rows], source_groups[rows]
        source = _subset(source, rows)
    names = list(dict.fromkeys(groups.tolist()))
    sizes = {name: len(np.unique(units[labels == name])) for name in names}
    unit = "cells" if donor_key is None else "donors"
    check_sizes(sizes, alpha, per_gene, unit, groupby, source_groups)

    columns = gene_positions(source.genes, target.genes, name="calibration", exact=True)
    rng = np.random.default_rng(seed)
    tails, lowest = np.empty((len(labels), len(target.genes))), 0.0
    for rows in source.blocks():
        x = observed(calibration, layer, source, rows) if values is None else values[rows]
        law = source.law(rows, columns)
        tails[rows] = law.tail(x[:, columns], rng.random(x.shape))
        lowest = min(lowest, x.min(), law.quantiles.min())
    thresholds = np.stack(
        [_thresholds(tails[labels == n], units[labels == n], alpha, per_gene) for n in names]
    )
    of_cells = thresholds[pd.Index(names).get_indexer(groups)]
    lower, upper = _bounds(target, of_cells, least=0.0 if lowest >= 0 else -np.inf)

    result = _slots.target(adata, copy)
    _slots.write(
        result,
        key,
        "conformalize",
        model=target.model,
        layers={"lower": lower, "upper": upper},
        info={
            "of": target.of,
            "alpha": alpha,
            "groupby": groupby,
            "groups": None if groupby is None else names,
            "donor_key": donor_key,
            "per_gene": per_gene,
            "n_units": np.array(list(sizes.values())),
            "cells_per_mean": cells_per_mean,
            "threshold": thresholds if per_gene else thresholds[:, 0],
            "seed": seed,
        },
        var_names=None if target.in_layers else list(target.genes),
        overwrite=overwrite,
    )
    if not per_gene:
        warn_of_few(sizes, alpha, unit)
    if cells_per_mean is not None:
        warn_of_sizes(cells_per_mean, source)
    return result


def group_means(
    adata: AnnData,
    layer: str | None,
    predicted: Predicted,
    donors: np.ndarray,
    groups: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of the cells of a donor and group that share a prediction.

    Parameters
    ----------
    adata, layer
        Cells and where their values are.
    predicted
        What was predicted of them.
    donors, groups
        Labels, ``(n_obs,)`` each.

    Returns
    -------
    Position of a cell of each mean ``(n,)``, how many cells it is of ``(n,)``, and the means
    ``(n, n_genes)``.
    """
    laws = [
        row.tobytes()
        for rows in predicted.blocks()
        for row in np.moveaxis(predicted.law(rows).quantiles, 0, 1)
    ]
    table = pd.DataFrame({"donor": donors, "group": groups, "law": laws})
    codes = table.groupby(list(table), sort=False).ngroup().to_numpy()
    sums = np.zeros((codes.max() + 1, len(predicted.genes)))
    for rows in predicted.blocks():
        np.add.at(sums, codes[rows], observed(adata, layer, predicted, rows))
    _, first = np.unique(codes, return_index=True)
    sizes = np.bincount(codes)
    return first, sizes, sums / sizes[:, None]


def _groups(adata: AnnData, groupby: str | None, name: str) -> np.ndarray:
    if groupby is None:
        return np.full(adata.n_obs, "", dtype=object)
    return text_labels(adata.obs, groupby, "groupby", f"{name}.obs")


def _thresholds(tails: np.ndarray, units: np.ndarray, alpha: float, per_gene: bool) -> np.ndarray:
    """One threshold, ``(1,)``, or one per gene, ``(n_genes,)``."""
    if not per_gene:
        return np.array([conformal_threshold(tails, alpha, units=units)])
    return np.array([conformal_threshold(gene, alpha, units=units) for gene in tails.T])


def _bounds(
    predicted: Predicted, thresholds: np.ndarray, *, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of intervals, ``(n_obs, n_genes)`` float32, for thresholds per cell (and gene)."""
    shape = predicted.std.shape
    lower, upper = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for rows in predicted.blocks():
        law = predicted.law(rows)
        ends = law.interval(thresholds[rows])
        # Where nothing was ever negative, an interval does not reach below 0 either.
        floor = np.minimum(least, law.quantiles[0])
        lower[rows], upper[rows] = (np.maximum(end, floor) for end in ends)
    return lower, upper


def _subset(predicted: Predicted, rows: np.ndarray) -> Predicted:
    """The predictions of some cells."""
    quantiles = [layer[rows] for layer in predicted.quantiles]
    return replace(predicted, quantiles=quantiles, std=predicted.std[rows])
