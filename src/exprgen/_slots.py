"""Where results go in an AnnData: all names in one place, and all or nothing is written.

Under a key *k* (``key_added``) a verb writes slots named

=========  ========================  ==========================================================
store      given as                  written to
=========  ========================  ==========================================================
layers     ``"mean"``                ``layers["k_mean"]``, or ``obsm["k_mean"]`` for some genes
obsm       ``"latent"``              ``obsm["X_k"]``
obsm       ``"latent_std"``          ``obsm["X_k_std"]``
obsm, obs  ``"log_likelihood"``      ``obsm["k_..."]``, ``obs["k_log_likelihood"]``
=========  ========================  ==========================================================

and ``uns["k"]`` records the model, its version, all slots under that key, and for each verb its
own slots and how they came about (seed, draws, estimator); sampled cells say there where they come
from. Running a verb again replaces its slots
and removes those of the verbs that depended on it. Whatever else bears such a name is the user's:
it is left alone unless ``overwrite=True``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import pandas as pd
from scipy import sparse

from exprgen._arguments import check_bool
from exprgen._errors import name_some
from exprgen._stores import stores_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData

__all__ = ["check_key", "check_values", "quantile_name", "target", "write"]


def target(adata: AnnData, copy: bool) -> AnnData:
    """Choose what to write to: ``adata``, or a copy if asked for or if it is a view.

    A copy is in memory.
    """
    if not (check_bool(copy, "copy") or adata.is_view):
        return adata
    return adata.to_memory() if adata.isbacked or stores_of(adata) else adata.copy()


def quantile_name(quantile: float) -> str:
    """Name a quantile by its percentage: 0.05 is ``"q05"``, 0.025 ``"q02.5"``, 0.95 ``"q95"``."""
    whole, _, rest = f"{100 * quantile:.10g}".partition(".")
    return f"q{whole:0>2}{'.' * bool(rest)}{rest}"


def check_key(key: object) -> None:
    """Refuse what cannot be the prefix of names in a file."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added must be a name without '/', got {key!r}.")


def write(
    adata: AnnData,
    key: str,
    verb: str,
    *,
    model: str,
    layers: Mapping[str, Any] | None = None,
    obsm: Mapping[str, Any] | None = None,
    obs: Mapping[str, Any] | None = None,
    info: Mapping[str, Any],
    var_names: Iterable[str] | None = None,
    replaces: Iterable[str] = (),
    overwrite: bool = False,
) -> None:
    """Write the results of one verb; if anything fails, ``adata`` is as it was.

    Parameters
    ----------
    adata
        Cells x genes; no view, see :func:`target`.
    key
        The user's ``key_added``.
    verb
        What was run: ``"predict"``, ``"denoise"``, ...
    model
        Name of the model's class.
    layers
        Arrays ``(n_obs, n_vars)`` by names without the key; ``(n_obs, len(var_names))`` if
        ``var_names`` is given.
    obsm
        Arrays ``(n_obs, d)``.
    obs
        Columns ``(n_obs,)``, in the order of the cells (an index is not looked at).
    info
        How the results came about; numbers, strings, and lists, arrays or mappings of them
        (None is left out).
    var_names
        The genes that ``layers`` holds if they are not all; kept in ``uns[key][verb]``.
    replaces
        Verbs whose results depended on what is replaced now.
    overwrite
        Whether to replace what this package has not written, or another model has.

    Raises
    ------
    ValueError
        If an array does not fit the cells or genes or is not finite, if a name is taken, or if
        ``uns[key]`` belongs to another model.
    TypeError
        If ``info`` holds what a file cannot.
    """
    check_key(key)
    check_bool(overwrite, "overwrite")
    genes = None if var_names is None else list(var_names)
    slots = _named(adata, key, layers or {}, obsm or {}, obs or {}, genes)
    entry = _storable(info, "info") | {"slots": _strings(slots)}
    if genes is not None:
        entry["var_names"] = _array(genes)

    previous = _previous(adata, key, model, overwrite)
    owned = set(previous.get("slots", ()))
    taken = sorted(slot for slot in slots.keys() - owned if _exists(adata, slot))
    if taken and not overwrite:
        raise ValueError(
            f"{len(taken)} names are taken, and not by results of exprgen: {name_some(taken)}. "
            "Choose another key_added=..., or replace them by overwrite=True."
        )
    # What is no verb's record says where the cells come from, whichever model is asked next.
    verbs = {name for name, value in previous.items() if _is_record(value)}
    again = {verb, *replaces} if previous.get("model") == model else {verb, *verbs}
    kept = {name: value for name, value in previous.items() if name not in again}
    for name, value in kept.items():
        if _is_record(value):
            kept[name] = {**value, "slots": _strings(set(value["slots"]) - slots.keys())}
    entries = [e for e in (*kept.values(), entry) if _is_record(e)]
    all_slots = {slot for e in entries for slot in e["slots"]}
    record = {"model": model, "version": version("exprgen"), "slots": _strings(all_slots)}

    _put(adata, slots)
    for slot in owned - all_slots:
        _remove(adata, slot)
    adata.uns[key] = kept | record | {verb: entry}


