r"""Do intervals of held-out cells, and of a new donor's means, hold their level?

NBVAE at its defaults, 1000 highly variable genes of the training cells.

**Cells**: ``pbmc3k_labelled`` and ``kang_ctrl_8donors``; 70 % of the cells for training, 10 % for
calibration, 20 % judged given their type. A count is inside an interval of level c if its
randomised PIT u has :math:`|2u - 1| \le c`: closed intervals of counts cannot have a level exactly
(their coverage and mean width are printed beside it). u is the rank of the cell's count among

- ``NBVAE``: 1000 cells that the model draws for the type;
- ``NBVAE, 11 quantiles`` and ``25 quantiles`` that ``predict`` writes, interpolated;
- ``conformal, pooled``, ``per type``, ``per gene``: the conformal rank of the row above among the
  calibration cells. ``per gene`` is per type and gene, which ``tl.conformalize`` refuses at these
  sizes;
- ``training cells``: real cells of the type;
- ``their own quantiles``: the judged cells of the type themselves, which have seen the answer.

Pairs are of gene and type. ``within 3 points`` is the share of pairs whose coverage is, ``of
ceiling`` that over what exact intervals would have at the type's number of cells (binomial).
``outside band`` is the share beyond the 99 % band of a beta-binomial, which allows for the number
of cells ranked among; of exact intervals at most 1 %.

**New donors**: each donor of ``kang_ctrl_8donors`` left out in turn, the others registered as
``donor_key``. Its cells, as above; and its means of types with 20 cells or more, in the 90 %
interval of ``predict(of="mean")``. ``no donor term`` leaves the variance between donors out of it;
``pooled cells`` has mean and variance from the other donors' cells, as if cells were all there is.

**Calibrated on donors**: three donors for training; of the other five each in turn is judged
after ``tl.conformalize(donor_key=)`` on the other four, which is as few as 80 % can be had from.
Means of 40 cells, of the types of which all have as many. One threshold for all genes, or one for
each gene and type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _common import (
    TYPE,
    arguments,
    format_table,
    load,
    prepare,
    say,
    train_test,
    variable_genes,
    write,
)
from scipy import stats

import exprgen
from exprgen import metrics
from exprgen._slots import quantile_name
from exprgen.tl._predicted import observed, read_predicted

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from anndata import AnnData

SETS, DONORS, DONOR = ("pbmc3k_labelled", "kang_ctrl_8donors"), "kang_ctrl_8donors", "donor"
PARTS = ("cells", "donors", "calibrated")
LEVELS = (0.8, 0.9, 0.95)
FEW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99)
MANY = tuple(sorted({*FEW, 0.005, 0.995, *(round(0.05 * k, 2) for k in range(1, 20))}))
KINDS = (
    "NBVAE",
    "NBVAE, 11 quantiles",
    "NBVAE, 25 quantiles",
    "conformal, pooled",
    "conformal, per type",
    "conformal, per gene",
    "training cells",
    "their own quantiles",
)
N_GENES, N_DRAWS, MIN_CELLS = 1000, 1000, 20
CALIBRATED: dict[str, dict[str, Any] | None] = {
    "NBVAE": None,
    "conformal, pooled": {"per_gene": False},
    "conformal, per gene": {"groupby": TYPE},
}
N_TRAIN, N_MEAN = 3, 40  # donors, and cells in a mean, of the last part


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--splits", type=int, default=2, help="of cells")
    parser.add_argument("--donors", type=int, default=8, help="how many are left out in turn")
    args = parser.parse_args()
    if args.quick:
        args.splits, args.donors = 1, 1
    prepare(args)
    rows: list[dict[str, Any]] = []
    for name in SETS if "cells" in args.parts else ():
        adata = load(args.data, name)
        for seed in range(args.seed, args.seed + args.splits):
            rows += cells(adata, name, seed, args)
            save("cells", rows, args)
    rows = []
    adata = load(args.data, DONORS)
    for donor in list(adata.obs[DONOR].unique())[: args.donors]:
        if "donors" in args.parts:
            rows += new_donor(adata, donor, args)
            save("donors", rows, args)
    if "calibrated" in args.parts:
        save("calibrated", list(calibrated_on_donors(adata, args)), args)


def cells(adata: AnnData, name: str, seed: int, args: argparse.Namespace) -> Iterator[dict]:
    """Held-out cells given their type."""
    train, rest = train_test(adata, TYPE, 0.3, seed)
    genes = variable_genes(train, N_GENES)
    train, rest = train[:, genes].copy(), rest[:, genes].copy()
    calibration, test = train_test(rest, TYPE, 2 / 3, seed)
    model = fitted(train, seed, args)
    say(f"{name}, split {seed}: trained")
    rng = np.random.default_rng(seed)
    types, counts = labels(test), test.layers["counts"].toarray()
    noise = rng.random(counts.shape)
    tails = {"NBVAE, 11 quantiles": from_layers(model, test, FEW, noise, seed)}
    tails["NBVAE, 25 quantiles"] = from_layers(model, test, MANY, noise, seed)
    known = from_layers(model, calibration, MANY, rng.random(calibration.shape), seed)
    n_ranked = {kind: dict.fromkeys(np.unique(types), N_DRAWS) for kind in tails}
    pools = {
        label: {
            "NBVAE": model.sample({TYPE: label}, n_obs=N_DRAWS, seed=seed, progress_bar=False),
            "training cells": train[labels(train) == label],
            "their own quantiles": test[types == label],
        }
        for label in np.unique(types)
    }
    for kind in ("NBVAE", "training cells", "their own quantiles"):
        tails[kind], n_ranked[kind] = np.empty(counts.shape), {}
        for label, pool in pools.items():
            of, own = types == label, kind == "their own quantiles"
            among = pool[kind].layers["counts"].toarray()
            tails[kind][of] = ranked(counts[of], among, noise[of], own=own)
            n_ranked[kind][label] = len(among)
    new = tails["NBVAE, 25 quantiles"]
    for kind in ("conformal, pooled", "conformal, per type", "conformal, per gene"):
        tails[kind], n_ranked[kind] = np.empty(counts.shape), {}
        for label in np.unique(types):
            of = types == label
            like = np.full(len(known), True) if "pooled" in kind else labels(calibration) == label
            per_gene = kind == "conformal, per gene"
            tails[kind][of] = conformal(known[like], new[of], per_gene, seed)
            # Pooled, a gene is still as far off as the draws its quantiles were made of.
            n_ranked[kind][label] = int(like.sum()) if per_gene else N_DRAWS
    closed = closed_coverage(test, calibration, seed)
    for kind in KINDS:
        for level in LEVELS:
            yield {
                "part": "cells",
                "set": name,
                "run": seed,
                "kind": kind,
                "level": level,
                **judged(tails[kind], types, n_ranked[kind], level),
                **closed.get((kind, level), {}),
            }


def labels(adata: AnnData) -> np.ndarray:
    """The cells' types."""
    return adata.obs[TYPE].astype(str).to_numpy()


