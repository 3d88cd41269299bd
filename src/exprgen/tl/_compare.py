r"""Which law of counts fits cells that no model has seen?

Log-likelihoods of counts, which are probabilities, and of log-normalised values, which are
densities in units of the layer, cannot stand in one table. A model of continuous values enters as
the probability of the interval around each count that its normalisation g maps to: with the cell's
total L,

.. math::
    P(x_g) = F\big(g(x_g + \tfrac12)\big) - F\big(g(x_g - \tfrac12)\big), \qquad
    g(x) = \log(1 + 10^4 x / L), \qquad g(-\tfrac12) = -\infty,

which over :math:`x_g = 0, 1, 2, \dots` adds up to 1. Such a model takes L as data. So does every
model here: all are scored as :math:`\log p(x \mid L, c)`, those of counts at
:math:`\ell = \log L` with the density of depth divided out. The scores are importance-weighted
lower bounds, of which that with more samples is the tighter.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exprgen import _arguments
from exprgen._errors import (
    DataQualityWarning,
    ExtrapolationWarning,
    TrainingStoppedWarning,
    name_some,
)
from exprgen._random import generator, resolve_seed
from exprgen._validate import check_anndata
from exprgen.models import NBVAE, ZINBVAE, CondVAE, ExprFlow
from exprgen.models._progress import blocks
from exprgen.models._query import CELL
from exprgen.tl._counts import read_counts
from exprgen.tl._held_out import check_labels_are_known, held_out
from exprgen.tl._names import check_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from scipy import sparse

    from exprgen.models import GenerativeModel

__all__ = ["compare_likelihoods"]

_OF_COUNTS = ("poisson", "nb", "contaminated_nb", "zinb")
_CONTINUOUS = ("gaussian", "mixture_of_gaussians")
_DENSITIES = ("mixture", "gaussian", "flow", "path")
_SCALE = 1e4


def compare_likelihoods(
    adata: AnnData,
    *,
    layer: str | None = "counts",
    likelihoods: str | Sequence[str] = ("gaussian", "poisson", "nb", "zinb"),
    densities: str | Sequence[str] = ("mixture",),
    categorical_condition_keys: Sequence[str] | None = None,
    continuous_condition_keys: Sequence[str] | None = None,
    batch_key: str | None = None,
    test_size: float = 0.2,
    split_key: str | None = None,
    max_epochs: int | None = None,
    n_samples: int = 50,
    accelerator: str = "auto",
    progress_bar: bool = True,
    seed: int | None = None,
) -> pd.DataFrame:
    """Rank likelihoods and densities by the held-out log-probability of counts.

    One model is trained for each likelihood and density, on the same cells from the same seed.

    Parameters
    ----------
    adata
        Cells; it is not changed.
    layer
        Where the counts are; ``None`` is ``.X``.
    likelihoods
        Of ``"gaussian"`` and ``"mixture_of_gaussians"`` (of log1p of counts per ten thousand),
        ``"poisson"``, ``"nb"``, ``"contaminated_nb"`` and ``"zinb"``.
    densities
        Of the latent state: ``"mixture"``, ``"gaussian"``, ``"flow"``, and ``"path"``, flow
        matching, which exists for counts that are not zero-inflated; other combinations with it
        are left out.
    categorical_condition_keys, continuous_condition_keys, batch_key
        As in :meth:`exprgen.NBVAE.setup_anndata`.
    test_size
        Share of cells held out at random.
    split_key
        Column of ``.obs`` whose labels are held out whole instead: cells of new donors, say. It
        cannot be a categorical condition or the batch, of which models know trained labels only.
    max_epochs
        Of every training; ``None`` is each model's default.
    n_samples
        Importance samples per cell.
    accelerator, progress_bar
        As in :meth:`exprgen.NBVAE.train`.
    seed
        The same seed gives the same numbers.

    Returns
    -------
    pandas.DataFrame
        One row per model, best first: ``likelihood``; ``density``; ``log_pmf``, nats per held-out
        cell given its total, a bound; ``difference`` from the best and ``difference_se``, its
        standard error over cells, which are paired (with ``split_key`` over its labels, and NaN
        if one is held out); ``n_test``, ``n_train``. Differences of another seed are not in the
        standard error.

    Raises
    ------
    KeyError, TypeError, ValueError
        If an argument is not what it should be, or cells are too few.

    Warns
    -----
    DataQualityWarning
        If ``split_key`` holds out one label: how labels differ is not known then.
    """
    import pandas as pd

    check_anndata(adata, method="adata=")
    likelihoods = _chosen(likelihoods, "likelihoods", (*_CONTINUOUS, *_OF_COUNTS))
    densities = _chosen(densities, "densities", _DENSITIES)
    test_size = _arguments.check_number(test_size, "test_size", "(0, 1)")
    if max_epochs is not None:
        _arguments.check_positive_int(max_epochs, "max_epochs")
    _arguments.check_positive_int(n_samples, "n_samples")
    pairs = [(a, b) for a in likelihoods for b in densities if _exists(a, b)]
    if not pairs:
        raise ValueError(
            f"densities={densities} does not exist for likelihoods={likelihoods}: 'path' needs "
            "one of 'poisson', 'nb', 'contaminated_nb'."
        )
    counts = read_counts(adata, layer, name="adata")
    seed = resolve_seed(seed)
    test, unit = held_out(adata, test_size, split_key, seed)
    setup: dict[str, Any] = {
        "categorical_condition_keys": categorical_condition_keys,
        "continuous_condition_keys": continuous_condition_keys,
        "batch_key": batch_key,
    }
    check_labels_are_known(adata.obs, test, setup)
    if unit is not None and len(np.unique(unit)) == 1:
        warnings.warn(
            f"One label of obs[{split_key!r}] (split_key) is held out, {unit[0]!r}: how labels "
            "differ is not known, and difference_se is NaN. A larger test_size holds out several.",
            DataQualityWarning,
            stacklevel=2,
        )
    training: dict[str, Any] = {"accelerator": accelerator, "progress_bar": progress_bar}
    scores = {}
    for likelihood, density in pairs:
        model_class, arguments = _model(likelihood, density)
        continuous = likelihood in _CONTINUOUS
        train, held = (
            _cells(adata, counts, rows, continuous=continuous)
            for rows in (np.flatnonzero(~test), np.flatnonzero(test))
        )
        model_class.setup_anndata(train, **setup)
        model = model_class(train, seed=seed, **arguments)
        with warnings.catch_warnings():  # an interruption is one of all of them
            warnings.simplefilter("error", TrainingStoppedWarning)
            model.train(max_epochs, **training)
        if continuous:
            score = _interval_log_pmf(model, held, counts[test], n_samples, progress_bar, seed)
        else:
            score = model.log_likelihood(
                held, n_samples=n_samples, given="depth", progress_bar=progress_bar, seed=seed
            )
        scores[likelihood, density] = score
    best = max(scores, key=lambda pair: scores[pair].mean())
    rows = []
    for (likelihood, density), score in scores.items():
        difference = score - scores[best]
        rows.append(
            {
                "likelihood": likelihood,
                "density": density,
                "log_pmf": score.mean(),
                "difference": difference.mean(),
                "difference_se": _standard_error(difference, unit),
                "n_test": len(score),
                "n_train": adata.n_obs - len(score),
            }
        )
    return pd.DataFrame(rows).sort_values("log_pmf", ascending=False, ignore_index=True)


def _chosen(given: str | Sequence[str], name: str, allowed: Sequence[str]) -> list[str]:
    """Names, all of which are allowed."""
    names = check_names(given, name, "")
    if not names:
        raise ValueError(f"{name} is empty; name some of {', '.join(allowed)}.")
    for one in names:
        _arguments.check_choice(one, name, tuple(allowed))
    return names


def _exists(likelihood: str, density: str) -> bool:
    """Whether there is a model of both."""
    return density != "path" or likelihood in ("poisson", "nb", "contaminated_nb")


def _model(likelihood: str, density: str) -> tuple[type[GenerativeModel], dict[str, Any]]:
    """Class of the model, and what it is made with."""
    if density == "path":
        return ExprFlow, {"likelihood": likelihood}
    if likelihood == "zinb":
        return ZINBVAE, {"density": density}
    model_class = CondVAE if likelihood in _CONTINUOUS else NBVAE
    return model_class, {"likelihood": likelihood, "density": density}


def _cells(
    adata: AnnData, counts: sparse.csr_matrix, rows: np.ndarray, *, continuous: bool
) -> AnnData:
    """Some cells with counts, or log1p of counts per ten thousand, in ``.X``; labels as they are.

    Raises
    ------
    ValueError
        If a cell has no counts: it has no total to be given.
    """
    from anndata import AnnData

    values = counts[rows]
    total = np.asarray(values.sum(1), dtype=np.float64).ravel()
    if (total == 0).any():
        names = adata.obs_names[rows[total == 0]]
        raise ValueError(
            f"{len(names)} cells have no counts ({name_some(names)}): leave them out."
        )
    if continuous:
        values = values.multiply((_SCALE / total)[:, None]).tocsr().astype(np.float32).log1p()
    return AnnData(X=values, obs=adata.obs.iloc[rows].copy(), var=adata.var[[]].copy())


def _interval_log_pmf(
    model: GenerativeModel,
    held: AnnData,
    counts: sparse.csr_matrix,
    n_samples: int,
    progress_bar: bool,
    seed: int,
) -> np.ndarray:
    """Log-probability of counts under a model of normalised values, a bound, ``(n_obs,)``."""
    with warnings.catch_warnings():
        # Values below the least of training have an interval like all others.
        warnings.simplefilter("ignore", ExtrapolationWarning)
        cells = model._cells(held)
    total = np.asarray(counts.sum(1), dtype=np.float64)
    values = np.zeros(len(cells))
    for block, part in blocks(len(cells), "Log-likelihood", show=progress_bar):
        x = counts[part].toarray().astype(np.float64)
        lower = np.where(x > 0, np.log1p((x - 0.5).clip(0) * _SCALE / total[part]), -np.inf)
        upper = np.log1p((x + 0.5) * _SCALE / total[part])
        bound = model.module.log_likelihood(
            *cells.tensors(part, model._device),
            n_samples=n_samples,
            generator=generator(seed, CELL, block),
            interval=(torch.from_numpy(lower), torch.from_numpy(upper)),
        )
        values[part] = bound.cpu().numpy()
    return values


def _standard_error(difference: np.ndarray, unit: np.ndarray | None) -> float:
    """Of the mean over cells; where labels were held out whole, from the labels' sums."""
    if unit is None:
        return float(difference.std(ddof=1) / np.sqrt(len(difference)))
    labels, code = np.unique(unit, return_inverse=True)
    n = len(labels)
    if n < 2:
        return float("nan")
    sums = np.bincount(code, difference - difference.mean())
    return float(np.sqrt(n / (n - 1) * (sums**2).sum()) / len(difference))
