"""What a name means among several modalities, and its values for the cells of one of them.

================ ================================================================================
``"prot:x"``     ``x`` of the modality ``prot``; if it has none, what ``mdata`` has as ``"prot:x"``
``"x"``          ``x`` of ``mdata`` or of the modelled modality; both, if they are equal
``"prot"``       as an embedding: the modality's ``X``
================ ================================================================================

Cells are matched by name, never by position: modalities keep theirs in any order.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from exprgen._errors import CovariateError, DataQualityWarning, SetupError, closest, name_some
from exprgen._matrix import as_reader
from exprgen._tables import column

if TYPE_CHECKING:
    from mudata import MuData

__all__ = ["find_by_name"]

LARGEST_DENSE = 2000
"""Most columns of a matrix that is made dense to condition on."""


def find_by_name(
    mdata: MuData, modality: str, key: str, store: str, role: str, *, at_setup: bool
) -> Any:
    """A column or array by its name, for the cells of the modelled modality.

    Parameters
    ----------
    mdata, modality
        Modalities, and the one that is modelled.
    key, store, role
        The name, whether it is one of ``"obs"`` or ``"obsm"``, and the argument that gives it.
    at_setup
        Whether it must be there, and doubts are said.

    Returns
    -------
    A Series, or an array ``(n_obs, n_dims)``, in the order of the modality's cells; None if there
    is no such name.

    Raises
    ------
    KeyError
        At setup, if there is no such name.
    SetupError
        If cells are not paired or their names repeated, the name has two meanings, or an array has
        too many columns to be made dense.
    CovariateError
        If a modality's X holds missing or infinite values.
    """
    mod = mdata.mod[modality]
    if store == "obsm" and key in mdata.mod:
        return _whole(mdata, modality, key)
    owner = next((name for name in mdata.mod if key.startswith(f"{name}:")), None)
    if owner is None:
        places = [("mdata", mdata, key), (f"mdata[{modality!r}]", mod, key)]
    else:
        own = key.removeprefix(f"{owner}:")
        places = [(f"mdata[{owner!r}]", mdata.mod[owner], own), ("mdata", mdata, key)]
    found = [
        (f"{words}.{store}[{at!r}]", _aligned(_get(place, store, at, role), place, mod, words))
        for words, place, at in places
        # A MuData's obsm holds a mask under each modality's name.
        if at in getattr(place, store) and not (store == "obsm" and at in mdata.mod)
    ]
    if not found:
        if at_setup:
            raise KeyError(_not_found(mdata, modality, key, store, role))
        return None
    if owner is not None and at_setup and found[0][0].startswith(f"mdata.{store}"):
        warnings.warn(
            f"{role}={key!r} is read from {found[0][0]}; {places[0][0]}.{store} has no "
            f"{places[0][2]!r}, whose copy it may be: if that was deleted, del {found[0][0]}.",
            DataQualityWarning,
            stacklevel=4,
        )
    if len(found) == 2 and (n := _differ(found[0][1], found[1][1])):
        where, other = found[0][0], found[1][0]
        if owner is None:
            raise SetupError(
                f"{role}={key!r} has two meanings: {where} and {other} differ in {n} cells. Give "
                f"'{modality}:{key}' for the latter, or rename the former."
            )
        if at_setup:
            warnings.warn(
                f"{role}={key!r} is read from {where}; {other} differs from it in {n} cells, "
                f"and may be an old copy: del {other}, and mdata.pull_obs() makes it anew.",
                DataQualityWarning,
                stacklevel=4,
            )
    return found[0][1]


def _whole(mdata: MuData, modality: str, name: str) -> np.ndarray:
    """All of a modality's X as vectors to condition on."""
    if name == modality:
        raise SetupError(
            f"condition_embedding_key={name!r} is the modality that is modelled; cells cannot be "
            "conditioned on themselves. Name another modality."
        )
    other, where = mdata.mod[name], f"mdata[{name!r}]"
    if other.X is None:
        raise SetupError(
            f"{where}.X is None, and condition_embedding_key={name!r} conditions on it."
        )
    values = _aligned(other.X, other, mdata.mod[modality], where)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        cells = mdata.mod[modality].obs_names[bad]
        raise CovariateError(
            f"{where}.X (condition_embedding_key={name!r}) has missing or infinite values in "
            f"{bad.sum()} cells: {name_some(cells)}. Fill them in, or leave out these cells."
        )
    return values