def _is_record(value: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether an entry of ``uns[key]`` is what a verb has recorded."""
    return isinstance(value, Mapping) and "slots" in value


def _previous(adata: AnnData, key: str, model: str, overwrite: bool) -> Mapping[str, Any]:
    """Find what exprgen recorded under ``key``; empty if nothing, or if it may be dropped."""
    previous = adata.uns.get(key, {})
    ours = isinstance(previous, Mapping) and (not previous or "model" in previous)
    if not overwrite and not ours:
        raise ValueError(
            f"adata.uns[{key!r}] is taken, and not by results of exprgen. Choose another "
            "key_added=..., or replace it by overwrite=True."
        )
    if not overwrite and previous.get("model", model) != model:
        raise ValueError(
            f"adata.uns[{key!r}] holds results of {previous['model']}, these are of {model}. "
            "Choose another key_added=..., or replace them by overwrite=True."
        )
    return previous if ours else {}


def _named(
    adata: AnnData,
    key: str,
    layers: Mapping[str, Any],
    obsm: Mapping[str, Any],
    obs: Mapping[str, Any],
    genes: list[str] | None,
) -> dict[str, Any]:
    """Give every array its slot, ``"layers/exprgen_mean"``, once it is known to fit."""
    store, n_vars = ("layers", adata.n_vars) if genes is None else ("obsm", len(genes))
    latent = {"latent": f"X_{key}", "latent_std": f"X_{key}_std"}
    slots: dict[str, Any] = {}
    for name, values in layers.items():
        check_values(name, values, (adata.n_obs, n_vars))
        slots[f"{store}/{key}_{name}"] = values
    for name, values in obsm.items():
        check_values(name, values, (adata.n_obs, *values.shape[1:2]))
        slots[f"obsm/{latent.get(name, f'{key}_{name}')}"] = values
    for name, values in obs.items():
        if len(values) != adata.n_obs:
            raise ValueError(f"{name} has {len(values)} values, adata has {adata.n_obs} cells.")
        slots[f"obs/{key}_{name}"] = values.array if isinstance(values, pd.Series) else values
    return slots


def check_values(name: str, values: Any, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape, or one with values that are not finite."""
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}, the cells and genes need {shape}.")
    data = values.data if sparse.issparse(values) else values
    if isinstance(data, np.ndarray) and data.dtype.kind == "f" and not np.isfinite(data).all():
        raise ValueError(f"{name} has {(~np.isfinite(data)).sum()} values that are not finite.")


def _find(adata: AnnData, slot: str) -> tuple[Any, str]:
    """Find the store of a slot, and its name there."""
    store, _, name = slot.partition("/")
    return getattr(adata, store), name


def _exists(adata: AnnData, slot: str) -> bool:
    store, name = _find(adata, slot)
    return name in store


def _remove(adata: AnnData, slot: str) -> None:
    store, name = _find(adata, slot)
    if name in store:
        del store[name]


def _put(adata: AnnData, slots: Mapping[str, Any]) -> None:
    """Write all slots; should one fail, put back what was there."""
    before: dict[str, Any] = {}
    try:
        for slot, values in slots.items():
            store, name = _find(adata, slot)
            before[slot] = store.get(name)
            store[name] = values
    except BaseException:
        for slot, values in before.items():
            store, name = _find(adata, slot)
            if values is None:
                _remove(adata, slot)
            else:
                store[name] = values
        raise


def _array(names: Iterable[str]) -> np.ndarray:
    """Hold strings the way they come back from a file."""
    return np.array(list(names), dtype=object)


def _strings(names: Iterable[str]) -> np.ndarray:
    return _array(sorted(names))


def _storable(value: Any, where: str) -> Any:
    """Bring a value into the form in which h5ad and zarr give it back.

    Raises
    ------
    TypeError
        If they cannot hold it.
    """
    if isinstance(value, Mapping):
        return {str(k): _storable(v, f"{where}[{k!r}]") for k, v in value.items() if v is not None}
    if isinstance(value, str):
        return str(value)
    array = np.asarray(value)
    if array.dtype.kind == "U":
        return _array(map(str, array))
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{where} = {value!r} cannot be written to a file; give a number or text.")
    return array if array.ndim else array.item()
