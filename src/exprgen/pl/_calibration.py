"""Do predicted laws hold what they promise, at every level?"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from exprgen._arguments import check_positive_int
from exprgen._random import resolve_seed
from exprgen.pl._style import CONTROL, REAL, SYNTHETIC, clean, finish, make_axes
from exprgen.tl._names import text_labels
from exprgen.tl._predicted import (
    BLOCK,
    Predicted,
    check_given,
    names_of,
    observed,
    read_predicted,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["calibration", "pit"]

_NOMINAL = np.linspace(0.02, 0.98, 49)
_LEVELS = 100 * _NOMINAL
_GENES, _REAL = "95 % of genes", "among real cells"
_EXACT = "95 % of genes if exact"
_BAND = (0.025, 0.975)
_FEWEST = 20  # cells, of which the scatter of bars can be told
_LONGEST = 18  # letters of a name that stands beside the number of cells


class _Transforms(NamedTuple):
    """Of a group: the randomised PIT of its cells, and of the same among real cells."""

    name: str
    u: np.ndarray  # (n_obs, n_genes)
    control: np.ndarray | None


def calibration(
    adata: AnnData,
    *,
    key: str = "exprgen",
    groupby: str | None = None,
    layer: str | None = None,
    control: AnnData | None = None,
    n_cols: int = 4,
    axes: Sequence[Axes] | None = None,
    seed: int = 0,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Plot how far the coverage of predicted intervals is from their level, at every level.

    The line is the share of all values of a group inside their central intervals, less the level;
    in the coloured area lie 95 % of the genes. The grey band is where 95 % of the genes would lie
    if every interval were exact, at the group's number of cells: an area as wide as the band is as
    good as it gets. Below 0 intervals are too narrow, above too wide. Counts are inside or outside
    by their randomised rank, so that intervals of counts can be exact. Between the predicted
    quantiles levels are interpolated: predict more of them (``quantiles=``) for a finer picture.

    Parameters
    ----------
    adata
        Cells that training has not seen, with what ``model.predict(adata)`` wrote.
    key
        The ``key_added`` of ``predict``.
    groupby
        Column of ``.obs``: a panel for each of its groups.
    layer
        Observed values; by default the layer that was modelled.
    control
        Real cells, the training cells say: the dashed line is the coverage of intervals made of
        these cells (of the same group).
    n_cols
        Panels per row.
    axes
        As many axes as groups, to draw on.
    seed
        Of the randomised ranks.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        One axes per group.

    Raises
    ------
    KeyError, ValueError
        No predictions, or of means; a layer or column is missing; values are not finite.
    """
    from scipy import stats

    groups = _transforms(adata, key, groupby, layer, control, seed)
    figure, panels = make_axes(axes, len(groups), n_cols=n_cols, size=_size(groups), share_y=True)
    for ax, (name, u, among) in zip(panels, groups, strict=True):
        n = len(u)
        low, high = (_points(stats.binom.ppf(q, n, _NOMINAL) / n) for q in _BAND)
        ax.fill_between(_LEVELS, low, high, color=CONTROL, alpha=0.6, lw=0, label=_EXACT)
        ax.axhline(0, color="black", lw=0.8)
        genes = _covered(u)
        low, high = (_points(np.quantile(genes, q, axis=1)) for q in _BAND)
        ax.fill_between(
            _LEVELS, low, high, color=SYNTHETIC, alpha=0.25, lw=0, label="95 % of genes"
        )
        if among is not None:
            line = _points(_covered(among).mean(1))
            ax.plot(_LEVELS, line, color=REAL, lw=1.4, ls="--", label=_REAL)
        ax.plot(_LEVELS, _points(genes.mean(1)), color=SYNTHETIC, lw=2, label="predicted")
        ax.set(xlim=(0, 100), xlabel="level of the interval, %")
        _title(ax, name, n)
        clean(ax)
    panels[0].set_ylabel("share inside − level, points")
    _legend(figure, panels)
    return finish(figure, panels, show=show, return_fig=return_fig)


