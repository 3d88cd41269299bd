"""Does ``tl.compare_likelihoods`` put the law that counts follow first, and which do real cells?

Counts of 1,500 cells and 50 genes of three types are drawn from a law that is known, with the
means and depths of ``simulate_nb``: Poisson; negative binomial; the same with three zeros in ten
put in; log1p of counts per ten thousand normal around its mean (at ten times the depth, rounded to
counts). A negative binomial with a large dispersion *is* a Poisson, and one without put-in zeros a
zero-inflated one, so these may tie; what must not happen is that another law is ahead of the true
one by more than three standard errors. Real cells beside them: ``pbmc68k_reduced`` and 1,000
variable genes of ``pbmc3k_labelled``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from _common import TYPE, arguments, format_table, load, prepare, say, variable_genes, write
from scipy import sparse

import exprgen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

LIKELIHOODS = ["gaussian", "poisson", "nb", "contaminated_nb", "zinb"]
LAWS = {"poisson": "Poisson", "nb": "NB", "zinb": "ZINB", "gaussian": "Gaussian of log1p"}
N_OBS, N_VARS = 1500, 50
ZEROS, SPREAD = 0.3, 0.5


def main() -> None:
    """All laws, then real cells, for every seed."""
    parser = arguments("Likelihoods ranked by held-out counts, on laws that are known")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    prepare(args)
    tables = []
    for seed in range(args.seed, args.seed + (1 if args.quick else args.seeds)):
        for name, adata in sets(args, seed):
            say(f"{name}, seed {seed}")
            table = exprgen.tl.compare_likelihoods(
                adata,
                likelihoods=LIKELIHOODS,
                categorical_condition_keys=[TYPE],
                max_epochs=2 if args.quick else None,
                accelerator="cpu",
                progress_bar=False,
                seed=seed,
            )
            tables.append(table.assign(data=name, seed=seed))
            results = pd.concat(tables, ignore_index=True)
            markdown = format_table(shown(results), index="counts of")
            write(args, "likelihood_ranking", results, markdown)
    print("\n" + markdown)


def sets(args, seed: int) -> Iterator[tuple[str, AnnData]]:
    """Cells by the name of their law."""
    for law, name in LAWS.items():
        yield name, simulated(law, seed, 300 if args.quick else N_OBS)
    yield "pbmc68k_reduced", exprgen.datasets.pbmc68k_reduced()
    adata = load(args.data, "pbmc3k_labelled")
    yield "pbmc3k_labelled", adata[:, variable_genes(adata, 1000)].copy()


def simulated(law: str, seed: int, n_obs: int) -> AnnData:
    """Cells of three types whose counts follow one of the laws."""
    depth = (9.3, 0.4) if law == "gaussian" else (7.0, 0.4)
    adata = exprgen.datasets.simulate_nb(
        n_obs, n_vars=N_VARS, log_depth=depth, dispersion=(0.5, 2.0), seed=seed
    )
    rng = np.random.default_rng([seed, 1])
    share = adata.varm["proportion"][adata.obs[TYPE].astype(str)].to_numpy().T
    total = adata.obs["depth"].to_numpy()[:, None]
    counts = adata.layers["counts"].toarray()
    if law == "poisson":
        counts = rng.poisson(total * share)
    elif law == "zinb":
        counts = counts * (rng.random(counts.shape) >= ZEROS)
    elif law == "gaussian":
        y = np.log1p(1e4 * share) + SPREAD * rng.normal(size=counts.shape)
        counts = np.rint(np.expm1(np.maximum(y, 0)) * total / 1e4)
    adata.layers["counts"] = sparse.csr_matrix(counts, dtype=np.float32)
    return adata[counts.sum(1) > 0].copy()


def shown(results: pd.DataFrame) -> pd.DataFrame:
    """Differences from the best likelihood, nats per cell, with standard errors over cells."""
    rows = {}
    for name, part in results.groupby("data", sort=False):
        by = part.groupby("likelihood")
        mean, n = by["difference"].mean(), by.size()
        error = by["difference_se"].apply(lambda se: np.sqrt((se**2).sum())) / n
        rows[name] = {
            "held out": f"{part['n_test'].iloc[0]}",
            "best, nats per cell": f"{part.groupby('seed')['log_pmf'].max().mean():.1f}",
        } | {
            law: "0" if mean[law] == 0 else f"{mean[law]:.2f} ± {error[law]:.2f}"
            for law in LIKELIHOODS
        }
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    main()
