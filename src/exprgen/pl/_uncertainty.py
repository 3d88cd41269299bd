"""Predicted ranges of genes beside the cells that were observed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pandas.api.types import is_list_like

from exprgen._arguments import check_genes, check_positive_int
from exprgen._errors import name_some
from exprgen._random import resolve_seed
from exprgen._slots import quantile_name
from exprgen.pl._style import SYNTHETIC, clean, finish, make_axes
from exprgen.tl._names import check_names, text_labels
from exprgen.tl._predicted import dense, names_of, observed, read_predicted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from exprgen.tl._predicted import Predicted

__all__ = [
    "DOT",
    "LEGEND_WIDTH",
    "columns_of",
    "draw_cells",
    "group_axis",
    "label_width",
    "uncertainty",
    "value_axis",
]

DOT = "#8C8C8C"
LEGEND_WIDTH = 6.6  # inches, of four entries beside each other


def uncertainty(
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    groupby: str,
    key: str = "exprgen",
    interval: tuple[str, str] = ("q05", "q95"),
    layer: str | None = None,
    n_cols: int = 4,
    max_cells: int = 150,
    axes: Sequence[Axes] | None = None,
    seed: int = 0,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Plot the predicted mean and interval of genes per group over the observed cells.

    Grey dots are cells (jittered, since counts coincide), the black line their mean; the band is
    the predicted interval for a cell, the coloured dot the predicted mean. Where a group's cells
    have different predictions, their median is drawn; the share of cells inside their interval,
    above each panel, uses every cell's own.

    Parameters
    ----------
    adata
        Real cells with what ``model.predict(adata)`` wrote.
    genes
        Names: one panel each.
    groupby
        Column of ``.obs``; its groups stand below each other.
    key
        The ``key_added`` of ``predict``: ``{key}_mean`` and ``{key}_{quantile}`` are read.
    interval
        Names of the lower and the upper quantile.
    layer
        Observed values; by default the layer that was modelled.
    n_cols
        Panels per row.
    max_cells
        At most so many dots per group.
    axes
        As many axes as genes, to draw on.
    seed
        Of the jitter and of the cells shown.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        One axes per gene.

    Raises
    ------
    KeyError
        A gene, the column, the predictions or a layer are missing.
    ValueError
        The predictions are of means; ``interval`` is none of theirs; values that are not finite,
        or no counts where counts were predicted.
    """
    check_positive_int(max_cells, "max_cells")
    predicted = read_predicted(adata, key, name="adata")
    if predicted.of == "mean":
        raise ValueError(
            "The predictions are of means (predict(of='mean')), and cells do not lie in intervals "
            "of means. Run predict(of='cell') under another key_added."
        )
    columns = columns_of(genes, predicted)
    lower, upper = _interval(interval, predicted)
    store = adata.layers if predicted.in_layers else adata.obsm
    if f"{key}_mean" not in store:
        raise KeyError(f"adata has no {key}_mean, which predict wrote. Run it again.")
    labels, names = (
        text_labels(adata.obs, groupby, "groupby", "adata.obs"),
        names_of(adata, groupby),
    )
    values = observed(adata, layer, predicted, np.arange(adata.n_obs))[:, columns]
    mean, lower, upper = (
        dense(matrix)[:, columns] for matrix in (store[f"{key}_mean"], lower, upper)
    )

    rng = np.random.default_rng(resolve_seed(seed))
    figure, panels = make_axes(
        axes,
        len(columns),
        n_cols=n_cols,
        size=(2.9, 0.3 * len(names) + 1.0),
        share_y=True,
        beside=label_width(names),
        least_width=LEGEND_WIDTH,
    )
    for j, ax in enumerate(panels):
        for position, name in enumerate(names):
            of = labels == name
            jitter = 0.18 if predicted.whole else 0.0
            draw_cells(ax, position, values[of, j], rng, max_cells, jitter=jitter)
            middle = [float(np.median(v[of, j])) for v in (mean, lower, upper)]
            _draw_prediction(ax, position, *middle, whole=predicted.whole)
        inside = ((lower[:, j] <= values[:, j]) & (values[:, j] <= upper[:, j])).mean()
        ax.set_title(predicted.genes[columns[j]], loc="left", fontsize=11, style="italic")
        ax.set_title(f"{100 * inside:.0f} % inside", loc="right", fontsize=8, color="#444444")
        value_axis(ax, predicted, max(values[:, j].max(), upper[:, j].max()))
        group_axis(ax, names)
        clean(ax)
    _legend(panels[0], interval)
    return finish(figure, panels, show=show, return_fig=return_fig)