def fitted(train: AnnData, seed: int, args: argparse.Namespace, **keys: Any) -> exprgen.NBVAE:
    """NBVAE at its defaults, given the type."""
    exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=[TYPE], **keys)
    model = exprgen.NBVAE(train, seed=seed)
    short = {"max_epochs": 2} if args.quick else {}
    model.train(accelerator="cpu", progress_bar=False, **short)
    return model


def ranked(x: np.ndarray, pool: np.ndarray, noise: np.ndarray, *, own: bool = False) -> np.ndarray:
    """Two-sided randomised tails of values among others; ``own`` if they are among them."""
    pool = np.sort(pool, axis=0)
    columns = range(x.shape[1])
    ends = [
        np.stack([np.searchsorted(pool[:, j], x[:, j], side) for j in columns], axis=1)
        for side in ("left", "right")
    ]
    n = len(pool) + (not own)
    u = (ends[0] + noise * (ends[1] - ends[0] + (not own))) / n
    return 2 * np.minimum(u, 1 - u)


def from_layers(
    model: Any, test: AnnData, quantiles: tuple[float, ...], noise: np.ndarray, seed: int
) -> np.ndarray:
    """Tails by the quantiles that predict writes."""
    model.predict(test, quantiles=quantiles, seed=seed, progress_bar=False)
    known = read_predicted(test, "exprgen", name="test")
    return np.concatenate(
        [
            known.law(rows).tail(observed(test, "counts", known, rows), noise[rows])
            for rows in known.blocks()
        ]
    )


def conformal(calibration: np.ndarray, new: np.ndarray, per_gene: bool, seed: int) -> np.ndarray:
    """Conformal ranks, of all genes together or of each."""
    if not len(new):
        return new
    if not len(calibration):
        return np.random.default_rng(seed).random(new.shape)
    if not per_gene:
        return metrics.conformal_rank(calibration, new, seed=seed)
    genes = range(new.shape[1])
    return np.concatenate(
        [metrics.conformal_rank(calibration[:, [j]], new[:, [j]], seed=seed + j) for j in genes],
        axis=1,
    )


