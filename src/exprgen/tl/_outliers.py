"""Which cells are unlike all that a model knows: calibrated p-values for whole cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from mudata import MuData
from scipy import stats

from exprgen import _slots
from exprgen._arguments import check_bool, check_choice, check_positive_int
from exprgen._errors import DataQualityWarning, closest, name_some
from exprgen._random import resolve_seed
from exprgen.models._cells import GeneReader, cell_keys
from exprgen.models._mudata import target_of
from exprgen.models._surprise import TERMS
from exprgen.tl._conformal_ranks import conformal_p_values
from exprgen.tl._model import check_model

if TYPE_CHECKING:
    from anndata import AnnData

    from exprgen.models import GenerativeModel

__all__ = ["outliers"]

SCORES = {"combined": TERMS, **{term: (term,) for term in TERMS}}
# Fewer would be ranked by a regression of six coefficients that passes through them.
MIN_CALIBRATION = 20
_LEVEL = 0.05
# Streams of random numbers under one seed.
_CALIBRATION, _QUERY = 20, 21


def outliers(
    adata: AnnData | MuData,
    model: GenerativeModel,
    calibration: AnnData | MuData,
    *,
    groupby: str | None = None,
    score: Literal["combined", "likelihood", "latent"] | None = None,
    conditions: Literal["own", "best"] = "own",
    adjust: bool = True,
    n_samples: int = 10,
    unseen: Literal["error", "null"] = "error",
    key_added: str = "exprgen",
    overwrite: bool = False,
    copy: bool = False,
    progress_bar: bool = True,
    seed: int | None = None,
) -> AnnData | MuData:
    """P-value of each cell: how many of the calibration cells does the model expect as little?

    If a cell is exchangeable with the calibration cells (of its group), its p-value is at most α
    with probability at most α, whatever the model is worth; a good one makes p-values of other
    cells small. That holds on average over calibration sets: with a given one of n cells, the share
    of ordinary cells below α varies by about ``sqrt(α (1 - α) / n)``.

    Parameters
    ----------
    adata
        Cells to judge; results are written to it. Those that the model was trained on would look
        too ordinary, of which there is a warning.
    model
        A trained model. To find new cell types train one *without* the cell type as a condition:
        given its type, a cell is judged as one of that type, and a new type has no label.
    calibration
        Ordinary cells that the model was not trained on; its validation cells may be among them.
    groupby
        Column of ``obs`` in both: cells are ranked among the calibration cells of their own group.
        P-values are then valid in each group, and larger, as groups are smaller.
    score
        What is ranked. ``"likelihood"``: how unlikely the counts are given their depth.
        ``"latent"``: how far in the tails of its prior the cell's latent state lies.
        ``"combined"``: both, in equal parts. ``None`` is ``"combined"``, and ``"likelihood"`` in
        gene space, where there is no other.
    conditions
        ``"own"``: given the cell's own conditions. ``"best"``: given those labels of training under
        which it is the likeliest, for cells that have none; calibration cells are treated alike.
    adjust
        Whether to take out, by a quadratic regression, what the logarithms of library size and of
        the number of detected genes explain (of continuous values: the second). A likelihood is
        little more than these.
    n_samples
        Importance samples of the likelihood, see :meth:`~exprgen.NBVAE.log_likelihood`.
    unseen
        ``"null"`` takes batches that training has not seen as the average of those it has.
    key_added
        Prefix of the columns of ``obs``: ``{key}_outlier_pvalue``; ``{key}_outlier_padj``, adjusted
        for the false discovery rate by Benjamini and Hochberg; ``{key}_outlier_score``, in standard
        deviations, and the ``{key}_outlier_library`` (or ``_detected``) that it is adjusted for;
        ``{key}_split``. ``uns[key]["outliers"]`` keeps the score, the calibration cells' values
        and the ``smallest_p`` that they allow.
    overwrite, copy, progress_bar, seed
        As in :meth:`~exprgen.NBVAE.predict`.

    Returns
    -------
    The AnnData that carries the results: the same object, or a copy if it was a view.

    Raises
    ------
    ValueError
        If calibration cells were trained on, are also in ``adata``, or are fewer than 20; if a
        group has none; if the model is one in gene space and the score needs a latent state.

    Warns
    -----
    DataQualityWarning
        If calibration cells are so few that adjusted p-values reach .05 only if more than a tenth
        of all cells are outliers; if cells were trained on.

    Notes
    -----
    P-values are exact after the adjustment, see :mod:`!exprgen.tl._conformal_ranks`. All of them
    depend on one calibration set; without the adjustment the procedure of Benjamini and Hochberg
    is known to hold its level all the same :cite:p:`bates2023`.
    """
    check_model(model)
    terms = _check_score(model, score)
    check_choice(conditions, "conditions", ("own", "best"))
    if conditions == "best" and not model.schema.labels:
        raise ValueError(
            "conditions='best' chooses among labels, and the model has no categorical condition. "
            "Leave it out."
        )
    check_bool(adjust, "adjust")
    check_positive_int(n_samples, "n_samples")
    _slots.check_key(key_added)
    seed = resolve_seed(seed)
    query, reference = _read(model, adata, groupby), _read(model, calibration, groupby)
    groups = _groups(query, reference, groupby)
    split = _check_cells(model, query, reference)

    (of_query, technical), (of_reference, of_calibration) = (
        model._surprise(
            cells,
            terms,
            conditions=conditions,
            n_samples=n_samples,
            unseen=unseen,
            noise=(seed, purpose),
            description=name,
            progress_bar=progress_bar,
        )
        for cells, purpose, name in (
            (query, _QUERY, "Cells"),
            (reference, _CALIBRATION, "Calibration cells"),
        )
    )
    found = conformal_p_values(
        of_reference,
        of_query,
        _covariates(of_calibration, adjust),
        _covariates(technical, adjust),
        groups[1],
        groups[0],
    )
    sizes = pd.Series(groups[1]).value_counts()[np.unique(groups[0])]
    against = next(iter(technical))
    slot = f"outlier_{against.split()[-1]}"
    target = target_of(adata, copy)
    _slots.write(
        model._home(target),
        key_added,
        "outliers",
        model=type(model).__name__,
        obs={
            "outlier_pvalue": found.p_values,
            "outlier_padj": stats.false_discovery_control(found.p_values),
            "outlier_score": found.scores,
            slot: technical[against],
            "split": split,
        },
        info={
            "score": score or ("combined" if len(terms) > 1 else terms[0]),
            "conditions": conditions,
            "adjusted_for": list(technical) if adjust else [],
            "groupby": groupby,
            "n_calibration": len(of_reference),
            "smallest_p": 1 / (sizes.max() + 1),
            "against": against,
            "calibration_score": found.calibration_scores,
            "calibration_against": of_calibration[against],
            "n_samples": n_samples,
            "seed": seed,
        },
        overwrite=overwrite,
    )
    _warn_of_few(len(of_query), sizes)
    return target


def _check_score(model: GenerativeModel, score: str | None) -> tuple[str, ...]:
    """Names of the terms that a score is made of."""
    has_state = model.module.space.is_learned
    if score is None:
        return SCORES["combined" if has_state else "likelihood"]
    terms = SCORES[check_choice(score, "score", (*SCORES, None))]
    if "latent" in terms and not has_state:
        raise ValueError(
            f"score={score!r} needs a latent state. This {type(model).__name__} models the values "
            "themselves, in gene space: take score='likelihood', or exprgen.CondVAE, or a model "
            "of the counts."
        )
    return terms


def _read(model: GenerativeModel, data: AnnData | MuData, groupby: str | None) -> AnnData:
    return model._readable(data, *(() if groupby is None else (groupby,)))


def _groups(
    query: AnnData, reference: AnnData, groupby: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Group of each cell of both, as text; one for all without ``groupby``."""
    if reference.n_obs < MIN_CALIBRATION:
        raise ValueError(
            f"calibration has {reference.n_obs} cells, at least {MIN_CALIBRATION} are needed. Set "
            "some aside before training."
        )
    if groupby is None:
        return np.zeros(query.n_obs), np.zeros(reference.n_obs)
    found = []
    for cells, name in ((query, "adata"), (reference, "calibration")):
        if groupby not in cells.obs:
            raise KeyError(
                f"groupby={groupby!r} is no column of {name}.obs.{closest(groupby, cells.obs)}"
            )
        missing = cells.obs[groupby].isna().to_numpy()
        if missing.any():
            raise ValueError(
                f"{name}.obs[{groupby!r}] (groupby) is missing for {missing.sum()} cells: "
                f"{name_some(cells.obs_names[missing])}. Give them a label, or leave them out."
            )
        found.append(cells.obs[groupby].astype(str).to_numpy())
    without = np.setdiff1d(*found)
    if without.size:
        raise ValueError(
            f"calibration has no cell of {without.size} groups of adata.obs[{groupby!r}]: "
            f"{name_some(without)}. Add some, leave out those of adata, or groupby=None."
        )
    return found[0], found[1]