def columns_of(genes: str | Sequence[str], predicted: Predicted) -> np.ndarray:
    """Positions of the named genes among those that were predicted."""
    return check_genes(check_names(genes, "genes", ""), predicted.genes)


def _interval(interval: Sequence[str], predicted: Predicted) -> list[Any]:
    """The quantiles of two names, ``(n_obs, n_genes)`` each."""
    names = [quantile_name(level) for level in predicted.levels]
    wanted: list[Any] = list(interval) if is_list_like(interval) else [interval]
    if len(wanted) != 2 or any(name not in names for name in wanted):
        raise ValueError(
            f"interval must be two of the predicted quantiles, {name_some(names, 20)}, got "
            f"{interval!r}."
        )
    low, high = sorted(map(names.index, wanted))
    return [predicted.quantiles[low], predicted.quantiles[high]]


def draw_cells(
    ax: Axes,
    position: int,
    values: np.ndarray,
    rng: np.random.Generator,
    max_cells: int,
    *,
    jitter: float = 0.18,
) -> None:
    """Dots of a group's values at a height, and their mean."""
    shown = rng.permutation(values)[:max_cells]
    x = shown + rng.uniform(-jitter, jitter, shown.size)
    y = position + rng.uniform(-0.3, 0.3, shown.size)
    ax.scatter(x, y, s=6, color=DOT, alpha=0.5, linewidths=0, zorder=2)
    line = values.mean()
    ax.plot([line, line], [position - 0.36, position + 0.36], color="black", lw=1.4, zorder=4)


def _draw_prediction(
    ax: Axes, position: int, mean: float, lower: float, upper: float, *, whole: bool
) -> None:
    # A quarter count on either side, so that the interval from 0 to 0 still shows.
    margin = 0.25 if whole else 0.0
    x = [lower - margin, upper + margin]
    ax.fill_between(
        x, position - 0.38, position + 0.38, color=SYNTHETIC, alpha=0.22, lw=0, zorder=1
    )
    ax.scatter(mean, position, s=34, color=SYNTHETIC, edgecolors="white", linewidths=0.9, zorder=5)


def value_axis(ax: Axes, predicted: Predicted, top: float) -> None:
    """Counts on a log(1 + x) scale, labelled in counts; other values as they are."""
    if not predicted.whole:
        ax.set_xlabel("mean of a donor's cells" if predicted.of == "mean" else "value per cell")
        return
    ticks = [0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000]
    ax.set_xscale("function", functions=(_log1p, np.expm1))
    ax.set_xlim(-0.35, 1.15 * max(top, 2) + 0.5)
    ax.set_xticks([tick for tick in ticks if tick <= max(top, 2) * 1.15])
    ax.minorticks_off()
    ax.set_xlabel("counts per cell")


def _log1p(values: np.ndarray) -> np.ndarray:
    return np.log1p(np.maximum(values, -0.9))


def label_width(names: Sequence[object]) -> float:
    """Width of the groups' labels beside the first panel, about, in inches."""
    return 0.08 * max(len(str(name)) for name in names)


def group_axis(ax: Axes, names: Sequence[object]) -> None:
    """Groups below each other."""
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def _legend(ax: Axes, interval: tuple[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    low, high = (name.removeprefix("q").lstrip("0") or "0" for name in sorted(interval))
    handles = [
        Line2D([], [], marker="o", ls="", color=DOT, markersize=3, label="observed cell"),
        Line2D([], [], color="black", lw=1.4, label="observed mean"),
        Line2D([], [], marker="o", ls="", color=SYNTHETIC, markersize=6, label="predicted mean"),
        Patch(color=SYNTHETIC, alpha=0.22, lw=0, label=f"predicted {low}–{high} %"),
    ]
    ax.figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
