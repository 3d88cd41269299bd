"""What 1,000 draws for every cell cost in memory, beside SCVI's posterior predictive sample.

10,000 cells of eight types and 2,000 genes, simulated counts. ``predict`` with 1,000 draws
describes p(x | c) of every cell; equal conditions share one computation, and draws are reduced to
moments and quantiles before the next. SCVI's ``posterior_predictive_sample`` answers another
question, p(x | a cell's own counts), but is what there is for per-gene intervals. It keeps all
draws: 1,000 do not fit a usual machine, so it is measured at two small numbers of draws, and a
straight line through both gives an idea of more.

Peaks are the growth of resident memory in the call, in MB; the output is what of it is left in the
result, for ``predict`` five dense layers of float32.
"""

from __future__ import annotations

from typing import Any

import _scvi as rival
import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import TYPE, arguments, format_table, measured, prepare, say, write

import exprgen

N_CELLS, N_GENES, N_TYPES, N_SAMPLES = 10_000, 2000, 8, 1000
N_FEW = (2, 6)


def main() -> None:
    args = arguments(__doc__).parse_args()
    prepare(args)
    n_cells = 500 if args.quick else N_CELLS
    adata = simulated(n_cells, args.seed)
    small = adata[:300].copy()
    exprgen.NBVAE.setup_anndata(small, layer="counts", categorical_condition_keys=[TYPE])
    model = exprgen.NBVAE(small, seed=args.seed)
    model.train(max_epochs=1, accelerator="cpu", progress_bar=False)
    model.predict(small.copy(), n_samples=10, progress_bar=False)
    say("predict")
    with measured() as cost:
        model.predict(adata, n_samples=N_SAMPLES, seed=args.seed, progress_bar=False)
    layers = [adata.layers[slot] for slot in adata.layers if str(slot).startswith("exprgen_")]
    output = sum(layer.nbytes for layer in layers) / 1024**2
    rows: list[dict[str, Any]] = [row("NBVAE.predict", N_SAMPLES, cost, output)]
    for layer in list(adata.layers):
        if str(layer).startswith("exprgen_"):
            del adata.layers[layer]

    rival.setup(small, covariate=TYPE)
    other = rival.fit(small, seed=args.seed, max_epochs=1)
    other.posterior_predictive_sample(small, n_samples=2)
    for n in N_FEW:
        say(f"SCVI, {n} draws")
        with measured() as cost:
            drawn = other.posterior_predictive_sample(adata, n_samples=n)
        rows.append(row("SCVI.posterior_predictive_sample", n, cost, drawn.nbytes / 1024**2))
        del drawn
    results = pd.DataFrame(rows)
    text = markdown(results)
    write(args, "memory", results, text)
    print(text)


def simulated(n_cells: int, seed: int) -> ad.AnnData:
    """About a tenth of the counts are not 0."""
    rng = np.random.default_rng(seed)
    types = np.arange(n_cells) % N_TYPES
    mean = rng.gamma(0.5, 0.3, (N_TYPES, N_GENES))
    counts = [sp.csr_matrix(rng.poisson(mean[t]).astype(np.float32)) for t in types]
    obs = pd.DataFrame(
        {TYPE: [f"type {t}" for t in types]}, index=[f"c{i}" for i in range(n_cells)]
    )
    adata = ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]))
    adata.layers["counts"] = sp.vstack(counts, format="csr")
    return adata


def row(name: str, n_samples: int, cost: Any, output: float) -> dict[str, Any]:
    peak = 1024 * cost.memory
    return {"call": name, "draws": n_samples, "peak": peak, "output": output, "cpu": cost.cpu}


def markdown(results: pd.DataFrame) -> str:
    """A row per call."""
    table = pd.DataFrame(
        {
            "draws": results["draws"].map("{:,}".format),
            "peak, MB": results["peak"].map("{:,.0f}".format),
            "of it output, MB": results["output"].map("{:,.0f}".format),
            "CPU s": results["cpu"].map("{:.1f}".format),
        }
    ).set_axis(results["call"])
    few = results[results["draws"] < N_SAMPLES]
    slope = np.diff(few["peak"])[0] / np.diff(few["draws"])[0]
    line = few["peak"].iloc[0] + slope * (N_SAMPLES - few["draws"].iloc[0])
    note = f"\nSCVI at {N_SAMPLES:,} draws, by the line through both: {line / 1024:,.0f} GB.\n"
    return format_table(table, index="call") + note


if __name__ == "__main__":
    main()
