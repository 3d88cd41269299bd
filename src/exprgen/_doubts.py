"""Columns that can be used, but probably are not what was meant: what setup warns of.

One sentence for each doubt: what is odd, in which column, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exprgen._errors import name_some
from exprgen._quantities import text_doubt

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from exprgen._conditions import ConditionSchema
    from exprgen._labels import Labels
    from exprgen._quantities import Quantity

__all__ = ["doubts"]

FEW_DONORS = 10
"""With fewer donors a label's effect cannot be told from the donors'."""


def doubts(schema: ConditionSchema, columns: Mapping[str, tuple[pd.Series, str]]) -> list[str]:
    """All doubts about the registered columns, each given with its name in messages."""
    found = []
    for quantity in schema.quantities:
        found += _of_quantity(quantity, *columns[quantity.key])
    for part in schema.label_columns:
        found += _of_labels(part, *columns[part.key], part.key in schema.condition_keys)
    if schema.donor:
        donors = schema.donor.lookup(columns[schema.donor.key][0])
        for part in schema.labels:
            found += _of_confounding(part, *columns[part.key], donors, len(schema.donor))
    return found


def _of_quantity(part: Quantity, column: pd.Series, where: str) -> list[str]:
    constant = part.minimum == part.maximum
    text = f"{where} has no effect: every cell has the value {part.minimum:g}."
    return text_doubt(column, where) + ([text] if constant else [])


def _of_labels(part: Labels, column: pd.Series, where: str, is_condition: bool) -> list[str]:
    found = []
    if part.categorical:
        unused = set(column.cat.categories) - set(part.labels)
        if unused:
            found.append(
                f"{where} declares categories that no cell has; they are dropped: "
                f"{name_some(sorted(unused, key=str))}."
            )
    cells = np.bincount(part.lookup(column), minlength=len(part))
    singletons = [label for label, n in zip(part.labels, cells, strict=True) if n == 1]
    if len(part) == 1:
        found.append(f"{where} has no effect: every cell has the label {part.labels[0]!r}.")
    elif isinstance(part.labels[0], float) or len(part) >= len(column) / 2:
        found.append(
            f"{where} looks continuous: {len(part)} labels of type "
            f"{type(part.labels[0]).__name__} for {len(column)} cells. Merge labels"
            + (", or use continuous_condition_keys." if is_condition else ".")
        )
    elif singletons:
        found.append(
            f"{where} has labels with 1 cell, from which little can be learned: "
            f"{name_some(singletons)}. Merge them with others, or leave out these cells."
        )
    return found


def _of_confounding(
    part: Labels, column: pd.Series, where: str, donors: np.ndarray, n_donors: int
) -> list[str]:
    """Say so if each donor has one label, and a label few donors."""
    pairs = np.unique(part.lookup(column) * n_donors + donors)
    counts = np.bincount(pairs // n_donors, minlength=len(part))
    few = {label: n for label, n in zip(part.labels, counts, strict=True) if n < FEW_DONORS}
    if len(part) == 1 or len(pairs) > n_donors or not few:
        return []
    known = name_some(f"{label}: {n}" for label, n in few.items())
    return [
        f"{where} is constant within donors, and labels are known from fewer than {FEW_DONORS} of "
        f"them ({known}): their effect cannot be told from the donors'. Read its effect with care."
    ]
