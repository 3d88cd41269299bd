"""How training went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen.pl._style import REAL, SYNTHETIC, clean, finish, make_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["history"]

# Panels by the names that the stages of training give their losses.
_STAGES = {
    "elbo": ("Autoencoder", "−ELBO, nats per cell"),
    "density_loss": ("Density", "loss of the density"),
}


def history(
    model: Any,
    *,
    n_cols: int = 4,
    axes: Sequence[Axes] | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> np.ndarray | Figure:
    """Plot the losses of training and validation by epoch, a panel for every stage.

    The dot marks the lowest validation loss, whose weights are kept. The axis leaves out the first
    tenth of the epochs, where losses fall steeply.

    Parameters
    ----------
    model
        A trained model, or its ``history``: a mapping from names of losses to tables by epoch.
    n_cols
        Panels per row.
    axes
        As many axes as stages, to draw on.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    numpy.ndarray of Axes, or Figure
        One axes per stage.

    Raises
    ------
    TypeError
        It is no model.
    ValueError
        The model is not trained, or has kept no history.
    """
    from matplotlib.ticker import MaxNLocator

    losses: Mapping[str, Any] = getattr(model, "history", model) or {}
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"model must be a trained model, or its history, got {type(model).__name__}."
        )
    stages = [name for name in _STAGES if f"{name}_train" in losses]
    if not stages:
        raise ValueError(
            "There is no history of training: give a model that has been trained, or its .history."
        )
    figure, panels = make_axes(axes, len(stages), n_cols=n_cols, size=(3.8, 3.0))
    for ax, name in zip(panels, stages, strict=True):
        title, unit = _STAGES[name]
        shown = []
        for part, color in (("train", SYNTHETIC), ("validation", REAL)):
            table = losses.get(f"{name}_{part}")
            if table is None or not len(table):
                continue
            epochs = np.asarray(table.index, dtype=float) + 1
            values = np.asarray(table, dtype=float).ravel()
            ax.plot(epochs, values, color=color, lw=1.6, label=part)
            shown.append(values[len(values) // 10 :])
            if part == "validation" and np.isfinite(values).any():
                best = int(np.nanargmin(values))
                ax.scatter(epochs[best], values[best], s=36, color=color, zorder=4,
                           edgecolors="white", label=f"best: epoch {epochs[best]:g}")  # fmt: skip
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _limit(ax, np.concatenate(shown))
        ax.set(xlabel="epoch", ylabel=unit)
        ax.set_title(title, loc="left", fontsize=10)
        ax.legend(frameon=False, fontsize=9)
        clean(ax)
    return finish(figure, panels, show=show, return_fig=return_fig)


def _limit(ax: Axes, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if values.size and values.max() > values.min():
        margin = 0.05 * (values.max() - values.min())
        ax.set_ylim(values.min() - margin, values.max() + margin)
