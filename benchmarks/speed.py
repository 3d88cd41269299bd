"""What a training step, a drawn cell and the memory of training cost, beside SCVI.

Kang's 12,261 control cells and 1,287 genes, cell type as condition (of SCVI: covariate of the
decoder), batches of 128 cells, one hidden layer of 128 units and 10 latent dimensions on both
sides. Beside NBVAE's defaults stands NBVAE with SCVI's own likelihood, negative binomial with a
dispersion per gene. Its density of state and depth, which SCVI lacks, is part of both.

- ``step in train(), CPU ms``: CPU time of a run, less that of a run of one epoch, over the steps
  between them; no validation on either side. What Lightning, loaders and callbacks take is in it.
- ``step in a loop, CPU ms``: loss, gradient and optimiser (AdamW, fused, and SCVI's Adam) on
  batches that were read beforehand.
- ``10,000 x 1,000 cells, CPU s``: drawing cells of the data's types, on its 1000 highly variable
  genes, after a few epochs. SCVI's come from z ~ N(0, I) at the totals of random cells.
- ``memory of training, MB``: by how much resident memory grows at its peak in ``train()``, each in
  a process of its own, after a warm-up on 300 cells.

Every number is a median over repetitions, in which the models take turns, with their range; the
ratio is the median of the repetitions' ratios. Only ratios mean anything on another machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import _scvi as rival
import numpy as np
import pandas as pd
import scvi
import torch
from _common import (
    Cost,
    arguments,
    format_table,
    load,
    measured,
    prepare,
    say,
    variable_genes,
    write,
)

import exprgen

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from anndata import AnnData

TYPE, DATA_SET = "cell_type", "kang_ctrl_8donors"
BATCH, HIDDEN, LATENT = 128, 128, 10
SCVI = 'SCVI(gene_likelihood="nb")'
MODELS: dict[str, dict[str, Any] | None] = {
    "NBVAE()": {},
    'NBVAE(likelihood="nb", dispersion="gene")': {"likelihood": "nb", "dispersion": "gene"},
    SCVI: None,
}
"""NBVAE's arguments; SCVI comes last."""
DIGITS = {
    "step in train(), CPU ms": 2,
    "step in a loop, CPU ms": 2,
    "10,000 x 1,000 cells, CPU s": 2,
    "memory of training, MB": 0,
}
N_CELLS, N_GENES = 10_000, 1000
N_WARM_UP = 300
N_BATCHES, N_TURNS = 10, 6
"""Of the loop: it goes over so many batches, so many times."""


def main() -> None:
    """Repeat all measurements, saving after each repetition."""
    parser = arguments("Speed and memory of NBVAE and SCVI at equal sizes")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement")
    parser.add_argument("--epochs", type=int, default=4, help="between the two run lengths")
    parser.add_argument("--memory-of", choices=MODELS, help="print this model's MB, no more")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.epochs = 2, 1
    prepare(args)
    adata = load(args.data, DATA_SET)
    if args.quick:
        adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[:1280]].copy()
    if args.memory_of is not None:
        print(memory(args.memory_of, adata))
        return
    say("warming up: the first training of a process imports more than it trains")
    for name in MODELS:
        train(name, adata[:N_WARM_UP].copy(), epochs=1)
    small = adata[:, variable_genes(adata, N_GENES)].copy()
    generators = {name: train(name, small.copy(), epochs=args.epochs)[0] for name in MODELS}
    measures: dict[str, Callable[[str], float]] = {
        "step in train(), CPU ms": lambda name: step_in_train(name, adata, args.epochs),
        "step in a loop, CPU ms": lambda name: step_in_loop(name, adata),
        "10,000 x 1,000 cells, CPU s": lambda name: drawing(name, generators[name], small),
        "memory of training, MB": lambda name: memory_apart(name, args),
    }
    rows = []
    for repeat in range(args.repeats):
        for metric, measure in measures.items():
            say(f"repetition {repeat}: {metric}")
            for name in MODELS:
                rows.append(
                    {"model": name, "metric": metric, "repeat": repeat, "value": measure(name)}
                )
        results = pd.DataFrame(rows)
        table = markdown(results)
        write(args, "speed", results, table)
    print("\n" + table)
    say(f"written to {args.out}")


