"""Does NBVAE's latent keep cell types together and donors apart from mattering?

Kang's control cells: 8 donors, the donor as batch, no condition; NBVAE beside scvi-tools' SCVI
(``gene_likelihood="nb"``), each with its defaults and trained in the same run. Neither is shown
the cell types. Beside them, for scale, 50 principal components of log-normalised counts.

- ``kNN``: accuracy of 15 nearest neighbours at naming the cell type, 5-fold cross-validation;
  ``kNN balanced``: the mean over types;
- ``kNN other donors``: each donor's cells named by neighbours among the other donors' cells;
- ``mixing``: a guard. Inverse Simpson index of the donors among a cell's 50 nearest neighbours
  (unweighted, after LISI), mean over cells, on a scale from 0 (neighbours of one donor) to 1 (as
  after shuffling donors within cell types). Mixing alone is no merit: noise mixes perfectly.

Then each donor is left out of training in turn, mapped with ``unseen="null"``, and its cells are
named by their 15 nearest neighbours among the training donors. For comparison: the same from the
models trained on all donors. SCVI refuses an unseen batch (scArches would train on it), but with
its defaults its encoder does not read the batch; so for the first ``--scvi-left-out`` donors it is
trained without the donor too, and the donor's cells are mapped under another one's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import _scvi as rival
import numpy as np
import pandas as pd
import scanpy as sc
from _common import Cost, arguments, format_table, load, measured, prepare, say, write
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

import exprgen

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData

TYPE, DONOR = "cell_type", "donor"
N_NEIGHBORS, N_MIXING = 15, 50


def main() -> None:
    """Run the seeds, saving after each."""
    parser = arguments("Integration of donors by NBVAE and SCVI")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each model")
    parser.add_argument("--donors", nargs="*", help="to leave out (default: each in turn)")
    parser.add_argument(
        "--scvi-left-out", type=int, default=1, help="donors for which SCVI is trained without"
    )
    parser.add_argument("--epochs", type=int, help="of both models (default: each its own)")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.epochs = 1, 3
    prepare(args)

    adata = load(args.data, "kang_ctrl_8donors")
    adata.obs[DONOR] = adata.obs[DONOR].astype(str)
    if args.quick:
        rows = np.random.default_rng(args.seed).permutation(adata.n_obs)[:2000]
        adata = adata[np.sort(rows)].copy()
    known = adata.obs[DONOR].value_counts().index
    args.donors = args.donors or list(known[:2] if args.quick else known)
    if unknown := set(args.donors) - set(known):
        parser.error(f"--donors: {sorted(unknown)} are none of {list(known)}")

    say("warming up: the first training of a process imports more than it trains")
    for name in ("NBVAE", "SCVI"):
        fit(name, adata[:500].copy(), seed=0, max_epochs=2)
    results = pd.DataFrame()
    for seed in range(args.seed, args.seed + args.seeds):
        rows = run_seed(adata, seed, args)
        results = pd.concat([results, rows.assign(seed=seed)], ignore_index=True)
        table = markdown(results)
        write(args, "integration", results, table)
    print("\n" + table)
    say(f"written to {args.out}")


def fit(name: str, adata: AnnData, *, seed: int, max_epochs: int | None) -> tuple[Any, Cost]:
    """A trained model and what ``train()`` cost."""
    if name == "NBVAE":
        exprgen.NBVAE.setup_anndata(adata, layer="counts", batch_key=DONOR)
        model = exprgen.NBVAE(adata, seed=seed)
        with measured() as cost:
            model.train(max_epochs, accelerator="cpu", progress_bar=False)
        return model, cost
    rival.setup(adata, batch=DONOR)
    with measured() as cost:
        model = rival.fit(adata, seed=seed, max_epochs=max_epochs)
    return model, cost


def run_seed(adata: AnnData, seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """Both models on all donors, then without each; one row per model and measure."""
    rows: list[dict[str, Any]] = []
    types, donors = adata.obs[TYPE].astype(str).to_numpy(), adata.obs[DONOR].to_numpy()
    latents = {"PCA": principal_components(adata)}
    for name in ("NBVAE", "SCVI"):
        say(f"seed {seed}: {name} on all {adata.n_obs} cells")
        model, cost = fit(name, adata, seed=seed, max_epochs=args.epochs)
        quiet = {"progress_bar": False} if name == "NBVAE" else {}
        latents[name] = model.get_latent_representation(**quiet)
        rows += [
            {"model": name, "metric": "train CPU s", "value": cost.cpu},
            {"model": name, "metric": "train GB", "value": cost.memory},
        ]
    for name, latent in latents.items():
        for metric, value in scores(latent, types, donors, seed=seed).items():
            rows.append({"model": name, "metric": metric, "value": value})

    def add(model: str, donor: str, latent: np.ndarray) -> None:
        accuracy = named_by_others(latent, types, donors, donor)
        rows.append({"model": model, "metric": f"left out: {donor}", "value": accuracy})

    for i, donor in enumerate(args.donors):
        for name, latent in latents.items():
            add(name, donor, latent)
        for name in ("NBVAE", "SCVI")[: 2 if i < args.scvi_left_out else 1]:
            say(f"seed {seed}: {name} without donor {donor}")
            latent = mapped(name, adata, donor, seed=seed, max_epochs=args.epochs)
            add(f"{name} without", donor, latent)
    return pd.DataFrame(rows)


def principal_components(adata: AnnData) -> np.ndarray:
    """50 components of log-normalised counts, ``(n_obs, 50)``."""
    normalised = sc.AnnData(adata.layers["counts"].copy())
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    sc.pp.pca(normalised, n_comps=50)
    return normalised.obsm["X_pca"]


def mapped(
    name: str, adata: AnnData, donor: str, *, seed: int, max_epochs: int | None
) -> np.ndarray:
    """Latents of all cells, ``(n_obs, n_latent)``, from a model trained without the donor."""
    is_out = (adata.obs[DONOR] == donor).to_numpy()
    train, out = adata[~is_out].copy(), adata[is_out].copy()
    model, _ = fit(name, train, seed=seed, max_epochs=max_epochs)
    if name == "NBVAE":
        parts = [
            model.get_latent_representation(part, unseen="null", progress_bar=False)
            for part in (train, out)
        ]
    else:
        out.obs[DONOR] = train.obs[DONOR].iloc[0]
        parts = [model.get_latent_representation(part) for part in (train, out)]
    latent = np.empty((adata.n_obs, parts[0].shape[1]))
    latent[~is_out], latent[is_out] = parts
    return latent


def scores(
    latent: np.ndarray, types: np.ndarray, donors: np.ndarray, *, seed: int
) -> dict[str, float]:
    """All measures of one representation of all cells."""
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    named = cross_val_predict(KNeighborsClassifier(N_NEIGHBORS), latent, types, cv=folds)
    others = np.empty_like(types)
    for donor in np.unique(donors):
        others[donors == donor] = name_cells(latent, types, donors, donor)
    return {
        "kNN": float((named == types).mean()),
        "kNN balanced": float(balanced_accuracy_score(types, named)),
        "kNN other donors": float((others == types).mean()),
        "mixing": mixing(latent, types, donors, seed=seed),
    }


def name_cells(
    latent: np.ndarray, types: np.ndarray, donors: np.ndarray, donor: str
) -> np.ndarray:
    """Types of the donor's cells by their neighbours among all other donors' cells."""
    is_out = donors == donor
    classifier = KNeighborsClassifier(N_NEIGHBORS).fit(latent[~is_out], types[~is_out])
    return classifier.predict(latent[is_out])


def named_by_others(
    latent: np.ndarray, types: np.ndarray, donors: np.ndarray, donor: str
) -> float:
    """Share of the donor's cells that :func:`name_cells` names rightly."""
    return float((name_cells(latent, types, donors, donor) == types[donors == donor]).mean())


