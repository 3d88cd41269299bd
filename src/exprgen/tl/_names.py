"""Arguments of the evaluation that are one name or several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["check_names"]


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
    raise TypeError(f"{argument} must be a name, a list of names, or {others}, got {given!r}.")
