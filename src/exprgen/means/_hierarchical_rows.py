"""Training rows of the hierarchical mean: encoded, centred, with their donors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from exprgen._errors import CovariateError, closest, name_some
from exprgen.means._checks import check_groups, check_table, check_training
from exprgen.means._encoding import Encoding
from exprgen.means._mixed import Rows, Sums

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Training", "design", "read"]


class Training(NamedTuple):
    """Training rows, what they were encoded and standardised by, and their sums."""

    rows: Rows
    sums: Sums
    encoding: Encoding
    centre: np.ndarray  # (n_vars,)
    scale: np.ndarray  # (n_vars,); the same for all but 0 of a gene that is constant
    donors: pd.Index  # none if rows are independent


def design(encoding: Encoding, table: pd.DataFrame) -> torch.Tensor:
    """Encoded conditions after a column of ones, ``(n_obs, 1 + n_inputs)``."""
    check_table(table)
    return torch.from_numpy(np.column_stack([np.ones(len(table)), encoding(table)]))


def read(
    table: pd.DataFrame,
    y: np.ndarray,
    weights: np.ndarray | None,
    groups: np.ndarray | None,
    *,
    donor_key: str | None,
    categorical_keys: Sequence[str] | None,
) -> Training:
    """Check, encode and standardise rows; donors are a column of the table or else ``groups``.

    Raises
    ------
    TypeError, ValueError, KeyError, CovariateError
        If an argument is not of the form that :meth:`Mean.fit` wants.
    """
    table, y, mass = check_training(table, y, weights)
    of_row, what = groups, "groups"
    if donor_key is not None:
        if donor_key not in table.columns:
            raise CovariateError(
                f"table lacks donor_key={donor_key!r}; its columns are "
                f"{name_some(table.columns, 20)}.{closest(donor_key, table.columns)}"
            )
        of_row, what = table[donor_key], f"table[{donor_key!r}]"
        table = table.drop(columns=donor_key)
    codes, donors = np.zeros(len(table), dtype=np.int64), pd.Index([])
    if of_row is not None:
        codes = check_groups(of_row, len(table), what)
        donors = pd.Index(pd.unique(pd.Series(of_row)))
    encoding = Encoding.fit(table, categorical_keys=categorical_keys)
    centre = mass @ y / mass.sum()
    away = y - centre
    spread = np.sqrt(mass @ np.square(away) / mass.sum())
    varies = spread > 1e-10 * np.abs(centre)  # rounding is no variation
    # One scale for all genes, as moderation compares their variances: a gene's own would be an
    # estimate from the very rows that are to be moderated.
    common = np.median(spread[varies]) if varies.any() else 1.0
    rows = Rows(
        design(encoding, table),
        torch.from_numpy(np.where(varies, away / common, 0.0)),
        torch.from_numpy(mass),
        torch.from_numpy(codes),
    )
    return Training(
        rows, Sums.of(rows, max(len(donors), 1)), encoding, centre, varies * common, donors
    )
