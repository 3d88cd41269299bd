"""What ``predict`` left in an AnnData, checked, and the values that were observed beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from exprgen._errors import name_some
from exprgen._levels import Law
from exprgen._slots import quantile_name
from exprgen._validate import check_anndata
from exprgen.tl._counts import gene_positions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

__all__ = [
    "BLOCK",
    "Predicted",
    "check_given",
    "dense",
    "names_of",
    "observed",
    "read_predicted",
]

BLOCK = 1024
"""Cells that are worked on at a time."""

# Of what predict records: what may differ between predictions that were made alike.
_OF_ONE_CALL = ("seed", "slots", "var_names", "known_donors")


@dataclass(frozen=True)
class Predicted:
    """Predicted quantiles and standard deviations, ``(n_obs, n_genes)`` each.

    ``of`` and ``n_cells`` are those of ``predict``; ``settings`` all that it was called with,
    ``layer`` what the model is of ("" is .X, None not recorded), ``known_donors`` the donors of
    these cells that it was trained on; ``in_layers`` says whether all genes were predicted
    (layers) or some (obsm).
    """

    name: str
    model: str
    of: str
    n_cells: int
    settings: Mapping[str, Any]
    layer: str | None
    known_donors: frozenset[str]
    levels: np.ndarray
    genes: pd.Index
    in_layers: bool
    quantiles: list[Any]
    std: Any
    whole: bool

    def law(self, rows: np.ndarray, columns: np.ndarray | slice = slice(None)) -> Law:
        """The laws of some cells and genes."""
        known = np.stack([dense(layer[rows])[:, columns] for layer in self.quantiles])
        return Law(known, self.levels, dense(self.std[rows])[:, columns], self.whole)

    def blocks(self) -> Iterator[np.ndarray]:
        """Positions of all cells, a block at a time."""
        n_obs = self.std.shape[0]
        for start in range(0, n_obs, BLOCK):
            yield np.arange(start, min(start + BLOCK, n_obs))


def read_predicted(adata: AnnData, key: str, *, name: str) -> Predicted:
    """Read and check what ``model.predict(adata, key_added=key)`` wrote.

    Parameters
    ----------
    adata
        Cells with predictions.
    key
        The ``key_added`` of ``predict``.
    name
        What to call ``adata`` in messages.

    Raises
    ------
    KeyError
        If there is no prediction under ``key``, or a part of it is gone.
    ValueError
        If it has no cells, no quantile on either side of the median, or values that are none.
    """
    check_given(adata, key, name=name)
    record = adata.uns.get(key)
    record = record if isinstance(record, Mapping) else {}
    entry = record.get("predict")
    if not isinstance(entry, Mapping):
        found = [k for k, v in adata.uns.items() if isinstance(v, Mapping) and "predict" in v]
        hint = f" There are predictions under {name_some(found)}." if found else ""
        raise KeyError(
            f"{name} has no predictions under key={key!r}: run model.predict({name}, "
            f"key_added={key!r}) first.{hint}"
        )
    levels = np.atleast_1d(np.asarray(entry.get("quantiles", ()), dtype=np.float64))
    if not (levels.size and levels[0] < 0.5 < levels[-1]):
        raise ValueError(
            f"{name} was predicted with quantiles={levels.tolist()}; there must be some on either "
            "side of the median. Run predict again, with quantiles=(0.05, 0.95) or more of them."
        )
    some = entry.get("var_names")
    store = adata.layers if some is None else adata.obsm
    names = [f"{key}_{quantile_name(level)}" for level in levels]
    for slot in (*names, f"{key}_std"):
        if slot not in store:
            raise KeyError(
                f"{name} has no {'layer' if some is None else 'obsm entry'} {slot!r}, which "
                f"predict wrote. Run model.predict({name}, key_added={key!r}) again."
            )
    quantiles, std = [store[slot] for slot in names], store[f"{key}_std"]
    if not adata.n_obs:
        raise ValueError(f"{name} has no cells.")
    whole = _check_values(names, quantiles, std, name)
    return Predicted(
        name=name,
        model=str(record.get("model")),
        of=str(entry["of"]),
        n_cells=int(entry["n_cells"]),
        settings={k: _as_python(v) for k, v in entry.items() if k not in _OF_ONE_CALL},
        layer=entry.get("layer"),
        known_donors=frozenset(map(str, np.atleast_1d(entry.get("known_donors", [])))),
        levels=levels,
        genes=adata.var_names if some is None else pd.Index(np.asarray(some, dtype=object)),
        in_layers=some is None,
        quantiles=quantiles,
        std=std,
        whole=whole and entry["of"] == "cell",
    )


def observed(
    adata: AnnData,
    layer: str | None,
    predicted: Predicted,
    rows: np.ndarray,
    *,
    name: str | None = None,
) -> np.ndarray:
    """Observed values of the predicted genes of some cells, ``(n, n_genes)`` float64.

    ``layer`` is what the caller says; None is the layer that was modelled. ``name`` is what
    messages call ``adata`` if it is not the one with the predictions.

    Raises
    ------
    KeyError
        The layer is missing, or not recorded.
    ValueError
        The layer is not the one that was modelled; values that are not finite; values that
        are no counts where counts were predicted.
    """
    name = name or predicted.name
    modelled = predicted.layer
    if layer is None:
        if modelled is None:
            raise KeyError(
                f"{predicted.name}'s predictions do not say which layer was modelled: run predict "
                "again, or name it as layer=."
            )
        layer = modelled or None
    elif modelled is not None and layer != modelled:
        raise ValueError(
            f"layer={layer!r} is not what was modelled: the predictions are of "
            f"{f'layer {modelled!r}' if modelled else '.X'}. Leave layer out."
        )
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f"{name} has no layer {layer!r}; its layers are {sorted(filter(None, adata.layers))}. "
            "Give cells that have the layer that was modelled."
        )
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise KeyError(f"{name} has no .X, which was modelled.")
    columns = gene_positions(adata.var_names, predicted.genes, name=name, exact=False)
    values = dense(matrix[rows])[:, columns].astype(np.float64)
    where = ".X" if layer is None else f".layers[{layer!r}]"
    if not np.isfinite(values).all():
        raise ValueError(f"{name}{where} has values that are not finite.")
    if predicted.whole and ((values < 0) | (values != np.rint(values))).any():
        raise ValueError(
            f"{name}{where} does not hold counts, and the predictions are of counts: name the "
            "layer that was modelled as layer=."
        )
    return values


def check_given(adata: object, key: str, *, name: str) -> None:
    """Refuse what is no AnnData; of a MuData, say which modality has results.

    Raises
    ------
    TypeError
        For a MuData, a path, anything else; if ``key`` is no name.
    """
    if not isinstance(key, str):
        raise TypeError(f"key must be the key_added of what wrote the results, got {key!r}.")
    if hasattr(adata, "mod"):
        found = [name for name, mod in adata.mod.items() if key in mod.uns] or [*adata.mod]
        raise TypeError(
            f"{name} is a MuData, and results are in its modalities: give one of them, "
            f"mdata[{found[0]!r}]."
        )
    check_anndata(adata, method=f"{name}=")


def names_of(adata: AnnData, column: str) -> list[str]:
    """Names of the groups that a column of obs has, in the order of its categories."""
    labels = adata.obs[column].astype("category").cat.remove_unused_categories()
    return [str(name) for name in labels.cat.categories]


def dense(values: Any) -> np.ndarray:
    """A matrix or a part of it, whatever its form."""
    return np.asarray(values.toarray() if sparse.issparse(values) else values)


def _as_python(value: Any) -> Any:
    """A record as it was written, whether or not it has been in a file since."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _check_values(names: list[str], quantiles: list[Any], std: Any, name: str) -> bool:
    """Refuse what no ``predict`` has written; say whether all quantiles are whole numbers."""
    whole = True
    for start in range(0, std.shape[0], BLOCK):
        rows = np.arange(start, min(start + BLOCK, std.shape[0]))
        blocks = [dense(layer[rows]) for layer in quantiles]
        for slot, block in zip((*names, "std"), (*blocks, dense(std[rows])), strict=True):
            if not np.isfinite(block).all():
                raise ValueError(
                    f"{name}'s predictions have values that are not finite, in {slot!r}. Run "
                    "predict again."
                )
        for slot, below, above in zip(names, blocks, blocks[1:], strict=False):
            if (below > above).any():
                raise ValueError(
                    f"{name}'s predictions are no quantiles: {slot!r} exceeds that of the next "
                    "level. Run predict again."
                )
        whole = whole and all((block == np.rint(block)).all() for block in blocks)
    return whole
