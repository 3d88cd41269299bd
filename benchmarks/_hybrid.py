"""What the benchmarks of ``HybridResidualModel`` share: its rivals, and how laws are judged.

A law of held-out samples is judged by its CRPS, the share of values in its 90 % interval, and, for
the hybrid, its mean error beside that of its predictor. Coverage per gene is pooled over splits
before the median over genes is taken: a split has ten to twenty samples, and the median of so
coarse shares is coarse itself. Standard errors are over splits, those of pooled figures by leaving
out one split at a time (jackknife).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import norm

from exprgen import metrics

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "N_DRAWS",
    "QUIET",
    "Judged",
    "Law",
    "judged",
    "jackknife",
    "mean_sem",
    "normal_law",
    "of_model",
    "shown",
]

LEVEL = 0.9
N_DRAWS = 200
QUIET: dict[str, Any] = {"progress_bar": False, "on_extrapolation": "ignore"}


@dataclass
class Law:
    """Mean, 90 % interval and CRPS of held-out samples; draws where a model has been asked."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    crps: float
    draws: np.ndarray | None = field(default=None, repr=False)


def normal_law(mean: np.ndarray, sd: np.ndarray, y: np.ndarray) -> Law:
    """A predictor and Gaussian noise, in closed form; all arrays ``(n_obs, n_vars)``."""
    sd = np.maximum(sd, 1e-9)
    z = (y - mean) / sd
    crps = sd * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    half = norm.ppf((1 + LEVEL) / 2) * sd
    return Law(mean, mean - half, mean + half, float(crps.mean()))


def of_model(model: Any, test: AnnData, seed: int, n_draws: int = N_DRAWS) -> Law:
    """What ``predict`` and ``sample`` of a model say of the conditions of held-out samples."""
    told = model.predict(test, n_samples=n_draws, copy=True, seed=seed, **QUIET)
    # Every draw is of another new donor: cells of one row of conditions share theirs.
    rows = np.tile(np.arange(test.n_obs), n_draws)
    asked_for = ad.AnnData(
        obs=test.obs.iloc[rows].drop(columns=model.schema.donor_key or []),
        obsm={key: values[rows] for key, values in test.obsm.items()},
    )
    asked_for.obs_names = np.arange(len(rows)).astype(str)
    drawn = model.sample(asked_for, seed=seed, **QUIET)
    draws = np.asarray(drawn.X).reshape(n_draws, test.n_obs, -1)
    layers = [np.asarray(told.layers[f"exprgen_{name}"]) for name in ("mean", "q05", "q95")]
    return Law(*layers, metrics.crps(draws, np.asarray(test.X)), draws)


@dataclass
class Judged:
    """Measures of one law on one split; what is pooled over splits is kept per sample and gene."""

    values: dict[str, float]
    covered: pd.DataFrame
    moments: dict[str, pd.DataFrame]


def judged(law: Law, test: AnnData, predicted: np.ndarray | None = None) -> Judged:
    """Judge a law on held-out samples, their values in X.

    Parameters
    ----------
    law
        Of the samples.
    test
        The samples.
    predicted
        What the predictor that the law is around says of them.
    """
    y = np.asarray(test.X, dtype=float)
    frame = {"index": test.obs_names, "columns": test.var_names}
    inside = pd.DataFrame((law.lower <= y) & (y <= law.upper), **frame)
    values = {
        "MSE": np.square(y - law.mean).mean(),
        "CRPS": law.crps,
        "coverage": inside.to_numpy().mean(),
    }
    if predicted is not None:
        values["MSE / predictor's"] = values["MSE"] / np.square(y - predicted).mean()
    moments = {}
    if law.draws is not None:
        moments = {
            "mean": pd.DataFrame(law.draws.mean(0), **frame),
            "variance": pd.DataFrame(law.draws.var(0), **frame),
            "error": pd.DataFrame(np.square(y - law.mean), **frame),
            "y": pd.DataFrame(y, **frame),
        }
    return Judged({k: float(v) for k, v in values.items()}, inside, moments)


def jackknife(splits: list[Judged], measure: str) -> tuple[float, float]:
    """A pooled measure and its standard error: ``median gene``, ``variance`` or ``spread``."""
    value = _POOLED[measure](splits)
    n = len(splits)
    if n < 2:
        return value, float("nan")
    without = [_POOLED[measure](splits[:i] + splits[i + 1 :]) for i in range(n)]
    return value, float(
        np.sqrt((n - 1) / n * np.square(np.array(without) - np.mean(without)).sum())
    )


def _pooled(parts: list[pd.DataFrame]) -> np.ndarray:
    """Samples of all splits, of the genes that all of them have."""
    return pd.concat(parts, join="inner").to_numpy(float)


def _median_gene(splits: list[Judged]) -> float:
    return float(np.median(_pooled([s.covered for s in splits]).mean(0)))


def _variance(splits: list[Judged]) -> float:
    """Variance of drawn values, conditions and all, over that of held-out ones; median gene."""
    mean, variance, y = (
        _pooled([s.moments[name] for s in splits]) for name in ("mean", "variance", "y")
    )
    return float(np.median((mean.var(0) + variance.mean(0)) / y.var(0)))


def _spread(splits: list[Judged]) -> float:
    """Variance of values drawn for the same conditions, over the mean's error; median gene."""
    variance, error = (
        _pooled([s.moments[name] for s in splits]) for name in ("variance", "error")
    )
    return float(np.median(variance.mean(0) / error.mean(0)))


_POOLED = {"median gene": _median_gene, "variance": _variance, "spread": _spread}


def mean_sem(values: Any) -> tuple[float, float]:
    """Mean over splits and its standard error."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(error)


def shown(value: float, error: float, digits: int = 3) -> str:
    """A number and its standard error, if there is one."""
    text = f"{value:.{digits}f}"
    return text if np.isnan(error) else f"{text} ± {error:.{digits}f}"
