"""Who is compared with whom: random halves of held-out cells, and cells drawn to match them.

A sample is a mapping of group to row numbers. The rows of two samples of one composition stand in
the same order of groups, so that cutting both to the same positions keeps them matched.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from exprgen import metrics
from exprgen._columns import refuse_values
from exprgen._errors import name_some
from exprgen.tl._counts import gene_positions, read_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData

    Sizes: TypeAlias = dict[str, int]

__all__ = ["Cells", "cut", "draw", "half_sizes", "read", "same_cells", "short_of"]

_MIN_GROUP = 4  # two cells in each half: variances need them
_MIN_HALF = 10
_MIN_DETECTED = 10  # genes that a cell must have for its counts to identify it
_FILL_IN = (
    " Fill them in with a label of their own, e.g. .astype('string').fillna('unknown'), or leave "
    "out these cells."
)


class Cells:
    """Counts (CSR, ``(n_obs, n_vars)``) and the group of every cell (str, ``(n_obs,)``)."""

    def __init__(self, counts: sp.csr_matrix, groups: np.ndarray) -> None:
        self.counts = counts
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, rows: np.ndarray) -> Cells:
        return Cells(self.counts[rows], self.groups[rows])

    @cached_property
    def values(self) -> sp.csr_matrix:
        """log1p of counts per 10,000."""
        return metrics.log_cp10k(self.counts)

    @cached_property
    def dense(self) -> np.ndarray:
        """The same as an ordinary array."""
        return self.values.toarray()

    @cached_property
    def sizes(self) -> Sizes:
        """Cells of every group."""
        names, sizes = np.unique(self.groups, return_counts=True)
        return dict(zip(names.tolist(), sizes.tolist(), strict=True))


def read(
    adata: AnnData,
    reference: AnnData,
    groupby: str | Sequence[str] | None,
    layer: str | None,
    *,
    name: str,
) -> Cells:
    """Counts in the gene order of ``reference``, and one group label per cell.

    Raises
    ------
    CovariateError
        A label is missing.
    GeneMismatchError
        The genes differ.
    KeyError
        A column or the layer is missing.
    ValueError
        There are no genes, or no counts.
    """
    if not adata.n_vars:
        raise ValueError(f"{name} has no genes; give at least one.")
    genes = gene_positions(adata.var_names, reference.var_names, name=name, exact=True)
    counts = read_counts(adata, layer, name=name)
    if not np.array_equal(genes, np.arange(len(genes))):
        counts = counts[:, genes]
    if len(counts.data) == 0 < adata.n_obs or (adata.n_obs and not counts.data.any()):
        raise ValueError(f"{name} has no counts: all values are 0 in all of its cells.")
    keys = [groupby] if isinstance(groupby, str) else list(groupby or ())
    missing = [key for key in keys if key not in adata.obs]
    if missing:
        raise KeyError(
            f"{name}.obs has no column {name_some(missing)}; its columns are "
            f"{list(adata.obs.columns)}."
        )
    for key in keys:
        missing_labels = adata.obs[key].isna().to_numpy()
        where = f"{name}.obs[{key!r}]"
        refuse_values(adata.obs_names, missing_labels, where, "missing value", _FILL_IN)
    labels = [adata.obs[key].astype(str) for key in keys]
    if len(keys) > 1:  # "a | b" with "c" is another group than "a" with "b | c"
        labels = [
            of.map(lambda text: text.replace("\\", "\\\\").replace("|", "\\|")) for of in labels
        ]
    groups = [" | ".join(cell) for cell in zip(*labels, strict=True)]
    return Cells(counts, np.array(groups if keys else ["all cells"] * adata.n_obs, dtype=str))


def same_cells(a: Cells, names_a: pd.Index, b: Cells, names_b: pd.Index) -> list[str]:
    """Names of cells in ``a`` that are in ``b`` as well: the same name and the same counts.

    Names alone are no evidence (``"0"``, ``"1"`` ... are everywhere), and neither are counts in
    which fewer than ten genes are detected.
    """
    common = names_a.intersection(names_b)
    keys = [
        {
            (names[i], rows.indices[start:stop].tobytes(), rows.data[start:stop].tobytes())
            for i, (start, stop) in enumerate(pairwise(rows.indptr))
            if stop - start >= _MIN_DETECTED
        }
        for rows, names in (
            (_plain(cells.counts[found]), of[found])
            for cells, of in ((a, names_a), (b, names_b))
            for found in [np.flatnonzero(of.isin(common))]
        )
    ]
    return sorted(name for name, *_ in keys[0] & keys[1])


def _plain(counts: sp.csr_matrix) -> sp.csr_matrix:
    """The same, stored in the one way that equal rows share."""
    counts.sum_duplicates()
    counts.eliminate_zeros()
    counts.indices = counts.indices.astype(np.int64)
    return counts


def half_sizes(test: Cells) -> Sizes:
    """Cells per group in half of the held-out cells; groups of fewer than four are left out.

    Raises
    ------
    ValueError
        The halves hold fewer than ten cells.
    """
    half = {group: n // 2 for group, n in test.sizes.items() if n >= _MIN_GROUP}
    if sum(half.values()) < _MIN_HALF:
        raise ValueError(
            f"test has too few cells to compare: its halves hold {sum(half.values())} cells in "
            f"{len(half)} groups of at least {_MIN_GROUP} cells ({_MIN_HALF} needed). Hold out "
            "more cells, or group them more coarsely."
        )
    return half


def cut(sizes: Sizes, max_cells: int | None) -> Sizes:
    """At most about ``max_cells`` in all, in the same proportions, at least two of a group."""
    total = sum(sizes.values())
    if max_cells is None or total <= max_cells:
        return sizes
    return {group: min(n, max(2, round(n * max_cells / total))) for group, n in sizes.items()}


def draw(rng: np.random.Generator, cells: Cells, sizes: Sizes) -> dict[str, np.ndarray]:
    """Random rows of every group, without replacement: ``sizes`` of them, or all there are."""
    return {
        group: rng.permutation(np.flatnonzero(cells.groups == group))[:size]
        for group, size in sizes.items()
    }


def short_of(cells: Cells, needed: Sizes, name: str) -> list[str]:
    """Groups of which there is no cell at all.

    Raises
    ------
    ValueError
        Some group has cells, but too few to compare, or all groups are missing.
    """
    found = {group: cells.sizes.get(group, 0) for group in needed}
    short = {group: n for group, n in needed.items() if 0 < found[group] < n}
    if short:
        listed = name_some([f"{group}: {n} (has {found[group]})" for group, n in short.items()])
        raise ValueError(
            f"synthetic {name!r} has too few cells in {len(short)} groups; needed are at least "
            f"{listed}. Sample as many cells per group as test has (half of that at least)."
        )
    missing = [group for group, n in found.items() if n == 0]
    if sum(n for group, n in needed.items() if group not in missing) < _MIN_HALF:
        raise ValueError(
            f"synthetic {name!r} has no cells in {len(missing)} of the {len(needed)} groups of "
            f"test ({name_some(missing)}), and too few are left to compare. Sample it for the "
            "conditions of test."
        )
    return missing
