"""A column of labels, and their codes.

Labels :math:`l_0 … l_{K-1}` become the codes :math:`0 … K-1`. Two labels are one and the same if
they are equal and of one kind (text, number or truth value): 1 is 1.0, but neither "1" nor True.
A column has labels of one kind only, so that JSON and h5ad keep them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd

from exprgen._columns import Column, refuse_values
from exprgen._errors import CovariateError, UnseenCategoryError, closest, name_some

__all__ = ["Label", "Labels"]

Label = str | int | float | bool

MAX_NAMED = 20  # known labels listed in a message
_FILL_IN = (
    " Fill them in with a label of their own, e.g. .astype('string').fillna('unknown'), or leave "
    "out these cells."
)


@dataclass(frozen=True)
class Labels(Column):
    """A column of labels.

    Parameters
    ----------
    key
        Name of the column.
    labels
        The labels by their codes: a categorical's own order, else sorted.
    dtype
        Of the column at setup; of its categories if it was a categorical.
    categorical, ordered
        Whether the column was a categorical, and an ordered one.
    """

    labels: tuple[Label, ...]
    dtype: str
    categorical: bool
    ordered: bool

    @classmethod
    def fit(cls, column: pd.Series, where: str) -> Labels:
        """Learn the labels in use.

        Raises
        ------
        CovariateError
            If values are missing, or labels are of several kinds or of an unfit one.
        """
        codes, labels = factorize(column)
        refuse_values(column.index, codes < 0, where, "missing value", _FILL_IN)
        labels = [labels[code] for code in np.unique(codes)]
        kinds = {kind_of(label): label for label in reversed(labels)}
        if len(kinds) > 1:
            examples = " and ".join(f"{kind} ({label!r})" for kind, label in kinds.items())
            raise CovariateError(
                f"{where} mixes labels of different types: {examples}. Make them one type, "
                f"e.g. with .astype(str)."
            )
        if not kinds.keys() <= {"str", "number", "bool"}:
            kind, label = kinds.popitem()
            raise CovariateError(
                f"{where} has labels of type {kind} ({label!r}); they must be text, numbers or "
                f"truth values. Convert them, e.g. with .astype(str)."
            )
        categorical = isinstance(column.dtype, pd.CategoricalDtype)
        return cls(
            key=str(column.name),
            labels=tuple(labels if categorical else sorted(labels)),
            dtype=str(column.cat.categories.dtype if categorical else column.dtype),
            categorical=categorical,
            ordered=bool(categorical and column.cat.ordered),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _code_of(self) -> dict[tuple[str, Label], int]:
        return {(kind_of(label), label): code for code, label in enumerate(self.labels)}

    def lookup(self, column: pd.Series) -> np.ndarray:
        """Codes of a column, shape (n,); -1 where missing or unseen. Never raises."""
        codes, labels = factorize(column)
        known = [self._code_of.get((kind_of(label), label), -1) for label in labels]
        return np.array([*known, -1])[codes]  # missing has code -1, which is the last entry

    def encode(
        self, column: pd.Series, where: str, *, unseen: Literal["error", "null"], remedy: str = ""
    ) -> np.ndarray:
        """Codes of a column, shape (n,); -1 for unseen labels if ``unseen="null"``.

        Raises
        ------
        CovariateError
            If values are missing.
        UnseenCategoryError
            If a label is unseen and that is an error; and always if it only differs in type from
            a known one (1 and "1"), which is never meant. ``remedy`` ends the message.
        """
        refuse_values(column.index, column.isna().to_numpy(), where, "missing value", _FILL_IN)
        codes = self.lookup(column)
        new = column[codes < 0]
        labels = pd.unique(new.astype(object))
        texts = {str(label): label for label in self.labels}
        twins = [label for label in labels if str(label) in texts]
        if twins:
            label, known = twins[0], texts[str(twins[0])]
            raise UnseenCategoryError(
                f"{where}: label {label!r} ({type(label).__name__}) was not seen in training, "
                f"{known!r} ({type(known).__name__}) was: the types differ. Convert the column."
            )
        if len(labels) and unseen == "error":
            raise UnseenCategoryError(
                f"{where}: labels not seen in training: {name_some(labels)} ({len(new)} rows, "
                f"first {name_some(new.index)}). Known: {name_some(self.labels, MAX_NAMED)}."
                f"{closest(labels[0], self.labels)}{remedy}"
            )
        return codes

    def decode(self, codes: np.ndarray, index: pd.Index | None = None) -> pd.Series:
        """Labels of codes, in the dtype seen at setup; undoes :meth:`lookup`."""
        labels = pd.Index(self.labels, dtype=self.dtype)
        values = (
            pd.Categorical.from_codes(codes, labels, ordered=self.ordered)
            if self.categorical
            else labels.take(codes)
        )
        return pd.Series(values, index=index, name=self.key)

    def restore(self, column: pd.Series) -> pd.Series:
        """Cast back to the dtype seen at setup; new labels extend a categorical."""
        codes = self.lookup(column)
        new = pd.unique(column[codes < 0].astype(object)).tolist()
        if not new:
            return self.decode(codes, column.index)
        if any(kind_of(label) != kind_of(self.labels[0]) for label in new):
            # AnnData can write a column of one type only; missing values stay as they are.
            texts = column.astype("string").astype(object)
            return texts.astype("category") if self.categorical else texts
        labels = (*self.labels, *sorted(new))
        dtype = self.dtype if isinstance(new[0], str) else str(pd.Index(labels).dtype)
        return replace(self, labels=labels, dtype=dtype).restore(column)


def kind_of(label: object) -> str:
    """Text, number, truth value, or the name of another type."""
    if isinstance(label, str):
        return "str"
    if isinstance(label, bool | np.bool_):
        return "bool"
    return "number" if isinstance(label, Real) else type(label).__name__


def factorize(column: pd.Series) -> tuple[np.ndarray, list[Any]]:
    """Codes of shape (n,), -1 where missing, and the labels they stand for."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.codes.to_numpy(), column.cat.categories.tolist()
    codes, labels = pd.factorize(column)
    return codes, labels.tolist()
