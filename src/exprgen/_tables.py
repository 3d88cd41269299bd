"""What callers hand in: keys by role at setup, tables of conditions later. Checked, never changed.

A table of conditions comes as a DataFrame, as a mapping in which scalars stand for whole columns,
or as an AnnData. All three become a DataFrame with the model's own columns and, apart from it,
the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_list_like

from exprgen._errors import SetupError, closest, name_some
from exprgen._quantities import Embedding

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "SUMMARY",
    "check_roles",
    "column",
    "key_list",
    "read_table",
    "refuse_lazy",
]

SUMMARY = ("min", "median", "max")
"""How a quantity of many values is summarised, as columns ``{key}_min`` ... of a table."""

WRITTEN = ("n_train", "support", "extrapolated", "synthetic", "library", "source")
"""Columns that exprgen writes beside the conditions of synthetic cells."""


def key_list(keys: Any, role: str, *, many: bool) -> list[str]:
    """List the keys given for a role: a list if ``many`` may be given, else a string or None.

    Raises
    ------
    TypeError
        If they are of another type, naming the argument ``role``.
    """
    if keys is None:
        return []
    if isinstance(keys, str):
        if not many:
            return [keys]
    elif many and isinstance(keys, Sequence | np.ndarray | pd.Index):
        if wrong := [key for key in keys if not isinstance(key, str)]:
            raise TypeError(f"{role} must be a list of str; it holds {name_some(wrong)}.")
        return list(keys)
    hint = f" Did you mean [{keys!r}]?" if isinstance(keys, str) else ""
    raise TypeError(
        f"{role} must be {'a list of str' if many else 'a str'}; got {type(keys).__name__} "
        f"{keys!r}.{hint}"
    )


def check_roles(roles: Mapping[str, Sequence[str]]) -> None:
    """Refuse keys that have two roles, or the name of a column that exprgen writes.

    Raises
    ------
    SetupError
        Naming the key and its arguments.
    """
    seen: dict[str, str] = {}
    for role, keys in roles.items():
        for key in keys:
            if key in seen:
                raise SetupError(
                    f"{key!r} is given twice: in {seen[key]} and in {role}. It can have one role."
                )
            if key in WRITTEN:
                raise SetupError(
                    f"{key!r} in {role} is the name of a column that exprgen writes to synthetic "
                    f"cells ({name_some(WRITTEN, len(WRITTEN))}). Rename it in adata.obs."
                )
            seen[key] = role


def column(table: pd.DataFrame, key: str, role: str) -> pd.Series:
    """One column, by name.

    Raises
    ------
    KeyError
        If there is none, naming the closest, or several.
    """
    n = int((table.columns == key).sum())
    if n == 0:
        raise KeyError(
            f"{role}: obs has no column {key!r}.{closest(key, table.columns)} "
            f"Its columns are {name_some(table.columns, 20)}."
        )
    if n > 1:
        raise KeyError(f"{role}: {n} columns are named {key!r}. Rename or remove all but one.")
    return table[key]


def read_table(
    conditions: Any, keys: Sequence[str], embedding_key: str | None, argument: str
) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Read the columns ``keys`` and the embedding, those of them that are given.

    See :meth:`exprgen._conditions.ConditionSchema.parse`.
    """
    table, embedding = conditions, None
    if isinstance(conditions, pd.DataFrame | Mapping):
        _refuse_unknown(conditions, [*keys, embedding_key] if embedding_key else keys, argument)
        embedding = conditions.get(embedding_key)
        if isinstance(embedding, pd.Series):
            embedding = list(embedding)  # of vectors, or of one vector's numbers
        if isinstance(conditions, Mapping):
            given = {key: conditions[key] for key in keys if key in conditions}
            table, embedding = _broadcast(given, embedding, argument)
    elif hasattr(conditions, "obs") and hasattr(conditions, "obsm"):
        refuse_lazy(conditions)
        table = conditions.obs
        if embedding_key in conditions.obsm:
            embedding = conditions.obsm[embedding_key]
    else:
        raise TypeError(
            f"{argument} must be a DataFrame, a mapping of columns or an AnnData; got "
            f"{type(conditions).__name__}."
        )
    given = {key: column(table, key, argument) for key in keys if key in table.columns}
    if embedding is not None:
        where = f"{argument}[{embedding_key!r}]"
        embedding = Embedding.values(embedding, table.index, where)
    return pd.DataFrame(given, table.index), embedding


def refuse_lazy(adata: AnnData) -> None:
    """Refuse an AnnData whose ``obs`` is no table in memory.

    Raises
    ------
    SetupError
        Saying how to read it.
    """
    if not isinstance(adata.obs, pd.DataFrame):
        raise SetupError("adata is read lazily. Bring it into memory: adata = adata.to_memory().")


def _refuse_unknown(given: Iterable[object], known: Sequence[str], argument: str) -> None:
    """Raise KeyError for unknown columns, but let rows of ``model.conditions`` come back."""
    reported = {"n_train", *(f"{key}_{what}" for key in known for what in SUMMARY)}
    allowed = {*known, *(reported if isinstance(given, pd.DataFrame) else ())}
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise KeyError(
            f"{argument}: unknown columns {name_some(unknown)}.{closest(unknown[0], known)} The "
            f"model's columns are: {name_some(known, 20) or 'none'}."
        )


def _broadcast(
    columns: Mapping[str, Any], embedding: Any, argument: str
) -> tuple[pd.DataFrame, Any]:
    """Put lists of one length together by position, and repeat scalars; at least one row."""
    parts, lengths = {}, {}
    for key, value in columns.items():
        if isinstance(value, Set | Mapping):
            raise TypeError(f"{argument}[{key!r}] must be a scalar or a list; got {value!r}.")
        parts[key] = pd.Series(value if is_list_like(value) else [value]).array
        if is_list_like(value):
            lengths[key] = len(parts[key])
    if embedding is not None and np.ndim(embedding) > 1:
        lengths["the embedding"] = np.shape(embedding)[0]
    if len(set(lengths.values())) > 1:
        named = ", ".join(f"{key!r}: {n}" for key, n in lengths.items())
        raise ValueError(f"{argument}: lists must be of one length; got {named}.")
    n = next(iter(lengths.values()), 1)
    for key in parts.keys() - lengths.keys():
        parts[key] = parts[key].repeat(n)
    if np.ndim(embedding) == 1:
        embedding = np.tile(np.asarray(embedding), (n, 1))
    return pd.DataFrame(parts, pd.RangeIndex(n)), embedding
