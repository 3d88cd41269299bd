"""Cells, or all cells of some labels, that a comparison of models holds out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen._errors import name_some
from exprgen._tables import key_list
from exprgen.tl._names import text_labels

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["check_labels_are_known", "held_out"]

_MIN_CELLS = 10


def held_out(
    adata: AnnData, test_size: float, split_key: str | None, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Which cells are held out ``(n_obs,)``, and the label of each of these if they go whole.

    Raises
    ------
    TypeError, KeyError, CovariateError
        If ``split_key`` is no column without gaps.
    ValueError
        If cells are too few on one side.
    """
    rng = np.random.default_rng(seed)
    if split_key is None:
        test = np.zeros(adata.n_obs, dtype=bool)
        test[rng.permutation(adata.n_obs)[: round(test_size * adata.n_obs)]] = True
        unit = None
    else:
        labels = text_labels(adata.obs, split_key, "split_key")
        known = np.unique(labels)
        n_held = max(1, round(test_size * len(known)))
        test = np.isin(labels, rng.permutation(known)[:n_held])
        unit = labels[test]
    if min(test.sum(), (~test).sum()) < _MIN_CELLS:
        raise ValueError(
            f"{test.sum()} cells would be held out and {(~test).sum()} trained on; at least "
            f"{_MIN_CELLS} of both are needed. Change test_size, or give more cells."
        )
    return test, unit


def check_labels_are_known(obs: pd.DataFrame, test: np.ndarray, setup: dict[str, Any]) -> None:
    """Refuse held-out labels that no model will have seen, before one is trained.

    Raises
    ------
    ValueError
        If there are any.
    """
    keys = [
        *key_list(setup["categorical_condition_keys"], "categorical_condition_keys", many=True),
        *key_list(setup["batch_key"], "batch_key", many=False),
    ]
    for key in (key for key in keys if key in obs):  # setup says which are missing
        unseen = np.setdiff1d(*(obs[key][rows].dropna().astype(str) for rows in (test, ~test)))
        if unseen.size:
            raise ValueError(
                f"obs[{key!r}] has labels in held-out cells only: {name_some(unseen)}. Models "
                "know the labels that they were trained on: take another split_key or seed, "
                "leave these cells out, or the condition."
            )
