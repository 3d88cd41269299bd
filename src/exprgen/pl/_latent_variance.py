"""Where predicted variance comes from cells' states, and where from counting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen._arguments import check_genes, check_positive_int
from exprgen.pl._style import finish, make_axes
from exprgen.tl._names import text_labels
from exprgen.tl._predicted import dense, names_of, read_predicted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["latent_variance"]


def latent_variance(
    adata: AnnData,
    genes: Sequence[str] | None = None,
    *,
    groupby: str,
    key: str = "exprgen",
    n_genes: int = 30,
    ax: Axes | None = None,
    show: bool | None = None,
    return_fig: bool = False,
) -> Axes | Figure:
    """Plot the latent share of the predicted variance, genes by groups.

    ``std_latent² / std²``: 0 is a gene whose cells differ by counting noise alone given the
    conditions, 1 one whose cells differ in state (or depth). Where a group's cells have different
    predictions, their variances are averaged.

    Parameters
    ----------
    adata
        Cells with what ``model.predict(adata)`` wrote.
    genes
        Names, in the order to show; by default the ``n_genes`` with the highest share in any
        group, sorted by the group where that is.
    groupby
        Column of ``.obs``, such as the condition.
    key
        The ``key_added`` of ``predict``.
    n_genes
        How many genes, if ``genes`` is None.
    ax
        Axes to draw on.
    show, return_fig
        Show the figure; return it instead of the axes.

    Returns
    -------
    Axes, or Figure

    Raises
    ------
    KeyError
        No predictions, or a gene or column is missing.
    """
    predicted = read_predicted(adata, key, name="adata")
    store = adata.layers if predicted.in_layers else adata.obsm
    if f"{key}_std_latent" not in store:
        raise KeyError(
            f"adata has no {key}_std_latent, which predict wrote. Run model.predict(adata, "
            f"key_added={key!r}) again."
        )
    check_positive_int(n_genes, "n_genes")
    labels = text_labels(adata.obs, groupby, "groupby", "adata.obs")
    names, latent = names_of(adata, groupby), store[f"{key}_std_latent"]
    share = np.stack([_share(predicted.std, latent, labels == name) for name in names])
    columns = _strongest(share, n_genes) if genes is None else check_genes(genes, predicted.genes)

    size = (0.24 * len(columns) + 2.6, 0.32 * len(names) + 1.6)
    figure, panels = make_axes(None if ax is None else [ax], 1, n_cols=1, size=size)
    panel = panels[0]
    image = panel.imshow(share[:, columns], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    panel.set_xticks(range(len(columns)), predicted.genes[columns], rotation=90, fontsize=8,
                     style="italic")  # fmt: skip
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=panel, shrink=0.9, pad=0.02)
    bar.set_label("latent share of variance")
    bar.outline.set_visible(False)
    finish(figure, panels, show=show, return_fig=return_fig)
    return figure if return_fig else panel


def _share(std: Any, latent: Any, of: np.ndarray) -> np.ndarray:
    """Latent share of the variance of a group's genes, ``(n_genes,)``; 0 without variance."""
    total, part = (np.square(dense(v[of]).astype(np.float64)).mean(0) for v in (std, latent))
    return np.divide(part, total, out=np.zeros_like(total), where=total > 0)


def _strongest(share: np.ndarray, n: int) -> np.ndarray:
    """Genes of the highest shares, by the group where these are, then by height."""
    highest, group = share.max(0), share.argmax(0)
    chosen = np.argsort(-highest, kind="stable")[:n]
    return chosen[np.lexsort((-highest[chosen], group[chosen]))]
