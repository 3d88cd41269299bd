"""Doses of a drug that were left out: do predictions lie between the neighbours, and how sure?

``tggates_drug_dose_normalised``: 146 drugs, log2 intensities of 200 genes in human hepatocytes,
two replicates per drug, dose and time. Doses rise about fivefold from Low to Middle to High: the
condition is their rank, a number, control 0.

Of the 70 drugs with a low dose a third at a time lose Middle, at all times. The rivals
interpolate: the mean of the samples at Low and High of the same drug and time, with Gaussian noise
of one variance or one per gene, of Middle interpolated likewise for the other drugs. Predictors of
the hybrid are its default, ``ridge``, which adds up drug, dose and time, so that all drugs share a
slope; and ``curves``, ridge on each drug's own level, slope and curvature, at all times together
and at each, beside a common curve for each time (:func:`dose_curves` in a scikit-learn pipeline).

``place``: where on the way from Low (0) to High (1) Middle lies, projected on that way; in the
half of drugs and times where held-out samples move most, as the way is noise where nothing moves.
``between``: the share within 0 and 1. The last row has means of two replicates each.
"""

from __future__ import annotations

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

DRUG, TIME, RANK = "drugid", "duration", "dose_rank"
KEYS = {"categorical_condition_keys": [DRUG, TIME], "continuous_condition_keys": [RANK]}
DOSES = {"Control": 0, "Low": 1, "Middle": 2, "High": 3}
REFERENCE = "hybrid: curves"
ENDS = ("Low", "Middle", "High")
# A drug's level counts for more than its slope before it is shrunk.
LEVEL = 3.0
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0)


def main() -> None:
    """Judge all laws of the doses that are left out."""
    parser = arguments(__doc__)
    parser.add_argument("--splits", type=int, default=3, help="thirds to leave out")
    args = parser.parse_args()
    prepare(args)
    rows, text = held_out_doses(samples(args), args)
    write(args, "hybrid_doses", rows, text)
    print(text)


def samples(args: argparse.Namespace) -> AnnData:
    """All samples, their conditions alone in obs."""
    adata = load(args.data, "tggates_drug_dose_normalised")
    adata.X = np.asarray(adata.layers.pop("counts").toarray())
    for key in (DRUG, TIME):
        adata.obs[key] = adata.obs[key].astype(str)
    adata.obs[RANK] = adata.obs["dose_level"].astype(str).map(DOSES).astype(float)
    adata.obs = adata.obs[[DRUG, TIME, RANK]].copy()
    return adata


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
    has_ends = np.isfinite(middle_of(adata, adata)).all(1)
    found: dict[str, list[Judged]] = {}
    ways: dict[str, list[np.ndarray]] = {}
    for split, some in enumerate(np.array_split(drugs, 3)[: 1 if args.quick else args.splits]):
        out = (adata.obs[DRUG].isin(some) & is_middle & has_ends).to_numpy()
        train, test = adata[~out].copy(), adata[out].copy()
        for name, law in (*interpolated(train, test), with_noise(train, test)):
            found.setdefault(name, []).append(judged(law, test))
        asked_for = test[~test.obs.duplicated([DRUG, TIME])].copy()
        for name, mean in (("hybrid: ridge", "ridge"), ("hybrid: curves", curves(train))):
            model = trained(train, KEYS, mean, split + args.seed)
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
    text = (
        f"{n_held_out} held-out samples, {split + 1} of 3 thirds of the drugs.\n\n{table(found)}\n"
    )
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
    """The predictor of curves, with noise of samples that were left out."""
    keys, y = [DRUG, TIME, RANK], np.asarray(train.X, float)
    mean = SklearnMean(curves(train))
    away = y - mean.out_of_sample(train.obs[keys], y, seed=0)
    told = mean.fit(train.obs[keys], y, seed=0).predict(test.obs[keys])
    sd = np.broadcast_to(np.sqrt(np.square(away).mean(0)), told.shape)
    return "curves + noise per gene", normal_law(told, sd, np.asarray(test.X, float))


def trained(train: AnnData, roles: dict[str, Any], mean: Any, seed: int, **options: Any) -> Any:
    """The hybrid, at its defaults but for the options."""
    exprgen.HybridResidualModel.setup_anndata(train, **roles)
    model = exprgen.HybridResidualModel(train, mean=mean, seed=seed, **options)
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
            "place": f"{middle:.2f}",
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


if __name__ == "__main__":
    main()
