"""Drug, dose and time: doses that were left out of seen drugs, and drugs that were never seen.

``tggates_drug_dose_normalised``: 146 drugs, log2 intensities of 200 genes in human hepatocytes, two replicates
per drug, dose and time. Doses rise fivefold from Low to Middle to High: the condition is their rank (control 0), a number.

**Held-out doses.** Of the 70 drugs with a low dose a third at a time lose Middle, at all times. The rivals
interpolate: the mean of the samples at Low and at High of the same drug and time, with Gaussian noise of
one variance or one per gene, from Middle interpolated likewise for the other drugs. The hybrid's
predictors: its default, ``ridge``, which adds up drug, dose and time, so that all drugs share a
slope; and ``curves``, ridge on the drug's own level, slope and curvature, at all times together
and at each, beside the common ones of dose by time (:func:`dose_curves`, twenty lines in a scikit-learn pipeline).
``rows left out``: residuals of predictions that never saw the sample, but its replicate;
``arms left out``: nor any sample of the drug at this dose (``donor_key``), which is what a held-out dose is.

``between``: where on the way from Low (0) to High (1) the drug's Middle lies, projected on that way,
median over drugs and times and how many lie within; only where the drug moves expression, Low and
High apart by more than replicates are: the half of drugs and times that moves most.

**Held-out drugs**, a fifth at a time. With the drug as a label they cannot be asked for. With an embedding of the drug,
the leading components of its response at Middle after 24 hours, they can; who asks is warned where the
vector is further out than all of training. The drug is registered as donor: residuals are those of drugs left out whole.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _common import arguments, format_table, load, prepare, say, write
from _hybrid import (
    QUIET,
    Judged,
    Law,
    jackknife,
    judged,
    mean_sem,
    normal_law,
    of_model,
    shown,
)
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import exprgen
from exprgen.means import SklearnMean

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from anndata import AnnData

DRUG, TIME, RANK, ARM = "drugid", "duration", "dose_rank", "arm"
KEYS = {"categorical_condition_keys": [DRUG, TIME], "continuous_condition_keys": [RANK]}
DOSES = {"Control": 0, "Low": 1, "Middle": 2, "High": 3}
REFERENCE = "hybrid: curves, rows left out"
ENDS = ("Low", "Middle", "High")
EMBEDDING, N_COMPONENTS = "X_drug", 10
# A drug's level counts for more than its slope before it is shrunk.
LEVEL = 3.0
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)


def main() -> None:
    """Both questions."""
    parser = arguments(__doc__)
    parser.add_argument("--part", nargs="+", default=["doses", "drugs"], choices=["doses", "drugs"])
    args = parser.parse_args()
    prepare(args)
    adata = load(args.data, "tggates_drug_dose_normalised")
    adata.X = np.asarray(adata.layers.pop("counts").toarray())
    for key in (DRUG, TIME):
        adata.obs[key] = adata.obs[key].astype(str)
    adata.obs[RANK] = adata.obs["dose_level"].astype(str).map(DOSES).astype(float)
    adata.obs[ARM] = adata.obs[DRUG] + ", " + adata.obs["dose_level"].astype(str)
    adata.obs = adata.obs[[DRUG, TIME, RANK, ARM]].copy()
    for part in args.part:
        rows, text = {"doses": held_out_doses, "drugs": held_out_drugs}[part](adata, args)
        write(args, f"hybrid_{part}", rows, text)
        print(text)


# Held-out doses ----------------------------------------------------------------------------


def dose_curves(table: pd.DataFrame, drugs: list[str], times: list[str]) -> np.ndarray:
    """Columns of a dose-response that every drug has its own of, ``(n_obs, n_columns)``."""
    drug = _indicators(table[DRUG], drugs) * LEVEL
    time = _indicators(table[TIME], times)
    rank = table[RANK].to_numpy(float)
    dose = _indicators(rank, list(DOSES.values()))
    own = np.hstack([drug, _product(drug, time)])
    slope, curvature = rank[:, None] / 3 / LEVEL, np.square(rank[:, None] / 3) / LEVEL
    return np.hstack([dose, time, _product(dose, time), own, own * slope, own * curvature])


def _indicators(values: Any, labels: list[Any]) -> np.ndarray:
    return (np.asarray(values)[:, None] == np.asarray(labels)).astype(float)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def curves(adata: AnnData) -> Any:
    """The predictor, unfitted."""
    labels = {"drugs": sorted(adata.obs[DRUG].unique()), "times": sorted(adata.obs[TIME].unique())}
    return make_pipeline(FunctionTransformer(dose_curves, kw_args=labels), RidgeCV(PENALTIES))


def held_out_doses(adata: AnnData, args: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """Judge all laws of Middle, a third of the drugs at a time."""
    rng = np.random.default_rng(args.seed)
    is_low, is_middle = (adata.obs[RANK] == DOSES[dose] for dose in ("Low", "Middle"))
    drugs = rng.permutation(np.sort(adata.obs.loc[is_low, DRUG].unique()))
    found: dict[str, list[Judged]] = {}
    ways: dict[str, list[np.ndarray]] = {}
    for split, some in enumerate(np.array_split(drugs, 3)[: 1 if args.quick else 3]):
        out = (adata.obs[DRUG].isin(some) & is_middle).to_numpy()
        train, test = adata[~out].copy(), adata[out].copy()
        for name, law in (*interpolated(train, test), with_noise(train, test)):
            found.setdefault(name, []).append(judged(law, test))
        asked_for = test[~test.obs.duplicated([DRUG, TIME])].copy()
        for name, (mean, options) in {
            "hybrid: ridge": ("ridge", {}),
            "hybrid: curves, rows left out": (curves(train), {}),
            "hybrid: curves, arms left out": (curves(train), {"donor_key": ARM}),
        }.items():
            model = trained(train, {**KEYS, **options}, mean, split + args.seed)
            told = model.mean.predict(test.obs[[DRUG, TIME, RANK]])
            found.setdefault(name, []).append(judged(of_model(model, test, split), test, told))
            ways.setdefault(name, []).append(way([predicted(model, asked_for, d) for d in ENDS]))
        ways.setdefault("held-out samples", []).append(
            way([cell_mean(adata, asked_for, dose) for dose in ENDS])
        )
        support = model.sample(test, seed=0, **QUIET).obs["support"]
        say(f"doses, split {split}: support {support.value_counts().to_dict()}")
    rows = pd.DataFrame(
        {"law": n, "split": i, **r.values} for n, rs in found.items() for i, r in enumerate(rs)
    )
    n_held_out = sum(len(r.covered) for r in found["hybrid: ridge"])
    text = f"{n_held_out} held-out samples of {len(drugs)} drugs.\n\n{table(found)}\n"
    return rows, text + between({name: np.concatenate(parts) for name, parts in ways.items()})


def interpolated(train: AnnData, test: AnnData) -> Iterator[tuple[str, Any]]:
    """Interpolation between neighbouring doses, with noise of Middle interpolated for others."""
    y, told = np.asarray(test.X, float), middle_of(train, test)
    others = train[train.obs[RANK] == DOSES["Middle"]]
    away = np.asarray(others.X, float) - middle_of(train, others)
    square = np.square(away[np.isfinite(away).all(1)])
    for name, variance in (("one variance", square.mean()), ("noise per gene", square.mean(0))):
        sd = np.broadcast_to(np.sqrt(variance), y.shape)
        yield f"interpolation + {name}", normal_law(told, sd, y)


def middle_of(train: AnnData, asked_for: AnnData) -> np.ndarray:
    """Halfway from Low to High of the same drug and time, nan without them."""
    return 0.5 * (cell_mean(train, asked_for, "Low") + cell_mean(train, asked_for, "High"))


def cell_mean(adata: AnnData, asked_for: AnnData, dose: str) -> np.ndarray:
    """Mean of the samples at a dose, of the drug and time of each row, nan where there is none."""
    at_dose = adata.obs[RANK] == DOSES[dose]
    means = pd.DataFrame(np.asarray(adata.X[at_dose]), index=adata.obs.index[at_dose])
    means = means.groupby([adata.obs.loc[at_dose, DRUG], adata.obs.loc[at_dose, TIME]]).mean()
    wanted = pd.MultiIndex.from_frame(asked_for.obs[[DRUG, TIME]])
    return means.reindex(wanted).to_numpy(float)


def with_noise(train: AnnData, test: AnnData) -> tuple[str, Law]:
    """The predictor of curves, with noise of arms that were left out."""
    keys, y = [DRUG, TIME, RANK], np.asarray(train.X, float)
    mean, arms = SklearnMean(curves(train)), train.obs[ARM].to_numpy()
    away = y - mean.out_of_sample(train.obs[keys], y, arms, seed=0)
    told = mean.fit(train.obs[keys], y, seed=0).predict(test.obs[keys])
    sd = np.broadcast_to(np.sqrt(np.square(away).mean(0)), told.shape)
    return "curves + noise per gene, arms left out", normal_law(told, sd, np.asarray(test.X, float))


def trained(train: AnnData, roles: dict[str, Any], mean: Any, seed: int) -> Any:
    """The hybrid at its defaults."""
    exprgen.HybridResidualModel.setup_anndata(train, **roles)
    model = exprgen.HybridResidualModel(train, mean=mean, seed=seed)
    model.train(accelerator="cpu", progress_bar=False)
    return model


def predicted(model: Any, asked_for: AnnData, dose: str) -> np.ndarray:
    """The hybrid's mean of the drugs and times of some rows at another dose."""
    table = asked_for.obs[[DRUG, TIME]].assign(**{RANK: float(DOSES[dose])})
    told = model.predict(table, n_samples=50, seed=0, **QUIET)
    return np.asarray(told.layers["exprgen_mean"], float)


