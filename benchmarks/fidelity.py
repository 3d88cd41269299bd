"""Are cells generated for given cell types like held-out cells of these types?

Three sets of counts, 80 % of the cells for training, stratified by type, and 1000 highly variable
genes chosen on them. For each of the held-out cells' types new cells are drawn from

- ``NBVAE``, ``ZINBVAE``, ``ExprFlow`` and ``ExprDiffusion``: exprgen's defaults, the type as
  categorical condition;
- ``SCVI prior``: z ~ N(0, I), with the totals of random training cells of the type;
- ``SCVI posterior``: z ~ q(z | x) of a training cell x of the type, decoded at that cell's total,
  by ``posterior_predictive_sample``: each training cell gives one draw, of which as many of a type
  are compared as of the other models. It copies the layout of real cells and is no way to generate
  without them, but the strongest use of SCVI;
- the baselines of :func:`exprgen.tl.evaluate`: independent negative binomials per gene and type,
  the same with a Gaussian copula, training cells, and the types' mean profiles.

One SCVI serves both its rows, trained in the same run with its own defaults; ``_scvi.py`` says how
it was given types and depths. Measures and their real-vs-real controls are those of
:func:`exprgen.tl.evaluate`, with all held-out cells and up to 500 a side for classifiers; besides
them

- ``log-total variance, 10 % of counts``: that of NBVAE trained on binomially thinned counts;
- ``log-likelihood`` of the held-out cells given their types, log p(x | c), and given depth as
  well: importance-weighted bounds, nats per cell; ``... above SCVI``: the paired difference. Not
  of flows and diffusions, whose densities take minutes for as many samples (``family.py`` has
  those of fewer);
- CPU seconds on one thread: of ``train()``, and of drawing 10,000 cells; GB by which memory grew
  while training.

Nothing is chosen on the held-out cells of a split. Splits share cells, so the standard error over
splits is somewhat too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import _scvi as rival
import numpy as np
import pandas as pd
from _common import (
    SETS,
    TYPE,
    Cost,
    arguments,
    format_table,
    load,
    measured,
    prepare,
    say,
    train_test,
    variable_genes,
    write,
)

import exprgen

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData

MODELS = {
    "NBVAE": exprgen.NBVAE,
    "ZINBVAE": exprgen.ZINBVAE,
    "ExprFlow": exprgen.ExprFlow,
    "ExprDiffusion": exprgen.ExprDiffusion,
}
WITH_LIKELIHOOD = ("NBVAE", "ZINBVAE")
RIVALS = ("SCVI posterior", "SCVI prior")
N_CELLS = 10_000
THINNED = "log-total variance, 10 % of counts"
# What the table shows of each measure, "excess" over the control, "ratio" to it or "value", and
# its digits.
ROWS: dict[str, tuple[str, int]] = {
    "RF-PC": ("excess", 3),
    "RF-gene": ("excess", 3),
    "LR-gene": ("excess", 3),
    "QC": ("excess", 3),
    "MMD": ("ratio", 2),
    "sliced Wasserstein": ("ratio", 2),
    "precision": ("ratio", 3),
    "recall": ("ratio", 3),
    "coverage": ("ratio", 3),
    "local mixing": ("excess", 3),
    "variance ratio": ("excess", 3),
    "log-total variance": ("excess", 2),
    THINNED: ("excess", 2),
    "gene correlation": ("excess", 3),
    "gene correlation overall": ("excess", 3),
    "fold-change slope": ("excess", 3),
    "fold-change rank correlation": ("excess", 3),
    "DE overlap": ("ratio", 2),
    "intervals within 3 points": ("ratio", 2),
    "CRPS": ("ratio", 3),
    "nearest-neighbour ratio": ("excess", 3),
    "membership AUC": ("excess", 3),
    "train-on-synthetic F1": ("ratio", 3),
    "log-likelihood": ("value", 2),
    "log-likelihood above SCVI": ("value", 2),
    "log-likelihood given depth": ("value", 2),
    "log-likelihood given depth above SCVI": ("value", 2),
    "train CPU s": ("value", 1),
    "10k cells CPU s": ("value", 2),
    "train GB": ("value", 2),
}
JUDGED = [metric for metric in ROWS if metric in exprgen.tl.METRICS]


def main() -> None:
    """Run the splits, saving after each."""
    parser = arguments("Fidelity of generated cells to held-out cells")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS, help="data sets")
    parser.add_argument("--splits", type=int, default=5, help="train/test splits")
    parser.add_argument("--scvi-splits", type=int, help="of these, with SCVI (default: all)")
    parser.add_argument("--genes", type=int, default=1000, help="highly variable genes")
    parser.add_argument("--repeats", type=int, default=5, help="halves of held-out cells")
    parser.add_argument("--samples", type=int, default=50, help="importance samples per cell")
    parser.add_argument("--epochs", type=int, help="of all models (default: each its own)")
    args = parser.parse_args()
    if args.quick:
        args.splits, args.genes, args.repeats, args.samples, args.epochs = 1, 500, 1, 3, 3
    if args.scvi_splits is None:
        args.scvi_splits = args.splits
    prepare(args)

    for i, name in enumerate(args.sets):
        adata = load(args.data, name)
        if args.quick:
            _, adata = train_test(adata, TYPE, 0.3, args.seed)
        if i == 0:
            say("warming up: the first training of a process imports more than it trains")
            warm_up(adata)
        results = pd.DataFrame()
        for split in range(args.seed, args.seed + args.splits):
            with_scvi = split < args.seed + args.scvi_splits
            rows = Split(adata, f"{name}, split {split}", split, args).run(with_scvi)
            results = pd.concat([results, rows.assign(split=split)], ignore_index=True)
            table = markdown(results)
            write(args, f"fidelity_{name}", results, table)
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


def fit(name: str, train: AnnData, *, seed: int, max_epochs: int | None) -> tuple[Any, Cost]:
    """A trained model and what ``train()`` cost."""
    if name in MODELS:
        MODELS[name].setup_anndata(train, layer="counts", categorical_condition_keys=[TYPE])
        model = MODELS[name](train, seed=seed)
        with measured() as cost:
            model.train(max_epochs, accelerator="cpu", progress_bar=False)
        return model, cost
    rival.setup(train, covariate=TYPE)
    with measured() as cost:
        model = rival.fit(train, seed=seed, max_epochs=max_epochs)
    return model, cost


class Split:
    """One split of one data set: train, draw and judge."""

    def __init__(self, adata: AnnData, name: str, seed: int, args: argparse.Namespace) -> None:
        train, test = train_test(adata, TYPE, 0.2, seed)
        genes = variable_genes(train, args.genes)
        self.train, self.test = train[:, genes].copy(), test[:, genes].copy()
        self.name, self.seed, self.args = name, seed, args
        # Types of the cells that are drawn: those of the held-out cells, several times.
        self.wanted = pd.concat([self.test.obs[TYPE]] * -(-N_CELLS // self.test.n_obs))
        self.rows: list[dict[str, Any]] = []
        self.synthetic: dict[str, AnnData] = {}
        self.likelihood: dict[tuple[str, str], np.ndarray] = {}

    def run(self, with_scvi: bool) -> pd.DataFrame:
        """One row per model and measure."""
        self.say(f"{self.train.n_obs} training and {self.test.n_obs} held-out cells")
        for name in MODELS:
            self.run_ours(name)
        if with_scvi:
            self.run_scvi()
        self.run_thinned()
        self.say("evaluating")
        report = exprgen.tl.evaluate(
            self.train,
            self.test,
            self.synthetic,
            groupby=TYPE,
            metrics=JUDGED,
            n_repeats=self.args.repeats,
            max_cells=None,
            max_cells_classifier=500,
            seed=self.seed,
            progress_bar=False,
        )
        report = report[report["metric"].isin(JUDGED)]
        return pd.concat([report, pd.DataFrame(self.rows)], ignore_index=True)

    def say(self, what: str) -> None:
        say(f"{self.name}: {what}")

    def add(self, model: str, metric: str, value: float, **others: float) -> None:
        self.rows.append({"model": model, "metric": metric, "value": value, **others})

    def add_cost(self, name: str, training: Cost, sampling: Cost) -> None:
        self.add(name, "train CPU s", training.cpu)
        self.add(name, "train GB", training.memory)
        n_cells = self.synthetic[name].n_obs
        self.add(name, "10k cells CPU s", sampling.cpu * N_CELLS / n_cells)

    def run_ours(self, name: str) -> None:
        """Cells and likelihoods of one of our models."""
        self.say(name)
        model, training = fit(name, self.train, seed=self.seed, max_epochs=self.args.epochs)
        with measured() as sampling:
            cells = model.sample(
                {TYPE: self.wanted.to_numpy()}, progress_bar=False, seed=self.seed
            )
        self.synthetic[name] = cells
        self.add_cost(name, training, sampling)
        if name not in WITH_LIKELIHOOD:
            return
        for given, metric in (
            ("conditions", "log-likelihood"),
            ("depth", "log-likelihood given depth"),
        ):
            value = model.log_likelihood(
                self.test,
                n_samples=self.args.samples,
                given=given,
                progress_bar=False,
                seed=self.seed,
            )
            self.likelihood[name, metric] = value
            self.add(name, metric, value.mean())

    def run_scvi(self) -> None:
        """Cells and likelihoods of SCVI, and how far ours are above."""
        self.say("SCVI")
        train, seed = self.train, self.seed
        model, training = fit("SCVI", train, seed=seed, max_epochs=self.args.epochs)
        rng = np.random.default_rng(seed)
        totals = np.maximum(np.asarray(train.layers["counts"].sum(axis=1)).ravel(), 0.5)
        by_type = train.obs.groupby(TYPE, observed=True).indices
        labels = self.wanted.sort_values(kind="stable")
        drawn = np.concatenate(
            [totals[rng.choice(by_type[t], n)] for t, n in labels.value_counts(sort=False).items()]
        )
        with measured() as sampling:
            self.synthetic["SCVI prior"] = rival.prior_cells(model, labels, drawn, seed=seed)
        self.add_cost("SCVI prior", training, sampling)
        with measured() as sampling:
            self.synthetic["SCVI posterior"] = rival.posterior_cells(
                model, train.obs[TYPE], rng.permutation(train.n_obs), seed=seed
            )
        self.add_cost("SCVI posterior", training, sampling)

        density = rival.DepthDensity.fit(totals, rival.codes(model, train.obs[TYPE]), seed=seed)
        for metric, depth in (("log-likelihood", density), ("log-likelihood given depth", None)):
            reference = rival.log_likelihood(
                model, self.test, TYPE, depth, n_samples=self.args.samples, seed=seed
            )
            # One model, listed where its cells are drawn from N(0, I), which is its p(z).
            self.add("SCVI prior", metric, reference.mean())
            for name in WITH_LIKELIHOOD:
                above = self.likelihood[name, metric] - reference
                spread = above.std(ddof=1) / len(above) ** 0.5
                self.add(name, f"{metric} above SCVI", above.mean(), spread=spread)

    def run_thinned(self) -> None:
        """Depth at a tenth of the counts, where most of a total's variance is counting noise."""
        rng = np.random.default_rng(self.seed)
        train, test = self.train.copy(), self.test.copy()
        for cells in (train, test):
            counts = cells.layers["counts"].astype(np.int64)
            counts.data = rng.binomial(counts.data, 0.1)
            counts.eliminate_zeros()
            cells.layers["counts"] = counts.astype(np.float32)
        model, _ = fit("NBVAE", train, seed=self.seed, max_epochs=self.args.epochs)
        drawn = model.sample({TYPE: self.wanted.to_numpy()}, progress_bar=False, seed=self.seed)
        value, control = (
            exprgen.metrics.log_total_ratio(
                cells.layers["counts"],
                test.layers["counts"],
                groups_synthetic=cells.obs[TYPE].astype(str).to_numpy(),
                groups_real=test.obs[TYPE].astype(str).to_numpy(),
            )
            for cells in (drawn, train)
        )
        self.add("NBVAE", THINNED, value, control=control, excess=value - control)


