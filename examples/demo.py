"""From real cells to synthetic cells: the main job of exprgen on 700 real blood cells.

Trains a model on half of the cells, draws new cells for the conditions of the other half, writes
each gene's predicted range back, and compares. Run it with ``make demo``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.model_selection import train_test_split

import exprgen

MARKERS = ["CD79A", "CD3D", "NKG7", "LYZ", "FCER1A", "CST3", "GNLY", "HLA-DRA"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    start = time.perf_counter()

    adata = exprgen.datasets.pbmc68k_reduced()
    print(f"{adata.n_obs} real cells x {adata.n_vars} genes, integer UMI counts, 10 cell types")
    rows = train_test_split(
        np.arange(adata.n_obs),
        test_size=0.5,
        stratify=adata.obs["cell_type"],
        random_state=arguments.seed,
    )
    train, test = (adata[np.sort(part)].copy() for part in rows)

    exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=["cell_type"])
    model = exprgen.NBVAE(train, seed=arguments.seed)
    model.train()

    # Two synthetic cells for the cell type of every held-out cell.
    synthetic = model.sample(test, n_obs=2, seed=arguments.seed)
    model.predict(test, seed=arguments.seed)
    model.log_likelihood(test, key_added="exprgen", seed=arguments.seed)

    print("\nSynthetic against held-out cells, beside held-out against held-out cells:")
    report = exprgen.tl.evaluate(
        train, test, {"NBVAE": synthetic}, groupby="cell_type", seed=arguments.seed
    )
    print(tidy(report[report["kind"] == "model"]).to_string(index=False))
    print(f"(baselines: report.csv, evaluation.png; {report.attrs['wall_seconds']:.0f} s)")
    inside = exprgen.metrics.coverage(
        test.layers["exprgen_q05"], test.layers["exprgen_q95"], test.layers["counts"]
    )
    inside_train = exprgen.metrics.coverage(*_resampled_interval(train, test))
    print(
        f"\n90 % intervals cover {inside:.3f} of the held-out counts (5th and 95th percentile of "
        f"the training cells of the type: {inside_train:.3f}; counts are discrete, so an exact "
        "interval covers 0.90 or more)"
    )

    test.write_h5ad(arguments.out / "annotated.h5ad")
    synthetic.write_h5ad(arguments.out / "synthetic.h5ad")
    model.save(arguments.out / "model", overwrite=True)
    report.to_csv(arguments.out / "report.csv", index=False)
    draw(train, test, synthetic, report, arguments.out)
    print(f"\nWrote {arguments.out}/ in {time.perf_counter() - start:.0f} s:")
    for path in sorted(arguments.out.iterdir()):
        print(f"  {path}")


def tidy(report: pd.DataFrame) -> pd.DataFrame:
    """The report as a short table: value and control, each with its spread over repeats."""

    def with_spread(value: pd.Series, spread: pd.Series) -> list[str]:
        return [f"{v:.3f} ± {s:.3f}" for v, s in zip(value, spread, strict=True)]

    return pd.DataFrame(
        {
            "metric": report["metric"],
            "synthetic vs real": with_spread(report["value"], report["spread"]),
            "real vs real": with_spread(report["control"], report["control_spread"]),
            "better": report["better"],
            "verdict": report["verdict"],
            "cells": report["n"],
        }
    )


def _resampled_interval(train, test):
    """Percentiles of the training cells of each held-out cell's type: the plain alternative."""
    low, high = np.empty(test.shape), np.empty(test.shape)
    for label in test.obs["cell_type"].unique():
        counts = train[train.obs["cell_type"] == label].layers["counts"].toarray()
        low[test.obs["cell_type"] == label] = np.quantile(counts, 0.05, axis=0)
        high[test.obs["cell_type"] == label] = np.quantile(counts, 0.95, axis=0)
    return low, high, test.layers["counts"]


def draw(train, test, synthetic, report: pd.DataFrame, folder: Path) -> None:
    """The four figures."""
    shown = synthetic[::2].copy()  # as many as held-out cells
    both = exprgen.tl.concat(test, shown)
    sc.pp.normalize_total(both, target_sum=1e4)
    sc.pp.log1p(both)
    sc.pp.pca(both)
    sc.pp.neighbors(both)
    sc.tl.umap(both)
    figures = {
        "umap": exprgen.pl.embedding(both, groupby="cell_type", return_fig=True),
        "moments": exprgen.pl.moments(test, shown, control=train, return_fig=True),
        "evaluation": exprgen.pl.evaluation(report, return_fig=True),
        "uncertainty": exprgen.pl.uncertainty(test, MARKERS, groupby="cell_type", return_fig=True),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
