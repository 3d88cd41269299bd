"""P-values beside those of ordinary cells, and scores against what they may be proxies of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from exprgen._arguments import check_number, check_positive_int
from exprgen.pl._style import CONTROL, REAL, SYNTHETIC, clean, finish, make_axes
from exprgen.tl._predicted import check_given

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["outliers"]


def outliers(
    adata: AnnData,
    *,
    key: str = "exprgen",
    alpha: float = 0.05,
    n_bins: int = 20,
    axes: Sequence[Axes] | np.ndarray | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """What :func:`exprgen.tl.outliers` found.

    On the left a histogram of p-values; the grey band (not with ``groupby``) holds each bar of
    ordinary cells in 95 % of calibration sets of this size. On the right each cell's score
    against its library (of continuous values, the genes detected), beside the calibration cells';
    a trend of the grey dots says that the score is a proxy of it.

    Parameters
    ----------
    adata
        Cells that :func:`exprgen.tl.outliers` has judged.
    key
        Its ``key_added``.
    alpha
        False discovery rate at which cells are marked.
    n_bins
        Bars of the histogram.
    axes
        Two axes to draw on.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        Two axes.

    Raises
    ------
    KeyError
        If there are no such results.
    """
    alpha = check_number(alpha, "alpha", "(0, 1)")
    check_positive_int(n_bins, "n_bins", minimum=2)
    info = _info(adata, key)
    figure, (left, right) = make_axes(axes, 2, n_cols=2, size=(4.4, 3.4))
    p_values = adata.obs[f"{key}_outlier_pvalue"].to_numpy()
    _draw_histogram(left, p_values, n_bins)
    if "groupby" not in info:
        _draw_band(left, len(p_values), int(info["n_calibration"]), n_bins)
    # Above all lines.
    left.set_ylim(0, 1.25 * left.get_ylim()[1])
    left.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    against = adata.obs[f"{key}_outlier_{info['against'].split()[-1]}"].to_numpy()
    found = adata.obs[f"{key}_outlier_padj"].to_numpy() <= alpha
    _draw_scores(right, info, against, adata.obs[f"{key}_outlier_score"].to_numpy(), found)
    right.set_title(
        f"{found.sum()} of {len(found)} cells at FDR {alpha:g}", loc="left", fontsize=10
    )
    for ax in (left, right):
        clean(ax)
    return finish(figure, np.array([left, right]), show=show, return_fig=return_fig)


def _info(adata: AnnData, key: str) -> Mapping[str, Any]:
    check_given(adata, key, name="adata")
    record = adata.uns.get(key)
    info = record.get("outliers") if isinstance(record, Mapping) else None
    if not isinstance(info, Mapping):
        raise KeyError(
            f"adata.uns has no outliers under {key!r}. Run exprgen.tl.outliers(adata, model, "
            "calibration) first, with this key as key_added."
        )
    against = info["against"].split()[-1]
    for name in ("pvalue", "padj", "score", against):
        if f"{key}_outlier_{name}" not in adata.obs:
            raise KeyError(
                f"adata.obs has no '{key}_outlier_{name}', which exprgen.tl.outliers wrote. Run "
                "it again."
            )
    return info


def _draw_histogram(ax: Axes, p_values: np.ndarray, n_bins: int) -> None:
    heights, edges = np.histogram(p_values, np.linspace(0, 1, n_bins + 1))
    ax.stairs(heights, edges, color=REAL, linewidth=1.6, label="cells", zorder=2)
    ax.set(xlabel="p-value", ylabel="cells", xlim=(0, 1))
    ax.set_title("P-values", loc="left", fontsize=10)


def _draw_band(ax: Axes, n_cells: int, n_calibration: int, n_bins: int) -> None:
    """What ordinary cells give: p-values are k / (n + 1), and share their calibration cells."""
    edges = np.linspace(0, 1, n_bins + 1)
    steps, _ = np.histogram(np.arange(1, n_calibration + 2) / (n_calibration + 1), edges)
    low, high = (
        stats.betabinom(n_cells, steps, n_calibration + 1 - steps).ppf(q) for q in (0.025, 0.975)
    )
    style: dict[str, Any] = {"color": CONTROL, "alpha": 0.5, "linewidth": 0}
    low, high = np.append(low, low[-1]), np.append(high, high[-1])
    ax.fill_between(edges, low, high, step="post", zorder=1, label="ordinary cells, 95 %", **style)


def _draw_scores(
    ax: Axes, info: Mapping[str, Any], against: np.ndarray, score: np.ndarray, found: np.ndarray
) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    dots: dict[str, Any] = {"linewidths": 0, "rasterized": len(score) > 5000}
    ax.scatter(
        info["calibration_against"],
        info["calibration_score"],
        s=7,
        color=CONTROL,
        zorder=1,
        label="calibration",
        **dots,
    )
    for rows, color, label in ((~found, REAL, "cells"), (found, SYNTHETIC, "outliers")):
        ax.scatter(
            against[rows], score[rows], s=7, color=color, alpha=0.6, zorder=2, label=label, **dots
        )
    ax.set(xscale="log", xlabel=info["against"], ylabel="score (standard deviations)")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8, markerscale=1.8)
