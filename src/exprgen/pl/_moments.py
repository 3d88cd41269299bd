"""Gene by gene: do synthetic cells have the means, variances and zeros of held-out cells?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen.pl._style import CONTROL, SYNTHETIC, clean, finish, make_axes
from exprgen.tl._counts import gene_positions, read_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import scipy.sparse as sp
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["moments"]


def moments(
    real: AnnData,
    synthetic: AnnData,
    *,
    control: AnnData | None = None,
    layer: str | None = "counts",
    groupby: str | None = None,
    axes: Sequence[Axes] | None = None,
    seed: int = 0,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Plot gene means, variances and zero fractions, synthetic against real cells.

    Every point is a gene. In grey beneath, other real cells against the same real cells: how
    close to the diagonal sampling noise lets anything come. All sides are cut to the same number
    of cells (of every group), since noise depends on it.

    Parameters
    ----------
    real
        Held-out real cells.
    synthetic
        Synthetic cells with the same genes (any order).
    control
        Real cells for the grey points, the training cells say; by default ``real`` is halved,
        and one half serves as control.
    layer
        Where all keep their counts; None for ``.X``.
    groupby
        Column of ``.obs`` whose composition is matched.
    axes
        Three axes to draw on.
    seed
        Of the random halves and subsets.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        Three axes.

    Raises
    ------
    GeneMismatchError, KeyError, ValueError
        As :func:`exprgen.tl.evaluate`.
    """
    from matplotlib.lines import Line2D

    reference, baseline, generated = _matched(real, synthetic, control, layer, groupby, seed)
    n_cells = reference.shape[0]
    figure, panels = make_axes(axes, 3, n_cols=3, size=(3.6, 4.0))
    statistics = (
        ("Mean", "counts per cell", _mean, True),
        ("Variance", "counts$^2$", _variance, True),
        ("Zeros", "share of cells", _zeros, False),
    )
    for ax, (title, unit, statistic, is_log) in zip(panels, statistics, strict=True):
        x, grey, colour = (statistic(counts) for counts in (reference, baseline, generated))
        if is_log:
            # Genes without a count, lost on log axes, are put at half a count in all the cells.
            x, grey, colour = (np.maximum(v, 0.5 / n_cells) for v in (x, grey, colour))
            ax.set_xscale("log")
            ax.set_yscale("log")
        style: dict[str, Any] = {"linewidths": 0, "rasterized": x.size > 3000}
        # Larger grey dots: where sampling noise alone reaches stays visible under the colour.
        ax.scatter(x, grey, s=26, color=CONTROL, alpha=0.6, **style)
        ax.scatter(x, colour, s=7, color=SYNTHETIC, alpha=0.7, **style)
        ax.axline((x.min(), x.min()), (x.max(), x.max()), color="black", lw=0.8, ls="--")
        ax.set_title(title, loc="left", fontsize=11)
        deviation = _deviation(x, grey, colour, is_log=is_log)
        ax.set_title(deviation, loc="right", fontsize=8, color="#444444")
        ax.set_xlabel(f"held-out cells ({unit})")
        ax.set_ylabel(f"other cells ({unit})")
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_box_aspect(1)
        clean(ax)
    names = ((SYNTHETIC, "synthetic cells"), (CONTROL, "other real cells (control)"))
    handles = [
        Line2D([], [], marker="o", ls="", color=colour, markersize=5, label=name)
        for colour, name in names
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
        handletextpad=0.1,
    )
    return finish(figure, panels, show=show, return_fig=return_fig)


def _deviation(x: np.ndarray, grey: np.ndarray, colour: np.ndarray, *, is_log: bool) -> str:
    """How far a typical gene lies from the diagonal, in words."""
    if is_log:
        typical = [np.exp(np.median(np.abs(np.log(v / x)))) for v in (colour, grey)]
        return "typical gene off ×{:.2f} (real: ×{:.2f})".format(*typical)
    typical = [np.median(np.abs(v - x)) for v in (colour, grey)]
    return "typical gene off {:.3f} (real: {:.3f})".format(*typical)


def _matched(
    real: AnnData,
    synthetic: AnnData,
    control: AnnData | None,
    layer: str | None,
    groupby: str | None,
    seed: int,
) -> list[sp.csr_matrix]:
    """Counts of reference, control and synthetic cells, same genes, numbers and composition."""
    rng = np.random.default_rng(seed)
    sides = {"real": real, "synthetic": synthetic}
    if control is not None:
        sides["control"] = control
    counts, rows = {}, {}
    for name, adata in sides.items():
        genes = gene_positions(adata.var_names, real.var_names, name=name, exact=True)
        counts[name] = read_counts(adata, layer, name=name)[:, genes]
        rows[name] = _rows_by_group(adata, groupby, rng, name=name)
    if control is None:
        counts["control"] = counts["real"]
        rows["control"] = {group: index[1::2] for group, index in rows["real"].items()}
        rows["real"] = {group: index[::2] for group, index in rows["real"].items()}
    size = {group: min(len(rows[name].get(group, ())) for name in rows) for group in rows["real"]}
    if not sum(size.values()):
        raise ValueError("real, synthetic and control have no group of cells in common.")
    return [
        counts[name][np.concatenate([rows[name][g][:n] for g, n in size.items() if n])]
        for name in ("real", "control", "synthetic")
    ]


def _rows_by_group(
    adata: AnnData, groupby: str | None, rng: np.random.Generator, *, name: str
) -> dict[str, np.ndarray]:
    """Rows of every group in random order."""
    if groupby is None:
        return {"": rng.permutation(adata.n_obs)}
    if groupby not in adata.obs:
        raise KeyError(
            f"{name}.obs has no column {groupby!r}; its columns are {list(adata.obs.columns)}."
        )
    labels = adata.obs[groupby].astype(str).to_numpy()
    return {str(g): rng.permutation(np.flatnonzero(labels == g)) for g in np.unique(labels)}


def _mean(counts: sp.csr_matrix) -> np.ndarray:
    return np.asarray(counts.mean(axis=0), dtype=np.float64).ravel()


def _variance(counts: sp.csr_matrix) -> np.ndarray:
    squares = counts.astype(np.float64).multiply(counts).mean(axis=0)
    n_cells = counts.shape[0]
    return (np.asarray(squares).ravel() - _mean(counts) ** 2) * n_cells / max(n_cells - 1, 1)


def _zeros(counts: sp.csr_matrix) -> np.ndarray:
    return 1 - np.asarray((counts != 0).sum(axis=0)).ravel() / counts.shape[0]
