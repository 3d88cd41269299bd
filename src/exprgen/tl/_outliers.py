"""Which cells are unlike all that a model knows: calibrated p-values for whole cells."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy import stats

from exprgen import _slots
from exprgen._arguments import check_bool, check_choice, check_positive_int
from exprgen._errors import DataQualityWarning, name_some
from exprgen._random import resolve_seed
from exprgen._validate import check_anndata
from exprgen.models._mudata import target_of
from exprgen.models._surprise import TERMS
from exprgen.tl._conformal_ranks import conformal_p_values
from exprgen.tl._contrast import contrast
from exprgen.tl._model import check_model
from exprgen.tl._outlier_cells import check_cells, groups_of

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from exprgen.models import GenerativeModel

__all__ = ["outliers"]

SCORES = ("combined", *TERMS, "contrast")
# Where more of the cells than this would have to be outliers to be found, there is a warning.
_LEVEL, _LARGEST_SHARE = 0.05, 0.1
# Leverage in the adjustment from which more than half of a cell's score is taken away by itself.
_OUTSIDE = 1.0
# Streams of random numbers under one seed.
_CALIBRATION, _QUERY = 20, 21


def outliers(
    adata: AnnData | MuData,
    model: GenerativeModel,
    calibration: AnnData | MuData,
    *,
    groupby: str | None = None,
    score: Literal["combined", "likelihood", "latent", "contrast"] = "combined",
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
    cells small. That holds on average over calibration sets: with a given one of n cells, the
    share of ordinary cells below α varies by about ``sqrt(α (1 - α) / n)``.

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
        ``"latent"``: how far in the tails of its prior the cell's latent state lies (not in gene
        space). ``"contrast"``: how well a classifier tells the cell from cells that the model
        draws; it learns from all cells of the call, and finds several new ones of a kind best.
        ``"combined"``: all of these, in equal parts.
    conditions
        ``"own"``: given the cell's own conditions. ``"best"``: given those labels of training
        under which it is the likeliest, for cells that have none, or none that training saw.
        Calibration cells are treated alike.
    adjust
        Whether to take out, by a quadratic regression, what the logarithms of library size and of
        the number of detected genes explain (of continuous values: the second). A likelihood is
        little more than these.
    n_samples
        Importance samples of the likelihood, see :meth:`~exprgen.NBVAE.log_likelihood`.
    unseen
        ``"null"`` takes batches that training has not seen as the average of those it has.
    key_added
        Prefix of the columns of ``obs``: ``{key}_outlier_pvalue``; ``{key}_outlier_padj``, for
        the false discovery rate :cite:p:`benjamini1995`; ``{key}_outlier_score``, in standard
        deviations; the ``{key}_outlier_library`` (of continuous values ``_detected``) that it is
        adjusted for; ``{key}_outlier_outside``, whether it lies so far outside the calibration
        cells in these that a large p-value says nothing; ``{key}_split``. ``uns[key]["outliers"]``
        keeps what was ranked, the values of the calibration cells, and the ``smallest_p`` that
        these allow.
    overwrite, copy, progress_bar, seed
        As in :meth:`~exprgen.NBVAE.predict`.

    Returns
    -------
    The AnnData that carries the results: the same object, or a copy if it was a view.

    Raises
    ------
    ValueError
        If calibration cells were trained on, are also in ``adata``, are repeated, or are fewer
        than 20; if a group has none; if the model is one in gene space and the score is of a
        latent state.

    Warns
    -----
    DataQualityWarning
        If calibration cells are so few that adjusted p-values reach .05 only if more than a tenth
        of all cells are outliers; if cells were trained on; if cells have a library or genes
        detected that no calibration cell is near. Empty droplets and doublets are to be taken out
        by these numbers themselves: adjusted for them, such a cell has an unremarkable p-value.

    Notes
    -----
    A conformal p-value :cite:p:`vovk2005`: ``(1 + m) / (n + 1)`` where m of n calibration cells
    have the cell's score or a higher one. The regression is fitted on these n + 1 cells, anew for
    each cell (in closed form), so that it favours none of them. P-values of one call share their
    calibration cells, with which the false discovery rate is known to be held if scores are not
    adjusted :cite:p:`bates2023`; that it is with the adjustment is an approximation.
    """
    check_model(model)
    terms = _terms_of(model, score)
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
    query, reference = (
        _read(model, data, groupby, name)
        for data, name in ((adata, "adata"), (calibration, "calibration"))
    )
    groups = groups_of(query, reference, groupby)
    split = check_cells(model, query, reference)

    of_query, of_reference = (
        model._surprise(
            cells,
            [term for term in TERMS if term in terms],
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
    values = [of_query.terms, of_reference.terms]
    if "contrast" in terms:
        odds = contrast(model, query, reference, seed=seed)
        values = [np.column_stack(pair) for pair in zip(values, odds, strict=True)]
    technical, of_calibration = of_query.technical, of_reference.technical
    found = conformal_p_values(
        values[1],
        values[0],
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
            "outlier_outside": found.leverage > _OUTSIDE,
            "split": split,
        },
        info={
            "score": score,
            "conditions": conditions,
            "adjusted_for": list(technical) if adjust else [],
            "groupby": groupby,
            "n_calibration": reference.n_obs,
            "smallest_p": 1 / (sizes.max() + 1),
            "against": against,
            "calibration_score": found.calibration_scores,
            "calibration_against": of_calibration[against],
            "n_samples": n_samples,
            "seed": seed,
        },
        overwrite=overwrite,
    )
    _warn_of_few(sizes)
    _warn_of_outside(query.obs_names[found.leverage > _OUTSIDE], list(technical), key_added)
    return target


def _terms_of(model: GenerativeModel, score: str) -> tuple[str, ...]:
    """Names of the terms that a score is made of."""
    check_choice(score, "score", SCORES)
    has_state = model.module.space.is_learned
    if score == "latent" and not has_state:
        raise ValueError(
            f"score='latent' needs a latent state. This {type(model).__name__} models the values "
            "themselves, in gene space: take another score, exprgen.CondVAE, or a model of the "
            "counts."
        )
    if score == "combined":
        return tuple(term for term in SCORES[1:] if term != "latent" or has_state)
    return (score,)


def _read(
    model: GenerativeModel, data: AnnData | MuData, groupby: str | None, name: str
) -> AnnData:
    cells = model._readable(data, *(() if groupby is None else (groupby,)))
    check_anndata(cells, method=f"{name}=")
    return cells


def _covariates(technical: dict[str, np.ndarray], adjust: bool) -> np.ndarray:
    logarithms = np.log(np.maximum(np.stack(list(technical.values()), 1), 0.5))
    return logarithms if adjust else logarithms[:, :0]


def _warn_of_few(sizes: pd.Series[int]) -> None:
    """Say if adjusted p-values can only be small where very many cells are outliers.

    Of m cells, the k smallest p-values 1 / (n + 1) are significant if 1 / (n + 1) <= level k / m.
    """
    n = int(sizes.min())
    share = 1 / (_LEVEL * (n + 1))
    if share > _LARGEST_SHARE:
        where = "" if len(sizes) == 1 else f" of group {sizes.idxmin()!r}"
        cells = f"cells{where}"
        what = (
            f"{cells} are found only if outliers are {100 * share:.0f} % of all or more"
            if share < 1
            else f"no {cells} can be found"
        )
        warnings.warn(
            f"{n} calibration cells{where} allow no p-value below {1 / (n + 1):.2g}: at a false "
            f"discovery rate of {_LEVEL:g}, {what}. Give more calibration cells.",
            DataQualityWarning,
            stacklevel=3,
        )


def _warn_of_outside(names: pd.Index, technical: list[str], key: str) -> None:
    """Say of which cells a large p-value says nothing, since the adjustment follows them."""
    if len(names):
        warnings.warn(
            f"{len(names)} cells of adata lie far outside the calibration cells in "
            f"{' or '.join(technical)}: {name_some(names)}. The adjustment for these takes most "
            "of their score away, and p-values are no evidence that they are ordinary: judge "
            f"them by these numbers themselves (obs[{f'{key}_outlier_outside'!r}] says which they "
            "are), or take adjust=False.",
            DataQualityWarning,
            stacklevel=3,
        )
