r"""How rare is a gene's value in a cell: two-sided tail probabilities under p(x | c).

With n draws of a gene under the cell's conditions, of which b are below its value x and t tie
with it,

.. math::
    q = \frac{b + (t + 1) / 2}{n + 1}, \qquad p = 2 \min(q, 1 - q),

the mid-p-value: x is ranked among the draws, in the middle of its ties. It is at least
:math:`1/(n + 1)`. Counts are discrete, and so is p: where nine cells in ten have a zero, each
zero has a p of .9. A *randomised* rank among the ties makes p uniform for cells that follow
p(x | c), and two equal cells unequal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from exprgen._arguments import check_bool, check_genes, check_positive_int
from exprgen._random import BLOCK_SIZE, resolve_seed
from exprgen._validate import check_anndata
from exprgen.models._query import TABLE
from exprgen.tl._model import check_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData

    from exprgen.models import GenerativeModel

__all__ = ["tail_pvalues"]

_RANKS = 22  # stream of random ranks under one seed


def tail_pvalues(
    adata: AnnData | MuData,
    model: GenerativeModel,
    *,
    genes: Sequence[str] | None = None,
    n_samples: int = 1000,
    randomised: bool = False,
    unseen: Literal["error", "null"] = "error",
    key_added: str = "exprgen",
    overwrite: bool = False,
    copy: bool = False,
    progress_bar: bool = True,
    seed: int | None = None,
) -> AnnData | MuData:
    """Two-sided tail probability of each gene's value in each cell, under p(x | c).

    The law is that of the cell's conditions, as in :meth:`~exprgen.NBVAE.predict`: depth is drawn,
    and a deep cell has many large counts. It is the model's; nothing calibrates it.

    Parameters
    ----------
    adata
        Cells with the layer that the model is of; results are written to it.
    model
        A trained model.
    genes
        Only these; the result then goes to obsm, with their names in ``uns``.
    n_samples
        Draws per distinct row of conditions. No p-value is below ``1 / (n_samples + 1)``.
    randomised
        ``False`` gives mid-p-values; ``True`` breaks ties at random, so that the p-values of cells
        that follow the model are uniform.
    unseen, key_added, overwrite, copy, progress_bar, seed
        As in :meth:`~exprgen.NBVAE.predict`; the slot is the layer ``{key}_tail_pvalue``.

    Returns
    -------
    The AnnData that carries the results: the same object, or a copy if it was a view.
    """
    check_model(model)
    check_positive_int(n_samples, "n_samples")
    check_bool(randomised, "randomised")
    selected = None if genes is None else check_genes(genes, model.var_names)
    seed = resolve_seed(seed)
    check_anndata(model._readable(adata), method="adata=")
    cells = model._cells(adata, unseen=unseen)
    if selected is None:
        model._check_same_genes(cells.adata)
    query = model._ask(
        cells.adata,
        draw_batch=False,
        unseen=unseen,
        on_extrapolation="warn",
        rng=np.random.default_rng([seed, TABLE]),
    )
    columns = slice(None) if selected is None else selected
    n_genes = len(model.var_names) if selected is None else len(selected)
    values = np.empty((len(cells), n_genes), np.float32)
    ranks = np.random.default_rng([seed, _RANKS])
    for group, law in model._laws(query, None, "cell", None, n_samples, seed, progress_bar):
        draws = np.sort(law.draws[:, columns], axis=0)
        for part in (group[i : i + BLOCK_SIZE] for i in range(0, len(group), BLOCK_SIZE)):
            x = cells.reader.rows(part)[:, columns]
            place = ranks.random(x.shape) if randomised else 0.5
            values[part] = tail_p_values(draws, x, place)
    return model._write(
        cells.given,
        "tail_pvalues",
        {"tail_pvalue": values},
        {"n_samples": n_samples, "randomised": randomised, "seed": seed},
        split=model._split_of(cells.adata),
        selected=selected,
        key_added=key_added,
        overwrite=overwrite,
        copy=copy,
    )


def tail_p_values(draws: np.ndarray, x: np.ndarray, place: np.ndarray | float) -> np.ndarray:
    """Two-sided p-values ``(n_obs, n_vars)`` of values among sorted draws ``(n, n_vars)``.

    ``place`` in [0, 1] is where among its ties a value is ranked.
    """
    below, up_to = np.empty(x.shape), np.empty(x.shape)
    for j in range(x.shape[1]):
        below[:, j] = np.searchsorted(draws[:, j], x[:, j], side="left")
        up_to[:, j] = np.searchsorted(draws[:, j], x[:, j], side="right")
    rank = (below + place * (up_to - below + 1)) / (len(draws) + 1)
    return 2 * np.minimum(rank, 1 - rank)
