"""All measures of the report, on one comparison: some cells against one half of held-out cells.

A measure of two samples is applied to (candidate, B), where the candidate is the synthetic cells
or, for the control, the held-out half A. Where the model's own sample matters, the control's
candidate is training cells instead: variances (training and held-out cells may differ by chance,
and a model can only know the former), and slopes of fold changes, which need three samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exprgen import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from exprgen.tl._halves import Cells

__all__ = ["Comparison", "Measure", "Measured", "add_up", "measure", "measures_of"]

_N_DRAWS = 20  # of which intervals are made
_CALIBRATED_GENES = 200
_LEVEL = 0.9


@dataclass
class Comparison:
    """A candidate against half B of the held-out cells, both of the same number and groups."""

    candidate: Cells
    b: Cells
    a: Cells  # the other half: third sample of the slopes
    train: Cells  # all training cells
    few: np.ndarray  # positions of the cells that classifiers see, (n_few,)
    genes: np.ndarray  # genes that classifiers see, most variable first, (n_genes,)
    bandwidth: float | None  # of the MMD: the control's, so that models share it
    seed: int
    n_jobs: int  # threads of the forests; -1 is all
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, Any]:
        return {"groups_synthetic": self.candidate.groups, "groups_real": self.b.groups}

    @cached_property
    def pcs(self) -> tuple[np.ndarray, np.ndarray]:
        """Components of this pair alone."""
        return metrics.pooled_pcs(self.candidate.dense, self.b.dense, seed=self.seed)

    @cached_property
    def few_values(self) -> tuple[np.ndarray, np.ndarray]:
        """What classifiers see of genes, ``(n_few, n_genes)`` each."""
        at = np.ix_(self.few, self.genes)
        return self.candidate.dense[at], self.b.dense[at]

    @cached_property
    def draws(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predictive draws, observed values, and the groups of the latter.

        Every cell of B is predicted by candidate cells of its group, drawn for it alone; log(1 +
        counts) of the most variable genes.
        """
        rng = np.random.default_rng([self.seed, 7])
        genes = self.genes[:_CALIBRATED_GENES]
        drawn, seen = [], []
        for group, n in self.b.sizes.items():
            pool = np.flatnonzero(self.candidate.groups == group)
            if pool.size >= _N_DRAWS:
                order = rng.random((n, pool.size)).argsort(axis=1)[:, :_N_DRAWS]
                drawn.append(pool[order])
                seen.append(np.flatnonzero(self.b.groups == group))
        if not seen:
            raise _NotApplicable(f"no group has {_N_DRAWS} cells to make intervals from")
        rows = np.concatenate(seen)
        candidate = np.log1p(self.candidate.counts[:, genes].toarray())
        observed = np.log1p(self.b.counts[rows][:, genes].toarray())
        return candidate[np.concatenate(drawn).T], observed, self.b.groups[rows]


class _NotApplicable(Exception):
    """The cells at hand leave a measure undefined."""


def _auc(features: str, **options: Any) -> Callable[[Comparison], dict[str, float]]:
    def run(c: Comparison) -> dict[str, float]:
        if features == "pcs":
            pair = tuple(scores[c.few] for scores in c.pcs)
        elif features == "quality":
            pair = tuple(metrics.quality_features(x.counts[c.few]) for x in (c.candidate, c.b))
        else:
            pair = c.few_values
        return {"": metrics.c2st_auc(*pair, seed=c.seed, n_jobs=c.n_jobs, **options)}

    return run


def _distances(c: Comparison) -> dict[str, float]:
    test = metrics.mmd_test(*c.pcs, bandwidth=c.bandwidth, seed=c.seed)
    c.details["p"] = test.p_value
    return {
        "energy distance": metrics.energy_distance(*c.pcs),
        "MMD": metrics.mmd(*c.pcs, bandwidth=c.bandwidth, estimator="biased") ** 0.5,
        "sliced Wasserstein": metrics.sliced_wasserstein(*c.pcs, seed=c.seed),
        "Wasserstein": metrics.wasserstein(*c.pcs),
    }