def mixing(latent: np.ndarray, types: np.ndarray, donors: np.ndarray, *, seed: int) -> float:
    """Diversity of donors around a cell: 0, one donor, to 1, as if shuffled within types."""
    nearest = NearestNeighbors(n_neighbors=min(N_MIXING, len(latent) - 1)).fit(latent)
    neighbors = nearest.kneighbors(return_distance=False)
    rng = np.random.default_rng(seed)
    shuffled = donors.copy()
    for cell_type in np.unique(types):
        rows = np.flatnonzero(types == cell_type)
        shuffled[rows] = donors[rng.permutation(rows)]
    observed, control = (_inverse_simpson(d[neighbors]) for d in (donors, shuffled))
    return (observed - 1) / (control - 1)


def _inverse_simpson(labels: np.ndarray) -> float:
    shares = np.stack([(labels == level).mean(1) for level in np.unique(labels)])
    return float((1 / np.square(shares).sum(0)).mean())


def markdown(results: pd.DataFrame) -> str:
    """Two tables: representations of all cells, and donors left out."""
    n_seeds = results["seed"].nunique()
    mean = results.pivot_table(
        index="metric", columns="model", values="value", aggfunc="mean", sort=False
    )
    is_out = mean.index.str.startswith("left out")
    whole = mean[~is_out].reindex(columns=["NBVAE", "SCVI", "PCA"])
    whole = whole.reindex(
        [*(m for m in whole.index if "train" not in m), "train CPU s", "train GB"]
    )
    out = mean[is_out].reindex(columns=["NBVAE without", "SCVI without", "NBVAE", "SCVI", "PCA"])
    out.index = out.index.str.removeprefix("left out: ")
    full = out.dropna(axis=1, how="any")
    out.loc["mean"] = full.mean()
    digits = {"train CPU s": 1, "train GB": 2}
    text = [
        format_table(_text(whole, digits), index=""),
        "Accuracy on a donor's cells, by their neighbours among the other donors' cells. "
        "*without*: the model has not seen the donor.\n",
        format_table(_text(out, {}), index="donor"),
        f"{n_seeds} training(s) of each model.\n",
    ]
    return "\n".join(text)


def _text(table: pd.DataFrame, digits: dict[str, int]) -> pd.DataFrame:
    cells = [
        ["" if np.isnan(v) else f"{v:.{digits.get(name, 3)}f}" for v in row]
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    return pd.DataFrame(cells, index=table.index, columns=table.columns)


if __name__ == "__main__":
    main()