def way(means: list[np.ndarray]) -> np.ndarray:
    """Place of Middle between Low (0) and High (1), and their distance, ``(n, 2)``."""
    low, middle, high = means
    square = np.square(high - low).sum(1)
    return np.stack([((middle - low) * (high - low)).sum(1) / square, np.sqrt(square)], axis=1)


def between(ways: dict[str, np.ndarray]) -> str:
    """Of the half of drugs and times that move most, by the held-out samples."""
    distance = ways["held-out samples"][:, 1]
    most = distance >= np.median(distance)
    rows = {}
    for name, (place, _) in ((name, values[most].T) for name, values in ways.items()):
        low, middle, high = np.quantile(place, (0.05, 0.5, 0.95))
        rows[name] = {
            "place of Middle": f"{middle:.2f}",
            "90 % of drugs and times": f"{low:.2f} to {high:.2f}",
            "between": f"{((place > 0) & (place < 1)).mean():.3f}",
        }
    return format_table(pd.DataFrame(rows).T, index="")


def table(found: dict[str, list[Judged]]) -> str:
    """A row per law: means over splits."""
    reference = np.array([r.values["CRPS"] for r in found[REFERENCE]])
    rows = {}
    for name, results in found.items():
        values = pd.DataFrame([r.values for r in results])
        rows[name] = {
            "MSE": shown(*mean_sem(values["MSE"]), 4),
            "CRPS": f"{values['CRPS'].mean():.4f}",
            f"/ {REFERENCE}": shown(*mean_sem(values["CRPS"] / reference)),
            "coverage": shown(*mean_sem(values["coverage"])),
            "median gene": shown(*jackknife(results, "median gene")),
        }
    return format_table(pd.DataFrame(rows).T, index="")


