r"""One sample against what a model expects of a new donor.

The observed value is the mean of the sample's cells of a group, its pseudobulk. What is expected
is the law of such a mean for a donor that the model has not seen: the cells' own noise, which
averages out, and the differences between donors, which do not (:mod:`exprgen.spaces`). With three
donors or thirty the first is the same; without the second, every gene in which people differ is
"found".
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from exprgen import _arguments
from exprgen._errors import CovariateError, DataQualityWarning, name_some
from exprgen._random import generator, resolve_seed
from exprgen.models._query import CELL, TABLE
from exprgen.models._tails import tails_of_mean
from exprgen.tl._model import check_model, warn_if_donors_are_coded
from exprgen.tl._names import text_labels
from exprgen.tl._ranked import check_ranked_key, signed_scores, store_ranked

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from exprgen.models import GenerativeModel
    from exprgen.models._cells import Cells

__all__ = ["nof1_de"]

_METHOD = "exprgen.nof1_de"
_MIN_EXPECTED = 10  # counts in all: p-values of fewer come in steps, and many are 1
_MIN_GENES = 20  # a median of fewer is mostly chance


def nof1_de(
    adata: AnnData,
    model: GenerativeModel,
    *,
    groupby: str,
    inflation: float | Literal["genes"] = "genes",
    level: float = 0.9,
    n_samples: int = 1000,
    key_added: str | None = "nof1_de",
    seed: int | None = None,
) -> pd.DataFrame:
    r"""Which genes of one patient, or sample, are outside what is expected of a new donor?

    The model must know how donors differ: train it with a ``donor_key``, on reference donors.
    Counts are compared at the sample's own depths, so that deeper sequencing is no finding.

    Parameters
    ----------
    adata
        The cells of *one* sample, none of which the model was trained on.
    model
        A trained model with donor effects.
    groupby
        Column of ``.obs``: each group (a cell type, say) is compared by itself. The model's
        conditions must be the same in all cells of a group.
    inflation
        By how much variances of standard scores are too large, :math:`\lambda`: people also
        differ in one cell type and not in another, samples in ways that belong to no gene, and the
        model knows neither. ``"genes"`` takes it of each group from the sample's own genes, by the
        median of their squared scores :cite:p:`devlin1999`, at least 1: right where most genes
        are as in anybody, cautious where most are not. Genes count of which ten counts are
        expected in the group; of fewer than 20 such genes it is not estimated, but 1, with a
        warning. A number is taken as it is, 1 as none.
    level
        Of the expected range ``lower`` to ``upper``: the share of new donors inside it. The
        observed mean is outside where ``pvals`` is below 1 - ``level``, and only there.
    n_samples
        Draws of the latent state per group.
    key_added
        Where the results go in ``adata.uns``, in the layout of
        :func:`scanpy.tl.rank_genes_groups`; ``None`` writes nothing.
    seed
        The same seed gives the same numbers.

    Returns
    -------
    pandas.DataFrame
        One row per group and gene, by group and decreasing score: ``group``; ``names``;
        ``scores``, the standard normal value of the p-value, positive where more than expected;
        ``logfoldchanges``, log2 of observed over expected with half a count added to the sums (of
        continuous values their difference over log 2, which is the same for natural logarithms);
        ``pvals``, two-sided; ``pvals_adj`` :cite:p:`benjamini1995`, per group; ``observed``,
        ``expected``, ``lower``, ``upper``, in the unit of the layer per cell; ``n_cells``;
        ``inflation``.

        P-values are tail probabilities of the model's law of the mean, integrated rather than
        drawn, hence of any size. They assume that the model's genes vary between donors as
        estimated from the training donors, alike in all groups. What the parameters of a
        :class:`~exprgen.HybridResidualModel`'s mean leave open is in them where the mean knows it,
        as ``"hierarchical"`` does; other parameters are taken as known.

    Raises
    ------
    ValueError
        If the model has no donor effects, some cells are training cells, the donor is known, there
        are several, a group has no counts or no name, or ``uns[key_added]`` is taken.
    CovariateError
        If conditions differ within a group.

    Warns
    -----
    ReproducibilityWarning
        If the model was loaded from a file without its donors' labels: then training cells are
        recognised, but not other cells of a donor that was trained on.
    DataQualityWarning
        If a group has too few genes for ``inflation="genes"``.
    """
    import pandas as pd
    from scipy.special import ndtr, ndtri
    from scipy.stats import false_discovery_control

    check_model(model)
    donors = model.module.space.donors
    if donors is None:
        raise ValueError(
            f"nof1_de needs to know how donors differ, and this {type(model).__name__} has no "
            "donor effects. Set up with donor_key=... and train on several donors."
        )
    if isinstance(inflation, str):
        _arguments.check_choice(inflation, "inflation", ("genes",))
    else:
        _arguments.check_number(inflation, "inflation", "(0, inf)")
    level = _arguments.check_number(level, "level", "(0, 1)")
    _arguments.check_positive_int(n_samples, "n_samples")
    home = model._home(adata)
    check_ranked_key(home, key_added, _METHOD)
    seed = resolve_seed(seed)
    cells = model._cells(adata)
    _check_one_new_donor(cells, model)
    groups = _groups(cells, model, groupby)
    model._check_batch_given(cells.adata)
    first = np.array([rows[0] for rows in groups.values()])
    query = model._ask(
        cells.adata[first], draw_batch=False, rng=np.random.default_rng([seed, TABLE])
    )
    likelihood = model.module.space.likelihood
    totals = {group: _total(cells, rows) for group, rows in groups.items()}
    if likelihood.is_count and (empty := [g for g, total in totals.items() if not total.any()]):
        raise ValueError(
            f"Cells of {groupby}={name_some(empty)} have no counts of the model's genes: there is "
            "no depth to compare them at. Leave them out."
        )
    parts, untold = [], []
    for i, (group, rows) in enumerate(groups.items()):
        noise = generator(seed, CELL, i)
        depth = _depths(cells, rows, n_samples) if model.module.space.depth is not None else None
        decoded, _ = model._decoded(query, i, depth, n_samples, noise, seed)
        total, share = totals[group], model._parameter_share(query, i)
        tails = tails_of_mean(likelihood, donors, decoded, total, len(rows), share)
        score = signed_scores(tails.p_value, tails.at_least <= tails.at_most)
        told = tails.expected * len(rows) >= _MIN_EXPECTED if likelihood.is_count else slice(None)
        factor = _inflation(score[told]) if isinstance(inflation, str) else inflation
        if isinstance(inflation, str) and len(score[told]) < _MIN_GENES:
            untold.append(group)
        score = score / np.sqrt(factor)
        p = np.clip(2 * ndtr(-np.abs(score)), 1e-300, 1)
        beyond = ndtr(ndtri((1 - level) / 2) * np.sqrt(factor))
        lower, upper = tails.interval(beyond)
        observed = total / len(rows)
        half = 0.5 / len(rows)
        change = (
            np.log2((observed + half) / (tails.expected + half))
            if likelihood.is_count
            else (observed - tails.expected) / np.log(2)
        )
        part = pd.DataFrame(
            {
                "group": group,
                "names": model.var_names.to_numpy(),
                "scores": score,
                "logfoldchanges": change,
                "pvals": p,
                "pvals_adj": false_discovery_control(p),
                "observed": observed,
                "expected": tails.expected,
                "lower": lower,
                "upper": upper,
                "n_cells": len(rows),
                "inflation": factor,
            }
        )
        parts.append(part.sort_values("scores", ascending=False, kind="stable"))
    if untold:
        warnings.warn(
            f"Inflation of {groupby}={name_some(untold)} is taken as 1, none: fewer than "
            f"{_MIN_GENES} genes are known well enough ({_MIN_EXPECTED} expected counts) to "
            "estimate it. Leave these cells out, or give inflation=1.0 if none is meant.",
            DataQualityWarning,
            stacklevel=2,
        )
    table = pd.concat(parts, ignore_index=True)
    if key_added is not None:
        store_ranked(home, key_added, table, _params(model, groupby, level, n_samples, seed))
    return table


def _params(
    model: GenerativeModel, groupby: str, level: float, n_samples: int, seed: int
) -> dict[str, Any]:
    """What scanpy wants to know, and how the results came about."""
    return {
        "groupby": groupby,
        "reference": "a new donor",
        "method": _METHOD,
        "use_raw": False,
        "layer": model._setup_args["layer"] or "",
        "corr_method": "benjamini-hochberg",
        "model": type(model).__name__,
        "level": level,
        "n_samples": n_samples,
        "seed": seed,
    }


def _check_one_new_donor(cells: Cells, model: GenerativeModel) -> None:
    """Refuse several donors, donors that training saw, and training cells."""
    if not len(cells):
        raise ValueError("adata has no cells: there is nothing to compare.")
    split = model._split_of(cells.adata)
    n_known = 0 if split is None else int((split != "new").sum())
    seen = f"{n_known} of its cells were" if n_known else ""
    donor, obs = model.schema.donor, cells.adata.obs
    if donor is not None and donor.key in obs:
        labels = obs[donor.key].unique()
        if len(labels) > 1:
            raise ValueError(
                f"adata has {len(labels)} donors in obs[{donor.key!r}] ({name_some(labels)}): "
                "nof1_de compares one sample with what is expected. Call it for each."
            )
        if (donor.lookup(obs[donor.key]) >= 0).any():
            seen = f"donor {labels[0]!r} was"
    if seen:
        raise ValueError(
            f"adata is not new to the model: {seen} in its training, which has learned what it "
            "should judge. Train on other donors only."
        )
    warn_if_donors_are_coded(model, "adata", stacklevel=3)


def _groups(cells: Cells, model: GenerativeModel, groupby: str) -> dict[str, np.ndarray]:
    """Rows of every group that has cells, in the order of the labels."""
    obs = cells.adata.obs
    labels, column = text_labels(obs, groupby, "groupby"), obs[groupby]
    if n_unnamed := int((labels == "").sum()):
        raise ValueError(
            f"obs[{groupby!r}] (groupby) is '' in {n_unnamed} cells: a group needs a name. Give "
            "them one, or leave them out."
        )
    order = column.cat.categories if column.dtype == "category" else np.unique(column)
    groups = {str(g): np.flatnonzero(labels == str(g)) for g in order if (labels == str(g)).any()}
    table, embedding = model.schema.parse(cells.adata, argument="adata")
    for group, rows in groups.items():
        part = table.iloc[rows]
        varying = [key for key in part if part[key].nunique() > 1]
        if embedding is not None and np.ptp(embedding[rows], axis=0).any():
            varying.append(str(model.schema.embedding_key))
        if varying:
            raise CovariateError(
                f"{name_some(varying)} varies within {groupby}={group!r}: what is expected of a "
                "mean is known for cells of equal conditions. Group by these conditions."
            )
    return groups


def _total(cells: Cells, rows: np.ndarray) -> np.ndarray:
    """Sum over some cells, ``(n_vars,)`` float64."""
    blocks = np.array_split(rows, -(-len(rows) // 4096))
    return np.sum([cells.reader.rows(block).sum(0, dtype=np.float64) for block in blocks], 0)


def _inflation(scores: np.ndarray) -> float:
    """Median of squared scores over that of a standard normal's, at least 1; 1 of few."""
    from scipy.stats import chi2

    if len(scores) < _MIN_GENES:
        return 1.0
    return max(1.0, float(np.median(scores**2) / chi2.median(1)))


def _depths(cells: Cells, rows: np.ndarray, n_samples: int) -> torch.Tensor:
    """Log depths at which draws are decoded: ``n_samples`` quantiles of the group's own.

    Scaled to their mean, which is what the sample's total says exactly.
    """
    library = np.maximum(cells.library[rows], 0.5)
    spread = np.quantile(library, (np.arange(n_samples) + 0.5) / n_samples, method="inverted_cdf")
    return torch.from_numpy(np.log(spread * library.mean() / spread.mean())).float()
