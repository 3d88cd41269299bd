"""Why p-values of sampled cells mean nothing: two conditions that do not differ.

The 700 blood cells of ``pbmc68k_reduced`` are given labels A and B at random, and NBVAE is trained
on the labels as a condition, from several seeds. There is nothing to find. Cells drawn for A are
then compared with cells drawn for B by scanpy's Wilcoxon test, as if they were observations, for
more and more cells; the share of genes at an adjusted p-value below .05 is printed. Beside it the
same test on the real cells, of which there are 350 a side, and ``tl.effect`` on all seeds
together.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scanpy as sc
from _common import arguments, format_table, prepare, say, write

import exprgen

N_CELLS = (100, 350, 1000, 3000, 10000)


def main() -> None:
    """Train, draw, test."""
    parser = arguments("P-values of sampled cells under no difference")
    parser.add_argument("--seeds", type=int, default=5, help="models in the ensemble")
    parser.add_argument("--labellings", type=int, default=3, help="random labellings")
    args = parser.parse_args()
    prepare(args)
    rows = []
    for labelling in range(1 if args.quick else args.labellings):
        adata = exprgen.datasets.pbmc68k_reduced()
        rng = np.random.default_rng([args.seed, labelling])
        adata.obs["label"] = np.where(rng.permutation(adata.n_obs) % 2, "A", "B")
        adata.X = adata.layers["counts"].copy()
        models = []
        for seed in range(args.seed, args.seed + (2 if args.quick else args.seeds)):
            say(f"labelling {labelling}, seed {seed}")
            exprgen.NBVAE.setup_anndata(
                adata, layer="counts", categorical_condition_keys=["label"]
            )
            model = exprgen.NBVAE(adata, seed=seed)
            model.train(2 if args.quick else None, accelerator="cpu", progress_bar=False)
            models.append(model)
        a, b = {"label": "A"}, {"label": "B"}
        found = {"350 real cells a side": significant(adata)}
        for n in N_CELLS:
            cells = models[0].sample({"label": ["A", "B"]}, n_obs=n, seed=1, progress_bar=False)
            found[f"{n} drawn cells a side"] = significant(cells)
        table = exprgen.tl.effect(models, a, b, seed=1)
        found[f"tl.effect, {len(models)} seeds"] = float((table["pvals_adj"] < 0.05).mean())
        rows.append({"labelling": labelling, **found})
    results = pd.DataFrame(rows)
    shares = results.drop(columns="labelling")
    text = pd.DataFrame(
        {
            "genes with adjusted p < .05": shares.mean().map("{:.1%}".format),
            "in each labelling": [", ".join(f"{v:.1%}" for v in shares[c]) for c in shares],
        }
    )
    markdown = format_table(text, index="")
    write(args, "effect", results, markdown)
    print("\n" + markdown)


def significant(adata: sc.AnnData) -> float:
    """Share of genes that a Wilcoxon test calls different between A and B."""
    cells = adata.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    cells.obs["label"] = cells.obs["label"].astype("category")
    sc.tl.rank_genes_groups(cells, "label", groups=["A"], reference="B", method="wilcoxon")
    table = sc.get.rank_genes_groups_df(cells, "A")
    return float((table["pvals_adj"] < 0.05).mean())


if __name__ == "__main__":
    main()
