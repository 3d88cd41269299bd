"""What the weight of guidance does to means and variances, beside real cells.

ExprFlow and ExprDiffusion at their defaults, trained on all of ``pbmc68k_reduced`` (700 blood
cells, 765 genes) with the cell type as condition; then ``--n-obs`` cells for each real cell's type
at each weight. Of log1p of counts per ten thousand, over types of at least ``--min-cells`` real
cells, which count by their numbers of cells:

- ``genes, within``: variance of a gene within a type, over that of real cells; the median gene.
  Most of it is counting noise, which no weight changes;
- ``genes, between``: variance of its means over types, over that of real cells; the median gene;
- ``programs, within`` and ``between``: the same of ten principal components, variances being
  summed over components. In brackets the least and the largest type;
- ``latent, within`` and ``between``: the same of the latent state, over that at weight 1.

Genes are those detected in a tenth of the cells. Components are those of half of the real cells,
and all variances are compared with those of the other half: components fit the noise of the cells
that they come from. All real cells were trained on: this is about
guidance, and no test of fidelity. For that see ``fidelity.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from _common import TYPE, arguments, format_table, prepare, say, trained_paths, write
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

import exprgen

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
N_PROGRAMS = 10
N_LATENT = 1000


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--n-obs", type=int, default=10, help="cells per real cell")
    parser.add_argument("--min-cells", type=int, default=20, help="of a type that counts")
    args = parser.parse_args()
    prepare(args)
    adata = exprgen.datasets.pbmc68k_reduced()
    real = Views(adata.layers["counts"], adata.obs[TYPE], args.min_cells)
    rows = []
    for name, model in trained_paths(adata, args):
        asked = {TYPE: np.repeat(adata.obs[TYPE].astype(str).to_numpy(), args.n_obs)}
        as_trained = latent(model, real.types, 1.0, args.seed)
        for weight in WEIGHTS:
            cells = model.sample(asked, guidance=weight, seed=args.seed, progress_bar=False)
            drawn = latent(model, real.types, weight, args.seed)
            row = {"model": name, "guidance": weight, **real.compared(cells.X, cells.obs[TYPE])}
            row["latent, within"], row["latent, between"] = drawn / as_trained
            rows.append(row)
    table = pd.DataFrame(rows)
    write(args, "guidance", table, markdown(table))
    say("done")


class Views:
    """Real cells, seen gene by gene and by principal components, and other cells beside them."""

    def __init__(self, counts: csr_matrix, labels: pd.Series, min_cells: int) -> None:
        n_cells = labels.value_counts()
        n_cells = n_cells[n_cells >= min_cells]
        self.types = list(n_cells.index)
        self.share = n_cells.to_numpy() / n_cells.sum()
        self.genes = counts.getnnz(0) > 0.1 * counts.shape[0]
        fitted, other = train_test_split(
            np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0
        )
        self.pca = PCA(N_PROGRAMS, svd_solver="full").fit(self.values(counts[fitted]))
        self.real = self.variances(counts[other], labels.iloc[other])

    def values(self, counts: csr_matrix) -> np.ndarray:
        return exprgen.metrics.log_cp10k(counts).toarray()[:, self.genes]

    def variances(self, counts: csr_matrix, labels: pd.Series) -> list[np.ndarray]:
        """Within each type and between types, of genes and of programs."""
        values, result = self.values(counts), []
        for view in (values, self.pca.transform(values)):
            parts = [view[(labels == label).to_numpy()] for label in self.types]
            means = np.stack([part.mean(0) for part in parts])
            within = np.stack([part.var(0, ddof=1) for part in parts])
            result += [within, self.share @ np.square(means - self.share @ means)]
        return result

    def compared(self, counts: csr_matrix, labels: pd.Series) -> dict[str, float]:
        """Variances over those of real cells."""
        drawn = self.variances(counts, labels)
        genes, genes_between, programs, programs_between = zip(drawn, self.real, strict=True)
        of_type = programs[0].sum(1) / programs[1].sum(1)
        return {
            "genes, within": np.median((self.share @ genes[0]) / (self.share @ genes[1])),
            "genes, between": np.median(genes_between[0] / genes_between[1]),
            "programs, within": float(self.share @ of_type),
            "programs, within: least type": of_type.min(),
            "programs, within: largest type": of_type.max(),
            "programs, between": programs_between[0].sum() / programs_between[1].sum(),
        }


@torch.no_grad()
def latent(model: exprgen.ExprFlow, types: list[str], weight: float, seed: int) -> np.ndarray:
    """Variances of the latent state within and between types, summed over dimensions."""
    table, embedding = model.schema.parse({TYPE: types}, argument="types")
    codes = torch.from_numpy(model.schema.encode(table, embedding))
    draws = [
        model.module.density.sample(
            features.expand(N_LATENT, -1),
            torch.Generator().manual_seed(seed),
            guidance=[weight],
        )[:, :-1]
        for features in model.module.space.features.conditions(codes)
    ]
    within = torch.stack([draw.var(0).sum() for draw in draws]).mean()
    return np.array([within, torch.stack([draw.mean(0) for draw in draws]).var(0).sum()])


def markdown(table: pd.DataFrame) -> str:
    """Two digits; real cells first."""
    names = [name for name in table.columns[2:] if ":" not in name]
    text = table[names].map("{:.2f}".format)
    text["programs, within"] += [
        f" ({low:.2f} to {high:.2f})"
        for low, high in zip(
            table["programs, within: least type"],
            table["programs, within: largest type"],
            strict=True,
        )
    ]
    text.index = table["model"] + ", " + table["guidance"].map("{:g}".format)
    text.loc["real cells"] = ["1"] * 4 + [""] * 2
    return format_table(text.loc[["real cells", *text.index[:-1]]], index="model, guidance")


if __name__ == "__main__":
    main()