def train(name: str, adata: AnnData, *, epochs: int) -> tuple[Any, Cost]:
    """A model trained on all cells, none kept for validation, and what ``train()`` cost."""
    if (kwargs := MODELS[name]) is not None:
        exprgen.NBVAE.setup_anndata(adata, layer="counts", categorical_condition_keys=[TYPE])
        model = exprgen.NBVAE(adata, seed=0, n_hidden=HIDDEN, n_latent=LATENT, **kwargs)
        with measured() as cost:
            model.train(
                epochs,
                batch_size=BATCH,
                train_size=1.0,
                early_stopping=False,
                accelerator="cpu",
                progress_bar=False,
            )
        return model, cost
    rival.setup(adata, covariate=TYPE)
    scvi.settings.seed = 0
    model = scvi.model.SCVI(adata, gene_likelihood="nb", n_hidden=HIDDEN, n_latent=LATENT)
    with measured() as cost:
        model.train(
            epochs,
            batch_size=BATCH,
            train_size=1.0,
            accelerator="cpu",
            enable_progress_bar=False,
        )
    return model, cost


def step_in_train(name: str, adata: AnnData, epochs: int) -> float:
    """CPU milliseconds of a step, from two run lengths."""
    short, long = (train(name, adata.copy(), epochs=n)[1].cpu for n in (1, 1 + epochs))
    return 1e3 * (long - short) / (epochs * -(-adata.n_obs // BATCH))


def step_in_loop(name: str, adata: AnnData) -> float:
    """CPU milliseconds of loss, gradient and optimiser, on batches that are at hand."""
    rows = np.random.default_rng(0).permutation(adata.n_obs)[: N_BATCHES * BATCH]
    model, _ = train(name, adata[rows].copy(), epochs=1)
    words: dict[str, Any] = {"kl_weight": 1.0}
    optimiser: torch.optim.Optimizer
    if MODELS[name] is not None:
        cells, _ = model._training_cells()
        batches = [cells[part] for part in np.arange(len(rows)).reshape(-1, BATCH)]
        words["n_obs_training"] = len(rows)
        optimiser = torch.optim.AdamW(model.module.parameters(), lr=1e-4, fused=True)
    else:
        batches = list(model._make_data_loader(model.adata, batch_size=BATCH))
        optimiser = torch.optim.Adam(
            model.module.parameters(), lr=1e-4, eps=0.01, weight_decay=1e-6
        )
    model.module.train()
    for turn in range(1 + N_TURNS):
        if turn == 1:  # the first is a warm-up
            start = time.process_time()
        for batch in batches:
            _, _, output = model.module(batch, loss_kwargs=words)
            optimiser.zero_grad()
            output.loss.backward()
            optimiser.step()
    return 1e3 * (time.process_time() - start) / (N_TURNS * len(batches))


def drawing(name: str, model: Any, adata: AnnData) -> float:
    """CPU seconds of drawing ``N_CELLS`` cells of the data's types."""
    rows = np.random.default_rng(0).choice(adata.n_obs, N_CELLS)
    labels = adata.obs[TYPE].iloc[rows]
    totals = np.maximum(np.asarray(adata.layers["counts"].sum(axis=1)).ravel(), 0.5)[rows]
    with measured() as cost:
        if MODELS[name] is not None:
            model.sample({TYPE: labels.to_numpy()}, progress_bar=False, seed=0)
        else:
            rival.prior_cells(model, labels, totals, seed=0)
    return cost.cpu


def memory(name: str, adata: AnnData) -> float:
    """MB by which memory grows in ``train()`` of two epochs, the first training excepted."""
    train(name, adata[:N_WARM_UP].copy(), epochs=1)
    return 1024 * train(name, adata, epochs=2)[1].memory


def memory_apart(name: str, args: argparse.Namespace) -> float:
    """:func:`memory` in a process of its own, so that no peak hides below another's."""
    words = ["--memory-of", name, "--data", str(args.data), "--out", str(args.out)]
    words += ["--quick"] if args.quick else []
    said = subprocess.run(
        [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(said.stdout.split()[-1])


def markdown(results: pd.DataFrame) -> str:
    """A row per measurement: medians and ranges, and SCVI's over NBVAE's."""
    n_repeats = results["repeat"].nunique()
    rows: dict[str, dict[str, str]] = {}
    for metric, digits in DIGITS.items():
        values = results[results["metric"] == metric].pivot(
            index="repeat", columns="model", values="value"
        )
        row = rows.setdefault(metric, {})
        for name in MODELS:
            low, middle, high = values[name].quantile([0, 0.5, 1])
            row[f"`{name}`"] = f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
        for name in list(MODELS)[:-1]:
            ratio = values[SCVI] / values[name]
            row[f"SCVI over `{name}`"] = f"{ratio.median():.2f}"
    note = f"Medians of {n_repeats} repetitions, in brackets their range.\n"
    return f"{format_table(pd.DataFrame(rows).T, index='')}\n{note}"


if __name__ == "__main__":
    main()
