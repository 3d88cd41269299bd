"""One held-out healthy donor against the model of seven others: false findings, and spiked genes.

Each donor of ``kang_ctrl_8donors`` is left out in turn, and NBVAE trained on the others with their
labels as ``donor_key``. ``tl.nof1_de`` then compares the donor's cell types with what is expected
of a new donor. As the donor is healthy, genes with ``pvals_adj`` < .05 are false. Controls: the
same without inflation, and without the variance between donors, where the only noise is that of
cells. Then one gene in twenty is spiked: its counts quadrupled (each molecule is followed by
Poisson(3) more) or three quarters of them removed, and ranked by score: AUROC of spiked genes
against all others of which ten counts are expected in the group, beside that of the fold change.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import TYPE, arguments, format_table, load, prepare, say, write
from sklearn.metrics import roc_auc_score

import exprgen

if TYPE_CHECKING:
    from anndata import AnnData

NAME = "kang_ctrl_8donors"
LARGE = 100
"""Cells of a group that counts as large."""


def main() -> None:
    """Leave out each donor."""
    parser = arguments("N-of-one: held-out healthy donors and spiked genes")
    parser.add_argument("--donors", type=int, default=8, help="how many donors to leave out")
    args = parser.parse_args()
    prepare(args)
    adata = load(args.data, NAME)
    adata.obs["donor"] = adata.obs["donor"].astype(str)
    rows = []
    for donor in list(adata.obs["donor"].unique())[: 1 if args.quick else args.donors]:
        say(f"donor {donor} left out")
        train = adata[adata.obs["donor"] != donor].copy()
        test = adata[adata.obs["donor"] == donor].copy()
        exprgen.NBVAE.setup_anndata(
            train, layer="counts", categorical_condition_keys=[TYPE], donor_key="donor"
        )
        model = exprgen.NBVAE(train, seed=args.seed)
        model.train(2 if args.quick else None, accelerator="cpu", progress_bar=False)
        rows += one_donor(test, model, donor, args.seed)
        results = pd.DataFrame(rows)
        table = summary(results)
        write(args, "nof1", results, table)
    print("\n" + table)


def one_donor(
    test: AnnData, model: exprgen.NBVAE, donor: str, seed: int
) -> list[dict[str, object]]:
    """Rows per method and cell type."""
    spiked, changed = spike(test, seed)
    rows = []
    for method in ("nof1_de", "no inflation", "no donor variance"):
        judge = without_donors(model) if method == "no donor variance" else model
        options = {} if method == "nof1_de" else {"inflation": 1.0}
        found, again = (
            exprgen.tl.nof1_de(cells, judge, groupby=TYPE, key_added=None, seed=seed, **options)
            for cells in (test, spiked)
        )
        for group, table in found.groupby("group"):
            second = again[again["group"] == group].set_index("names")
            told = second["expected"] * second["n_cells"] >= 10
            second = second[told]
            truth = second.index.isin(changed)
            inside = table["observed"].between(table["lower"], table["upper"])
            row = {
                "donor": donor,
                "method": method,
                "group": group,
                "cells": table["n_cells"].iloc[0],
                "inflation": table["inflation"].iloc[0],
                "significant": (table["pvals_adj"] < 0.05).mean(),
                "p < .05": (table["pvals"] < 0.05).mean(),
                "inside 90 %": inside.mean(),
            }
            if truth.any() and not truth.all():
                row["AUROC"] = roc_auc_score(truth, second["scores"].abs())
                row["AUROC of fold change"] = roc_auc_score(truth, second["logfoldchanges"].abs())
                hits = second["pvals_adj"] < 0.05
                row["spiked found"] = hits[truth].mean()
                row["false among found"] = (hits & ~truth).sum() / max(hits.sum(), 1)
            rows.append(row)
    return rows


def spike(test: AnnData, seed: int) -> tuple[AnnData, pd.Index]:
    """The same cells with one gene in twenty changed fourfold, up or down, and which these are."""
    rng = np.random.default_rng(seed)
    counts = test.layers["counts"].toarray()
    genes = rng.permutation(test.n_vars)[: test.n_vars // 20]
    up, down = np.array_split(genes, 2)
    counts[:, up] += rng.poisson(3 * counts[:, up])
    counts[:, down] = rng.binomial(counts[:, down].astype(int), 0.25)
    spiked = test.copy()
    spiked.X = sp.csr_matrix(counts, dtype=np.float32)
    spiked.layers["counts"] = spiked.X.copy()
    return spiked, test.var_names[genes]


def without_donors(model: exprgen.NBVAE) -> exprgen.NBVAE:
    """The model as if donors did not differ; a new one is the mean of those known."""
    judge = copy.copy(model)
    judge.module = copy.deepcopy(model.module)
    donors = judge.module.space.donors
    centre = donors.law(-1)
    donors.posterior_mean.data[:] = centre[0] + centre[1] / 2
    donors.posterior_log_sd.data[:] = -12.0
    return judge


def summary(results: pd.DataFrame) -> str:
    """A row per method: mean over donors and types, and the worst donor."""
    shown = {}
    for method, table in results.groupby("method", sort=False):
        large = table[table["cells"] >= LARGE]
        by_donor = table.groupby("donor")["significant"].mean()
        shown[method] = {
            "donors": table["donor"].nunique(),
            "significant": f"{by_donor.mean():.2%}",
            "worst donor": f"{by_donor.max():.2%}",
            "p < .05, all": f"{table['p < .05'].mean():.3f}",
            f"p < .05, ≥ {LARGE} cells": f"{large['p < .05'].mean():.3f}",
            f"inside 90 %, ≥ {LARGE} cells": f"{large['inside 90 %'].mean():.3f}",
            "AUROC of spiked": f"{table['AUROC'].mean():.3f}",
            "... of fold change": f"{table['AUROC of fold change'].mean():.3f}",
            "spiked found": f"{table['spiked found'].mean():.2f}",
            "false among found": f"{table['false among found'].mean():.2f}",
        }
    return format_table(pd.DataFrame(shown).T, index="method")


if __name__ == "__main__":
    main()
