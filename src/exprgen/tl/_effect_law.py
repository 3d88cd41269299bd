"""The law of a fold change, from models and donors, and the columns that it makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from exprgen.models import GenerativeModel
    from exprgen.spaces._donor import DonorEffect

__all__ = ["LawOfChange", "columns_of", "law_of_change"]


class LawOfChange(NamedTuple):
    """Student t of each gene's fold change; terms of its variance, each ``(n_vars,)``."""

    mean: np.ndarray
    parameter: np.ndarray
    donor: np.ndarray
    sampling: np.ndarray
    dof: np.ndarray

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.parameter + self.donor + self.sampling, 1e-24))


def law_of_change(
    models: Sequence[GenerativeModel],
    change: np.ndarray,
    means: Sequence[np.ndarray],
    n_donors: int | None,
    pseudocount: float,
) -> LawOfChange:
    """Fold changes ``(n_models, n_parts, n_vars)`` and donors as one law.

    ``means`` are those under either condition, ``(n_models, n_vars)``. The donors' variance is the
    mean of what the models say, each as likely.
    """
    n_models, n_parts, n_vars = change.shape
    of_model = change.mean(1)
    parameter, sampling, donor = np.zeros((3, n_vars))
    terms = []
    if n_models > 1:
        parameter = of_model.var(0, ddof=1) * (1 + 1 / n_models)
        terms.append((parameter, n_models - 1))
    else:
        sampling = change[0].var(0, ddof=1) / n_parts
        terms.append((sampling, n_parts - 1))
    if n_donors is not None:
        effects = [cast("DonorEffect", model.module.space.donors) for model in models]
        variance = np.stack([e.variance().detach().double().cpu().numpy() for e in effects])
        kept = sum((mean / (mean + pseudocount)) ** 2 for mean in means)
        donor = (variance * kept).mean(0) / np.log(2) ** 2 / n_donors
        terms.append((donor, effects[0].dof))
    total = sum(term for term, _ in terms)
    dof = np.maximum(total, 1e-24) ** 2 / np.maximum(sum(t**2 / d for t, d in terms), 1e-48)
    return LawOfChange(of_model.mean(0), parameter, donor, sampling, dof)


def columns_of(law: LawOfChange, delta: float, level: float | None) -> pd.DataFrame:
    """Columns of the result that come from the law."""
    import pandas as pd
    from scipy import stats

    nothing = np.full(len(law.mean), np.nan)
    columns = {
        "scores": law.mean,
        "logfoldchanges": law.mean,
        "pvals": nothing,
        "pvals_adj": nothing,
        "lower": nothing,
        "upper": nothing,
        "probability": nothing,
        "std": nothing,
    }
    if level is not None:
        std, dof = law.std, law.dof
        size = np.abs(law.mean)
        p = stats.t.sf((size - delta) / std, dof) + stats.t.sf((size + delta) / std, dof)
        p = np.clip(p, 1e-300, 1)
        half = stats.t.ppf((1 + level) / 2, dof) * std
        outside = stats.t.sf((delta - law.mean) / std, dof)
        outside = outside + stats.t.cdf((-delta - law.mean) / std, dof)
        columns |= {
            "scores": law.mean / std,
            "pvals": p,
            "pvals_adj": stats.false_discovery_control(p),
            "lower": law.mean - half,
            "upper": law.mean + half,
            "probability": np.minimum(outside, 1),
            "std": std,
        }
    columns["std_parameter"] = np.sqrt(law.parameter)
    columns["std_donor"] = np.sqrt(law.donor)
    columns["std_sampling"] = np.sqrt(law.sampling)
    return pd.DataFrame(columns)
