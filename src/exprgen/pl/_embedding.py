"""Real and synthetic cells on one map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen.pl._style import REAL, SYNTHETIC, finish, group_colors, make_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["embedding"]

_BACKGROUND = "#E4E4E4"
_LEGEND_COLUMNS = 5


def embedding(
    combined: AnnData,
    *,
    groupby: str,
    basis: str = "umap",
    size: float | None = None,
    axes: Sequence[Axes] | None = None,
    seed: int = 0,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Plot real cells, synthetic cells, and both over each other, on one embedding.

    Parameters
    ----------
    combined
        From :func:`exprgen.tl.concat`, with an embedding computed on all cells together
        (``sc.pp.normalize_total``, ``sc.pp.log1p``, ``sc.pp.pca``, ``sc.pp.neighbors``,
        ``sc.tl.umap``).
    groupby
        Column of ``.obs`` that colours the first two panels.
    basis
        The embedding, ``.obsm["X_{basis}"]``; its first two dimensions are drawn.
    size
        Area of a dot, points squared; by default it shrinks with the number of cells.
    axes
        Three axes to draw on.
    seed
        Of the order in which cells are drawn over each other.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        Three axes: real, synthetic, both.

    Raises
    ------
    KeyError
        The embedding, ``obs["synthetic"]`` or the column is missing.
    """
    if f"X_{basis}" not in combined.obsm:
        raise KeyError(
            f"No embedding .obsm['X_{basis}']; it has {list(combined.obsm)}. Run "
            "sc.pp.normalize_total, sc.pp.log1p, sc.pp.pca, sc.pp.neighbors and sc.tl.umap on it."
        )
    for column in ("synthetic", groupby):
        if column not in combined.obs:
            raise KeyError(
                f"No column {column!r} in .obs; its columns are {list(combined.obs.columns)}."
            )
    points = np.asarray(combined.obsm[f"X_{basis}"])[:, :2]
    synthetic = combined.obs["synthetic"].to_numpy(dtype=bool)
    groups = combined.obs[groupby].astype("category")
    colors = group_colors(combined, groupby, groups.cat.categories)
    by_group = np.array([colors.get(label, "#BBBBBB") for label in groups], dtype=object)
    order = np.random.default_rng(seed).permutation(combined.n_obs)
    dot = size if size is not None else float(np.clip(24000 / combined.n_obs, 3, 16))
    style: dict[str, Any] = {"s": dot, "linewidths": 0, "rasterized": combined.n_obs > 5000}

    n_rows = -(-len(groups.cat.categories) // _LEGEND_COLUMNS)
    figure, panels = make_axes(axes, 3, n_cols=3, size=(3.9, 4.15 + 0.21 * n_rows))
    sides = (("Real", ~synthetic), ("Synthetic", synthetic))
    for ax, (title, member) in zip(panels[:2], sides, strict=True):
        # The other side in pale grey: what is missing, or invented, shows at once.
        ax.scatter(*points[~member].T, color=_BACKGROUND, **style)
        shown = order[member[order]]
        ax.scatter(*points[shown].T, c=list(by_group[shown]), **style)
        ax.set_title(f"{title} ({member.sum():,} cells)", loc="left", fontsize=11)
    both = np.where(synthetic[order], SYNTHETIC, REAL)
    panels[2].scatter(*points[order].T, c=list(both), alpha=0.6, **style)
    panels[2].set_title("Both", loc="left", fontsize=11)

    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.04 * (high - low)
    for ax in panels:
        ax.set_xlim(low[0] - margin[0], high[0] + margin[0])
        ax.set_ylim(low[1] - margin[1], high[1] + margin[1])
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_box_aspect(1)
        ax.set_xlabel(f"{basis.upper()} 1", fontsize=9)
        ax.set_ylabel(f"{basis.upper()} 2", fontsize=9)

    text: dict[str, Any] = {
        "frameon": False,
        "fontsize": 9,
        "handletextpad": 0.1,
        "columnspacing": 1.2,
    }
    figure.legend(
        handles=[_handle(colors[name], str(name)) for name in groups.cat.categories],
        loc="outside lower center",
        ncols=_LEGEND_COLUMNS,
        **text,
    )
    panels[2].legend(
        handles=[_handle(REAL, "real"), _handle(SYNTHETIC, "synthetic")],
        loc="lower right",
        bbox_to_anchor=(1.03, 0.985),
        ncols=2,
        **text,
    )
    return finish(figure, panels, show=show, return_fig=return_fig)


def _handle(color: str, label: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", ls="", color=color, markersize=6, label=label)
