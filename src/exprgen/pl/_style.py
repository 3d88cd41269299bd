"""What the figures share: two colours that mean real and synthetic, clean axes, showing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exprgen._arguments import check_positive_int

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CONTROL", "REAL", "SYNTHETIC", "clean", "finish", "group_colors", "make_axes"]

# Told apart by colour-blind readers and in grey print.
REAL = "#2F5D8A"
SYNTHETIC = "#E36C0A"
CONTROL = "#B9BEC4"


def make_axes(
    axes: Sequence[Axes] | np.ndarray | None,
    n_axes: int,
    *,
    n_cols: int,
    size: tuple[float, float],
    share_y: bool = False,
    beside: float = 0.0,
    least_width: float = 0.0,
) -> tuple[Figure, np.ndarray]:
    """``n_axes`` axes on a new figure with panels of ``size`` inches, or those given.

    ``beside`` is the width of what stands left of the panels, and ``least_width`` that of the
    whole figure, inches.
    """
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    check_positive_int(n_cols, "n_cols")
    if axes is not None:
        given = np.atleast_1d(np.asarray(axes, dtype=object)).ravel()
        wrong = [ax for ax in given if not isinstance(ax, Axes)]
        if wrong:
            raise TypeError(f"axes must be matplotlib axes, got {wrong[0]!r}.")
        if given.size != n_axes:
            raise ValueError(f"axes must be {n_axes} matplotlib axes, got {given.size}.")
        return given[0].figure, given
    n_cols = min(n_cols, n_axes)
    n_rows = -(-n_axes // n_cols)
    figure, grid = plt.subplots(
        n_rows,
        n_cols,
        figsize=(max(size[0] * n_cols + beside, least_width), size[1] * n_rows),
        squeeze=False,
        sharey=share_y,
        layout="constrained",
    )
    for ax in grid.ravel()[n_axes:]:
        ax.set_visible(False)
    return figure, grid.ravel()[:n_axes]


def clean(ax: Axes) -> None:
    """Take away the frame's upper and right side."""
    ax.spines[["top", "right"]].set_visible(False)


def finish(
    figure: Figure, axes: np.ndarray, *, show: bool | None, return_fig: bool
) -> np.ndarray | Figure:
    """Show if asked (or if matplotlib is interactive), and hand back axes or figure."""
    import matplotlib
    import matplotlib.pyplot as plt

    if matplotlib.is_interactive() if show is None else show:
        plt.show()
    return figure if return_fig else axes


def group_colors(adata: AnnData, groupby: str, labels: pd.Index) -> dict[object, str]:
    """One colour per label: those scanpy has stored for the column, else scanpy's palettes."""
    stored = adata.uns.get(f"{groupby}_colors")
    if stored is not None and len(stored) == len(labels):
        return dict(zip(labels, map(str, stored), strict=True))
    from scanpy.plotting import palettes

    for palette in (palettes.default_20, palettes.default_28, palettes.default_102):
        if len(labels) <= len(palette):
            return dict(zip(labels, palette, strict=False))
    cycle = [palettes.default_102[i % 102] for i in range(len(labels))]
    return dict(zip(labels, cycle, strict=True))
