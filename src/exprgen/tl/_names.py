"""Arguments that are names, and the labels in the column that one names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from exprgen._columns import refuse_values
from exprgen._errors import closest

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

__all__ = ["check_names", "text_labels"]


def check_names(given: Any, argument: str, others: str = "None") -> list[str]:
    """One name, or several, as a list without repeats.

    Raises
    ------
    TypeError
        Something else; ``others`` says what besides names is allowed.
    """
    names = [given] if isinstance(given, str) else given
    if isinstance(names, Iterable):
        names = list(names)
        if all(isinstance(name, str) for name in names):
            return list(dict.fromkeys(names))
    allowed = f"a name, a list of names, or {others}" if others else "a name or a list of names"
    raise TypeError(f"{argument} must be {allowed}, got {given!r}.")


def text_labels(obs: pd.DataFrame, key: str, argument: str, where: str = "obs") -> np.ndarray:
    """A column of obs without gaps, as text, ``(n_obs,)``.

    Raises
    ------
    TypeError
        If ``key`` is no name.
    KeyError
        If there is no such column.
    CovariateError
        If cells have no label.
    """
    if not isinstance(key, str):
        raise TypeError(f"{argument} must be the name of one column of {where}, got {key!r}.")
    if key not in obs:
        raise KeyError(f"{argument}={key!r} is no column of {where}.{closest(key, obs.columns)}")
    column = obs[key]
    refuse_values(
        obs.index,
        column.isna().to_numpy(),
        f"{where}[{key!r}] ({argument})",
        "missing value",
        " Fill them in, or leave these cells out.",
    )
    return column.astype(str).to_numpy()
