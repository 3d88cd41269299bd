r"""Tables of conditions to the numbers a model reads, and back; everywhere and alone.

A cell's conditions :math:`c` have five roles:

========== =============================== ==============================================
role       setup argument                  what it is
========== =============================== ==============================================
labels     ``categorical_condition_keys``  what is generated on: cell type, perturbation …
quantities ``continuous_condition_keys``   dose, age …
embedding  ``condition_embedding_key``     a vector per cell: a drug's structure …
batch      ``batch_key``                   nuisance; the latent space does not see it
donor      ``donor_key``                   random effect; a new label is a new donor
========== =============================== ==============================================

:class:`ConditionSchema` learns them once from ``obs`` and encodes any later table as one float32
matrix with the columns ``labels | quantities | embedding | batch | donor``: codes for labels,
standardised numbers for quantities. The code -1 is an unknown batch (to be marginalised) or a new
donor. :class:`ConditionLayout` says to the torch side how wide each part is.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from exprgen._doubts import doubts
from exprgen._errors import CovariateError, DataQualityWarning, ExtrapolationWarning, name_some
from exprgen._labels import Labels
from exprgen._layout import ConditionLayout
from exprgen._quantities import Embedding, Quantity
from exprgen._tables import check_roles, column, key_list, read_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from exprgen._columns import Column

__all__ = ["ConditionLayout", "ConditionSchema"]

_MARGINALIZE = " To average over it, leave it out and give marginalize=[{!r}]."
_NEW_BATCH = " To map a new batch, give unseen='null'."
_CODED_DONOR = "coded_donor_"


@dataclass(frozen=True)
class ConditionSchema:
    """What the registered cells' conditions are: labels, ranges, dtypes, standardisation."""

    labels: tuple[Labels, ...] = ()
    quantities: tuple[Quantity, ...] = ()
    embedding: Embedding | None = None
    batch: Labels | None = None
    donor: Labels | None = None

    @classmethod
    def fit(
        cls,
        obs: pd.DataFrame,
        *,
        categorical: Sequence[str] | None = (),
        continuous: Sequence[str] | None = (),
        batch: str | None = None,
        donor: str | None = None,
        embedding: tuple[str, Any] | None = None,
    ) -> ConditionSchema:
        """Learn the conditions from a table of cells, which is not modified.

        Parameters
        ----------
        obs
            Table with a row per cell.
        categorical, continuous, batch, donor
            Columns of ``obs``, by role.
        embedding
            Key in ``obsm`` and its array of shape (n_obs, n_dims).

        Raises
        ------
        TypeError, KeyError, ValueError
            If an argument is of the wrong type, or names a column that is missing, ambiguous,
            reserved or used twice.
        CovariateError
            If a column has missing, infinite, mixed or non-numeric values.

        Warns
        -----
        DataQualityWarning
            If a column is probably not what was meant, or a condition is confounded with donors.
        """
        roles = {
            "categorical_condition_keys": (categorical, True),
            "continuous_condition_keys": (continuous, True),
            "condition_embedding_key": (embedding and embedding[0], False),
            "batch_key": (batch, False),
            "donor_key": (donor, False),
        }
        keys = {role: key_list(given, role, many=many) for role, (given, many) in roles.items()}
        check_roles(keys)
        keys.pop("condition_embedding_key")
        columns = {
            key: (column(obs, key, role), f"obs[{key!r}] ({role})")
            for role, named in keys.items()
            for key in named
        }

        def fit_labels(role: str) -> tuple[Labels, ...]:
            return tuple(Labels.fit(*columns[key]) for key in keys[role])

        schema = cls(
            labels=fit_labels("categorical_condition_keys"),
            quantities=tuple(
                Quantity.fit(*columns[key]) for key in keys["continuous_condition_keys"]
            ),
            embedding=Embedding.fit(*embedding, obs.index) if embedding else None,
            batch=next(iter(fit_labels("batch_key")), None),
            donor=next(iter(fit_labels("donor_key")), None),
        )
        for doubt in doubts(schema, columns):
            warnings.warn(doubt, DataQualityWarning, stacklevel=2)
        return schema

    # ------------------------------------------------------------------ what there is

    @cached_property
    def layout(self) -> ConditionLayout:
        """How the encoded matrix is laid out."""
        return ConditionLayout(
            n_categories=tuple(len(part) for part in self.labels),
            n_continuous=len(self.quantities),
            n_embedding=len(self.embedding or ()),
            n_batch=len(self.batch or ()),
            n_donor=len(self.donor or ()),
        )

    @property
    def categorical_keys(self) -> list[str]:
        """Columns of labels that are generated on."""
        return [part.key for part in self.labels]

    @property
    def continuous_keys(self) -> list[str]:
        """Columns of quantities that are generated on."""
        return [part.key for part in self.quantities]

    @property
    def embedding_key(self) -> str | None:
        """Key of the embedding in ``obsm``."""
        return _key(self.embedding)

    @property
    def batch_key(self) -> str | None:
        """Column of the batch, a nuisance."""
        return _key(self.batch)

    @property
    def donor_key(self) -> str | None:
        """Column of the donor, a random effect."""
        return _key(self.donor)

    @property
    def condition_keys(self) -> list[str]:
        """What is generated on: labels, quantities, embedding."""
        return self.categorical_keys + self.continuous_keys + _some(self.embedding_key)

    @property
    def nuisance_keys(self) -> list[str]:
        """Batch and donor, where there are."""
        return _some(self.batch_key, self.donor_key)

    @property
    def column_keys(self) -> list[str]:
        """All keys that are columns of ``obs``."""
        return self.categorical_keys + self.continuous_keys + self.nuisance_keys

    @property
    def label_columns(self) -> list[Labels]:
        """Every column of labels: conditions, batch, donor."""
        return [*self.labels, *_some(self.batch, self.donor)]

    @property
    def columns(self) -> list[Labels | Quantity]:
        """Everything that is a column of ``obs``, as learned."""
        return [*self.label_columns, *self.quantities]

    def missing(self, table: pd.DataFrame, embedding: np.ndarray | None = None) -> list[str]:
        """Conditions (not batch or donor) that a parsed table does not give."""
        given = {*table.columns, *(_some(self.embedding_key) if embedding is not None else ())}
        return [key for key in self.condition_keys if key not in given]

    # ------------------------------------------------------------------ tables in, tables out

    def parse(
        self, conditions: Any, *, argument: str = "conditions"
    ) -> tuple[pd.DataFrame, np.ndarray | None]:
        """Read what a caller may give as conditions.

        Parameters
        ----------
        conditions
            A DataFrame; a mapping of columns, whose lists are of one length and whose scalars are
            repeated (the embedding's value is (d,) or (n, d)); or an AnnData, of whose ``obs`` and
            ``obsm`` the model's keys are read.
        argument
            What the caller calls it.

        Returns
        -------
        The given ones of the model's columns, with the index of a DataFrame or AnnData, and the
        embedding of shape (n, d) if given.

        Raises
        ------
        TypeError, KeyError, ValueError
            If it is something else, has unknown columns, or lists of several lengths.
        """
        return read_table(conditions, self.column_keys, self.embedding_key, argument)

    def encode(
        self,
        table: pd.DataFrame,
        embedding: np.ndarray | None = None,
        *,
        unseen: Literal["error", "null"] = "error",
        on_extrapolation: Literal["warn", "raise", "ignore"] = "warn",
    ) -> np.ndarray:
        """Encode a table as the matrix that the model reads.

        Parameters
        ----------
        table, embedding
            As :meth:`parse` returns them.
        unseen
            Whether a batch label that training has not seen is an error or code -1. An unseen
            label of a condition is always an error, an unseen donor always a new donor (-1).
        on_extrapolation
            What to do about quantities outside the trained range.

        Returns
        -------
        Array of shape (n, layout.width), float32.

        Raises
        ------
        CovariateError
            If conditions or values are missing or not finite, or a quantity is out of range and
            ``on_extrapolation="raise"``.
        UnseenCategoryError
            If labels are unseen.

        Warns
        -----
        ExtrapolationWarning
            Once, naming every quantity that is out of range.
        """
        if missing := self.missing(table, embedding):
            raise CovariateError(
                f"conditions lack {name_some(missing, 20)}. The model requires "
                f"{name_some(self.condition_keys, 20)}; average over one by marginalize=[...]."
            )
        columns = {key: (table[key], f"conditions[{key!r}]") for key in table.columns}
        encoded = [
            part.encode(*columns[part.key], unseen="error", remedy=_MARGINALIZE.format(part.key))
            for part in self.labels
        ]
        encoded += [part.encode(*columns[part.key]) for part in self.quantities]
        if self.embedding:
            where = f"conditions[{self.embedding.key!r}]"
            encoded += list(self.embedding.encode(embedding, table.index, where).T)
        for part, policy in ((self.batch, unseen), (self.donor, "null")):
            if part and part.key in columns:
                encoded.append(part.encode(*columns[part.key], unseen=policy, remedy=_NEW_BATCH))
            elif part:
                encoded.append(np.full(len(table), -1))
        self._report_extrapolation(table, embedding, on_extrapolation)
        matrix = np.empty((len(table), self.layout.width), dtype=np.float32)
        for j, values in enumerate(encoded):
            matrix[:, j] = values
        return matrix

    def extrapolated(self, table: pd.DataFrame, embedding: np.ndarray | None = None) -> np.ndarray:
        """Which rows have a quantity or vector outside the trained range, boolean, shape (n,)."""
        outside = np.zeros(len(table), dtype=bool)
        if self.embedding is not None and embedding is not None:
            outside |= self.embedding.outside(embedding)
        for part in self.quantities:
            if part.key in table:
                outside |= part.outside(part.values(table[part.key], f"column {part.key!r}"))
        return outside

    def restore(self, table: pd.DataFrame) -> pd.DataFrame:
        """Cast columns back to the dtypes seen at setup, as a new table of the same order."""
        restored = table.copy(deep=False)
        for part in self.columns:
            if part.key in table:
                restored[part.key] = part.restore(table[part.key])
        return restored

    # ------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """Plain types that survive JSON, for files."""
        return {
            "labels": [part.to_dict() for part in self.labels],
            "quantities": [part.to_dict() for part in self.quantities],
            "embedding": self.embedding and self.embedding.to_dict(),
            "batch": self.batch and self.batch.to_dict(),
            "donor": self.donor and self.donor.to_dict(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ConditionSchema:
        """Undo :meth:`to_dict`."""
        return cls(
            labels=tuple(Labels.from_dict(part) for part in state["labels"]),
            quantities=tuple(Quantity.from_dict(part) for part in state["quantities"]),
            embedding=state["embedding"] and Embedding.from_dict(state["embedding"]),
            batch=state["batch"] and Labels.from_dict(state["batch"]),
            donor=state["donor"] and Labels.from_dict(state["donor"]),
        )

    def with_coded_donors(self) -> ConditionSchema:
        """The same with numbers in place of donors' labels."""
        if self.donor is None:
            return self
        labels = tuple(f"{_CODED_DONOR}{i}" for i in range(len(self.donor)))
        return replace(self, donor=replace(self.donor, labels=labels, dtype="object"))

    @property
    def has_coded_donors(self) -> bool:
        """Whether donors' labels were left out of a file, so that no donor is recognised."""
        labels = () if self.donor is None else self.donor.labels
        return bool(labels) and all(str(label).startswith(_CODED_DONOR) for label in labels)

    # ------------------------------------------------------------------ helpers

    def _report_extrapolation(
        self, table: pd.DataFrame, embedding: np.ndarray | None, action: str
    ) -> None:
        if action == "ignore":
            return
        found = []
        if self.embedding is not None and (far := self.embedding.outside(embedding)).any():
            found.append(
                f"{self.embedding.key!r} further from the trained vectors' mean than any of them "
                f"({far.sum()} rows)"
            )
        for part in self.quantities:
            values = part.values(table[part.key], part.key)
            if (outside := values[part.outside(values)]).size:
                found.append(
                    f"{part.key!r} = {name_some(np.unique(outside))} ({outside.size} rows; "
                    f"trained on {part.minimum:g} to {part.maximum:g})"
                )
        if found and action == "raise":
            raise CovariateError(
                f"Outside the trained range: {'; '.join(found)}. To allow it, give "
                f"on_extrapolation='warn'."
            )
        if found:
            warnings.warn(
                f"Extrapolating outside the trained range: {'; '.join(found)}.",
                ExtrapolationWarning,
                stacklevel=3,
            )


def _key(part: Column | None) -> str | None:
    return None if part is None else part.key


def _some(*keys: Any) -> list[Any]:
    """Those that are not None."""
    return [key for key in keys if key is not None]
