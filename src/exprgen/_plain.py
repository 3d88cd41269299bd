"""Any state of a model as tensors and plain Python types, and back.

A pickle can run code when it is read; ``torch.load(weights_only=True)`` reads only tensors, dict,
list, tuple, str, int, float, bool and None. :func:`to_plain` writes everything else a model keeps
(numpy arrays, pandas tables, paths) as a dict that names its kind under one marker key, and
:func:`from_plain` restores type, dtype and order exactly. Values are data all the way: no name in
a file decides what is called, beyond the fixed list of kinds below.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
import torch

__all__ = ["from_plain", "to_plain"]

KIND = "__kind__"
SCALARS = (str, int, float, bool, type(None))
NULLABLE = {"boolean", "string", "str", "Float32", "Float64"} | {
    f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)
}
FACTORIES = {kind.__name__: kind for kind in (list, dict, int, float, str)}  # of a defaultdict


def to_plain(value: Any, *, where: str = "") -> Any:
    """Write a value as tensors and plain types.

    Parameters
    ----------
    value
        Nested mappings, lists and tuples of plain types, tensors, numpy arrays and scalars,
        :class:`pandas.DataFrame`, ``Series``, ``Index`` and paths. Tensors are detached, and carry
        no more than their own values: a slice does not take along the rest.
    where
        What the value is called in an error.

    Raises
    ------
    TypeError
        If something in it is of another type, naming the place.
    """

    def inner(part: Any, name: object) -> Any:
        return to_plain(part, where=f"{where}[{name!r}]")

    if type(value) in SCALARS:
        return value
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        whole = plain.untyped_storage().nbytes() == plain.nbytes
        return plain.as_subclass(torch.Tensor) if whole else plain.clone()
    if isinstance(value, np.generic):
        return {KIND: "scalar", "value": inner(np.asarray(value), "value")}
    if isinstance(value, np.ndarray):
        return _array_to_plain(value, inner, where)
    if type(value) in (list, tuple, torch.Size):
        parts = [inner(part, i) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, Mapping):
        return _mapping_to_plain(value, inner)
    if isinstance(value, PurePath):
        return {KIND: "path", "value": str(value)}
    if isinstance(value, (pd.DataFrame, pd.Series, pd.Index, pd.api.extensions.ExtensionArray)):
        return _table_to_plain(value, inner, where)
    raise TypeError(
        f"{where or 'The value'} is a {type(value).__name__}, which a model file cannot hold; "
        "give numbers, text, arrays, tables, or lists and mappings of them."
    )


def from_plain(value: Any) -> Any:
    """Restore what :func:`to_plain` has written.

    Raises
    ------
    ValueError
        If the value was not written by it.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(map(from_plain, value))
    if not isinstance(value, dict):
        return value
    if KIND not in value:
        return type(value)((name, from_plain(part)) for name, part in value.items())
    if value[KIND] not in _RESTORE:
        raise ValueError(f"Unknown kind of value: {value[KIND]!r}.")
    parts = {name: from_plain(part) for name, part in value.items() if name != KIND}
    return _RESTORE[value[KIND]](parts)


def _array_to_plain(value: np.ndarray, inner: Callable[[Any, object], Any], where: str) -> dict:
    """Write an array as its bytes, or as the list of its objects."""
    shape = tuple(value.shape)
    if value.dtype == object:
        parts = [inner(part, i) for i, part in enumerate(value.ravel().tolist())]
        return {KIND: "objects", "shape": shape, "values": parts}
    if value.dtype.kind not in "biufcSUmM":
        raise TypeError(f"{where} is an array of {value.dtype}, which a model file cannot hold.")
    raw = np.frombuffer(value.tobytes(), dtype=np.uint8)
    return {
        KIND: "array",
        "dtype": value.dtype.str,
        "shape": shape,
        "bytes": torch.from_numpy(raw.copy()),
    }