def _get(place: AnnData | MuData, store: str, key: str, role: str) -> Any:
    return column(place.obs, key, role) if store == "obs" else place.obsm[key]


def _aligned(values: Any, place: AnnData | MuData, mod: AnnData, where: str) -> Any:
    """Rows of a column or an array for the cells of ``mod``, found by name."""
    rows = _rows(place, mod, where)
    if isinstance(values, pd.Series):
        return values.iloc[rows].set_axis(mod.obs_names)
    if isinstance(values, pd.DataFrame):
        values = values.to_numpy()
    if isinstance(values, np.ndarray):
        return values[rows]
    if values.shape[1] > LARGEST_DENSE:
        raise SetupError(
            f"{where} has {values.shape[1]} columns to condition on, which would be made dense; "
            f"at most {LARGEST_DENSE} are. Give fewer dimensions, e.g. principal components in "
            f"{where}.obsm, as condition_embedding_key='modality:key'."
        )
    return as_reader(values).rows(rows)


def _rows(place: AnnData | MuData, mod: AnnData, where: str) -> np.ndarray:
    """Row of each cell of ``mod`` in another modality, or in all of them, ``(n_obs,)``.

    Raises
    ------
    SetupError
        If names are repeated, or cells are not in both.
    """
    names, here = mod.obs_names, place.obs_names
    if names.equals(here):
        return np.arange(len(names))
    for index, owner in ((here, where), (names, "the modelled modality")):
        if not index.is_unique:
            repeated = index[index.duplicated()].unique()
            raise SetupError(
                f"{len(repeated)} names of cells are repeated in {owner}: {name_some(repeated)}. "
                "Modalities are matched by name: make them unique, the same in each."
            )
    missing = names[~names.isin(here)]
    spare = here[~here.isin(names)] if isinstance(place, AnnData) else missing[:0]
    if len(missing) or len(spare):
        raise SetupError(
            f"{len(missing) + len(spare)} cells are unpaired: {len(missing)} of the modelled "
            f"modality are not in {where}, {len(spare)} are only there "
            f"({name_some([*missing, *spare])}). Conditions are needed for every cell. Keep the "
            "cells that are in both: muon.pp.intersect_obs(mdata)."
        )
    return here.get_indexer(names)


def _differ(a: Any, b: Any) -> int:
    """In how many rows two columns or arrays differ; missing values are equal."""
    if not isinstance(a, pd.Series):
        a, b = (np.asarray(x.toarray() if hasattr(x, "toarray") else x) for x in (a, b))
        if a.shape != b.shape:
            return len(a)
        return int((a != b).reshape(len(a), -1).any(axis=1).sum())
    a, b = (x.astype(object).where(x.notna(), "").to_numpy() for x in (a, b))
    return int((a != b).sum())


def _not_found(mdata: MuData, modality: str, key: str, store: str, role: str) -> str:
    """What to say of a name that is nowhere."""
    there = {
        f"mdata.{store}": [str(at) for at in getattr(mdata, store) if at not in mdata.mod],
        **{
            f"mdata[{name!r}].{store}": [str(at) for at in getattr(mod, store)]
            for name, mod in mdata.mod.items()
        },
    }
    options = [*there[f"mdata.{store}"], *there[f"mdata[{modality!r}].{store}"]]
    options += [f"{name}:{at}" for name in mdata.mod for at in there[f"mdata[{name!r}].{store}"]]
    options += list(mdata.mod) if store == "obsm" else []
    listed = "; ".join(f"{where} has {name_some(names, 20) or 'none'}" for where, names in
                       there.items())  # fmt: skip
    return (
        f"{role}: {key!r} is neither in mdata.{store} nor in a modality's."
        f"{closest(key, options)} {listed}. Another modality's is named 'modality:key'."
    )