def closed_coverage(
    test: AnnData, calibration: AnnData, seed: int
) -> dict[tuple[str, float], dict[str, float]]:
    """Coverage and width of the closed integer intervals, as predicted and as corrected."""
    found, x = {}, test.layers["counts"].toarray()
    for level in LEVELS:
        exprgen.tl.conformalize(test, calibration, alpha=round(1 - level, 3), seed=seed)
        ends = [quantile_name(0.5 + side * level / 2) for side in (-1, 1)]
        for kind, names in (
            ("NBVAE, 25 quantiles", ends),
            ("conformal, pooled", ["lower", "upper"]),
        ):
            low, high = (test.layers[f"exprgen_{end}"] for end in names)
            found[kind, level] = {
                "closed coverage": metrics.coverage(low, high, x),
                "width": metrics.sharpness(low, high),
            }
    return found


def judged(
    tails: np.ndarray, types: np.ndarray, n_ranked: dict[str, int], level: float
) -> dict[str, float]:
    """Coverage over all values and over pairs of gene and type."""
    inside = tails >= 1 - level
    within, ceiling, outside = [], [], []
    for label in np.unique(types):
        of = types == label
        n, hits = int(of.sum()), inside[of].sum(0)
        within.append(np.abs(hits / n - level) <= 0.03 + 1e-9)
        exact = stats.binom(n, level)
        reach = np.floor(n * (level + 0.03) + 1e-9), np.ceil(n * (level - 0.03) - 1e-9) - 1
        ceiling.append(np.full(len(hits), exact.cdf(reach[0]) - exact.cdf(reach[1])))
        m = n_ranked[label] + 1
        low, high = stats.betabinom(n, level * m, (1 - level) * m).ppf([0.005, 0.995])
        outside.append((hits < low) | (hits > high))
    share, best = np.concatenate(within).mean(), np.concatenate(ceiling).mean()
    return {
        "coverage": float(inside.mean()),
        "within 3 points": float(share),
        "of ceiling": float(share / best),
        "outside band": float(np.concatenate(outside).mean()),
    }


def new_donor(adata: AnnData, donor: str, args: argparse.Namespace) -> Iterator[dict]:
    """A donor whom training has not seen: its cells, and the means of its types."""
    of = (adata.obs[DONOR] == donor).to_numpy()
    genes = variable_genes(adata[~of], N_GENES)
    train, test = adata[~of, genes].copy(), adata[of, genes].copy()
    model = fitted(train, args.seed, args, donor_key=DONOR)
    say(f"without donor {donor}: trained")
    rng = np.random.default_rng(args.seed)
    types, counts, known = labels(test), test.layers["counts"].toarray(), labels(train)
    tails = {kind: np.empty(counts.shape) for kind in ("NBVAE", "training cells")}
    means: dict[str, list[np.ndarray]] = {"NBVAE": [], "no donor term": [], "pooled cells": []}
    expressed = []
    for label in np.unique(types):
        rows, pool = types == label, train.layers["counts"][known == label].toarray()
        # A row of conditions for each cell: each comes from a donor of its own.
        table = pd.DataFrame({TYPE: [label] * N_DRAWS})
        drawn = model.sample(table, seed=args.seed, progress_bar=False).layers["counts"].toarray()
        noise = rng.random(counts[rows].shape)
        tails["NBVAE"][rows] = ranked(counts[rows], drawn, noise)
        tails["training cells"][rows] = ranked(counts[rows], pool, noise)
        n = int(rows.sum())
        if n < MIN_CELLS:
            continue
        law = model.predict(
            {TYPE: label}, of="mean", n_cells=n, seed=args.seed, progress_bar=False
        )
        mean, std, between, low, high = (
            law.layers[f"exprgen_{part}"][0] for part in ("mean", "std", "std_donor", "q05", "q95")
        )
        found, z = counts[rows].mean(0), stats.norm.ppf(0.95)
        means["NBVAE"].append((low <= found) & (found <= high))
        within = z * np.sqrt(np.maximum(std**2 - between**2, 0))
        means["no donor term"].append(np.abs(found - mean) <= within)
        spread = z * np.sqrt(pool.var(0) * (1 / n + 1 / len(pool)))
        means["pooled cells"].append(np.abs(found - pool.mean(0)) <= spread)
        expressed.append(n * pool.mean(0) >= 5)
    for kind, values in tails.items():
        for level in LEVELS:
            yield {
                "part": "new donor, cells",
                "set": DONORS,
                "run": donor,
                "kind": kind,
                "level": level,
                "coverage": float((values >= 1 - level).mean()),
            }
    for kind, values in means.items():
        inside, seen = np.concatenate(values), np.concatenate(expressed)
        yield {
            "part": "new donor, means",
            "set": DONORS,
            "run": donor,
            "kind": kind,
            "level": 0.9,
            "coverage": float(inside.mean()),
            "coverage, 5 counts": float(inside[seen].mean()),
        }


