"""What a caller asks a model: conditions, completed, encoded, and their donors named.

Batch and donor are marginalised unless they are given: the batch is drawn from those that training
saw with the row's conditions, a donor is a new one. Both are drawn once per row of conditions, and
cells of one row share them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from exprgen._arguments import check_choice
from exprgen._errors import CovariateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from exprgen._conditions import ConditionSchema
    from exprgen._observed import ObservedConditions
    from exprgen.models._means import CodesWithMean

__all__ = ["CELL", "DONOR", "TABLE", "Query", "ask", "log_library", "new_donors", "with_batch"]

logger = logging.getLogger("exprgen")

# Streams of random numbers under one seed: conditions, donors' effects, and blocks of cells.
TABLE, DONOR, CELL = range(3)

NEW_DONOR = "new_donor_{}"


@dataclass(frozen=True)
class Query:
    """Rows of conditions, complete and encoded.

    ``table`` ``(n, ...)`` holds labels and values as the caller knows them, ``codes``
    ``(n, width)`` what the module reads, ``embedding`` ``(n, d)`` the raw embedding,
    ``donors`` ``(n,)`` a number per donor label: rows with the same number share one effect.
    ``rows`` ``(n,)`` says which of the caller's ``n_rows`` rows each comes from.
    """

    table: pd.DataFrame
    codes: np.ndarray | CodesWithMean
    embedding: np.ndarray | None
    donors: np.ndarray
    rows: np.ndarray
    n_rows: int

    @property
    def keys(self) -> np.ndarray:
        """What tells rows apart, ``(n, ...)``."""
        return self.codes if isinstance(self.codes, np.ndarray) else self.codes.keys


def ask(
    schema: ConditionSchema,
    observed: ObservedConditions,
    conditions: Any,
    *,
    n_obs: int = 1,
    marginalize: Sequence[str] = (),
    draw_batch: bool = True,
    unseen: Literal["error", "null"] = "error",
    on_extrapolation: Literal["warn", "raise", "ignore"] = "warn",
    rng: np.random.Generator,
) -> Query:
    """Parse, complete and encode ``conditions``, each row repeated ``n_obs`` times.

    Parameters
    ----------
    schema, observed
        The model's conditions and what it was trained on.
    conditions
        DataFrame, mapping or AnnData; ``None`` draws ``n_obs`` rows as they occur in training.
    n_obs
        Cells per row.
    marginalize
        Conditions to draw from training, given the others, cell by cell.
    draw_batch
        Whether an unknown batch is drawn once per row, or stays unknown (code -1).
    unseen, on_extrapolation
        As in :meth:`exprgen._conditions.ConditionSchema.encode`.
    rng
        Source of the draws.

    Raises
    ------
    KeyError, TypeError, ValueError, CovariateError
        If the conditions are not what the model knows.
    """
    check_choice(unseen, "unseen", ("error", "null"))
    check_choice(on_extrapolation, "on_extrapolation", ("warn", "raise", "ignore"))
    marginalize = _check_marginalize(schema, marginalize)
    if conditions is None and schema.embedding_key is not None:
        raise CovariateError(
            f"conditions are needed: this model is conditioned on {schema.embedding_key!r}, of "
            "which it keeps no vectors to draw from. Give an AnnData whose obsm holds them."
        )
    if conditions is None:
        table, embedding = observed.draw(n_obs, rng), None
        n_obs = 1
    else:
        table, embedding = schema.parse(conditions)
        given = [key for key in marginalize if key in table]
        if given and not isinstance(conditions, AnnData):
            raise ValueError(
                f"{given[0]!r} is in marginalize and in conditions: leave it out of one of them."
            )
        table = table.drop(columns=given)
    if draw_batch:
        table = with_batch(schema, observed, table, unseen=unseen, rng=rng)
    donor = schema.donor_key
    if donor is not None and donor not in table:
        logger.info("%r is not given: every row of conditions is a new donor.", donor)
        table = table.assign(**{donor: new_donors(schema, len(table))})
    n_rows = len(table)
    rows = np.repeat(np.arange(n_rows), n_obs)
    # Drawn conditions differ between the cells of a row; given ones are read once per row.
    if marginalize:
        table = observed.complete(table.iloc[rows], marginalize, rng)
        embedding = None if embedding is None else embedding[rows]
    codes = schema.encode(table, embedding, unseen=unseen, on_extrapolation=on_extrapolation)
    observed.report_unseen(table, on_extrapolation=on_extrapolation)
    if not marginalize:
        table, codes = table.iloc[rows], codes[rows]
        embedding = None if embedding is None else embedding[rows]
    donors = np.zeros(len(table), dtype=np.int64)
    if donor is not None:
        donors = pd.factorize(table[donor].astype(object))[0]
    return Query(table, codes, embedding, donors, rows, n_rows)


def new_donors(schema: ConditionSchema, n: int, taken: Iterable[object] = ()) -> list[str]:
    """Labels of new donors that no known donor has, and none of those ``taken``."""
    known = () if schema.donor is None else schema.donor.labels
    used = {str(label) for label in (*known, *taken)}
    free = (NEW_DONOR.format(i) for i in count())
    return list(islice((label for label in free if label not in used), n))


def with_batch(
    schema: ConditionSchema,
    observed: ObservedConditions,
    table: pd.DataFrame,
    *,
    unseen: Literal["error", "null"] = "error",
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Draw each row's batch where it is not given, or unseen and ``unseen="null"``."""
    if schema.batch is None:
        return table
    key = schema.batch.key
    if key in table and unseen == "error":
        return table
    drawn = observed.complete(table.drop(columns=key, errors="ignore"), [key], rng)[key]
    if key in table:
        known = schema.batch.lookup(table[key]) >= 0
        drawn = table[key].astype(object).where(known | table[key].isna(), drawn.astype(object))
    else:
        logger.info("%r is not given: drawn as training saw it with these conditions.", key)
    return table.assign(**{key: drawn})


def _check_marginalize(schema: ConditionSchema, marginalize: Sequence[str]) -> list[str]:
    if isinstance(marginalize, str):
        raise TypeError(f"marginalize must be a list, did you mean [{marginalize!r}]?")
    for key in marginalize:
        if key == schema.embedding_key:
            raise CovariateError(
                f"The embedding {key!r} cannot be averaged over: the model keeps no vectors to "
                "draw from. Give it in conditions."
            )
        if key not in schema.condition_keys:
            raise KeyError(
                f"marginalize names {key!r}, which is no condition of the model; conditions are "
                f"{schema.condition_keys}. Batch and donor are always marginalised unless given."
            )
    return list(marginalize)


def log_library(
    library: str | float | np.ndarray, rows: np.ndarray, n_rows: int
) -> torch.Tensor | None:
    """Fixed log depths of the cells, ``(n_cells,)``; ``None`` where they are to be sampled.

    Parameters
    ----------
    library
        ``"sampled"``, one number, or one for each of the ``n_rows`` rows of conditions.
    rows
        Row of conditions of each cell.
    """
    if isinstance(library, str) and library == "sampled":
        return None
    if isinstance(library, str | bool):
        raise ValueError(f"library must be 'sampled', a number or an array, got {library!r}.")
    values = np.asarray(library, dtype=np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError("library must be positive and finite.")
    if values.ndim == 0:
        values = np.full(n_rows, float(values))
    if values.shape != (n_rows,):
        raise ValueError(
            f"library has shape {values.shape}; give one number, or one for each of the {n_rows} "
            "rows of conditions."
        )
    return torch.from_numpy(np.log(values[rows])).float()
