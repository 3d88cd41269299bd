"""Real and synthetic cells in one object, on one scale.

Two things go wrong when they are put together by hand. :func:`anndata.concat` with its defaults
drops the flag that tells them apart, and lets the ``.X`` of one side (log values, say) meet the
counts of the other. And real cells carry a depth over *all* genes, synthetic ones only the
modelled genes: dividing the first by one total and the second by the other separates identical
cells perfectly. :func:`concat` therefore keeps the modelled genes on both sides, and one depth.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from exprgen._labels import kind_of
from exprgen.tl._counts import gene_positions, read_counts

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

__all__ = ["concat"]


def concat(real: AnnData, synthetic: AnnData, *, layer: str | None = "counts") -> AnnData:
    """Put real and synthetic cells together so that scanpy treats both alike.

    Both sides hold the modelled genes only, so :func:`scanpy.pp.normalize_total` divides every
    cell, real or synthetic, by its total over the *same* genes, and everything that follows
    (log1p, PCA, neighbours, UMAP) sees no difference that is not in the cells.

    Parameters
    ----------
    real
        Real cells; must have all genes of ``synthetic`` (others are dropped).
    synthetic
        Cells from a model's ``sample`` or ``counterfactual``.
    layer
        Where both sides keep their counts; None is ``.X``.

    Returns
    -------
    AnnData
        New object: real cells first, then synthetic ones. ``.X`` and, if named,
        ``.layers[layer]``: counts, CSR float32, in the gene order of ``synthetic``. ``.obs``: the
        columns of both (categories joined, missing where a side has no such column; labels that
        are text on one side, numbers or truth values on the other, as text);
        ``synthetic`` (bool); ``library``, the depth of every cell on one scale: the model's
        size-factor column where it was trained with one, else the total over the modelled genes.
        ``.obs_names`` are unique, the real ones as they were. ``.var`` is that of ``real``.

    Raises
    ------
    GeneMismatchError
        A gene of ``synthetic`` is missing from ``real``, or names occur twice.
    KeyError
        The layer, or the size-factor column in ``real``, is missing.
    ValueError
        A side holds no counts.
    """
    import pandas as pd
    from anndata import AnnData
    from anndata.utils import make_index_unique
    from scipy import sparse

    genes = gene_positions(real.var_names, synthetic.var_names, name="real", exact=False)
    counts_real = read_counts(real, layer, name="real")[:, genes]
    counts_synthetic = read_counts(synthetic, layer, name="synthetic")
    counts = sparse.vstack([counts_real, counts_synthetic], format="csr")

    obs = _join_obs(real.obs, synthetic.obs)
    obs["synthetic"] = np.repeat([False, True], [real.n_obs, synthetic.n_obs])
    obs["library"] = _library(real, synthetic, counts)
    names = pd.Index([*real.obs_names, *synthetic.obs_names]).astype(str)
    obs.index = names if names.is_unique else make_index_unique(names)
    layers = {} if layer is None else {layer: counts.copy()}
    return AnnData(X=counts, obs=obs, var=real.var.iloc[genes].copy(), layers=layers)


def _library(real: AnnData, synthetic: AnnData, counts: sparse.csr_matrix) -> np.ndarray:
    """Depth on one scale for both, shape ``(n_real + n_synthetic,)``."""
    provenance = synthetic.uns.get("exprgen", {})
    key = str(provenance.get("size_factor_key") or "")
    if not key:
        return np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    for adata, column, name in ((real, key, "real"), (synthetic, "library", "synthetic")):
        if column not in adata.obs:
            raise KeyError(
                f"The model took depth from obs[{key!r}], but {name}.obs has no {column!r} "
                "column. Add it, so that depth is on one scale for all cells."
            )
    return np.concatenate(
        [
            real.obs[key].to_numpy(dtype=np.float64),
            synthetic.obs["library"].to_numpy(dtype=np.float64),
        ]
    )


def _join_obs(real: pd.DataFrame, synthetic: pd.DataFrame) -> pd.DataFrame:
    """Rows of both tables under the columns of either; categoricals stay categorical."""
    import pandas as pd

    tables = [real.reset_index(drop=True), synthetic.reset_index(drop=True)]
    joined = {}
    for column in tables[0].columns.union(tables[1].columns, sort=False):
        parts = [
            table[column] if column in table else pd.Series(np.nan, index=table.index)
            for table in tables
        ]
        if len(set().union(*map(_kinds, parts))) > 1:  # a file holds labels of one kind
            parts = [part.astype("string").astype(object) for part in parts]
        given = [
            part
            for part, table in zip(parts, tables, strict=True)
            if column in table and part.notna().any()
        ]
        dtype = _common_dtype(given or parts)
        if dtype is not None:
            parts = [part.astype(dtype) for part in parts]
        joined[column] = pd.concat(parts, ignore_index=True)
    return pd.DataFrame(joined, index=pd.RangeIndex(len(real) + len(synthetic)))


def _kinds(column: pd.Series) -> set[str]:
    """What the values of a column are: text, numbers, truth values."""
    values = column.cat.categories.to_series() if column.dtype == "category" else column
    values = values.dropna()
    if values.dtype.kind in "biuf":
        return {"bool" if values.dtype.kind == "b" else "number"} if len(values) else set()
    return {kind_of(value) for value in values}


def _common_dtype(parts: list[pd.Series]) -> object | None:
    """The dtype both sides are brought to; None leaves them to pandas.

    Labels become one categorical. Whole numbers and flags that only one side has become nullable,
    so that the other side's gaps do not turn them into floats and objects.
    """
    import pandas as pd

    one_sided = len(parts) == 1
    categorical = [isinstance(part.dtype, pd.CategoricalDtype) for part in parts]
    if any(categorical) or any(part.dtype.kind == "O" for part in parts):
        levels = [part.astype("category").cat.categories.tolist() for part in parts]
        ordered = all(getattr(part.dtype, "ordered", False) for part in parts)
        return pd.CategoricalDtype(list(dict.fromkeys(chain.from_iterable(levels))), ordered)
    if one_sided and parts[0].dtype.kind in "iub":
        return parts[0].convert_dtypes().dtype
    return parts[0].dtype if one_sided else None