def markdown(results: pd.DataFrame) -> str:
    """Means over splits: the value, and its excess over the control or ratio to it."""
    cells: dict[str, dict[str, str]] = {"real cells": {}}
    for (model, metric), group in results.groupby(["model", "metric"], sort=False):
        form, digits = ROWS[metric]
        text = f"{group['value'].mean():.{digits}f}"
        several = len(group) > 1
        if form == "excess":
            error = f" ± {group['excess'].sem():.{digits}f}" if several else ""
            text += f" ({group['excess'].mean():+.{digits}f}{error})"
        elif form == "ratio":
            text += f" (×{(group['value'] / group['control']).mean():.{digits}f})"
        elif metric.endswith("above SCVI"):
            error = group["value"].sem() if several else group["spread"].iloc[0]
            text += f" ± {error:.{digits}f}"
        if form != "value":
            cells["real cells"].setdefault(metric, f"{group['control'].mean():.{digits}f}")
        cells.setdefault(model, {})[metric] = text
    models = [name for name in (*MODELS, *RIVALS) if name in cells]
    order = ["real cells", *models, *(name for name in cells if name not in models)]
    table = pd.DataFrame(cells).reindex(index=list(ROWS), columns=list(dict.fromkeys(order)))
    n_splits = results.groupby("model")["split"].nunique()
    note = (
        f"Mean over {n_splits['NBVAE']} split(s)"
        + (f", of SCVI {n_splits['SCVI prior']}" if "SCVI prior" in n_splits else "")
        + "; in brackets the excess over the real-vs-real control ± the standard error over "
        "splits (of one split's log-likelihoods: over cells), or × the ratio to the control.\n"
    )
    return f"{format_table(table.fillna(''), index='')}\n{note}"


if __name__ == "__main__":
    main()
