"""A rare cell type: do synthetic cells help a classifier more than copies of real cells do?

Of ``pbmc3k_labelled`` a fifth is held out. In the rest one cell type is cut to 5 % of its cells,
and NBVAE is trained on what is left, so that it knows as little of the type as the classifier
does. The type is filled up to the median of all types with synthetic cells, with duplicates, or
not at all, and logistic regression labels the held-out cells (``tl.augmentation_test``, with
intervals by a paired bootstrap). Controls: duplicates, and the classifier trained on all cells of
the type, uncut.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from _common import TYPE, arguments, format_table, load, prepare, say, train_test, variable_genes
from _common import write as write_results
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

import exprgen

NAME = "pbmc3k_labelled"
KEPT = 0.05


def main() -> None:
    """Every type of more than a hundred cells, in turn."""
    parser = arguments("Augmentation of a rare type against duplicates and nothing")
    parser.add_argument("--types", type=int, default=4, help="how many types, largest first")
    parser.add_argument("--genes", type=int, default=1000)
    args = parser.parse_args()
    prepare(args)
    adata = load(args.data, NAME)
    train, test = train_test(adata, TYPE, 0.2, args.seed)
    genes = variable_genes(train, args.genes)
    train, test = train[:, genes].copy(), test[:, genes].copy()
    rows = []
    for name in train.obs[TYPE].value_counts().index[: 1 if args.quick else args.types]:
        of_type = np.flatnonzero(train.obs[TYPE] == name)
        kept = np.random.default_rng(args.seed).permutation(of_type)
        kept = kept[: max(5, round(KEPT * len(of_type)))]
        rest = np.flatnonzero(train.obs[TYPE] != name)
        cut = train[np.sort(np.r_[rest, kept])].copy()
        say(f"{name}: {len(kept)} of {len(of_type)} cells kept")
        exprgen.NBVAE.setup_anndata(cut, layer="counts", categorical_condition_keys=[TYPE])
        model = exprgen.NBVAE(cut, seed=args.seed)
        model.train(2 if args.quick else None, accelerator="cpu", progress_bar=False)
        n_obs = {name: int(cut.obs[TYPE].value_counts().median())}
        table = exprgen.tl.augmentation_test(
            cut, test, model, groupby=TYPE, n_obs=n_obs, progress_bar=False, seed=args.seed
        )
        of_metric = table[table["metric"] == f"F1 of {name}"].set_index("comparison")
        gain = of_metric.loc["synthetic - none"]
        copies = of_metric.loc["synthetic - duplicates"]
        macro = table[table["metric"] == "macro"].set_index("comparison")
        rows.append(
            {
                "type": name,
                "cells kept": len(kept),
                "held out": int((test.obs[TYPE] == name).sum()),
                "F1, uncut": uncut(train, test, name),
                "F1, none": gain["baseline"],
                "F1, duplicates": copies["baseline"],
                "F1, synthetic": gain["value"],
                "gain over none": interval(gain),
                "gain over duplicates": interval(copies),
                "macro gain over none": interval(macro.loc["synthetic - none"]),
                "verdict": table.attrs["verdict"],
            }
        )
        results = pd.DataFrame(rows)
        shown = results.set_index("type").map(lambda v: f"{v:.3f}" if isinstance(v, float) else v)
        markdown = format_table(shown, index="type")
        write_results(args, "augmentation", results, markdown)
    print("\n" + markdown)


def interval(row: pd.Series) -> str:
    """Difference and its 95 % interval."""
    return f"{row['difference']:+.3f} [{row['lower']:+.3f}, {row['upper']:+.3f}]"


def uncut(train, test, name: str) -> float:
    """F1 of the type with all its cells: what augmentation could at best restore."""
    values = [exprgen.metrics.log_cp10k(part.layers["counts"]) for part in (train, test)]
    fitted = LogisticRegression(max_iter=1000).fit(values[0], train.obs[TYPE].astype(str))
    truth = test.obs[TYPE].astype(str) == name
    return float(f1_score(truth, fitted.predict(values[1]) == name))


if __name__ == "__main__":
    main()