def _neighbours(c: Comparison) -> dict[str, float]:
    prdc = metrics.precision_recall_density_coverage(*c.pcs)
    mixing = metrics.local_mixing(*c.pcs, k=min(30, len(c.b)))
    return {**prdc._asdict(), "local mixing": mixing}


def _variation(c: Comparison) -> dict[str, float]:
    return {
        "variance ratio": metrics.variance_ratio(c.candidate.values, c.b.values, **c.groups),
        "log-total variance": metrics.log_total_ratio(
            c.candidate.counts,
            c.b.counts,
            groups_synthetic=c.candidate.groups,
            groups_real=c.b.groups,
        ),
    }


def _genes(c: Comparison) -> dict[str, float]:
    values = c.candidate.values, c.b.values
    agreement = metrics.moment_agreement(*values, **c.groups)
    found = {
        "gene correlation": metrics.gene_correlation_agreement(*values, **c.groups),
        "zero fraction difference": metrics.zero_fraction_difference(
            c.candidate.counts, c.b.counts
        ),
        "mean correlation": metrics.mean_correlation(*values, **c.groups),
        "mean agreement": agreement.mean,
        "sd agreement": agreement.sd,
        "zero agreement": agreement.zero_fraction,
    }
    if len(c.b.sizes) > 1:
        found["gene correlation overall"] = metrics.gene_correlation_agreement(*values)
    return found


def _slope(c: Comparison) -> dict[str, float]:
    slope = metrics.fold_change_slope(
        c.candidate.values,
        c.a.values,
        c.b.values,
        groups_synthetic=c.candidate.groups,
        groups_a=c.a.groups,
        groups_b=c.b.groups,
    )
    return {"": slope}


def _fold_changes(c: Comparison) -> dict[str, float]:
    values = c.candidate.values, c.b.values
    return {
        "fold-change rank correlation": metrics.fold_change_rank_correlation(*values, **c.groups),
        "DE overlap": metrics.de_overlap(*values, **c.groups),
    }


def _calibration(c: Comparison) -> dict[str, float]:
    draws, observed, groups = c.draws
    alpha = 1 - _LEVEL
    u = metrics.pit(draws, observed, seed=c.seed)
    inside = np.abs(u - 0.5) <= _LEVEL / 2
    lower, upper = np.quantile(draws, [alpha / 2, 1 - alpha / 2], axis=0)
    by_group = [groups == group for group in dict.fromkeys(groups.tolist())]
    pairs = np.concatenate([inside[of].mean(axis=0) for of in by_group])
    return {
        "interval coverage": float(inside.mean()),
        "intervals within 3 points": float((np.abs(pairs - _LEVEL) <= 0.03).mean()),
        "PIT distance": float(
            np.concatenate([_uniform_distance(u[of]) for of in by_group]).mean()
        ),
        "CRPS": metrics.crps(draws, observed),
        "interval score": metrics.interval_score(lower, upper, observed, alpha=alpha),
        "interval width": metrics.sharpness(lower, upper),
    }


def _uniform_distance(u: np.ndarray) -> np.ndarray:
    """Kolmogorov and Smirnov's distance of each column to the uniform distribution."""
    n = len(u)
    steps = np.sort(u, axis=0) - np.arange(n)[:, None] / n
    return np.maximum(steps.max(axis=0), 1 / n - steps.min(axis=0))


def _memorisation(c: Comparison) -> dict[str, float]:
    # Axes of the candidate itself favour neither side of the comparison.
    from sklearn.utils.extmath import randomized_svd

    centre = c.candidate.dense.mean(axis=0)
    n_pcs = min(50, min(c.candidate.dense.shape) - 1)
    if n_pcs < 1:
        raise _NotApplicable("a single gene has no principal components to look for copies in")
    axes = randomized_svd(c.candidate.dense - centre, n_pcs, random_state=c.seed)[2].T
    s, t, h = (np.asarray(x.values @ axes) - centre @ axes for x in (c.candidate, c.train, c.b))
    groups: dict[str, Any] = {
        "groups_synthetic": c.candidate.groups,
        "groups_train": c.train.groups,
        "groups_held_out": c.b.groups,
    }
    try:
        found = metrics.memorisation(s, t, h, **groups)
    except ValueError as error:  # no group has two cells on all sides
        raise _NotApplicable(str(error)) from error
    c.details["memorisation"] = [tuple(entry) for entry in found]
    weights = [entry.n for entry in found]
    return {
        "nearest-neighbour ratio": metrics.nearest_neighbour_ratio(s, t, h, seed=c.seed),
        "membership AUC": float(np.average([entry.auc for entry in found], weights=weights)),
        "membership z of worst group": found[0].z,
    }


