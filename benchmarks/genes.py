"""Are continuous values generated for given cell types like those of held-out cells?

One set of counts, 80 % of the cells for training, stratified by type, and 1000 highly variable
genes chosen on them; their counts are normalised to 10,000 a cell and log-transformed. For the
held-out cells' types new values are drawn from

- ``CondVAE``, and ``ExprFlow`` and ``ExprDiffusion`` in gene space: exprgen's defaults, trained on
  the values, the type as categorical condition;
- ``NBVAE``, trained on the counts, whose draws are then normalised: what counts are worth where
  they are at hand;
- ``independent``: every gene's values of random training cells of the type, gene by gene;
- ``training cells`` of the types, as the control: real cells beside real ones.

Measures, mean over draws and splits: ``RF-PC`` and ``RF-gene``, AUCs of random forests that tell
drawn from held-out cells (.5: they cannot), on pooled principal components and on genes; ``MMD``
on components, beside that of the control; ``variance``, of drawn values beside held-out ones
within types, median gene; ``zeros``, the share of them drawn less that of held-out cells;
``detected``, the standard deviation of the number of genes above 0, beside that of held-out cells;
``train CPU s`` on one thread.

With ``--validation`` the training part is cut once more, as in ``defaults.py``, and the second
part judged: by these numbers the models' defaults were chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
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
from exprgen import metrics

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData

MODELS = {
    "CondVAE": exprgen.CondVAE,
    "ExprFlow": exprgen.ExprFlow,
    "ExprDiffusion": exprgen.ExprDiffusion,
    "NBVAE": exprgen.NBVAE,
}
BASELINES = ("independent", "training cells")
DIGITS = {
    "RF-PC": 3, "RF-gene": 3, "MMD": 2, "variance": 2, "zeros": 4, "detected": 2, "train CPU s": 1,
}  # fmt: skip


def main() -> None:
    """Run the splits, saving after each."""
    parser = arguments("Fidelity of continuous values")
    parser.add_argument("--set", default=SETS[0], choices=SETS, help="data set")
    parser.add_argument("--splits", type=int, default=1, help="train/test splits")
    parser.add_argument("--draws", type=int, default=3, help="of the held-out cells' types")
    parser.add_argument("--validation", action="store_true", help="judge on validation cells")
    args = parser.parse_args()
    if args.quick:
        args.splits, args.draws = 1, 1
    prepare(args)
    adata = load(args.data, args.set)
    results = pd.DataFrame()
    for split in range(args.seed, args.seed + args.splits):
        train, test = train_test(adata, TYPE, 0.2, split)
        genes = variable_genes(train, 200 if args.quick else 1000)
        if args.validation:
            train, test = train_test(train, TYPE, 0.2, 1000 + split)
        train, test = (normalised(cells[:, genes].copy()) for cells in (train, test))
        for name in (*BASELINES, *MODELS):
            say(f"split {split}: {name}")
            rows = judge(name, train, test, split, args)
            results = pd.concat([results, rows.assign(split=split, model=name)])
        table = markdown(results)
        write(args, f"genes_{args.set}" + "_validation" * args.validation, results, table)
    print("\n" + table)


def normalised(adata: AnnData) -> AnnData:
    """The same cells with their log-normalised values in X."""
    values = metrics.log_cp10k(adata.layers["counts"]).astype(np.float32)
    adata.X = values.toarray() if sp.issparse(values) else values
    return adata


def judge(
    name: str, train: AnnData, test: AnnData, seed: int, args: argparse.Namespace
) -> pd.DataFrame:
    """A row per measure."""
    draws, cost = drawn(name, train, test, seed, args)
    real, labels = np.asarray(test.X), test.obs[TYPE].astype(str).to_numpy()
    rng = np.random.default_rng(seed)
    control = train.X[matched(train, labels, rng)]
    values: dict[str, list[float]] = {}
    for i, cells in enumerate(draws):
        counted = [(x > 0).sum(axis=1).std() for x in (cells, real)]
        for measure, value in {
            "RF-PC": metrics.c2st_auc(*metrics.pooled_pcs(cells, real, seed=i), seed=i),
            "RF-gene": metrics.c2st_auc(cells, real, seed=i),
            "MMD": discrepancy(cells, real, seed=i) / discrepancy(control, real, seed=i),
            "variance": metrics.variance_ratio(
                cells, real, groups_synthetic=labels, groups_real=labels
            ),
            "zeros": (cells == 0).mean() - (real == 0).mean(),
            "detected": counted[0] / counted[1],
        }.items():
            values.setdefault(measure, []).append(float(value))
    means = {measure: np.mean(value) for measure, value in values.items()} | {"train CPU s": cost}
    return pd.DataFrame({"measure": list(means), "value": list(means.values())})


def discrepancy(cells: np.ndarray, real: np.ndarray, *, seed: int) -> float:
    """Maximum mean discrepancy on pooled principal components; never 0."""
    return metrics.mmd(*metrics.pooled_pcs(cells, real, seed=seed), estimator="biased") ** 0.5


def matched(train: AnnData, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of training cells of the given types, ``(n,)``; each once where there are enough."""
    of_train, rows = train.obs[TYPE].astype(str).to_numpy(), np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        mine, there = np.flatnonzero(labels == label), np.flatnonzero(of_train == label)
        rows[mine] = rng.choice(there, len(mine), replace=len(mine) > len(there))
    return rows


def drawn(
    name: str, train: AnnData, test: AnnData, seed: int, args: argparse.Namespace
) -> tuple[list[np.ndarray], float]:
    """Values for the held-out cells' types, several times, and the CPU seconds of training."""
    labels = test.obs[TYPE].astype(str).to_numpy()
    rng = np.random.default_rng([seed, 1])
    if name == "training cells":
        return [train.X[matched(train, labels, rng)] for _ in range(args.draws)], np.nan
    if name == "independent":
        rows = [
            np.stack([matched(train, labels, rng) for _ in range(train.n_vars)], axis=1)
            for _ in range(args.draws)
        ]
        return [train.X[row, np.arange(train.n_vars)] for row in rows], np.nan
    layer = "counts" if name == "NBVAE" else None
    MODELS[name].setup_anndata(train, layer=layer, categorical_condition_keys=[TYPE])
    model: Any = MODELS[name](train, seed=seed)
    short: dict[str, Any] = {}
    if args.quick:
        in_genes = name.startswith("Expr")
        short = {"density_kwargs": {"max_epochs": 2}} if in_genes else {"max_epochs": 2}
    with measured() as cost:
        model.train(accelerator="cpu", progress_bar=False, **short)
    draws = []
    for draw in range(args.draws):
        cells = model.sample(test, progress_bar=False, seed=100 * seed + draw)
        draws.append(np.asarray(normalised(cells).X if layer else cells.X))
    return draws, cost.cpu


def markdown(results: pd.DataFrame) -> str:
    """A row per model: means over splits."""
    wide = results.pivot_table(index="model", columns="measure", values="value", dropna=False)
    rows = {
        name: {
            measure: ""
            if np.isnan(wide.loc[name, measure])
            else f"{wide.loc[name, measure]:.{n}f}"
            for measure, n in DIGITS.items()
        }
        for name in ("training cells", *MODELS, "independent")
    }
    table = format_table(pd.DataFrame(rows).T, index="")
    return f"{table}\nMean over {results['split'].nunique()} split(s).\n"


if __name__ == "__main__":
    main()
