"""What each choice within the family is worth: held-out likelihood, and the CPU time it costs.

Three sets of counts; 80 % of the cells for training, stratified by cell type, and 1000 highly
variable genes chosen on them. The cells that early stopping looks at are a tenth of the training
cells. Every model has the type as condition, and all else at its defaults.

*Counts* (``family.md``). NBVAE() and what its arguments may be, and ZINBVAE: all are probabilities
of the same counts, so their log-likelihoods can be subtracted.

- ``log-likelihood`` of the held-out cells given their types: the importance-weighted bound of
  :meth:`exprgen.NBVAE.log_likelihood`, nats per cell, higher is better;
- ``above NBVAE()``: the difference from it on the same cells of the same split, its mean over
  splits and the standard error over splits (of one split: over cells);
- ``train CPU s``: of ``train()``; ``10k cells CPU s``: of drawing 10,000 cells; one thread.

*Continuous values* (``family_continuous.md``). CondVAE with its two likelihoods, on log1p of
counts per ten thousand (of all genes). These are densities of another space: beside those of
counts they mean nothing, hence a table of their own. Besides the rows above

- ``variance ratio``: of the median gene, drawn over held-out cells; in brackets training over
  held-out cells;
- ``zeros``: their share among drawn values, in brackets among those of held-out cells.

Nothing is chosen on held-out cells. Splits share cells, so standard errors over splits are
somewhat too small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from _common import (
    SETS,
    TYPE,
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

N_CELLS = 10_000
LAYERS = {"counts": "counts", "continuous": "log1p CP10k"}
MODELS: dict[str, list[tuple[type, dict[str, Any]]]] = {
    "counts": [
        (exprgen.NBVAE, {}),
        (exprgen.NBVAE, {"dispersion": "gene"}),
        (exprgen.NBVAE, {"likelihood": "nb"}),
        (exprgen.NBVAE, {"likelihood": "nb", "dispersion": "gene"}),
        (exprgen.ZINBVAE, {}),
        (exprgen.ZINBVAE, {"dispersion": "gene-cell"}),
        (exprgen.NBVAE, {"likelihood": "poisson"}),
        (exprgen.NBVAE, {"density": "gaussian"}),
        (exprgen.NBVAE, {"density": "flow"}),
    ],
    "continuous": [
        (exprgen.CondVAE, {}),
        (exprgen.CondVAE, {"likelihood": "gaussian"}),
    ],
}
"""The first of each kind is what the others are compared with."""
COSTS = ("train CPU s", "10k cells CPU s")
TABLES = {
    "counts": [("log-likelihood",), COSTS],
    "continuous": [("log-likelihood",), ("variance ratio", "zeros"), COSTS],
}
DIGITS = {
    "log-likelihood": 1,
    "above": 2,
    "train CPU s": 1,
    "10k cells CPU s": 2,
    "variance ratio": 2,
    "zeros": 3,
}


def main() -> None:
    """Run the splits of each data set, saving after each."""
    parser = arguments("Held-out likelihood and training time of the family")
    parser.add_argument("--splits", type=int, default=2, help="train/test splits")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS, help="data sets")
    parser.add_argument("--genes", type=int, default=1000, help="highly variable genes")
    parser.add_argument("--samples", type=int, default=50, help="importance samples per cell")
    parser.add_argument("--epochs", type=int, help="of all models (default: their own)")
    args = parser.parse_args()
    if args.quick:
        args.splits, args.genes, args.samples, args.epochs = 1, 300, 3, 2
    prepare(args)

    results = pd.DataFrame()
    for name in args.sets:
        adata = load(args.data, name)
        adata.X = adata.layers["counts"].copy()
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        adata.layers[LAYERS["continuous"]] = adata.X
        if args.quick:
            _, adata = train_test(adata, TYPE, 600, args.seed)
        if results.empty:
            say("warming up: the first training of a process imports more than it trains")
            warm_up(adata)
        for split in range(args.seed, args.seed + args.splits):
            rows = run_split(name, adata, split, args)
            results = pd.concat([results, rows], ignore_index=True)
            write(args, "family", results, markdown(results, "counts"))
            continuous = markdown(results, "continuous")
            (args.out / "family_continuous.md").write_text(continuous)
    print("\n" + markdown(results, "counts"), continuous, sep="\n")
    say(f"written to {args.out}")


def called(model: type, kwargs: dict[str, Any]) -> str:
    """The call that makes a model, as it is written in code."""
    said = [f'{name}="{value}"' for name, value in kwargs.items()]
    return f"{model.__name__}({', '.join(said)})"


def warm_up(adata: AnnData) -> None:
    """Everything that is timed, on a small part of the data."""
    expressed = np.argsort(-np.asarray(adata.layers["counts"].sum(axis=0)).ravel())[:50]
    small = adata[:300, expressed].copy()
    for kind, models in MODELS.items():
        for model, kwargs in models:
            model.setup_anndata(small, layer=LAYERS[kind], categorical_condition_keys=[TYPE])
            trained = model(small, seed=0, **kwargs)
            trained.train(2, accelerator="cpu", progress_bar=False)
            trained.sample(n_obs=10, progress_bar=False, seed=0)


def run_split(name: str, adata: AnnData, split: int, args: argparse.Namespace) -> pd.DataFrame:
    """Train every model, and judge it; one row per model and measure."""
    train, test = train_test(adata, TYPE, 0.2, split)
    genes = variable_genes(train, args.genes)
    train, test = train[:, genes].copy(), test[:, genes].copy()
    say(f"{name}, split {split}: {train.n_obs} training and {test.n_obs} held-out cells")
    wanted = pd.concat([test.obs[TYPE]] * -(-N_CELLS // test.n_obs)).to_numpy()
    rows: list[dict[str, Any]] = []
    for kind, models in MODELS.items():
        reference: np.ndarray | None = None
        for model, kwargs in models:
            said = called(model, kwargs)
            say(f"{name}, split {split}: {said}")
            model.setup_anndata(train, layer=LAYERS[kind], categorical_condition_keys=[TYPE])
            trained = model(train, seed=split, **kwargs)
            with measured() as training:
                trained.train(args.epochs, accelerator="cpu", progress_bar=False)
            with measured() as drawing:
                cells = trained.sample({TYPE: wanted}, progress_bar=False, seed=split)
            values = trained.log_likelihood(
                test, n_samples=args.samples, progress_bar=False, seed=split
            )
            measures = {
                "log-likelihood": {"value": values.mean()},
                "train CPU s": {"value": training.cpu},
                "10k cells CPU s": {"value": drawing.cpu * N_CELLS / cells.n_obs},
            }
            if reference is None:
                reference = values
            else:
                above = values - reference
                error = above.std(ddof=1) / len(above) ** 0.5
                measures["above"] = {"value": above.mean(), "spread": error}
            if kind == "continuous":
                measures |= spread_and_zeros(cells, train, test)
            at = {"data": name, "split": split, "kind": kind, "model": said}
            rows += [{**at, "metric": metric, **m} for metric, m in measures.items()]
    return pd.DataFrame(rows)


def spread_and_zeros(cells: AnnData, train: AnnData, test: AnnData) -> dict[str, dict[str, float]]:
    """Two measures of continuous values, each beside that of real cells."""
    layer = LAYERS["continuous"]
    real = test.layers[layer]
    # Not within types: of a type with few held-out cells most genes would not vary at all.
    ratio = {
        "value": exprgen.metrics.variance_ratio(cells.X, real),
        "control": exprgen.metrics.variance_ratio(train.layers[layer], real),
    }
    zeros = {"value": share_of_zeros(cells.X), "control": share_of_zeros(real)}
    return {"variance ratio": ratio, "zeros": zeros}


def share_of_zeros(values: Any) -> float:
    """Share of the values that are exactly 0."""
    values = sp.csr_matrix(values)
    return 1 - values.count_nonzero() / np.prod(values.shape)


def markdown(results: pd.DataFrame, kind: str) -> str:
    """A table of likelihoods, one of costs, one of what else there is; means over splits."""
    part = results[results["kind"] == kind]
    n_splits = part.groupby("data")["split"].nunique().max()
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for (data, metric, model), group in part.groupby(["data", "metric", "model"], sort=False):
        text = number(group["value"].mean(), DIGITS[metric], signed=metric == "above")
        if metric == "above":
            error = group["value"].sem() if len(group) > 1 else group["spread"].iloc[0]
            text = f" ({text} ± {error:.{DIGITS[metric]}f})"
        elif metric in ("variance ratio", "zeros"):
            text += f" ({number(group['control'].mean(), DIGITS[metric])})"
        at = cells.setdefault((metric.replace("above", "log-likelihood"), data), {})
        at[model] = at.get(model, "") + text
    pages = []
    for metrics in TABLES[kind]:
        columns = {
            f"`{data}`" if len(metrics) == 1 else f"{metric}, `{data}`": cells[metric, data]
            for metric in metrics
            for data in part["data"].unique()
        }
        table = pd.DataFrame(columns).reindex([called(*model) for model in MODELS[kind]])
        table.index = [f"`{model}`" for model in table.index]
        pages.append(format_table(table, index=metrics[0] if len(metrics) == 1 else ""))
    pages.append(
        f"Mean over {n_splits} split(s); beside likelihoods in brackets the difference from "
        f"`{called(*MODELS[kind][0])}`, ± its standard error over splits (of one split: over "
        "cells).\n"
    )
    return "\n".join(pages)


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """Fixed digits, with a minus sign that does not break."""
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


if __name__ == "__main__":
    main()
