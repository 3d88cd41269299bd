"""Predicted ranges of genes beside the cells that were observed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen._errors import closest
from exprgen.pl._style import SYNTHETIC, clean, finish, make_axes
from exprgen.tl._counts import read_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DOT",
    "LEGEND_WIDTH",
    "count_axis",
    "draw_cells",
    "group_axis",
    "label_width",
    "uncertainty",
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
    layer: str | None = "counts",
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
        Names in ``.var_names``: one panel each.
    groupby
        Column of ``.obs``; its groups stand below each other.
    key
        The ``key_added`` of ``predict``: layers ``{key}_mean`` and ``{key}_{quantile}`` are read.
    interval
        Names of the lower and upper quantile layers.
    layer
        Observed counts; None for ``.X``.
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
        A gene, the column or a layer is missing.
    """
    genes = [genes] if isinstance(genes, str) else list(genes)
    needed = [f"{key}_mean", *(f"{key}_{name}" for name in interval)]
    _check(adata, genes, groupby, needed)
    columns = adata.var_names.get_indexer(genes)
    observed = read_counts(adata, layer, name="adata")[:, columns].toarray()
    mean, lower, upper = (_columns(adata.layers[name], columns) for name in needed)
    groups = adata.obs[groupby].astype("category")
    names = groups.cat.remove_unused_categories().cat.categories

    rng = np.random.default_rng(seed)
    figure, panels = make_axes(
        axes,
        len(genes),
        n_cols=n_cols,
        size=(2.9, 0.3 * len(names) + 1.0),
        share_y=True,
        beside=label_width(names),
        least_width=LEGEND_WIDTH,
    )
    for j, (ax, gene) in enumerate(zip(panels, genes, strict=True)):
        for position, name in enumerate(names):
            rows = np.flatnonzero((groups == name).to_numpy())
            draw_cells(ax, position, observed[rows, j], rng, max_cells)
            _draw_prediction(ax, position, *(np.median(v[rows, j]) for v in (mean, lower, upper)))
        inside = ((lower[:, j] <= observed[:, j]) & (observed[:, j] <= upper[:, j])).mean()
        ax.set_title(gene, loc="left", fontsize=11, style="italic")
        ax.set_title(f"{100 * inside:.0f} % inside", loc="right", fontsize=8, color="#444444")
        count_axis(ax, max(observed[:, j].max(), upper[:, j].max()))
        group_axis(ax, names)
        clean(ax)
    _legend(panels[0], interval)
    return finish(figure, panels, show=show, return_fig=return_fig)


def _check(adata: AnnData, genes: Sequence[str], groupby: str, needed: Sequence[str]) -> None:
    for gene in genes:
        if gene not in adata.var_names:
            raise KeyError(f"No gene {gene!r} in .var_names.{closest(gene, adata.var_names)}")
    if not genes:
        raise ValueError("genes is empty; name at least one gene of .var_names.")
    if groupby not in adata.obs:
        raise KeyError(
            f"No column {groupby!r} in .obs; its columns are {list(adata.obs.columns)}."
        )
    absent = [name for name in needed if name not in adata.layers]
    if absent:
        raise KeyError(
            f"adata has no layer {absent[0]!r}. Run model.predict(adata) first (for all genes), "
            "with this key as key_added and these quantiles."
        )


def _columns(matrix: Any, columns: np.ndarray) -> np.ndarray:
    from scipy import sparse

    block = matrix[:, columns]
    return block.toarray() if sparse.issparse(block) else np.asarray(block)


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


def _draw_prediction(ax: Axes, position: int, mean: float, lower: float, upper: float) -> None:
    # A quarter count on either side, so that the interval from 0 to 0 still shows.
    x = [lower - 0.25, upper + 0.25]
    ax.fill_between(
        x, position - 0.38, position + 0.38, color=SYNTHETIC, alpha=0.22, lw=0, zorder=1
    )
    ax.scatter(mean, position, s=34, color=SYNTHETIC, edgecolors="white", linewidths=0.9, zorder=5)


def count_axis(ax: Axes, top: float) -> None:
    """Counts on a log(1 + x) scale, labelled in counts."""
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

    low, high = (name.removeprefix("q").lstrip("0") or "0" for name in interval)
    handles = [
        Line2D([], [], marker="o", ls="", color=DOT, markersize=3, label="observed cell"),
        Line2D([], [], color="black", lw=1.4, label="observed mean"),
        Line2D([], [], marker="o", ls="", color=SYNTHETIC, markersize=6, label="predicted mean"),
        Patch(color=SYNTHETIC, alpha=0.22, lw=0, label=f"predicted {low}–{high} %"),
    ]
    ax.figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
