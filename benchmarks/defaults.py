"""What NBVAE's defaults were chosen by, and what other values would have given.

The training part of each split of ``fidelity.py`` (80 % of the cells) is cut once more, 80/20 and
stratified by type: models are trained on the first part and judged on the second, so that the
held-out cells of ``fidelity.py`` are not looked at. 1000 highly variable genes of the training
part. One choice at a time is changed.

- ``log-likelihood``: importance-weighted bound on log p(x | c) of the validation cells, nats per
  cell, and above the defaults' on the same cells (± the standard error over splits);
- ``RF-PC``, ``RF-gene``, ``QC``: AUCs of random forests that tell cells drawn for the validation
  cells' types from these cells (.5: they cannot), on pooled principal components, genes and
  quality features; mean over draws and splits, ± the standard error over splits;
- ``RF-top``: the same of as many drawn cells as there are training cells, and these, on the 30
  most expressed genes, where counts are large enough for how genes vary together to show;
- ``gene correlation``: how far correlations within types are those of the validation cells, see
  :func:`exprgen.metrics.gene_correlation_agreement` (higher is better);
- ``train CPU s``: of ``train()``, on one thread.

Differences within two standard errors say nothing; then the cheaper value is the default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
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

DEFAULTS = "defaults"
JUDGED = ("RF-PC", "RF-gene", "RF-top", "QC", "gene correlation")
# Arguments of NBVAE and of train().
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    DEFAULTS: ({}, {}),
    "256 hidden units": ({"n_hidden": 256}, {}),
    "dropout .2": ({"dropout": 0.2}, {}),
    "6 latent dimensions": ({"n_latent": 6}, {}),
    "15 latent dimensions": ({"n_latent": 15}, {}),
    "5 components": ({"n_components": 5}, {}),
    "dispersion by gene": ({"dispersion": "gene"}, {}),
    "no outliers": ({"likelihood": "nb"}, {}),
    "30 epochs": ({}, {"max_epochs": 30}),
    "100 epochs": ({}, {"max_epochs": 100}),
    "density's rate × 1": ({}, {"plan_kwargs": {"density_lr_factor": 1.0}}),
    "density's rate × 10": ({}, {"plan_kwargs": {"density_lr_factor": 10.0}}),
    "dispersion's rate × 1": ({}, {"plan_kwargs": {"dispersion_lr_factor": 1.0}}),
    "half the rate": ({}, {"plan_kwargs": {"lr": 1e-3}}),
    "KL warm-up over a fifth": ({}, {"plan_kwargs": {"kl_warmup": 0.2}}),
    "KL warm-up over four fifths": ({}, {"plan_kwargs": {"kl_warmup": 0.8}}),
    "effects' rate × 1": ({}, {"plan_kwargs": {"offset_lr_factor": 1.0}}),
}


def main() -> None:
    """Run the splits, saving after each."""
    parser = arguments("NBVAE's defaults and other values, on validation cells")
    parser.add_argument("--set", default=SETS[0], choices=SETS, help="data set")
    parser.add_argument("--splits", type=int, default=4, help="train/validation splits")
    parser.add_argument(
        "--choices", nargs="+", default=list(CHOICES), choices=CHOICES, help="besides defaults"
    )
    parser.add_argument("--draws", type=int, default=2, help="of the validation cells' types")
    args = parser.parse_args()
    if args.quick:
        args.splits, args.draws = 1, 1
    prepare(args)
    adata = load(args.data, args.set)
    results = pd.DataFrame()
    for split in range(args.seed, args.seed + args.splits):
        part, _ = train_test(adata, TYPE, 0.2, split)
        part = part[:, variable_genes(part, 200 if args.quick else 1000)].copy()
        train, validation = train_test(part, TYPE, 0.2, 1000 + split)
        for name in dict.fromkeys([DEFAULTS, *args.choices]):
            say(f"split {split}: {name}")
            rows = judge(name, train, validation, split, args)
            results = pd.concat([results, rows.assign(split=split, choice=name)])
        table = markdown(results)
        write(args, f"defaults_{args.set}", results, table)
    print("\n" + table)


def judge(
    name: str, train: AnnData, validation: AnnData, seed: int, args: argparse.Namespace
) -> pd.DataFrame:
    """One model, trained and judged: a row per measure."""
    of_model, of_train = CHOICES[name]
    if args.quick:
        of_train = of_train | {"max_epochs": 2}
    exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=[TYPE])
    model = exprgen.NBVAE(train, seed=seed, **of_model)
    with measured() as cost:
        model.train(accelerator="cpu", progress_bar=False, **of_train)
    bound = model.log_likelihood(validation, n_samples=20, progress_bar=False, seed=seed)
    values = {"train CPU s": [cost.cpu], "log-likelihood": [bound.mean()]}
    real = validation.layers["counts"]
    labels = validation.obs[TYPE].astype(str).to_numpy()
    trained_on = train.layers["counts"]
    top = np.argsort(-np.asarray(trained_on.sum(axis=0)).ravel())[:30]
    many = model.sample(train, progress_bar=False, seed=seed).layers["counts"]
    pair = (metrics.log_cp10k(counts)[:, top] for counts in (many, trained_on))
    values["RF-top"] = [metrics.c2st_auc(*pair, seed=seed)]
    for draw in range(args.draws):
        cells = model.sample(validation, progress_bar=False, seed=100 * seed + draw)
        drawn = cells.layers["counts"]
        genes = metrics.log_cp10k(drawn), metrics.log_cp10k(real)
        quality = metrics.quality_features(drawn), metrics.quality_features(real)
        for measure, pair in (
            ("RF-PC", metrics.pooled_pcs(*genes, seed=draw)),
            ("RF-gene", genes),
            ("QC", quality),
        ):
            values.setdefault(measure, []).append(metrics.c2st_auc(*pair, seed=draw))
        together = metrics.gene_correlation_agreement(
            *genes, groups_synthetic=labels, groups_real=labels
        )
        values.setdefault("gene correlation", []).append(together)
    return pd.DataFrame(
        {"measure": list(values), "value": [sum(v) / len(v) for v in values.values()]}
    )


def markdown(results: pd.DataFrame) -> str:
    """A row per choice: means over splits."""
    wide = results.pivot_table(index=["choice", "split"], columns="measure", values="value")
    bound = wide["log-likelihood"].unstack("split")
    above = bound - bound.loc[DEFAULTS]
    rows = {}
    for choice in wide.index.unique("choice"):
        mean, error = wide.loc[choice].mean(), wide.loc[choice].sem().fillna(0.0)
        row = {"log-likelihood": f"{mean['log-likelihood']:.2f}"}
        difference = above.loc[choice]
        row["above the defaults"] = (
            "" if choice == DEFAULTS else f"{difference.mean():+.2f} ± {difference.sem():.2f}"
        )
        row |= {m: f"{mean[m]:.3f} ± {error[m]:.3f}" for m in JUDGED}
        row["train CPU s"] = f"{mean['train CPU s']:.1f}"
        rows[choice] = row
    table = format_table(pd.DataFrame(rows).T, index="")
    return f"{table}\nMean over {results['split'].nunique()} split(s).\n"


if __name__ == "__main__":
    main()
