"""Are cells that NBVAE generates for given cell types like held-out cells of these types?

PBMC 3k, 80 % of the cells for training, stratified by type, and 1000 highly variable genes chosen
on them. For each of the held-out cells' types new cells are drawn from

- ``NBVAE``: exprgen's defaults, the type as categorical condition; and the same with the width of
  SCVI's hidden layers (128 instead of 256);
- ``SCVI prior``: z ~ N(0, I), with the totals of random training cells of the type;
- ``SCVI posterior``: z ~ q(z | x) of a training cell x of the type, decoded at that cell's total,
  by ``posterior_predictive_sample``: each training cell gives one draw, of which as many of a type
  are compared as of the other models. It copies the layout of real cells and is no way to generate
  without them, but the strongest use of SCVI.

One SCVI serves both, trained in the same run with its own defaults; ``_scvi.py`` says how it was
given types and depths. Measures and their real-vs-real controls are those of
:func:`exprgen.tl.evaluate`; besides them

- ``log-total variance``: within types, that of generated over held-out cells' log totals (control:
  of training cells);
- ``log-likelihood`` of the held-out cells given their types, log p(x | c), and given depth as
  well: importance-weighted bounds, nats per cell; ``... above SCVI``: the paired difference;
- CPU seconds on one thread: of ``train()``, and of drawing 10,000 cells; GB by which memory grew
  while training.

Nothing is chosen on the held-out cells. Splits share cells, so the standard error over splits is
somewhat too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import _scvi as rival
import numpy as np
import pandas as pd
import scanpy as sc
from _common import Cost, arguments, format_table, load, measured, prepare, say, write
from sklearn.model_selection import train_test_split

import exprgen

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData

TYPE = "cell_type"
MODELS: dict[str, dict[str, Any]] = {"NBVAE": {}, "NBVAE, 128 hidden": {"n_hidden": 128}}
N_CELLS = 10_000
JUDGED = [
    "RF-PC", "RF-gene", "LR-gene", "QC", "variance ratio", "gene correlation",
    "zero fraction difference", "mean correlation",
]  # fmt: skip
COLUMNS = {
    "RF-PC": 3,
    "RF-gene": 3,
    "LR-gene": 3,
    "QC": 3,
    "variance ratio": 3,
    "log-total variance": 2,
    "gene correlation": 3,
    "zero fraction difference": 4,
    "mean correlation": 4,
    "log-likelihood": 2,
    "log-likelihood above SCVI": 2,
    "log-likelihood given depth": 2,
    "log-likelihood given depth above SCVI": 2,
    "train CPU s": 1,
    "10k cells CPU s": 2,
    "train GB": 2,
}


def main() -> None:
    """Run the splits, saving after each."""
    parser = arguments("Fidelity of NBVAE's and SCVI's cells to held-out cells")
    parser.add_argument("--splits", type=int, default=5, help="train/test splits")
    parser.add_argument("--genes", type=int, default=1000, help="highly variable genes")
    parser.add_argument("--repeats", type=int, default=5, help="halves of held-out cells")
    parser.add_argument("--samples", type=int, default=50, help="importance samples per cell")
    parser.add_argument("--epochs", type=int, help="of all models (default: each its own)")
    args = parser.parse_args()
    if args.quick:
        args.splits, args.genes, args.repeats, args.samples, args.epochs = 1, 500, 1, 3, 3
    prepare(args)

    adata = load(args.data, "pbmc3k_labelled")
    if args.quick:
        _, adata = train_test(adata, 0.3, args.seed)
    say("warming up: the first training of a process imports more than it trains")
    warm_up(adata)
    results = pd.DataFrame()
    for split in range(args.seed, args.seed + args.splits):
        rows = run_split(adata, split, args)
        results = pd.concat([results, rows.assign(split=split)], ignore_index=True)
        table = markdown(results)
        write(args, "fidelity", results, table)
    print("\n" + table)
    say(f"written to {args.out}")


def warm_up(adata: AnnData) -> None:
    """Everything that is timed, on a small part of the data."""
    expressed = np.argsort(-np.asarray(adata.layers["counts"].sum(axis=0)).ravel())[:50]
    small = adata[:300, expressed].copy()
    for name in MODELS:
        model, _ = fit(name, small, seed=0, max_epochs=2)
        model.sample(n_obs=10, progress_bar=False, seed=0)
    model, _ = fit("SCVI", small, seed=0, max_epochs=2)
    rival.prior_cells(model, small.obs[TYPE], np.full(small.n_obs, 100.0), seed=0)
    rival.posterior_cells(model, small.obs[TYPE], np.arange(10), seed=0)


def train_test(adata: AnnData, test_size: float, seed: int) -> tuple[AnnData, AnnData]:
    """Two parts with the same share of every type."""
    rows = train_test_split(
        np.arange(adata.n_obs), test_size=test_size, stratify=adata.obs[TYPE], random_state=seed
    )
    return adata[np.sort(rows[0])].copy(), adata[np.sort(rows[1])].copy()


def variable_genes(train: AnnData, n_genes: int) -> pd.Index:
    """Names of the highly variable genes, scanpy's defaults on log-normalised counts."""
    normalised = sc.AnnData(train.layers["counts"].copy(), var=train.var[[]].copy())
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    sc.pp.highly_variable_genes(normalised, n_top_genes=n_genes)
    return normalised.var_names[normalised.var["highly_variable"]]


