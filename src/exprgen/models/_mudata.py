"""Several modalities: one is modelled, the others can only condition.

Verbs read cells from an AnnData and know nothing of a MuData. :func:`read_modality` makes one of
the modelled modality: its own matrix, and beside it the columns and vectors that setup named, from
wherever in the MuData they are, put to its cells *by name*. Nothing of the user's is changed or
copied but these columns, and they are read anew each time, so that an edit is noticed. Results go
to the modality itself (:func:`home_of`).

The conditions are called as setup called them (:mod:`exprgen.models._mudata_names`), but without
the prefix of the modelled modality: ``"rna:x"`` is ``x`` of ``rna``. So its AnnData can be given
alone where it has all of them.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mudata
import pandas as pd
from anndata import AnnData
from mudata import MuData
from scvi.data import AnnDataManager
from scvi.data._manager import AnnDataManagerValidationCheck

from exprgen import _slots
from exprgen._errors import SetupError, closest, name_some
from exprgen._random import isolated
from exprgen._tables import key_list
from exprgen._validate import align_genes, matrix_of
from exprgen.models._mudata_names import find_by_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from scvi.data.fields import BaseAnnDataField

__all__ = [
    "ModalityManager",
    "check_mudata",
    "home_of",
    "in_modality",
    "own_name",
    "own_names",
    "read_h5mu",
    "read_modality",
    "target_of",
    "write_h5mu",
]

_COLUMNS = {
    "batch_key": False,
    "donor_key": False,
    "categorical_condition_keys": True,
    "continuous_condition_keys": True,
    "size_factor_key": False,
}
"""Arguments of setup that name columns of obs, and whether they are lists."""

_EMBEDDING = "condition_embedding_key"


class ModalityManager(AnnDataManager):
    """Registers a MuData with scvi-tools, whose fields see the modelled modality.

    Cells need not be in all modalities, only in those that condition, which are checked here; the
    genes of another object may come in another order.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs["validation_checks"] = AnnDataManagerValidationCheck(
            check_fully_paired_mudata=False
        )
        super().__init__(**kwargs)

    def _add_field(
        self,
        field: BaseAnnDataField,
        adata: MuData,
        source_registry: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        said = self._registry["setup_args"]
        cells = read_modality(adata, said)
        if source_registry is not None:
            names = source_registry["field_registries"]["X"]["state_registry"]["column_names"]
            order = align_genes(cells.var_names, names, quiet=True)
            cells = cells if order is None else cells[:, order]
        super()._add_field(field, cells, source_registry, **kwargs)
        place = self._registry["field_registries"][field.registry_key]["data_registry"]
        if place:
            place["mod_key"] = said["modality"]  # where scvi-tools itself looks


def check_mudata(mdata: object) -> None:
    """Refuse what cannot be set up as several modalities.

    Raises
    ------
    TypeError
        If it is no MuData.
    SetupError
        If it is a view.
    """
    if not isinstance(mdata, MuData):
        advice = (
            "For one AnnData: setup_anndata."
            if isinstance(mdata, AnnData)
            else "Make one of AnnData objects: mudata.MuData({'rna': rna, 'prot': prot})."
        )
        raise TypeError(f"setup_mudata wants a MuData, got {type(mdata).__name__}. {advice}")
    if mdata.is_view:
        raise SetupError(
            "mdata is a view of another MuData, and setup writes to it. Set up a copy: "
            "mdata = mdata.copy()."
        )


def own_names(said: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of setup with the names that columns have in the AnnData that verbs read."""
    if "modality" not in said:
        return dict(said)
    named = dict(said)
    for role in (*_COLUMNS, _EMBEDDING):
        keys = said[role]
        if keys is not None:
            one = isinstance(keys, str)
            named[role] = own_name(keys, said) if one else [own_name(key, said) for key in keys]
    return named


def own_name(key: str, said: Mapping[str, Any]) -> str:
    """Name of a column without the prefix of the modelled modality, if there are several."""
    return key.removeprefix(f"{said['modality']}:") if "modality" in said else key


def home_of(mdata: MuData, said: Mapping[str, Any]) -> AnnData:
    """The modality that results are written to; no longer a view of what it was made from."""
    name = said["modality"]
    if mdata.mod[name].is_view:
        mdata.mod[name] = mdata.mod[name].copy()
    return mdata.mod[name]


def target_of(data: AnnData | MuData, copy: bool) -> AnnData | MuData:
    """What to write to: ``data``, or a copy if asked for or if it is a view.

    Raises
    ------
    ValueError
        If a MuData in a file would have to be copied, which only goes to another file.
    """
    if not isinstance(data, MuData):
        return _slots.target(data, copy)
    if data.isbacked and (copy or data.is_view):
        raise ValueError(
            f"mdata is read from a file, and {'copy=True' if copy else 'a view of it'} needs a "
            "copy to write to. Read it into memory first: mudata.read_h5mu(path)."
        )
    with quietly():
        return _slots.target(data, copy)


def read_h5mu(file: Path) -> MuData:
    """Read a MuData from a file."""
    with quietly():
        return mudata.read_h5mu(file)


def write_h5mu(mdata: MuData, file: Path) -> None:
    """Write a MuData to a file, and leave it as it is: mudata makes categories of all text."""
    frames = [(mod, mod.obs.copy(), mod.var.copy()) for mod in mdata.mod.values()]
    try:
        with quietly():
            mdata.write_h5mu(file)
    finally:
        for mod, obs, var in frames:
            mod.obs, mod.var = obs, var


@contextmanager
def quietly() -> Iterator[None]:
    """For what mudata does when it makes or writes an object.

    It draws from numpy's global stream, warns of its own next version, and until that copies
    columns of the modalities over those of the whole.
    """
    changed = mudata.set_options(pull_on_update=False)  # as a context it sets up logging
    try:
        with isolated(0), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        mudata.set_options(**changed.opts)


@contextmanager
def in_modality(name: str | None) -> Iterator[None]:
    """Say in which modality, if any, an error is, where the message speaks of ``adata``."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if name is None:
            raise
        error.args = (f"In modality {name!r}: {error.args[0]}", *error.args[1:])
        raise


def read_modality(
    mdata: MuData, said: Mapping[str, Any], *also: str, at_setup: bool = False
) -> AnnData:
    """The modelled modality as an AnnData with its conditions; matrices are shared, not copied.

    Parameters
    ----------
    mdata
        Modalities.
    said
        Arguments of ``setup_mudata``.
    *also
        Further columns of obs to read.
    at_setup
        Whether everything named must be there; later a query may leave out what is averaged over.

    Returns
    -------
    The modality's cells in its own order, with ``obs``, the matrix to model, the embedding.

    Raises
    ------
    KeyError
        If there is no such modality; at setup also column, layer or embedding.
    TypeError
        If a name is not of the right type.
    SetupError
        If cells are not paired or their names repeated, a name has two meanings, or an embedding
        has too many columns to be made dense.

    Warns
    -----
    DataQualityWarning
        At setup, if ``mdata.obs`` has an older copy of a modality's column.
    """
    name, layer = said["modality"], said["layer"]
    mod = _modality(mdata, name)
    columns = {}
    for role, keys in _named(said, also):
        for key in keys:
            values = find_by_name(mdata, name, key, "obs", role, at_setup=at_setup)
            if values is not None:
                columns[own_name(key, said)] = values
    obsm = {}
    for key in key_list(said[_EMBEDDING], _EMBEDDING, many=False):
        values = find_by_name(mdata, name, key, "obsm", _EMBEDDING, at_setup=at_setup)
        if values is not None:
            obsm[own_name(key, said)] = values
    if at_setup:
        with in_modality(name):
            matrix_of(mod, layer)  # or an error that says which there are
    with warnings.catch_warnings():
        # The modality has said before if its names are repeated.
        warnings.filterwarnings("ignore", ".*names are not unique", UserWarning)
        return AnnData(
            X=mod.X if layer is None else None,
            obs=mod.obs.assign(**columns),
            var=pd.DataFrame(index=mod.var_names),
            obsm=obsm,
            layers={key: mod.layers[key] for key in {"counts", layer} if key in mod.layers},
            uns={**mod.uns, **{key: mdata.uns[key] for key in mdata.uns if key[:6] == "_scvi_"}},
        )


def _named(said: Mapping[str, Any], also: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Columns to read, by the argument that names them."""
    for role, many in _COLUMNS.items():
        yield role, key_list(said[role], role, many=many)
    for key in also:
        yield "split_key", key_list(key, "split_key", many=False)


def _modality(mdata: MuData, name: object) -> AnnData:
    if not isinstance(name, str):
        raise TypeError(
            f"modality must be a str, the name of the modality to model; got {name!r}. mdata has "
            f"{name_some(mdata.mod, 20)}."
        )
    if name not in mdata.mod:
        raise KeyError(
            f"modality={name!r} is not in mdata; its modalities are: "
            f"{name_some(mdata.mod, 20) or 'none'}.{closest(name, mdata.mod)}"
        )
    return mdata.mod[name]