def pit(
    adata: AnnData,
    *,
    key: str = "exprgen",
    groupby: str | None = None,
    layer: str | None = None,
    control: AnnData | None = None,
    n_bins: int = 20,
    n_cols: int = 4,
    axes: Sequence[Axes] | None = None,
    seed: int = 0,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Plot histograms of the randomised probability integral transform of observed values.

    Flat if the predicted laws are those of the cells :cite:p:`czado2009`; a hump in the middle
    says that they are too wide, raised ends too narrow, a slope too high or too low. Values of all
    genes together. The grey band is where 95 % of the bars would lie if the laws were exact, given
    how cells differ and their number; of fewer than 20 cells there is none. With few
    predicted quantiles, steps at their levels are those of the interpolation.

    Parameters
    ----------
    n_bins
        Bars.
    adata, key, groupby, layer, control, n_cols, axes, seed, show, return_fig
        As in :func:`calibration`.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        One axes per group.

    Raises
    ------
    KeyError, ValueError
        As :func:`calibration`.
    """
    check_positive_int(n_bins, "n_bins", minimum=2)
    groups = _transforms(adata, key, groupby, layer, control, seed)
    figure, panels = make_axes(axes, len(groups), n_cols=n_cols, size=_size(groups), share_y=True)
    edges = np.linspace(0, 1, n_bins + 1)
    for ax, (name, u, among) in zip(panels, groups, strict=True):
        bars, error = _histogram(u, edges)
        ax.axhline(1, color="black", lw=0.8, zorder=2)
        if len(u) >= _FEWEST:
            low, high = (1 + side * 1.96 * error for side in (-1, 1))
            ax.stairs(high, edges, baseline=low, fill=True, color=CONTROL, alpha=0.6,
                      label="95 % of bars, if exact", zorder=1)  # fmt: skip
        ax.stairs(bars, edges, color=SYNTHETIC, lw=2, label="predicted", zorder=3)
        if among is not None:
            ax.stairs(_histogram(among, edges)[0], edges, baseline=None, color=REAL, lw=1.4,
                      ls="--", label=_REAL, zorder=4)  # fmt: skip
        ax.set(xlim=(0, 1), xlabel="rank among predictions")
        _title(ax, name, len(u))
        clean(ax)
    panels[0].set_ylabel("density")
    panels[0].set_ylim(0, max(1.5, panels[0].get_ylim()[1]))
    _legend(figure, panels)
    return finish(figure, panels, show=show, return_fig=return_fig)


def _transforms(
    adata: AnnData,
    key: str,
    groupby: str | None,
    layer: str | None,
    control: AnnData | None,
    seed: int,
) -> list[_Transforms]:
    predicted = read_predicted(adata, key, name="adata")
    if predicted.of == "mean":
        raise ValueError(
            "The predictions are of means (predict(of='mean')); cells' values have no rank among "
            "these. Run predict(of='cell') under another key_added."
        )
    rng = np.random.default_rng(resolve_seed(seed))
    names, rows_of = _grouped(adata, groupby, "adata")
    among = {}
    if control is not None:
        check_given(control, key, name="control")
        among = dict(zip(*_grouped(control, groupby, "control"), strict=True))
    found = []
    for name, rows in zip(names, rows_of, strict=True):
        if control is not None and name not in among:
            raise ValueError(f"control has no cell of the group {name!r} (groupby={groupby!r}).")
        parts = [
            _of_block(adata, layer, predicted, part, rng)
            for part in np.array_split(rows, -(-len(rows) // BLOCK))
        ]
        x, u = (np.concatenate(values) for values in zip(*parts, strict=True))
        ranks = None
        if control is not None:
            pool = observed(control, layer, predicted, among[name], name="control")
            ranks = _ranks(x, pool, rng.random(x.shape))
        found.append(_Transforms(name, u, ranks))
    return found


def _of_block(
    adata: AnnData,
    layer: str | None,
    predicted: Predicted,
    rows: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    x = observed(adata, layer, predicted, rows)
    return x, predicted.law(rows).transform(x, rng.random(x.shape))[0]


def _grouped(adata: AnnData, groupby: str | None, name: str) -> tuple[list[str], list[np.ndarray]]:
    """Names of groups and the positions of their cells, in the order of the categories."""
    if groupby is None:
        return ["all cells"], [np.arange(adata.n_obs)]
    labels = text_labels(adata.obs, groupby, "groupby", f"{name}.obs")
    names = names_of(adata, groupby)
    return names, [np.flatnonzero(labels == name) for name in names]


def _ranks(x: np.ndarray, pool: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Randomised ranks of values among those of other cells, gene by gene."""
    pool = np.sort(pool, axis=0)
    u = np.empty(x.shape)
    for j in range(x.shape[1]):
        below, upto = (np.searchsorted(pool[:, j], x[:, j], side) for side in ("left", "right"))
        u[:, j] = (below + v[:, j] * (upto - below + 1)) / (len(pool) + 1)
    return u


def _covered(u: np.ndarray) -> np.ndarray:
    """Share of cells inside the central interval of each level, ``(n_levels, n_genes)``."""
    distance = np.sort(np.abs(2 * u - 1), axis=0)
    shares = [np.searchsorted(gene, _NOMINAL, side="right") for gene in distance.T]
    return np.stack(shares, axis=1) / len(u)


def _points(share: np.ndarray) -> np.ndarray:
    """Percentage points above the level."""
    return 100 * (share - _NOMINAL)


def _histogram(u: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Density in each bin, and its standard error with cells as the units, ``(n_bins,)`` each."""
    bins = np.clip(np.searchsorted(edges, u, side="right") - 1, 0, len(edges) - 2)
    width = 1 / (len(edges) - 1)
    density = np.stack([(bins == k).mean(1) for k in range(len(edges) - 1)], axis=1) / width
    error = density.std(0, ddof=min(1, len(u) - 1)) / np.sqrt(len(u))
    return density.mean(0), error


def _size(groups: list[_Transforms]) -> tuple[float, float]:
    """Inches of a panel; a single one has the legend below each other."""
    return (2.9, 2.7) if len(groups) > 2 else (3.6, 3.7)


def _title(ax: Axes, name: str, n: int) -> None:
    if len(name) > _LONGEST:  # above the number of cells
        name = textwrap.fill(name, 2 * _LONGEST) + "\n"
    ax.set_title(name, loc="left", fontsize=10)
    ax.set_title(f"{n} cells", loc="right", fontsize=8, color="#444444")


def _legend(figure: Figure, panels: np.ndarray) -> None:
    found = [ax.get_legend_handles_labels() for ax in panels]
    handles, labels = max(found, key=lambda pair: len(pair[1]))  # not all have a band
    n_cols = len(labels) if len(panels) > 2 else 1
    figure.legend(
        handles, labels, loc="outside lower center", ncols=n_cols, frameon=False, fontsize=9
    )
