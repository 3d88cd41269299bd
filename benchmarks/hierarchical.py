"""Is a mean that knows donors better for donors it has not seen, and for types of those it has?

Pseudobulks of ``kang_ctrl_8donors`` (donor x cell type, log1p of counts per million, of 10 cells
or more), from the type.

**A new donor.** Donors are left out one at a time, or all but 2 or 3 (random sets); what is left
out is predicted. Methods:

- *pooled*: ridge on the type, donors ignored; its spread is, for each gene, that of its residuals
  when rows are left out.
- *donor as a condition*: ridge on type and donor, predictions averaged over the known donors;
  spread likewise.
- *hierarchical*: donors as random effects; spread from parameters, donor and noise. *Without
  donors*: the same model that ignores them.
- *weighted*: pseudobulks count for their numbers of cells, and those of few cells are noisier.

``MSE`` is over genes and types, ``CRPS`` that of a normal law with the method's mean and spread,
``coverage`` the share of values in its 90 % interval, ``median gene`` that of the median gene,
``width`` the interval's mean width.

**A known donor.** All but m types of one donor are left out, one donor at a time, and predicted
with what is known of the donor: its effect in *hierarchical*, its indicator otherwise
(*not shrunk*: least squares). MSE only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from _common import TYPE, arguments, format_table, load, prepare, say, write
from scipy.stats import norm
from sklearn.linear_model import LinearRegression

from exprgen.means import HierarchicalMean, RidgeMean, SklearnMean

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

MIN_CELLS = 10
Law = tuple[np.ndarray, np.ndarray]  # mean and variance, each (n_obs, n_vars)


def main() -> None:
    args = arguments(__doc__).parse_args()
    prepare(args)
    table, y = pseudobulks(args)
    say(f"{len(y)} pseudobulks of {table['donor'].nunique()} donors x {y.shape[1]} genes")
    rows = pd.DataFrame([*new_donors(table, y, args), *known_donors(table, y, args)])
    write(args, "hierarchical", rows, donor_share(table, y) + markdown(rows))
    say("done")


def pseudobulks(args: argparse.Namespace) -> tuple[pd.DataFrame, np.ndarray]:
    """Donor, type and number of cells of each pseudobulk; its log1p CPM."""
    adata = load(args.data, "kang_ctrl_8donors")
    cells = adata.obs[["donor", TYPE]].astype(str)
    of_cell = cells.groupby(["donor", TYPE]).ngroup().to_numpy()
    table = cells.groupby(["donor", TYPE]).size().rename("cells").reset_index()
    sums = np.zeros((len(table), adata.n_vars))
    np.add.at(sums, of_cell, adata.layers["counts"].toarray())
    kept = (table["cells"] >= MIN_CELLS).to_numpy()
    counts = sums[kept][:, : 100 if args.quick else None]
    y = np.log1p(counts / sums[kept].sum(1, keepdims=True) * 1e6)
    return table[kept].reset_index(drop=True), y


def donor_share(table: pd.DataFrame, y: np.ndarray) -> str:
    """How much of the variance between pseudobulks of one type is the donors'."""
    text = []
    for name, weights in (("equal weights", None), ("weighted by cells", table["cells"])):
        mean = HierarchicalMean().fit(table[[TYPE]], y, weights, groups=table["donor"].to_numpy())
        share = mean.donor_variance / (mean.donor_variance + mean.noise_variance)
        low, middle, high = np.quantile(share, (0.05, 0.5, 0.95))
        text.append(f"{name}: {middle:.3f} in the median gene, {low:.3f} to {high:.3f} in 90 %")
    return f"Donors' share of the variance within types, {'; '.join(text)}.\n\n"


def pooled(
    train: pd.DataFrame, y: np.ndarray, test: pd.DataFrame, *, weighted: bool = False
) -> Law:
    weights = train["cells"].to_numpy(float) if weighted else None
    mean = RidgeMean().fit(train[[TYPE]], y, weights)
    noise = residual_variance(train[[TYPE]], y, len(test), weights)
    if weighted:
        noise *= train["cells"].mean() / test[["cells"]].to_numpy()
    return mean.predict(test[[TYPE]]), noise


def as_condition(train: pd.DataFrame, y: np.ndarray, test: pd.DataFrame) -> Law:
    inputs = train[[TYPE, "donor"]]
    mean = RidgeMean().fit(inputs, y)
    donors = [mean.predict(test[[TYPE]].assign(donor=d)) for d in train["donor"].unique()]
    return np.mean(donors, axis=0), residual_variance(inputs, y, len(test))