# Held-out drugs ----------------------------------------------------------------------------


def held_out_drugs(adata: AnnData, args: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """Ask for drugs that training never saw, as a label and by an embedding."""
    drugs = np.random.default_rng(args.seed).permutation(np.sort(adata.obs[DRUG].unique()))
    adata.obsm[EMBEDDING] = responses(adata)
    rows = []
    for split, some in enumerate(np.array_split(drugs, 5)[: 1 if args.quick else 5]):
        out = adata.obs[DRUG].isin(some).to_numpy()
        train, test = adata[~out].copy(), adata[out].copy()
        label = trained(train, KEYS, "ridge", split)
        roles = {
            "categorical_condition_keys": [TIME],
            "continuous_condition_keys": [RANK],
            "condition_embedding_key": EMBEDDING,
            "donor_key": DRUG,
        }
        model = trained(train, roles, "ridge", split)
        # The components were made of Middle at 24 hours.
        fresh = test[(test.obs[RANK] == DOSES["High"]).to_numpy()].copy()
        result = judged(of_model(model, fresh, split), fresh)
        flagged = flags(model, fresh)
        error = np.square(np.asarray(fresh.X) - model.mean.predict(inputs(fresh))).mean(1)
        for drug in some:
            mine = (fresh.obs[DRUG] == drug).to_numpy()
            rows.append(
                {
                    "drug": drug,
                    "refused as label": refused(label, drug),
                    "flagged by embedding": flagged[mine].all(),
                    "MSE": error[mine].mean(),
                    "coverage": result.covered[mine].to_numpy().mean(),
                }
            )
        seen = train[(train.obs[RANK] == DOSES["High"]).to_numpy()].copy()
        say(f"drugs, split {split}: flagged {flagged.mean():.3f}, seen {flags(model, seen).mean()}")
    found = pd.DataFrame(rows)
    return found, drugs_table(found)


def responses(adata: AnnData) -> np.ndarray:
    """Leading components of each drug's response at Middle after 24 hours, ``(n_obs, n)``."""
    drugs = adata.obs[DRUG]
    at_day = adata[(adata.obs[TIME] == "24").to_numpy()]
    one = at_day[~at_day.obs.duplicated(DRUG)]
    response = cell_mean(at_day, one, "Middle") - cell_mean(at_day, one, "Control")
    left, singular, _ = np.linalg.svd(response - response.mean(0), full_matrices=False)
    components = pd.DataFrame((left * singular)[:, :N_COMPONENTS], index=one.obs[DRUG])
    return components.loc[drugs].to_numpy()


def inputs(adata: AnnData) -> pd.DataFrame:
    """What the predictor reads: columns, and the embedding as columns."""
    names = [f"{EMBEDDING}_{i}" for i in range(N_COMPONENTS)]
    embedding = pd.DataFrame(adata.obsm[EMBEDDING], adata.obs_names, names)
    return pd.concat([adata.obs[[TIME, RANK]], embedding], axis=1)


def flags(model: Any, asked_for: AnnData) -> np.ndarray:
    """Which rows the model says are extrapolated; a warning goes with any."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drawn = model.sample(asked_for, seed=0, progress_bar=False)
    flagged = drawn.obs["extrapolated"].to_numpy(bool)
    warned = any(issubclass(w.category, exprgen.ExtrapolationWarning) for w in said)
    if flagged.any() and not warned:
        raise RuntimeError("Rows were flagged without a warning.")
    return flagged


def refused(model: Any, drug: str) -> bool:
    """Whether asking for a label that training never saw is an error."""
    try:
        model.sample({DRUG: drug, TIME: "24", RANK: 3.0}, progress_bar=False)
    except exprgen.UnseenCategoryError:
        return True
    return False


def drugs_table(found: pd.DataFrame) -> str:
    """How many are refused, flagged, and how far off those are."""
    flagged = found["flagged by embedding"]
    text = f"Of {len(found)} drugs that training never saw {found['refused as label'].sum()} are "
    text += f"refused as labels; by their embedding {flagged.sum()} are flagged.\n\n"
    rows = {}
    for name, some in (("flagged", found[flagged]), ("not flagged", found[~flagged])):
        rows[name] = {
            "drugs": len(some),
            "MSE at High": shown(*mean_sem(some["MSE"])),
            "coverage": shown(*mean_sem(some["coverage"])),
        }
    return text + format_table(pd.DataFrame(rows).T, index="embedding")


if __name__ == "__main__":
    main()
