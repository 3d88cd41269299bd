r"""Real cells that everybody who has scanpy has: the 68k PBMC subset, with its counts recovered.

scanpy ships 700 annotated cells of the 68k PBMC set of Zheng et al. :cite:p:`Zheng2017` as
:math:`y = \log(1 + 10^4 x / n)` to three decimals, with the true depth :math:`n` of every cell
(its total over all genes, not only the 765 that are kept). The counts are therefore

.. math:: x = \operatorname{round}\bigl(n \, (e^{y} - 1) / 10^4\bigr).

No other integer is possible: half a unit of the third decimal moves even the largest count by
less than 0.130, and the values before rounding lie within 0.082 of an integer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pbmc68k_reduced"]

_OBS = ("n_counts", "n_genes", "percent_mito", "phase", "louvain")


def pbmc68k_reduced() -> AnnData:
    """Return 700 real blood cells, 765 genes, with their integer UMI counts; no network needed.

    Returns
    -------
    AnnData
        ``.X`` and ``.layers["counts"]``: counts, CSR float32, shape ``(700, 765)``.
        ``.obs``: ``cell_type`` (10 sorted types), ``n_counts`` (the cell's depth over *all* genes,
        3.6 to 9 times its total over these 765: a size factor), ``n_genes``, ``percent_mito``,
        ``phase``, ``louvain``. ``.uns["source"]`` says where the cells come from.

    Notes
    -----
    Data: Zheng et al., Massively parallel digital transcriptional profiling of single cells,
    Nature Communications 2017 :cite:p:`Zheng2017`; 10x Genomics, CC BY 4.0; selection and labels
    as shipped with scanpy (:func:`scanpy.datasets.pbmc68k_reduced`). The module's docstring has
    the formula that recovers the counts.

    Examples
    --------
    >>> import exprgen
    >>> adata = exprgen.datasets.pbmc68k_reduced()
    >>> adata.layers["counts"].max()
    np.float32(259.0)
    """
    import pandas as pd
    import scanpy as sc
    from anndata import AnnData

    shipped = sc.datasets.pbmc68k_reduced()
    counts = shipped.raw.X.tocsr().astype(np.float64)
    depth = shipped.obs["n_counts"].to_numpy(dtype=np.float64)
    per_value = np.repeat(depth, np.diff(counts.indptr))
    counts.data = np.rint(np.expm1(counts.data) * per_value / 1e4)
    counts = counts.astype(np.float32)

    obs = shipped.obs[list(_OBS)].rename_axis(index=None)
    labels = shipped.obs["bulk_labels"].astype(str).to_numpy()
    obs.insert(0, "cell_type", pd.Categorical(labels))
    return AnnData(
        X=counts,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(shipped.raw.var_names.astype(str))),
        layers={"counts": counts.copy()},
        uns={"source": "10x 68k PBMC (Zheng et al. 2017), subset shipped with scanpy"},
    )
