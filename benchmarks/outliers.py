"""What the outlier component of NBVAE's default likelihood is worth, and where.

Part one counts isolated large counts: genes with a mean between .02 and .1 of which some cell has
ten or more, and those of which no other cell has more than three. Part two trains NBVAE with and
without the component (``likelihood="nb"``) on the same cells with the same seed and compares
held-out log-likelihoods and two classifiers' AUC, each beside its real-vs-real control.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scanpy as sc
from _common import arguments, format_table, load, prepare, say, train_test, write

import exprgen

if TYPE_CHECKING:
    from anndata import AnnData

TYPE = "cell_type"
LIKELIHOODS = ("nb", "contaminated_nb")
METRICS = ("RF-gene", "QC")
N_TEST = 600
"""Held-out cells at most: classifiers take long on many."""


def main() -> None:
    """Both parts, for each data set."""
    parser = arguments("NBVAE with and without its outlier component")
    parser.add_argument("--genes", type=int, default=1000, help="variable genes, by residuals")
    parser.add_argument("--epochs", type=int, help="default: NBVAE's own")
    args = parser.parse_args()
    if args.quick:
        args.genes, args.epochs = 300, 2
    prepare(args)
    sets = {
        "pbmc3k_labelled": (load(args.data, "pbmc3k_labelled"), 0.2),
        "kang_ctrl_8donors": (load(args.data, "kang_ctrl_8donors"), 0.2),
        "pbmc68k_reduced": (exprgen.datasets.pbmc68k_reduced(), 0.3),
    }
    rows = [
        {"data": name, **isolated_counts(adata), **compare(name, adata, share, args)}
        for name, (adata, share) in sets.items()
    ]
    results = pd.DataFrame(rows)
    shown = results.set_index("data").T
    table = format_table(shown.map(lambda value: f"{value:.6g}"), index="")
    write(args, "outliers", results, table)
    print("\n" + table)


def isolated_counts(adata: AnnData) -> dict[str, int]:
    """How many genes of low mean have a large count, and how many have it alone."""
    counts = adata.layers["counts"].tocsc()
    mean = np.asarray(counts.mean(axis=0)).ravel()
    genes = np.flatnonzero((mean > 0.02) & (mean < 0.1))
    top = [np.sort(counts[:, [gene]].data)[-2:] for gene in genes]
    large = [values for values in top if values[-1] >= 10]
    alone = [values for values in large if len(values) < 2 or values[0] <= 3]
    return {
        "genes of mean .02 to .1": len(genes),
        "... with a count of 10 or more": len(large),
        "... and none above 3 besides": len(alone),
    }


def compare(name: str, adata: AnnData, share: float, args) -> dict[str, float]:
    """Held-out bound and AUCs of both likelihoods."""
    train, test = train_test(adata, TYPE, share, args.seed)
    if test.n_obs > N_TEST:
        _, test = train_test(test, TYPE, N_TEST / test.n_obs, args.seed)
    chosen = train.copy()
    chosen.X = chosen.layers["counts"]
    sc.experimental.pp.highly_variable_genes(chosen, n_top_genes=min(args.genes, adata.n_vars))
    genes = chosen.var_names[chosen.var["highly_variable"]]
    train, test = train[:, genes].copy(), test[:, genes].copy()
    row: dict[str, float] = {"training cells": train.n_obs, "genes": len(genes)}
    cells = {}
    for likelihood in LIKELIHOODS:
        say(f"{name}: {likelihood}")
        exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=[TYPE])
        model = exprgen.NBVAE(train, seed=args.seed, likelihood=likelihood)
        model.train(args.epochs, accelerator="cpu", progress_bar=False)
        values = model.log_likelihood(test, seed=args.seed, progress_bar=False)
        row[f"log-likelihood, {likelihood}"] = float(values.mean())
        cells[likelihood] = model.sample(test, n_obs=1, seed=args.seed, progress_bar=False)
    learned = model.module.space.likelihood
    row["share of outliers among all counts"] = learned.outlier_rate.item()
    row["mean outlier"] = learned.outlier_mean.item()
    report = exprgen.tl.evaluate(
        train,
        test,
        cells,
        groupby=TYPE,
        metrics=METRICS,
        baselines=False,
        n_repeats=3,
        max_cells=None,
        max_cells_classifier=None,
        seed=args.seed,
        progress_bar=False,
    ).set_index(["metric", "model"])
    for metric in METRICS:
        for likelihood in LIKELIHOODS:
            row[f"{metric}, {likelihood}"] = report.loc[(metric, likelihood), "value"]
        row[f"{metric}, real cells"] = report.loc[(metric, LIKELIHOODS[0]), "control"]
    return row


if __name__ == "__main__":
    main()
