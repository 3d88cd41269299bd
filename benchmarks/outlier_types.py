"""Is a cell type that training never saw found, and are ordinary cells left alone?

One type is left out. Of the other cells 60 % train NBVAE at its defaults, 20 % calibrate, 20 % are
the ordinary cells that are judged beside those left out; 2,000 highly variable genes chosen on the
training cells (of fewer, all). The score of :func:`exprgen.tl.outliers` is

- ``combined``, ``contrast``, ``latent``, ``likelihood``: of a model without conditions, adjusted
  for the logarithms of library and genes detected;
- ``combined, best label``: of a model that is given the cell type, each cell under the type that
  suits it best, since no type suits those left out (with ``--best-label``).

Beside it, ranked by the same code, with and without the same adjustment (``raw``):

- ``ELBO, raw``: the likelihood as it is, and ``library size``;
- ``NB per type``: the best of independent negative binomials per gene, fitted to the training
  cells of each type at the cells' depths;
- ``latent neighbours``: the mean distance to the 15 nearest training cells in the latent space.

``AUROC`` is of cells left out against ordinary ones; ``rho`` is Spearman's correlation of score
and library among ordinary cells, for n of which it has a standard error of 1 / sqrt(n).
*Calibration* (``combined``) is the share of ordinary cells with a p-value up to .01, .05 and .1,
with the number of runs in which it lies outside the 95 % band: ordinary cells of one run share
their calibration cells, so the number is beta-binomial.

The default score was chosen on the *validation* types: those with odd ranks when the types of a
set are ordered by their numbers of cells. The others are the test. A type is left out once, with
one split and one seed of the model.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from _common import (
    TYPE,
    arguments,
    format_table,
    load,
    prepare,
    say,
    train_test,
    variable_genes,
    write,
)
from scipy import stats
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import exprgen
from exprgen._errors import DataQualityWarning
from exprgen.likelihoods import negative_binomial_log_prob
from exprgen.tl._conformal_ranks import conformal_p_values

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData

SETS = ("pbmc3k_labelled", "kang_ctrl_8donors")
PARTS = ("validation", "test")
LEVELS = (0.01, 0.05, 0.1)
COLUMNS = ("value", "n_calibration", "n_ordinary")
METHODS = (
    "combined",
    "contrast",
    "latent",
    "likelihood",
    "combined, best label",
    "NB per type",
    "latent neighbours",
    "ELBO, raw",
    "NB per type, raw",
    "latent neighbours, raw",
    "library size, raw",
)


def main() -> None:
    """Leave out one type after the other, saving after each."""
    parser = arguments("Cell types that were left out of training")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS, help="data sets")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which types")
    parser.add_argument("--genes", type=int, default=2000, help="highly variable genes")
    parser.add_argument(
        "--best-label", action="store_true", help="a model that is given the type as well (slow)"
    )
    parser.add_argument("--resume", action="store_true", help="add to the rows that are there")
    args = parser.parse_args()
    if args.quick:
        args.genes = 300
    prepare(args)

    done = args.out / "outlier_types.csv"
    results = pd.read_csv(done) if args.resume and done.exists() else pd.DataFrame()
    for name in args.sets:
        adata = load(args.data, name)
        adata.X = adata.layers["counts"]
        if args.quick:
            _, adata = train_test(adata, TYPE, 900, args.seed)
        for rank, left_out in enumerate(adata.obs[TYPE].value_counts().index):
            part = PARTS[rank % 2]
            if part not in args.parts or is_done(results, name, left_out):
                continue
            say(f"{name}: without {left_out}")
            rows = run(adata, left_out, args).assign(data=name, part=part, type=left_out)
            results = pd.concat([results, rows], ignore_index=True)
            write(args, "outlier_types", results, markdown(results))
    print("\n" + markdown(results))
    say(f"written to {args.out}")


def is_done(results: pd.DataFrame, name: str, left_out: str) -> bool:
    """Whether there are rows of this type."""
    return len(results) > 0 and bool(
        ((results["data"] == name) & (results["type"] == left_out)).any()
    )


def run(adata: AnnData, left_out: str, args: argparse.Namespace) -> pd.DataFrame:
    """One type left out: a row per method and measure."""
    is_out = (adata.obs[TYPE] == left_out).to_numpy()
    rest = adata[~is_out].copy()
    rest.obs[TYPE] = rest.obs[TYPE].cat.remove_unused_categories()
    train, held_out = train_test(rest, TYPE, 0.4, args.seed)
    calibration, ordinary = train_test(held_out, TYPE, 0.5, args.seed)
    genes = variable_genes(train, args.genes)
    cells = adata[np.concatenate([ordinary.obs_names, adata.obs_names[is_out]]), genes].copy()
    train, calibration = train[:, genes].copy(), calibration[:, genes].copy()
    is_out = (cells.obs[TYPE] == left_out).to_numpy()
    library = total(cells)
    judged: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def judge(method: str, model: exprgen.NBVAE, **options: object) -> None:
        found = exprgen.tl.outliers(
            cells, model, calibration, copy=True, seed=args.seed, progress_bar=False, **options
        ).obs
        judged[method] = found["exprgen_outlier_score"], found["exprgen_outlier_pvalue"]

    def rank(method: str, of_calibration: np.ndarray, of_cells: np.ndarray) -> None:
        for ending, adjust in (("", True), (", raw", False)):
            found = conformal_p_values(
                of_calibration[:, None],
                of_cells[:, None],
                technical(calibration, adjust),
                technical(cells, adjust),
                np.zeros(calibration.n_obs),
                np.zeros(cells.n_obs),
            )
            judged[method + ending] = found.scores, found.p_values

    model = trained(train, None, args)
    for score in ("combined", "contrast", "latent", "likelihood"):
        judge(score, model, score=score)
    judge("ELBO, raw", model, score="likelihood", adjust=False, n_samples=1)
    rank("latent neighbours", *neighbours(model, train, calibration, cells))
    rank("NB per type", *(independent_nb(train, part) for part in (calibration, cells)))
    rank("library size", -np.log(total(calibration)), -np.log(library))
    if args.best_label:
        judge("combined, best label", trained(train, [TYPE], args), conditions="best")

    rows = []
    for method in (m for m in METHODS if m in judged):
        score, p_values = map(np.asarray, judged[method])
        rho = stats.spearmanr(score[~is_out], library[~is_out]).statistic
        measures = {"AUROC": roc_auc_score(is_out, score), "rho": rho}
        for level in LEVELS:
            measures[f"rejected at {level:g}"] = (p_values[~is_out] <= level).mean()
            measures[f"found at {level:g}"] = (p_values[is_out] <= level).mean()
        rows += [{"method": method, "metric": k, "value": v} for k, v in measures.items()]
    sizes = {"n_calibration": calibration.n_obs, "n_ordinary": ordinary.n_obs}
    return pd.DataFrame(rows).assign(**sizes, n_left_out=is_out.sum())


def trained(
    train: AnnData, conditions: list[str] | None, args: argparse.Namespace
) -> exprgen.NBVAE:
    """NBVAE at its defaults."""
    exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=conditions)
    model = exprgen.NBVAE(train, seed=args.seed)
    model.train(2 if args.quick else None, accelerator="cpu", progress_bar=False)
    return model


def total(adata: AnnData) -> np.ndarray:
    """Counts of each cell, at least a half."""
    return np.maximum(np.asarray(adata.layers["counts"].sum(1)).ravel(), 0.5)


def technical(adata: AnnData, adjust: bool) -> np.ndarray:
    """Logarithms of library and genes detected; no columns if nothing is adjusted for."""
    detected = np.maximum(adata.layers["counts"].getnnz(1), 0.5)
    return np.log(np.stack([total(adata), detected], 1))[:, : 2 if adjust else 0]


def neighbours(model: exprgen.NBVAE, train: AnnData, *others: AnnData) -> list[np.ndarray]:
    """Mean distance to the 15 nearest training cells."""
    latents = [model.get_latent_representation(x, progress_bar=False) for x in (train, *others)]
    nearest = NearestNeighbors(n_neighbors=15).fit(latents[0])
    return [nearest.kneighbors(latent)[0].mean(1) for latent in latents[1:]]


def independent_nb(train: AnnData, adata: AnnData) -> np.ndarray:
    """Minus the log-likelihood under the best type; dispersions by moments, shrunk to one half."""
    counts, values = train.layers["counts"].toarray(), adata.layers["counts"].toarray()
    overall = counts.sum(0) / counts.sum()
    best = np.full(len(values), -np.inf)
    for label in train.obs[TYPE].unique():
        of_type = counts[(train.obs[TYPE] == label).to_numpy()].astype(np.float64)
        depth = of_type.sum(1)
        # Fifty counts of the average cell, so that what a rare type lacks is not impossible.
        share = (of_type.sum(0) + 50 * overall + 1e-8) / (depth.sum() + 50)
        excess = np.square(of_type - depth[:, None] * share).sum(0) - share * depth.sum()
        overdispersion = (excess + 25) / (np.square(share) * np.square(depth).sum() + 50)
        log_theta = -np.log(overdispersion.clip(1e-2, 1e2))
        arguments_ = (values, np.log(total(adata))[:, None] + np.log(share), log_theta)
        log_prob = negative_binomial_log_prob(
            *(torch.from_numpy(np.asarray(a, np.float64)) for a in arguments_)
        )
        best = np.maximum(best, log_prob.numpy())
    return -best


def markdown(results: pd.DataFrame) -> str:
    """Tables of AUROC and of the correlation, by part and data; then the calibration."""
    pages = []
    for (part, data), of_set in results.groupby(["part", "data"], sort=False):
        types = list(of_set["type"].unique())
        methods = [method for method in METHODS if (of_set["method"] == method).any()]
        table = pd.DataFrame(index=methods)
        auroc, rho = (
            of_set[of_set["metric"] == metric].pivot(
                index="method", columns="type", values="value"
            )
            for metric in ("AUROC", "rho")
        )
        for label in types:
            table[label] = [f"{auroc.loc[m, label]:.3f}" for m in methods]
        table["mean"] = [f"**{auroc.loc[m].mean():.3f}**" for m in methods]
        table["mean rho"] = [f"{rho.loc[m].mean():+.2f}".replace("-", "−") for m in methods]
        table["largest, absolute"] = [f"{rho.loc[m].abs().max():.2f}" for m in methods]
        pages.append(f"`{data}`, {part} types\n\n" + format_table(table, index="AUROC"))
    pages.append(calibration_table(results))
    return "\n".join(pages)


def calibration_table(results: pd.DataFrame) -> str:
    """Rejection rates of the default among ordinary cells, beside those of cells left out."""
    default = results[results["method"] == METHODS[0]]
    rows: dict[str, dict[str, str]] = {}
    for (part, data), of_set in default.groupby(["part", "data"], sort=False):
        cells = rows.setdefault(f"`{data}`, {part}", {})
        for level in LEVELS:
            rates = of_set[of_set["metric"] == f"rejected at {level:g}"]
            found = of_set[of_set["metric"] == f"found at {level:g}"]
            outside = sum(map(is_outside, *(rates[c] for c in COLUMNS), [level] * len(rates)))
            cells[f"p ≤ {level:g}"] = (
                f"{rates['value'].mean():.3f} ({outside} of {len(rates)}); "
                f"{found['value'].mean():.2f}"
            )
    note = (
        "Share of ordinary cells (in brackets: runs outside the 95 % band); of cells left out.\n"
    )
    return format_table(pd.DataFrame(rows).T, index="combined") + "\n" + note


def is_outside(rate: float, n_calibration: int, n_ordinary: int, level: float) -> bool:
    """Whether a share of rejected ordinary cells is in the tails, 2.5 % on each side."""
    ranks = int(level * (n_calibration + 1))
    law = stats.betabinom(n_ordinary, ranks, n_calibration + 1 - ranks)
    n = round(rate * n_ordinary)
    return bool(law.cdf(n) < 0.025 or law.sf(n - 1) < 0.025)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DataQualityWarning)
    main()