def calibrated_on_donors(adata: AnnData, args: argparse.Namespace) -> Iterator[dict]:
    """Means of donors that are new to the model, calibrated on each other."""
    rng = np.random.default_rng(args.seed)
    donors = rng.permutation(adata.obs[DONOR].unique())
    of = adata.obs[DONOR].isin(donors[:N_TRAIN]).to_numpy()
    genes = variable_genes(adata[of], N_GENES)
    train, rest = adata[of, genes].copy(), adata[~of, genes]
    sizes = pd.crosstab(rest.obs[DONOR], rest.obs[TYPE]).loc[donors[N_TRAIN:]]
    rest = rest[rest.obs[TYPE].isin(sizes.columns[(sizes >= N_MEAN).all()])]
    of_each = rest.obs.groupby([DONOR, TYPE], observed=True).indices.values()
    rest = rest[np.concatenate([rng.choice(at, N_MEAN, replace=False) for at in of_each])].copy()
    model = fitted(train, args.seed, args, donor_key=DONOR)
    level = 0.8
    ends = [quantile_name(0.5 + side * level / 2) for side in (-1, 1)]
    model.predict(
        rest, of="mean", n_cells=N_MEAN, quantiles=MANY, seed=args.seed, progress_bar=False
    )
    for donor in donors[N_TRAIN:]:
        own = (rest.obs[DONOR] == donor).to_numpy()
        test, others = rest[own].copy(), rest[~own].copy()
        found = test.to_df("counts").groupby(labels(test)).mean().to_numpy()
        for kind, options in CALIBRATED.items():
            names = ends
            if options is not None:
                names = ["lower", "upper"]
                alpha = round(1 - level, 3)
                exprgen.tl.conformalize(
                    test, others, alpha=alpha, donor_key=DONOR, seed=args.seed, **options
                )
            low, high = (
                test.to_df(f"exprgen_{name}").groupby(labels(test)).mean().to_numpy()
                for name in names
            )
            yield {
                "run": donor,
                "kind": kind,
                "level": level,
                "coverage": metrics.coverage(low - 1e-6, high + 1e-6, found),
                "width": float(np.median((high - low) / np.maximum(found.mean(0), 1e-9))),
            }


def save(part: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    results = pd.DataFrame(rows)
    shown = {"cells": of_cells, "donors": of_donors, "calibrated": of_calibrated}
    text = shown[part](results)
    write(args, f"intervals_{part}", results, text)
    print(text)


def of_cells(results: pd.DataFrame) -> str:
    """A table for each set."""
    text = ""
    measures = ["coverage", "within 3 points", "of ceiling", "outside band"]
    measures += ["closed coverage", "width"]
    for name, part in results.groupby("set", sort=False):
        columns = {}
        for measure in measures:
            means = part.pivot_table(values=measure, index="kind", columns="level")
            shown = means.map("{:.3f}".format).agg(" / ".join, axis=1)
            columns[measure] = shown.reindex(list(KINDS)).fillna("")
        table = pd.DataFrame(columns)
        text += (
            f"**{name}**, intervals of 80 / 90 / 95 %; mean of {part['run'].nunique()} splits\n\n"
        )
        text += format_table(table, index="ranked among") + "\n"
    return text


def of_donors(results: pd.DataFrame) -> str:
    """A table of donors' cells, and one of their means; a column per donor."""
    of_cell = results[results["part"] == "new donor, cells"]
    every = of_cell.groupby(["kind", "level"])["coverage"].mean().unstack()
    table = of_cell[of_cell["level"] == 0.9].pivot(index="kind", columns="run", values="coverage")
    table = table.map("{:.3f}".format)
    table["mean of 80 / 90 / 95 %"] = every.map("{:.3f}".format).agg(" / ".join, axis=1)
    text = "**A new donor's cells**, intervals of 90 %, by donor\n\n"
    text += format_table(table, index="ranked among") + "\n"
    of_mean = results[results["part"] == "new donor, means"]
    table = of_mean.pivot(index="kind", columns="run", values="coverage")
    table["mean"] = table.mean(axis=1)
    seen = of_mean.groupby("kind")["coverage, 5 counts"].mean()
    table["genes with 5 counts or more"] = seen
    table = table.loc[["NBVAE", "no donor term", "pooled cells"]].map("{:.3f}".format)
    text += "**A new donor's means of types**, intervals of 90 %, by donor\n\n"
    return text + format_table(table, index="interval")


def of_calibrated(results: pd.DataFrame) -> str:
    """A column per donor."""
    table = results.pivot(index="kind", columns="run", values="coverage")
    table["mean"] = table.mean(axis=1)
    table = table.loc[list(CALIBRATED)].map("{:.3f}".format)
    widths = results.groupby("kind")["width"].mean()
    table["width, of the gene's mean"] = widths.map("{:.2f}".format)
    text = "**A new donor's means, trained on three donors**, intervals of 80 %, by donor\n\n"
    return text + format_table(table, index="interval")


if __name__ == "__main__":
    main()
