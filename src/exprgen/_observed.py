r"""What a model can be asked: the combinations of conditions it was trained on, with their counts.

This stands in for the training rows in a saved model. Rows that agree in every label, in the batch
and in the *levels* of quantities with at most 20 distinct values are one combination; of any other
quantity a combination keeps 21 quantiles :math:`q_0 … q_{20}`, from which values are drawn by
interpolation, :math:`v = q_i + (20u - i)(q_{i+1} - q_i)` with :math:`i = \lfloor 20u \rfloor` and
:math:`u` uniform. Donors and embeddings take no part.

Combinations are held as codes, one row each; two tables are compared by the numbers of their
distinct rows, so that a million rows cost no more than a sort.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd

from exprgen._errors import CovariateError, ExtrapolationWarning, name_some
from exprgen._labels import Labels
from exprgen._tables import SUMMARY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from exprgen._conditions import ConditionSchema
    from exprgen._quantities import Quantity

__all__ = ["ObservedConditions"]

MAX_LEVELS = 20
N_STEPS = 20
"""Quantiles are kept at 0, 1/20, …, 1."""


@dataclass(frozen=True, eq=False)
class ObservedConditions:
    """Distinct combinations of conditions and batch, with the number of training cells.

    Parameters
    ----------
    schema
        Whose labels the codes stand for.
    levels
        Sorted values of each quantity that has at most 20.
    codes
        Shape (n_combinations, n_keys), with a column for each of :attr:`keys`.
    counts
        Training cells of each combination, shape (n_combinations,), most frequent first.
    quantiles
        Of the quantities without levels, shape (n_combinations, n_spread, 21).
    """

    schema: ConditionSchema
    levels: Mapping[str, tuple[float, ...]]
    codes: np.ndarray
    counts: np.ndarray
    quantiles: np.ndarray

    @classmethod
    def fit(cls, schema: ConditionSchema, table: pd.DataFrame) -> Self:
        """Summarise the training rows, whose columns are those of ``schema``."""
        values = {part.key: _values(part, table) for part in schema.quantities}
        distinct = {key: np.unique(column) for key, column in values.items()}
        levels = {k: tuple(v.tolist()) for k, v in distinct.items() if len(v) <= MAX_LEVELS}
        empty = cls(schema, levels, np.empty((0, 0), int), np.empty(0, int), np.empty((0, 0, 0)))
        codes = empty._encode(table, empty.keys)
        [group] = _number_rows(codes)
        _, first, counts = np.unique(group, return_index=True, return_counts=True)
        quantiles = np.empty((len(counts), len(empty.spread_keys), N_STEPS + 1))
        for j, key in enumerate(empty.spread_keys):
            grid = np.linspace(0, 1, N_STEPS + 1)
            by_group = pd.Series(values[key]).groupby(group)
            quantiles[:, j] = by_group.quantile(grid).to_numpy().reshape(-1, N_STEPS + 1)
        order = np.argsort(-counts, kind="stable")
        return cls(schema, levels, codes[first][order], counts[order], quantiles[order])

    # ------------------------------------------------------------------ what there is

    @property
    def keys(self) -> list[str]:
        """Columns whose combinations are counted: labels, levels, batch."""
        batch = [self.schema.batch_key] if self.schema.batch_key else []
        return [*self.schema.categorical_keys, *self.levels, *batch]

    @property
    def spread_keys(self) -> list[str]:
        """Quantities with too many values to be levels."""
        return [key for key in self.schema.continuous_keys if key not in self.levels]

    @property
    def label_codes(self) -> np.ndarray:
        """Distinct combinations of categorical conditions, ``(n, n_labels)``."""
        return np.unique(self.codes[:, : len(self.schema.labels)], axis=0)

    @property
    def frame(self) -> pd.DataFrame:
        """A row per combination, most frequent first, with ``n_train``.

        Quantities without levels are summarised as ``{key}_min``, ``_median`` and ``_max``.
        """
        frame = self._decode(np.arange(len(self.counts)), self.keys)
        for j, key in enumerate(self.spread_keys):
            for what, at in zip(SUMMARY, (0, N_STEPS // 2, N_STEPS), strict=True):
                frame[f"{key}_{what}"] = self.quantiles[:, j, at]
        frame["n_train"] = self.counts
        return frame

    # ------------------------------------------------------------------ drawing

    def draw(self, n: int, rng: np.random.Generator) -> pd.DataFrame:
        """Draw ``n`` rows of conditions and batch as they occur in training."""
        table = pd.DataFrame(index=pd.RangeIndex(n))
        return self.complete(table, [*self.keys, *self.spread_keys], rng)

    def complete(
        self, table: pd.DataFrame, keys: Sequence[str], rng: np.random.Generator
    ) -> pd.DataFrame:
        """Fill in absent columns row by row from p(missing | given) of the training rows.

        Given are the labels, levels and batch in ``table``; a combination of them that was never
        seen is completed from p(missing) overall. Quantities without levels do not count as given.
        A donor is not filled in: without the column it is a new one. The first rows do not depend
        on how many follow: combinations and each quantity are drawn from a stream of their own.

        Raises
        ------
        CovariateError
            If the embedding is to be filled in.
        """
        if self.schema.embedding_key in keys:
            raise CovariateError(
                f"The embedding {self.schema.embedding_key!r} cannot be averaged over; give it in "
                f"conditions."
            )
        absent = [key for key in keys if key not in table]
        given = [key for key in self.keys if key in table]
        here, there = self._match(table, given)
        order = np.argsort(there, kind="stable")
        upper = np.cumsum(self.counts[order])
        # The training cells of each group, in that order, are numbers start .. start + size - 1.
        size = self._total(there, here)
        start = np.cumsum(size) - size
        unknown = size[here] == 0
        low = np.where(unknown, 0, start[here])
        high = low + np.where(unknown, upper[-1], size[here])
        row = order[np.searchsorted(upper, rng.integers(low, high), side="right")]

        completed = table.copy(deep=False)
        drawn = self._decode(row, [key for key in self.keys if key in absent])
        for key in drawn:
            completed[key] = drawn[key].array
        streams = rng.spawn(len(self.spread_keys))
        for j, (key, stream) in enumerate(zip(self.spread_keys, streams, strict=True)):
            if key in absent:
                at = stream.random(len(table)) * N_STEPS
                step = at.astype(np.int64)
                below, above = self.quantiles[row, j, step], self.quantiles[row, j, step + 1]
                completed[key] = below + (at - step) * (above - below)
        return completed

    # ------------------------------------------------------------------ how well it is known

    def n_train(self, table: pd.DataFrame) -> np.ndarray:
        """Training cells with the conditions of each row, over all batches, shape (n,)."""
        given = [key for key in self.keys if key in table and key != self.schema.batch_key]
        here, there = self._match(table, given)
        return self._total(there, here)[here]

    def support(self, table: pd.DataFrame, embedding: np.ndarray | None = None) -> np.ndarray:
        """How well training covers each row of conditions, shape (n,), of str.

        ``"outside range"``
            A quantity is outside everything trained, or an embedding further out.
        ``"unseen combination"``
            The labels were never seen together, or a quantity is outside what they were seen with.
        ``"between"``
            A quantity is inside that range, but not at a level seen with these labels.
        ``"seen"``
            Otherwise.
        """
        here, there = self._match(table, self._given_labels(table))
        inside = np.isin(here, there)
        for part in self.schema.quantities:
            if part.key in table:
                low, high = (pd.Series(end).groupby(there) for end in self._ends(part))
                values = _values(part, table)
                inside &= values >= low.min().reindex(here).to_numpy() - part.tolerance
                inside &= values <= high.max().reindex(here).to_numpy() + part.tolerance
        return np.select(
            [self.schema.extrapolated(table, embedding), ~inside, self.n_train(table) == 0],
            ["outside range", "unseen combination", "between"],
            "seen",
        )

    def report_unseen(
        self, table: pd.DataFrame, *, on_extrapolation: Literal["warn", "raise", "ignore"] = "warn"
    ) -> None:
        """Warn once, or raise, if labels were never seen together, naming the combinations."""
        given = self._given_labels(table)
        here, there = self._match(table, given)
        unseen = ~np.isin(here, there)
        if on_extrapolation == "ignore" or not unseen.any():
            return
        rows = table.loc[unseen, given].astype(object).drop_duplicates()
        named = name_some(
            ", ".join(f"{k}={v}" for k, v in row.items()) for _, row in rows.iterrows()
        )
        message = f"Conditions never seen together in training: {named} ({unseen.sum()} rows)."
        if on_extrapolation == "raise":
            raise CovariateError(f"{message} To allow it, give on_extrapolation='warn'.")
        warnings.warn(message, ExtrapolationWarning, stacklevel=3)

    # ------------------------------------------------------------------ sharing and files

    def drop_rare(self, min_cells: int) -> Self:
        """Keep the combinations of at least ``min_cells`` training cells.

        Raises
        ------
        ValueError
            If none is left.
        """
        keep = self.counts >= min_cells
        if not keep.any():
            raise ValueError(
                f"min_cells={min_cells} leaves no combination of conditions; the most frequent "
                f"has {self.counts.max()} cells."
            )
        return type(self)(
            self.schema, self.levels, self.codes[keep], self.counts[keep], self.quantiles[keep]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types that survive JSON, for files; the schema is kept apart."""
        return {
            "levels": {key: list(values) for key, values in self.levels.items()},
            "codes": self.codes.tolist(),
            "counts": self.counts.tolist(),
            "quantiles": self.quantiles.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], schema: ConditionSchema) -> Self:
        """Undo :meth:`to_dict`."""
        n = len(state["counts"])
        n_spread = len(schema.quantities) - len(state["levels"])
        return cls(
            schema=schema,
            levels={key: tuple(values) for key, values in state["levels"].items()},
            codes=np.array(state["codes"], dtype=np.int64).reshape(n, -1),
            counts=np.array(state["counts"], dtype=np.int64),
            quantiles=np.array(state["quantiles"], float).reshape(n, n_spread, N_STEPS + 1),
        )

    # ------------------------------------------------------------------ codes

    @cached_property
    def _parts(self) -> dict[str, Labels | Quantity]:
        return {part.key: part for part in self.schema.columns}

    def _given_labels(self, table: pd.DataFrame) -> list[str]:
        return [key for key in self.schema.categorical_keys if key in table]

    def _encode(self, table: pd.DataFrame, keys: Sequence[str]) -> np.ndarray:
        """Codes of a table, shape (n, n_keys); -1 is no trained label or level."""
        codes = np.empty((len(table), len(keys)), dtype=np.int64)
        for j, key in enumerate(keys):
            part = self._parts[key]
            if isinstance(part, Labels):
                codes[:, j] = part.lookup(table[key])
            else:
                values, levels = _values(part, table), np.array(self.levels[key])
                nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
                codes[:, j] = np.where(
                    np.abs(values - levels[nearest]) <= part.tolerance, nearest, -1
                )
        return codes

    def _decode(self, rows: np.ndarray, keys: Sequence[str]) -> pd.DataFrame:
        """Columns ``keys`` of the combinations ``rows``, in the dtypes seen at setup."""
        decoded = pd.DataFrame(index=pd.RangeIndex(len(rows)))
        for key in keys:
            part, codes = self._parts[key], self.codes[rows, self.keys.index(key)]
            decoded[key] = (
                part.decode(codes)
                if isinstance(part, Labels)
                else part.restore(pd.Series(np.array(self.levels[key])[codes]))
            )
        return decoded

    def _match(self, table: pd.DataFrame, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Number rows and combinations so that those which agree in ``keys`` have one number."""
        columns = [self.keys.index(key) for key in keys]
        here, there = _number_rows(self._encode(table, keys), self.codes[:, columns])
        return here, there

    def _total(self, there: np.ndarray, here: np.ndarray) -> np.ndarray:
        """Training cells by number, for all numbers of :meth:`_match`."""
        n_numbers = 1 + max(here.max(initial=0), there.max())
        return np.bincount(there, self.counts, minlength=n_numbers).astype(np.int64)

    def _ends(self, part: Quantity) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest value of each combination, shape (n_combinations,) each."""
        if part.key in self.levels:
            values = np.array(self.levels[part.key])[self.codes[:, self.keys.index(part.key)]]
            return values, values
        quantiles = self.quantiles[:, self.spread_keys.index(part.key)]
        return quantiles[:, 0], quantiles[:, -1]


def _values(part: Quantity, table: pd.DataFrame) -> np.ndarray:
    return part.values(table[part.key], f"column {part.key!r}")


def _number_rows(*tables: np.ndarray) -> list[np.ndarray]:
    """Number the distinct rows of code tables, in order; equal rows have one number in all."""
    rows = np.concatenate(tables)
    number = np.zeros(len(rows), dtype=np.int64)
    for column in rows.T:
        # Numbered anew for every column, so that the products cannot overflow.
        number, _ = pd.factorize(number * (column.max(initial=0) + 2) + column + 1, sort=True)
    return np.split(number, np.cumsum([len(table) for table in tables])[:-1])
