"""The evaluation report in an AnnData: ``uns[key]["report"]`` and ``["settings"]``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen._slots import check_key

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["check_target", "store"]


def check_target(test: AnnData, key: str | None) -> None:
    """Refuse, before anything is computed, what could not be written or is someone else's."""
    if key is None:
        return
    check_key(key)
    if test.is_view:
        raise ValueError(
            "test is a view, whose .uns cannot be written to; pass test.copy(), or no key_added."
        )
    entry = test.uns.get(key)
    ours = isinstance(entry, Mapping) and "report" in entry and "settings" in entry
    if key in test.uns and not ours:
        raise ValueError(
            f"test.uns[{key!r}] is taken, and not by an evaluation report. Choose another "
            "key_added=...."
        )


def store(test: AnnData, key: str, report: pd.DataFrame) -> None:
    """Write the report in a form that h5ad and zarr hold."""
    table = report.copy()
    table.attrs = {}
    table.index = table.index.astype(str)
    settings = {name: _storable(value) for name, value in report.attrs.items()}
    test.uns[key] = {"report": table, "settings": {"version": version("exprgen"), **settings}}


def _storable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key).replace("/", "|"): _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        if value and isinstance(value[0], Mapping):
            return {name: _storable([item[name] for item in value]) for name in value[0]}
        return np.array(value, dtype=object if not value or isinstance(value[0], str) else None)
    return value
