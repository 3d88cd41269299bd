"""Rare groups of cells, filled up with synthetic ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from exprgen import _arguments
from exprgen._errors import name_some
from exprgen._random import resolve_seed
from exprgen._validate import check_anndata
from exprgen.models._query import new_donors
from exprgen.tl._concat import concat
from exprgen.tl._model import check_model
from exprgen.tl._names import text_labels

if TYPE_CHECKING:
    from mudata import MuData

    from exprgen._conditions import ConditionSchema
    from exprgen._labels import Labels
    from exprgen.models import GenerativeModel

__all__ = ["augment", "check_generator", "real_cells", "shortages", "synthetic_like"]

logger = logging.getLogger("exprgen")

_SIZES = ("median", "max")
Sizes = Literal["median", "max"] | int | Mapping[str, int]


def augment(
    adata: AnnData | MuData,
    model: GenerativeModel,
    *,
    groupby: str,
    n_obs: Sizes = "median",
    progress_bar: bool = True,
    seed: int | None = None,
) -> AnnData:
    """Fill groups of few cells up with cells that the model draws.

    Synthetic cells have the conditions, batches and donors of real cells of their group, drawn
    with replacement. Donors that the model does not know (none is known to one whose file was
    saved without ``donor_labels=True``) are replaced by new ones with labels of their own,
    ``"new_donor_0"`` and so on: cells drawn for another donor do not bear a real one's name.

    Whether they help is another question: see :func:`exprgen.tl.augmentation_test`. They are for
    training something on, a classifier say. They are no evidence: a test that counts them as
    observations finds whatever the model believes.

    Parameters
    ----------
    adata
        Real cells, with counts where the model's setup found them. Of a MuData the modelled
        modality is filled up.
    model
        A trained model of counts, of which ``groupby`` is a categorical condition.
    groupby
        Column of ``.obs``.
    n_obs
        Cells that each group is to have at least: ``"median"`` or ``"max"`` over the groups of
        ``adata``, a number, or a number for some groups by name.
    progress_bar, seed
        As in :meth:`exprgen.NBVAE.sample`.

    Returns
    -------
    AnnData
        A new object as of :func:`exprgen.tl.concat`: the real cells, then the synthetic ones,
        which ``obs["synthetic"]`` tells apart; counts of the model's genes on one scale of depth.
        Without groups to fill, the real cells alone, in the same form.

    Raises
    ------
    KeyError, TypeError, ValueError
        If the model cannot draw cells of these groups, or ``n_obs`` is not what it should be.
    """
    check_generator(model, groupby)
    cells = real_cells(model, adata, "adata")
    labels = text_labels(cells.obs, groupby, "groupby")
    if not len(labels):
        raise ValueError("adata has no cells: there is nothing to fill up.")
    missing = shortages(labels, n_obs)
    synthetic = synthetic_like(
        cells, model, labels, missing, seed=resolve_seed(seed), progress_bar=progress_bar
    )
    return concat(cells, synthetic, layer=model._setup_args["layer"])


def real_cells(model: GenerativeModel, data: AnnData | MuData, name: str, *also: str) -> AnnData:
    """Cells to read, of a MuData the modelled modality with further columns ``also``.

    Raises
    ------
    TypeError
        If there are none in it.
    ValueError
        If some were drawn: they would count as real ones from here on.
    """
    adata: AnnData = model._readable(data, *also)
    check_anndata(adata, method=f"{name}=")
    if "synthetic" in adata.obs and (drawn := int(adata.obs["synthetic"].astype(bool).sum())):
        raise ValueError(
            f"{drawn} cells of {name} are synthetic (obs['synthetic']): give the real ones, "
            f"{name}[~{name}.obs['synthetic'].astype(bool)].copy()."
        )
    return adata


def check_generator(model: GenerativeModel, groupby: str) -> None:
    """Refuse a model that cannot draw counts of given groups.

    Raises
    ------
    TypeError, RuntimeError
        If it is no trained model.
    ValueError
        If it is one of continuous values, or groups are no condition of it.
    """
    check_model(model)
    if not model.needs_counts:
        raise ValueError(
            f"This {type(model).__name__} models continuous values: real and synthetic cells are "
            "put together as counts. Use a model of the counts."
        )
    if groupby not in model.schema.categorical_keys:
        raise ValueError(
            f"groupby={groupby!r} is no categorical condition of the model, which cannot draw "
            f"cells of one group: these are {name_some(model.schema.categorical_keys) or 'none'}."
        )


def shortages(labels: np.ndarray, n_obs: Sizes) -> dict[str, int]:
    """How many cells each group lacks; groups that lack none are left out.

    Raises
    ------
    TypeError, ValueError, KeyError
        If ``n_obs`` is neither a word, a number nor a mapping of groups to numbers.
    """
    groups, sizes = np.unique(labels, return_counts=True)
    have = dict(zip(groups.tolist(), sizes.tolist(), strict=True))
    if isinstance(n_obs, Mapping):
        unknown = [group for group in n_obs if str(group) not in have]
        if unknown:
            raise KeyError(
                f"n_obs names groups without a cell: {name_some(unknown)}; there is nothing to "
                f"take their conditions from. Groups: {name_some(groups)}."
            )
        wanted = {
            str(group): _arguments.check_positive_int(n, f"n_obs[{group!r}]", minimum=0)
            for group, n in n_obs.items()
        }
    elif isinstance(n_obs, str):
        _arguments.check_choice(n_obs, "n_obs", _SIZES)
        size = int(np.ceil(np.median(sizes))) if n_obs == "median" else int(sizes.max())
        wanted = dict.fromkeys(have, size)
    else:
        size = _arguments.check_positive_int(n_obs, "n_obs", minimum=0)
        wanted = dict.fromkeys(have, size)
    return {group: n - have[group] for group, n in wanted.items() if n > have[group]}


def synthetic_like(
    adata: AnnData,
    model: GenerativeModel,
    labels: np.ndarray,
    missing: Mapping[str, int],
    *,
    seed: int,
    progress_bar: bool,
) -> AnnData:
    """Cells drawn for the conditions of real cells of each group, drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(np.flatnonzero(labels == group), n) for group, n in missing.items()]
    chosen = np.concatenate([np.zeros(0, np.intp), *rows])
    schema = model.schema
    columns = [key for key in schema.column_keys if key in adata.obs]
    obs = adata.obs[columns].iloc[chosen].reset_index(drop=True)
    obs.index = obs.index.astype(str)
    if (donor := schema.donor) is not None and donor.key in obs:
        obs[donor.key] = _drawn_donors(schema, donor, obs[donor.key], adata.obs[donor.key])
    key = schema.embedding_key
    vectors: dict[str, Any] = {} if key is None else {key: np.asarray(adata.obsm[key])[chosen]}
    like = AnnData(obs=obs, obsm=vectors, var=pd.DataFrame(index=model.var_names))
    # What the cells say of their conditions was said when these were trained on.
    return model.sample(like, on_extrapolation="ignore", progress_bar=progress_bar, seed=seed)


def _drawn_donors(
    schema: ConditionSchema, donor: Labels, labels: pd.Series, real: pd.Series
) -> pd.Series:
    """Labels with those of donors that the model does not know replaced, one by one."""
    codes = donor.encode(labels, f"obs[{donor.key!r}] (donor_key)", unseen="null")
    unknown = labels[codes < 0].unique()
    if len(unknown):
        logger.info(
            "The model does not know the donors %s: synthetic cells are those of new donors.",
            name_some(unknown),
        )
    own = dict(zip(unknown, new_donors(schema, len(unknown), taken=real.unique()), strict=True))
    return labels.astype(object).map(lambda label: own.get(label, label))