def _check_cells(
    model: GenerativeModel, query: AnnData, reference: AnnData
) -> pd.Categorical | None:
    """Refuse calibration cells that tell nothing of new ones; what the query cells are."""
    split, of_reference = model._split_of(query), model._split_of(reference)
    trained = np.asarray(of_reference == "train")
    if trained.any():
        raise ValueError(
            f"calibration has {trained.sum()} cells that the model was trained on: "
            f"{name_some(reference.obs_names[trained])}. They look more ordinary than new cells "
            "do. Give cells that were set aside, or those of validation."
        )
    layer = model._setup_args["layer"]
    keys = [
        cell_keys(cells, GeneReader(cells.X if layer is None else cells.layers[layer]))
        for cells in (query[:, model.var_names], reference[:, model.var_names])
    ]
    shared = np.isin(*keys)
    if shared.any():
        raise ValueError(
            f"{shared.sum()} cells of adata are in calibration as well: "
            f"{name_some(query.obs_names[shared])}. Each would be compared with itself. Leave "
            "them out of one of the two."
        )
    trained = np.asarray(split == "train")
    if trained.any():
        warnings.warn(
            f"The model was trained on {trained.sum()} of {len(trained)} cells of adata: their "
            "p-values are larger than those of new cells would be (column '..._split' says which "
            "they are).",
            DataQualityWarning,
            stacklevel=3,
        )
    return split


def _covariates(technical: dict[str, np.ndarray], adjust: bool) -> np.ndarray:
    logarithms = np.log(np.maximum(np.stack(list(technical.values()), 1), 0.5))
    return logarithms if adjust else logarithms[:, :0]


def _warn_of_few(n_cells: int, sizes: pd.Series[Any]) -> None:
    """Say if adjusted p-values can only be small where very many cells are outliers.

    k cells at the smallest p-value are significant together if k > n_cells / (level (n + 1)).
    """
    share = 1 / (_LEVEL * (sizes.min() + 1))
    if share > 0.1:
        of_group = "" if len(sizes) == 1 else f" in group {sizes.idxmin()!r}"
        needed = (
            "cannot be" if share > 1 else f"are only where {100 * share:.0f} % of all cells are"
        )
        warnings.warn(
            f"{sizes.min()} calibration cells{of_group} allow no p-value below "
            f"{1 / (sizes.min() + 1):.2g}: adjusted for {n_cells} cells, p-values of this size "
            f"{needed} below {_LEVEL:g}. {round(10 / _LEVEL)} calibration cells or more are better.",
            DataQualityWarning,
            stacklevel=3,
        )