def residual_variance(
    inputs: pd.DataFrame, y: np.ndarray, n: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Of a row of mean weight, ``(n, n_vars)``."""
    away = y - RidgeMean().out_of_sample(inputs, y, weights=weights)
    share = np.ones(len(y)) if weights is None else weights / weights.mean()
    return np.tile((share[:, None] * np.square(away)).mean(0), (n, 1))


def hierarchical(
    train: pd.DataFrame,
    y: np.ndarray,
    test: pd.DataFrame,
    *,
    donors: bool = True,
    weighted: bool = False,
) -> Law:
    weights = train["cells"].to_numpy(float) if weighted else None
    groups = train["donor"].to_numpy() if donors else None
    mean = HierarchicalMean().fit(train[[TYPE]], y, weights, groups=groups)
    noise = np.tile(mean.noise_variance, (len(test), 1))
    if weighted:
        noise *= train["cells"].mean() / test[["cells"]].to_numpy()
    doubt = mean.parameter_variance(test[[TYPE]])
    return mean.predict(test[[TYPE]]), doubt + mean.donor_variance + noise


NEW: dict[str, Callable[..., Law]] = {
    "pooled": pooled,
    "donor as a condition": as_condition,
    "hierarchical": hierarchical,
    "weighted: pooled": lambda *rows: pooled(*rows, weighted=True),
    "weighted: hierarchical without donors": lambda *rows: hierarchical(
        *rows, donors=False, weighted=True
    ),
    "weighted: hierarchical": lambda *rows: hierarchical(*rows, weighted=True),
}


def new_donors(table: pd.DataFrame, y: np.ndarray, args: argparse.Namespace) -> list[dict]:
    """Measures of each method on donors that are left out."""
    rng = np.random.default_rng(args.seed)
    donors = table["donor"].unique()
    sets = [np.setdiff1d(donors, [donor]) for donor in donors]
    for size in (2, 3):
        sets += [rng.choice(donors, size, replace=False) for _ in range(len(donors))]
    rows = []
    for trained_on in sets[:2] if args.quick else sets:
        known = table["donor"].isin(trained_on).to_numpy()
        # A type that no training donor has cannot be predicted by anyone.
        known_types = table[TYPE].isin(table.loc[known, TYPE]).to_numpy()
        test = ~known & known_types
        for method, predict in NEW.items():
            mean, variance = predict(table[known], y[known], table[test])
            rows.append(
                {
                    "question": f"new donor, trained on {len(trained_on)}",
                    "method": method,
                    **measures(mean, np.sqrt(variance), y[test]),
                }
            )
        say(f"trained on {len(trained_on)} donors")
    return rows


def measures(mean: np.ndarray, sd: np.ndarray, y: np.ndarray) -> dict[str, float]:
    sd = np.maximum(sd, 1e-6)
    z = (y - mean) / sd
    crps = sd * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    inside = np.abs(z) <= norm.ppf(0.95)
    return {
        "MSE": np.square(y - mean).mean(),
        "CRPS": crps.mean(),
        "coverage": inside.mean(),
        "median gene": np.median(inside.mean(0)),
        "width": 2 * norm.ppf(0.95) * sd.mean(),
    }


def known_donors(table: pd.DataFrame, y: np.ndarray, args: argparse.Namespace) -> list[dict]:
    """Error on the types of a donor of whom m other types are known."""
    rng = np.random.default_rng(args.seed)
    rows = []
    for donor in table["donor"].unique()[: 1 if args.quick else None]:
        own = np.flatnonzero(table["donor"] == donor)
        for n_known in (1, 2, 4):
            test = np.setdiff1d(own, rng.choice(own, n_known, replace=False))
            train = np.setdiff1d(np.arange(len(y)), test)
            for method, mean in types_of_known(table.iloc[train], y[train], table.iloc[test]):
                rows.append(
                    {
                        "question": f"known donor, {n_known} of its types",
                        "method": method,
                        "MSE": np.square(y[test] - mean).mean(),
                    }
                )
        say(f"donor {donor}")
    return rows


def types_of_known(
    train: pd.DataFrame, y: np.ndarray, test: pd.DataFrame
) -> list[tuple[str, np.ndarray]]:
    kind, both = [TYPE], [TYPE, "donor"]
    squares = SklearnMean(LinearRegression()).fit(train[both], y, seed=0)
    found = []
    cells = train["cells"].to_numpy(float)
    for name, weights in (("hierarchical", None), ("weighted: hierarchical", cells)):
        mean = HierarchicalMean().fit(train[kind], y, weights, groups=train["donor"].to_numpy())
        effects, population = mean.donor_effects, mean.predict(test[kind])
        own = effects.mean[effects.donors.get_indexer(test["donor"])]
        found += [
            (f"{name}, a new donor's mean", population),
            (f"{name}, its own", population + own),
        ]
    return [
        ("pooled", RidgeMean().fit(train[kind], y).predict(test[kind])),
        ("donor as a condition", RidgeMean().fit(train[both], y).predict(test[both])),
        ("donor as a condition, not shrunk", squares.predict(test[both])),
        *found,
        ("weighted: pooled", RidgeMean().fit(train[kind], y, cells).predict(test[kind])),
    ]


def markdown(rows: pd.DataFrame) -> str:
    """A table per question: means over splits; MSE as a part of the pooled one's, by split."""
    text = ""
    for question, part in rows.groupby("question", sort=False):
        n_splits = (part["method"] == "pooled").sum()
        values = part.drop(columns="question").reset_index(drop=True)
        reference = np.repeat(
            values.loc[values["method"] == "pooled", "MSE"].to_numpy(),
            values["method"].nunique(),
        )
        ratio = (values["MSE"] / reference).groupby(values["method"]).agg(["mean", "sem"])
        means = values.groupby("method", sort=False).mean().dropna(axis=1)
        shown = means.map("{:.3f}".format)
        shown["MSE / pooled's"] = [f"{a:.3f} ± {b:.3f}" for a, b in ratio.loc[means.index].values]
        text += f"### {question} ({n_splits} splits)\n\n"
        text += format_table(shown, index="method") + "\n"
    return text


if __name__ == "__main__":
    main()