def _mapping_to_plain(value: Mapping, inner: Callable[[Any, object], Any]) -> dict:
    """Write a mapping as a dict if its keys are plain, as its items if not."""
    parts = {name: inner(part, name) for name, part in value.items()}
    plain = KIND not in parts and all(type(name) in SCALARS for name in parts)
    factory = value.default_factory if isinstance(value, defaultdict) else None
    if factory in FACTORIES.values():
        items = [(inner(name, "key"), part) for name, part in parts.items()]
        return {KIND: "defaultdict", "factory": factory.__name__, "items": items}  # type: ignore[union-attr]
    if plain:
        return OrderedDict(parts) if isinstance(value, OrderedDict) else parts
    return {KIND: "dict", "items": [(inner(name, "key"), part) for name, part in parts.items()]}


def _table_to_plain(value: Any, inner: Callable[[Any, object], Any], where: str) -> dict:
    """Write a table, a column, an index, or the values of one that numpy has no type for."""
    if isinstance(value, pd.RangeIndex):
        kind, parts = "range", {"args": (value.start, value.stop, value.step), "name": value.name}
    elif isinstance(value, pd.DataFrame):
        columns = [_values(value.iloc[:, i]) for i in range(value.shape[1])]
        kind, parts = "frame", {"values": columns, "index": value.index, "columns": value.columns}
    elif isinstance(value, pd.Series):
        kind, parts = (
            "series",
            {"values": _values(value), "index": value.index, "name": value.name},
        )
    elif isinstance(value, pd.Index) and not isinstance(value, pd.MultiIndex):
        kind, parts = "index", {"values": _values(value), "name": value.name}
    elif isinstance(value, pd.Categorical):
        kind = "categorical"
        parts = {k: getattr(value, k) for k in ("codes", "categories", "ordered")}
    elif str(getattr(value, "dtype", "")) in NULLABLE:
        kind, values = "nullable", value.to_numpy(dtype=object, na_value=None)
        parts = {"dtype": str(value.dtype), "values": values.tolist()}
    else:
        raise TypeError(f"{where} is a {type(value).__name__}, which a model file cannot hold.")
    return {KIND: kind} | {name: inner(part, name) for name, part in parts.items()}


def _values(column: pd.Series | pd.Index) -> Any:
    """Take a column's values: numpy's where numpy has such a type, else pandas' own."""
    return column.to_numpy() if isinstance(column.dtype, np.dtype) else column.array


def _objects(parts: dict[str, Any]) -> np.ndarray:
    values = np.empty(len(parts["values"]), dtype=object)
    values[:] = parts["values"]
    return values.reshape(parts["shape"])


def _frame(parts: dict[str, Any]) -> pd.DataFrame:
    index = parts["index"]
    columns = {i: pd.Series(v, index, dtype=v.dtype) for i, v in enumerate(parts["values"])}
    return pd.DataFrame(columns, index=index).set_axis(parts["columns"], axis=1)


def _nullable(parts: dict[str, Any]) -> Any:
    if parts["dtype"] not in NULLABLE:
        raise ValueError(f"Unknown type of values: {parts['dtype']!r}.")
    return pd.array(parts["values"], dtype=parts["dtype"])


_RESTORE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "scalar": lambda p: p["value"][()],
    "array": lambda p: np.frombuffer(
        bytearray(p["bytes"].cpu().numpy()), dtype=np.dtype(p["dtype"])
    ).reshape(p["shape"]),
    "objects": _objects,
    "path": lambda p: Path(p["value"]),
    "dict": lambda p: dict(p["items"]),
    "defaultdict": lambda p: defaultdict(FACTORIES[p["factory"]], p["items"]),
    "range": lambda p: pd.RangeIndex(*p["args"], name=p["name"]),
    "index": lambda p: pd.Index(p["values"], name=p["name"], dtype=p["values"].dtype),
    "series": lambda p: pd.Series(
        p["values"], p["index"], name=p["name"], dtype=p["values"].dtype
    ),
    "frame": _frame,
    "categorical": lambda p: pd.Categorical.from_codes(
        p["codes"], p["categories"], ordered=p["ordered"]
    ),
    "nullable": _nullable,
}
