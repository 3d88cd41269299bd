"""Intervals of marker genes over what was observed, as predicted and as corrected."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exprgen._arguments import check_positive_int
from exprgen._random import resolve_seed
from exprgen.pl._style import SYNTHETIC, clean, finish, make_axes
from exprgen.pl._uncertainty import (
    DOT,
    LEGEND_WIDTH,
    columns_of,
    draw_cells,
    group_axis,
    label_width,
    value_axis,
)
from exprgen.tl._conformal import group_means
from exprgen.tl._names import text_labels
from exprgen.tl._predicted import dense, names_of, observed, read_predicted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from exprgen.tl._predicted import Predicted

__all__ = ["intervals"]


def intervals(
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    groupby: str,
    key: str = "exprgen",
    layer: str | None = None,
    n_cols: int = 4,
    max_cells: int = 150,
    axes: Sequence[Axes] | None = None,
    seed: int = 0,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Plot intervals before and after :func:`exprgen.tl.conformalize`, over observed values.

    Dots are cells, or the means of donors if the intervals are of means; the black line is their
    mean. The coloured bar is the corrected interval, the thin grey one above it the interval
    between the predicted quantiles that come closest to the level. Where a group's cells have
    different intervals their median is drawn; the shares inside, above each panel, are those of
    every cell's own.

    Parameters
    ----------
    adata
        Cells with what ``model.predict`` and ``tl.conformalize`` wrote.
    key
        The key of both.
    genes, groupby, layer, n_cols, max_cells, axes, seed, show, return_fig
        As in :func:`exprgen.pl.uncertainty`.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        One axes per gene.

    Raises
    ------
    KeyError
        A gene, the column or a layer is missing, or ``tl.conformalize`` has not run.
    ValueError
        Values that are not finite, or no counts where counts were predicted.
    """
    check_positive_int(max_cells, "max_cells")
    predicted = read_predicted(adata, key, name="adata")
    record = adata.uns[key].get("conformalize")
    if record is None:
        raise KeyError(
            f"adata has no corrected intervals under key={key!r}: run exprgen.tl.conformalize("
            "adata, calibration) first, or look at the predicted ones by exprgen.pl.uncertainty."
        )
    columns = columns_of(genes, predicted)
    labels = text_labels(adata.obs, groupby, "groupby", "adata.obs")
    rows, dots = _dots(adata, layer, predicted, record, labels)
    dots, groups = dots[:, columns], labels[rows]
    ends = _ends(adata, key, predicted, float(record["alpha"]), rows, columns)
    names = names_of(adata, groupby)

    rng = np.random.default_rng(resolve_seed(seed))
    figure, panels = make_axes(
        axes,
        len(columns),
        n_cols=n_cols,
        size=(2.9, 0.34 * len(names) + 1.1),
        share_y=True,
        beside=label_width(names),
        least_width=LEGEND_WIDTH,
    )
    for j, ax in enumerate(panels):
        for position, name in enumerate(names):
            of = groups == name
            jitter = 0.18 if predicted.whole else 0.0
            draw_cells(ax, position, dots[of, j], rng, max_cells, jitter=jitter)
            _draw_bars(ax, position, [np.median(end[of, j]) for end in ends], predicted.whole)
        inside = [
            100 * ((low <= dots[:, j]) & (dots[:, j] <= high)).mean()
            for low, high in ((ends[0][:, j], ends[1][:, j]), (ends[2][:, j], ends[3][:, j]))
        ]
        ax.set_title(predicted.genes[columns[j]], loc="left", fontsize=11, style="italic")
        ax.set_title(f"{inside[0]:.0f} → {inside[1]:.0f} % inside", loc="right", fontsize=8,
                     color="#444444")  # fmt: skip
        value_axis(ax, predicted, max(end[:, j].max() for end in (dots, *ends)))
        group_axis(ax, names)
        clean(ax)
    _legend(panels[0], float(record["alpha"]), "cell" if predicted.of == "cell" else "donor")
    return finish(figure, panels, show=show, return_fig=return_fig)


def _dots(
    adata: AnnData,
    layer: str | None,
    predicted: Predicted,
    record: Mapping[str, object],
    labels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A cell's position for each dot, ``(n,)``, and what to draw there, ``(n, n_genes)``."""
    if "donor_key" not in record:
        rows = np.arange(adata.n_obs)
        return rows, observed(adata, layer, predicted, rows)
    donors = text_labels(adata.obs, str(record["donor_key"]), "donor_key", "adata.obs")
    rows, _, means = group_means(adata, layer, predicted, donors, labels)
    return rows, means


def _ends(
    adata: AnnData,
    key: str,
    predicted: Predicted,
    alpha: float,
    rows: np.ndarray,
    columns: np.ndarray,
) -> list[np.ndarray]:
    """Lower and upper ends, predicted and corrected, ``(n, n_genes)`` each."""
    store = adata.layers if predicted.in_layers else adata.obsm
    for end in ("lower", "upper"):
        if f"{key}_{end}" not in store:
            raise KeyError(
                f"adata has no {key}_{end}, which exprgen.tl.conformalize wrote. Run it again."
            )
    near = [np.abs(predicted.levels - level).argmin() for level in (alpha / 2, 1 - alpha / 2)]
    law = predicted.law(rows, columns)
    written = (dense(store[f"{key}_{end}"]) for end in ("lower", "upper"))
    return [*law.quantiles[near], *(ends[np.ix_(rows, columns)] for ends in written)]


def _draw_bars(ax: Axes, position: int, ends: Sequence[float], whole: bool) -> None:
    # A quarter count on either side, so that the interval from 0 to 0 still shows.
    margin = 0.25 if whole else 0.0
    before, after = [ends[0] - margin, ends[1] + margin], [ends[2] - margin, ends[3] + margin]
    low, high = position - 0.38, position + 0.38
    ax.fill_between(after, low, high, color=SYNTHETIC, alpha=0.25, lw=0, zorder=1)
    ax.plot(before, [low, low], color="#555555", lw=2.5, solid_capstyle="butt", zorder=3)


def _legend(ax: Axes, alpha: float, unit: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], marker="o", ls="", color=DOT, markersize=3, label=f"observed {unit}"),
        Line2D([], [], color="black", lw=1.4, label="observed mean"),
        Line2D([], [], color="#555555", lw=2.5, label="predicted interval"),
        Patch(color=SYNTHETIC, alpha=0.25, lw=0, label=f"corrected, {100 * (1 - alpha):g} %"),
    ]
    ax.figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
