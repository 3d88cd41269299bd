"""Power of a study of new donors, planned with a model, against real donors resampled.

NBVAE is trained on the eight donors of ``kang_ctrl_8donors``. A study compares the monocytes of
four donors with those of four others; in the second group one gene in ten is expressed less. Each
donor's cells are summed to a pseudobulk, and log counts per million compared by a t-test; power is
the share of the changed genes with p < .05, size that of the others. Studies are of

*real donors*: the eight donors, split at random, their molecules thinned in the second group;

*one effect per donor*: ``model.sample`` with a new label per donor (the recipe of the guide);

*an effect per cell*: a new label per cell, so that donors' effects average out, which is wrong;

*no donors*: one known donor's label for all cells, which is wrong as well.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from _common import TYPE, arguments, format_table, load, prepare, say, write
from scipy import stats

import exprgen

if TYPE_CHECKING:
    from anndata import AnnData

NAME, CELLS = "kang_ctrl_8donors", "CD14+ Monocytes"
CHANGES = -0.5, -1.0
"""Planted log2 fold changes."""
N_SIDE = 4
MIN_MEAN = 0.1
"""Counts per cell of the genes that are looked at."""


def main() -> None:
    """Train once, then many small studies."""
    parser = arguments("Power of studies of new donors, against resampled real donors")
    parser.add_argument("--studies", type=int, default=30)
    args = parser.parse_args()
    prepare(args)
    adata = load(args.data, NAME)
    adata.obs["donor"] = adata.obs["donor"].astype(str)
    exprgen.NBVAE.setup_anndata(
        adata, layer="counts", categorical_condition_keys=[TYPE], donor_key="donor"
    )
    model = exprgen.NBVAE(adata, seed=args.seed)
    say("training")
    model.train(2 if args.quick else None, accelerator="cpu", progress_bar=False)
    real = adata[adata.obs[TYPE] == CELLS]
    counts = real.layers["counts"].toarray()
    seen = counts.mean(0) >= MIN_MEAN
    donors = real.obs["donor"].to_numpy()
    n_cells = int(np.median(np.unique(donors, return_counts=True)[1]))
    rows = []
    for study, size in product(range(3 if args.quick else args.studies), CHANGES):
        say(f"study {study}, log2 fold change {size:g}")
        rng = np.random.default_rng([args.seed, study])
        changed = seen & (rng.random(adata.n_vars) < 0.1)
        change = dict.fromkeys(adata.var_names[changed], size)
        bulks = {
            "real donors": resampled(counts, donors, changed, size, n_cells, rng),
            "one effect per donor": planned(model, change, n_cells, "donor", study),
            "an effect per cell": planned(model, change, n_cells, "cell", study),
            "no donors": planned(model, change, n_cells, "none", study),
        }
        for source, bulk in bulks.items():
            power, level = tested(bulk, changed, seen)
            rows.append(
                {"study": study, "change": size, "source": source, "power": power, "size": level}
            )
    results = pd.DataFrame(rows)
    error = np.sqrt(results["study"].nunique())
    shown = {}
    for source, part in results.groupby("source", sort=False):
        by = {f"power at {c:g}": part.loc[part["change"] == c, "power"] for c in CHANGES}
        by["size"] = part.groupby("study")["size"].mean()
        shown[source] = {k: f"{v.mean():.3f} ± {v.std() / error:.3f}" for k, v in by.items()}
    table = f"{N_SIDE} donors on each side, {n_cells} cells each.\n\n"
    table += format_table(pd.DataFrame(shown).T, index="source")
    write(args, "power", results, table)
    print("\n" + table)


def resampled(
    counts: np.ndarray,
    donors: np.ndarray,
    changed: np.ndarray,
    change: float,
    n_cells: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Pseudobulks of the real donors in random order, the second half thinned, ``(8, n_vars)``."""
    bulk = []
    for i, donor in enumerate(rng.permutation(np.unique(donors))[: 2 * N_SIDE]):
        rows = rng.choice(np.flatnonzero(donors == donor), n_cells)
        total = counts[rows].sum(0).astype(int)
        if i >= N_SIDE:
            total[changed] = rng.binomial(total[changed], 2.0**change)
        bulk.append(total)
    return np.stack(bulk)


def planned(
    model: exprgen.NBVAE, change: dict[str, float], n_cells: int, effects: str, seed: int
) -> np.ndarray:
    """Pseudobulks of synthetic donors, ``(8, n_vars)``."""
    bulk = []
    for i in range(2 * N_SIDE):
        labels = {
            "donor": [f"new {i}"] * n_cells,
            "cell": [f"new {i}, {cell}" for cell in range(n_cells)],
            "none": [model.schema.donor.labels[0]] * n_cells,
        }[effects]
        cells: AnnData = model.sample(
            {TYPE: [CELLS] * n_cells, "donor": labels},
            log_fold_change=change if i >= N_SIDE else None,
            progress_bar=False,
            seed=1000 * seed + i,
        )
        bulk.append(np.asarray(cells.X.sum(0)).ravel())
    return np.stack(bulk)


def tested(bulk: np.ndarray, changed: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """Power and size of a t-test of log counts per million."""
    log_cpm = np.log2((bulk + 0.5) / (bulk.sum(1, keepdims=True) + 1) * 1e6)
    p = stats.ttest_ind(log_cpm[:N_SIDE], log_cpm[N_SIDE:]).pvalue
    return float((p[changed] < 0.05).mean()), float((p[seen & ~changed] < 0.05).mean())


if __name__ == "__main__":
    main()
