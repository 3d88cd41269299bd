"""A model of your own cells: ``python examples/own_data.py cells.h5ad --condition cell_type``.

Holds out a fifth of the cells (or a fifth of the donors), trains on the others, draws new cells
for these, and says how far they are from the held-out ones. The command line does the same without
Python, see ``examples/pipeline.sh``; change here what it has no option for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
from sklearn.model_selection import GroupShuffleSplit

import exprgen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cells", type=Path, help="raw counts of cells, .h5ad")
    parser.add_argument("--condition", required=True, help="column of labels to generate on")
    parser.add_argument("--layer", help="layer of the counts; X if it is left out")
    parser.add_argument("--batch", help="column of a nuisance")
    parser.add_argument("--donor", help="column of donors, of whom some are held out")
    parser.add_argument("--out", type=Path, default=Path("own_data"), help="folder of results")
    parser.add_argument("--max-epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    said.out.mkdir(parents=True, exist_ok=True)

    adata = ad.read_h5ad(said.cells)
    # Whole donors, for what a model says of new donors is only seen on new donors.
    groups = adata.obs_names if said.donor is None else adata.obs[said.donor]
    split = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=said.seed)
    rows = next(split.split(adata.obs_names, groups=groups))
    train, test = (adata[part].copy() for part in rows)

    exprgen.NBVAE.setup_anndata(
        train,
        layer=said.layer,
        categorical_condition_keys=[said.condition],
        batch_key=said.batch,
        donor_key=said.donor,
    )
    model = exprgen.NBVAE(train, seed=said.seed)
    model.train(said.max_epochs)
    model.save(said.out / "model", overwrite=True)

    # Two for each held-out cell, of its type and batch, and of its donor as a new one.
    synthetic = model.sample(test, n_obs=2, seed=said.seed)
    synthetic.write_h5ad(said.out / "synthetic.h5ad")
    model.predict(test, seed=said.seed)
    test.write_h5ad(said.out / "annotated.h5ad")

    report = exprgen.tl.evaluate(
        train, test, synthetic, groupby=said.condition, layer=said.layer, seed=said.seed
    )
    report.to_csv(said.out / "report.csv", index=False)
    columns = ["metric", "value", "control", "better", "verdict"]
    print(report.loc[report["kind"] == "model", columns].to_string(index=False))
    print(f"\nWrote {said.out}/")


if __name__ == "__main__":
    main()