def fit(name: str, train: AnnData, *, seed: int, max_epochs: int | None) -> tuple[Any, Cost]:
    """A trained model and what ``train()`` cost."""
    if name in MODELS:
        exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=[TYPE])
        model = exprgen.NBVAE(train, seed=seed, **MODELS[name])
        with measured() as cost:
            model.train(max_epochs, accelerator="cpu", progress_bar=False)
        return model, cost
    rival.setup(train, covariate=TYPE)
    with measured() as cost:
        model = rival.fit(train, seed=seed, max_epochs=max_epochs)
    return model, cost


def run_split(adata: AnnData, split: int, args: argparse.Namespace) -> pd.DataFrame:
    """Train, draw and judge; one row per model and measure."""
    train, test = train_test(adata, 0.2, split)
    genes = variable_genes(train, args.genes)
    train, test = train[:, genes].copy(), test[:, genes].copy()
    say(f"split {split}: {train.n_obs} training and {test.n_obs} held-out cells")
    rows: list[dict[str, Any]] = []
    synthetic: dict[str, AnnData] = {}
    likelihood: dict[tuple[str, str], np.ndarray] = {}

    def add(model: str, metric: str, value: float, **others: float) -> None:
        rows.append({"model": model, "metric": metric, "value": value, **others})

    wanted = pd.concat([test.obs[TYPE]] * -(-N_CELLS // test.n_obs))
    for name in MODELS:
        say(f"split {split}: {name}")
        model, cost = fit(name, train, seed=split, max_epochs=args.epochs)
        add(name, "train CPU s", cost.cpu)
        add(name, "train GB", cost.memory)
        with measured() as cost:
            cells = model.sample({TYPE: wanted.to_numpy()}, progress_bar=False, seed=split)
        add(name, "10k cells CPU s", cost.cpu * N_CELLS / cells.n_obs)
        synthetic[name] = cells
        for given, metric in (
            ("conditions", "log-likelihood"),
            ("depth", "log-likelihood given depth"),
        ):
            likelihood[name, metric] = model.log_likelihood(
                test, n_samples=args.samples, given=given, progress_bar=False, seed=split
            )

    say(f"split {split}: SCVI")
    model, cost = fit("SCVI", train, seed=split, max_epochs=args.epochs)
    for name in ("SCVI prior", "SCVI posterior"):
        add(name, "train CPU s", cost.cpu)
        add(name, "train GB", cost.memory)
    rng = np.random.default_rng(split)
    totals = log_totals(train, as_log=False)
    by_type = train.obs.groupby(TYPE, observed=True).indices
    drawn = np.concatenate(
        [totals[rng.choice(by_type[t], n)] for t, n in wanted.value_counts(sort=False).items()]
    )
    with measured() as cost:
        labels = wanted.sort_values(kind="stable")
        cells = rival.prior_cells(model, labels, drawn, seed=split)
    add("SCVI prior", "10k cells CPU s", cost.cpu * N_CELLS / cells.n_obs)
    synthetic["SCVI prior"] = cells
    with measured() as cost:
        cells = rival.posterior_cells(
            model, train.obs[TYPE], rng.permutation(train.n_obs), seed=split
        )
    add("SCVI posterior", "10k cells CPU s", cost.cpu * N_CELLS / cells.n_obs)
    synthetic["SCVI posterior"] = cells

    code = rival.codes(model, train.obs[TYPE])
    density = rival.DepthDensity.fit(totals, code, seed=split)
    for metric, depth in (("log-likelihood", density), ("log-likelihood given depth", None)):
        reference = rival.log_likelihood(
            model, test, TYPE, depth, n_samples=args.samples, seed=split
        )
        # One model, listed where its cells are drawn from N(0, I), which is its p(z).
        add("SCVI prior", metric, reference.mean())
        for name in MODELS:
            above = likelihood[name, metric] - reference
            spread = above.std(ddof=1) / len(above) ** 0.5
            add(name, metric, likelihood[name, metric].mean())
            add(name, f"{metric} above SCVI", above.mean(), spread=spread)

    control = log_total_variance(train, test)
    for name, cells in synthetic.items():
        value = log_total_variance(cells, test)
        add(name, "log-total variance", value, control=control, excess=value - control)
    say(f"split {split}: evaluating")
    report = exprgen.tl.evaluate(
        train,
        test,
        synthetic,
        groupby=TYPE,
        metrics=JUDGED,
        baselines=False,
        n_repeats=args.repeats,
        max_cells=None,
        max_cells_classifier=None,
        seed=split,
        progress_bar=False,
    )
    report = report[report["metric"].isin(JUDGED)]
    return pd.concat([report, pd.DataFrame(rows)], ignore_index=True)


def log_totals(adata: AnnData, *, as_log: bool = True) -> np.ndarray:
    """Total of every cell over the modelled genes, at least ½, or its logarithm."""
    totals = np.maximum(np.asarray(adata.layers["counts"].sum(axis=1)).ravel(), 0.5)
    return np.log(totals) if as_log else totals


def log_total_variance(cells: AnnData, test: AnnData) -> float:
    """Variance of log totals within types, over that of held-out cells; both pooled over types."""
    sizes = test.obs[TYPE].value_counts()
    pooled = []
    for adata in (cells, test):
        groups = pd.Series(log_totals(adata)).groupby(adata.obs[TYPE].astype(str).to_numpy())
        variance = groups.var(ddof=1).reindex(sizes.index.astype(str)).to_numpy()
        known = np.isfinite(variance)
        pooled.append(np.average(variance[known], weights=np.maximum(sizes - 1, 0)[known]))
    return float(pooled[0] / pooled[1])


def markdown(results: pd.DataFrame) -> str:
    """Means over splits: value, and its excess over the control with the standard error."""
    n_splits = results["split"].nunique()
    cells: dict[str, dict[str, str]] = {"real cells": {}}
    for (model, metric), group in results.groupby(["model", "metric"], sort=False):
        digits = COLUMNS[metric]
        text = f"{group['value'].mean():.{digits}f}"
        if group["excess"].notna().all():
            error = f" ± {group['excess'].sem():.{digits}f}" if n_splits > 1 else ""
            text += f" ({group['excess'].mean():+.{digits}f}{error})"
            cells["real cells"][metric] = f"{group['control'].mean():.{digits}f}"
        elif metric.endswith("above SCVI"):
            error = group["value"].sem() if n_splits > 1 else group["spread"].iloc[0]
            text += f" ± {error:.{digits}f}"
        cells.setdefault(model, {})[metric] = text
    order = ["real cells", *MODELS, "SCVI posterior", "SCVI prior"]
    table = pd.DataFrame(cells).reindex(index=list(COLUMNS), columns=order).fillna("")
    note = (
        f"Mean over {n_splits} split(s); in brackets the excess over the real-vs-real control, "
        "± the standard error over splits (of one split's log-likelihoods: over cells).\n"
    )
    return f"{format_table(table, index='')}\n{note}"


if __name__ == "__main__":
    main()