def _downstream(c: Comparison) -> dict[str, float]:
    values = c.few_values
    f1 = metrics.train_on_synthetic_f1(
        values[0], c.candidate.groups[c.few], values[1], c.b.groups[c.few], seed=c.seed
    )
    return {"": f1}


class Measure(NamedTuple):
    """Something to compute: names of its values, and what it needs."""

    family: str
    names: tuple[str, ...]
    run: Callable[[Comparison], dict[str, float]]
    needs_groups: bool = False
    against_train: bool = False  # the control's candidate is training cells
    slow: bool = False
    few: bool = False  # sees few cells


MEASURES = (
    Measure("classifier", ("RF-PC",), _auc("pcs"), slow=True, few=True),
    Measure("classifier", ("RF-gene",), _auc("genes"), slow=True, few=True),
    Measure("classifier", ("LR-gene",), _auc("genes", classifier="logistic"), few=True),
    Measure("classifier", ("QC",), _auc("quality"), slow=True, few=True),
    Measure(
        "distance", ("MMD", "energy distance", "sliced Wasserstein", "Wasserstein"), _distances
    ),
    Measure(
        "neighbours", ("precision", "recall", "density", "coverage", "local mixing"), _neighbours
    ),
    Measure(
        "variation", ("variance ratio", "log-total variance"), _variation, against_train=True
    ),
    Measure(
        "genes",
        (
            "gene correlation", "gene correlation overall", "mean correlation", "mean agreement",
            "sd agreement", "zero agreement", "zero fraction difference",
        ),
        _genes,
    ),
    Measure(
        "fold changes", ("fold-change slope",), _slope, needs_groups=True, against_train=True
    ),
    Measure(
        "fold changes",
        ("fold-change rank correlation", "DE overlap"), _fold_changes, needs_groups=True,
    ),
    Measure(
        "calibration",
        (
            "interval coverage", "intervals within 3 points", "PIT distance", "CRPS",
            "interval score", "interval width",
        ),
        _calibration,
    ),
    Measure(
        "memorisation",
        ("nearest-neighbour ratio", "membership AUC", "membership z of worst group"),
        _memorisation,
    ),
    Measure(
        "downstream", ("train-on-synthetic F1",), _downstream, needs_groups=True, few=True
    ),
)  # fmt: skip


def measures_of(wanted: list[str] | None, *, n_groups: int) -> list[Measure]:
    """Measures to compute: those with a wanted name or family that apply."""
    return [
        entry
        for entry in MEASURES
        if (n_groups > 1 or not entry.needs_groups)
        and (wanted is None or entry.family in wanted or set(entry.names) & set(wanted))
    ]


class Measured(NamedTuple):
    """Values of one comparison by name, why some are missing, remarks, seconds by family.

    A control also has values ``of_train``ing cells in the place of A.
    """

    values: dict[str, float]
    missing: dict[str, str]
    details: Mapping[str, Any]
    seconds: dict[str, float]
    of_train: Mapping[str, float] = MappingProxyType({})


def add_up(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sum mappings entry by entry."""
    return {key: sum(part.get(key, 0.0) for part in parts) for part in parts for key in part}


def measure(c: Comparison, chosen: list[Measure]) -> Measured:
    """Run measures on one comparison."""
    values: dict[str, float] = {}
    missing: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for entry in chosen:
        start = perf_counter()
        try:
            found = entry.run(c)
        except _NotApplicable as reason:
            found = dict.fromkeys(entry.names, float("nan"))
            missing |= dict.fromkeys(entry.names, str(reason))
        values |= {name or entry.names[0]: value for name, value in found.items()}
        seconds[entry.family] = seconds.get(entry.family, 0) + perf_counter() - start
    return Measured(values, missing, c.details, seconds)
