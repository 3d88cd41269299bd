"""Bulk samples: is a predictor with the hybrid's distribution better than one with noise?

Values are log(1 + counts per million) of the 2,000 most variable genes among those that over half
of the training samples express, chosen on these.

- ``gtex``: 90 samples, tissue, sex and age band; five folds, with the same shares of tissues.
- ``tcell``: 44 samples of T-cell activation, condition and time; a donor at a time left out.
- ``kang``: pseudobulks, donor x cell type, of ten cells or more; a donor at a time left out.

In the latter two donors are registered as such (``donor_key``). The rivals are the same predictor
with Gaussian noise, of one variance or of one per gene, from residuals of predictions that never
saw the sample (``out of sample``) or of the predictor's own training samples (``in sample``). They
have all training samples; the hybrid keeps a tenth of these for validation, and so from its
predictor. ``hybrid, in sample`` is told that a predictor fitted to all its samples never saw them.
``CondVAE`` is the generative model without a predictor, and without donors.

``MSE`` is that of the predicted mean, beside it over that of the hybrid's own predictor; ``CRPS``,
beside it over that of the hybrid with the same mean, by split; ``coverage`` of 90 % intervals, of
all values, and of the median gene, samples pooled over splits; ``variance`` of drawn values,
conditions as in the held-out samples, over that of these, median gene; ``spread``: variance of
values drawn for a sample's own conditions over the squared error of their mean, median gene. Of
the last two 1 is best; the control of ``variance`` is that of training over held-out samples.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from _common import TYPE, arguments, format_table, load, prepare, say, write
from _hybrid import QUIET, Judged, Law, jackknife, judged, mean_sem, normal_law, of_model, shown
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold

import exprgen
from exprgen.means import CallableMean, as_mean

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from anndata import AnnData

KEYS = {"gtex": ["tissue", "sex", "age"], "tcell": ["Condition", "Timepoint"], "kang": [TYPE]}
FILES = {
    "gtex": "gtex_bulk_3tissue", "tcell": "tcell_activation_bulk", "kang": "kang_ctrl_8donors"
}  # fmt: skip
DONOR = {"tcell": "Replicates", "kang": "donor"}
MEANS = ("ridge", "group", "hierarchical", "forest")
N_GENES, MIN_CELLS = 2000, 10
IN_SAMPLE = "hybrid, in sample"


def main() -> None:
    """Run the sets that are asked for, saving after each."""
    parser = arguments(__doc__)
    parser.add_argument("--set", nargs="+", default=list(KEYS), choices=KEYS, help="data sets")
    parser.add_argument("--means", nargs="+", default=MEANS, choices=MEANS, help="predictors")
    args = parser.parse_args()
    prepare(args)
    for name in args.set:
        rows, text = run(name, args)
        write(args, f"hybrid_{name}", rows, text)
        print(text)


def run(name: str, args: argparse.Namespace) -> tuple[pd.DataFrame, str]:
    """All methods on all splits of one set; a table."""
    found: dict[tuple[str, str], list[Judged]] = {}
    control, speed = [], ""
    for split, (train, test) in enumerate(splits(name, args)):
        control.append(np.median(train.X.var(0) / np.maximum(test.X.var(0), 1e-9)))
        for key, result, model in methods(name, train, test, split + args.seed, args):
            found.setdefault(key, []).append(result)
            if split == 0 and key[1] in ("hybrid", "CondVAE") and key[0] in ("ridge", "-"):
                speed += f"{key[1]}: {milliseconds(model, test)}. "
        say(f"{name}: split {split}, {train.n_obs} + {test.n_obs} samples x {train.n_vars} genes")
    rows = pd.DataFrame(
        [
            {"mean": mean, "law": law, "split": i, **result.values}
            for (mean, law), results in found.items()
            for i, result in enumerate(results)
        ]
    )
    n_held_out = sum(len(r.covered) for r in next(iter(found.values())))
    text = table(found)
    text += f"\n{len(control)} splits, {n_held_out} held-out samples; "
    text += f"variance of training over held-out samples: {shown(*mean_sem(control))}. {speed}\n"
    return rows, text


# Data --------------------------------------------------------------------------------------


def splits(name: str, args: argparse.Namespace) -> Iterator[tuple[AnnData, AnnData]]:
    """Training and held-out samples, their log values in X."""
    adata = pseudobulks(args) if name == "kang" else load(args.data, FILES[name])
    for key in KEYS[name]:
        adata.obs[key] = adata.obs[key].astype(str)
    if name == "gtex":  # two are older than 69
        adata.obs["age"] = adata.obs["age"].replace({"60-69": "60-79", "70-79": "60-79"})
    if name in DONOR:
        parts = LeaveOneGroupOut().split(adata.obs, groups=adata.obs[DONOR[name]].astype(str))
    else:
        folds = StratifiedKFold(5, shuffle=True, random_state=args.seed)
        parts = folds.split(adata.obs, adata.obs["tissue"])
    for number, (train, test) in enumerate(parts):
        if args.quick and number == 2:
            return
        values, kept = log_cpm(adata, train, 100 if args.quick else N_GENES)
        samples = ad.AnnData(values, obs=adata.obs.copy(), var=adata.var[[]].iloc[kept])
        # What no training sample has cannot be asked for.
        known = [samples.obs[k].isin(samples.obs[k].iloc[train]) for k in KEYS[name]]
        test = test[np.all(known, axis=0)[test]]
        yield samples[train].copy(), samples[test].copy()


def log_cpm(adata: AnnData, train: np.ndarray, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """log1p counts per million of the most variable genes, and which these are."""
    counts = np.asarray(adata.layers["counts"].toarray(), dtype=float)
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e6)
    variance = np.where((counts[train] > 0).mean(0) > 0.5, values[train].var(0), -1)
    kept = np.sort(np.argsort(-variance)[: min(n_genes, (variance > 0).sum())])
    return values[:, kept].astype(np.float32), kept


def pseudobulks(args: argparse.Namespace) -> AnnData:
    """Summed counts of donor x type."""
    import scipy.sparse as sp

    cells = load(args.data, FILES["kang"])
    label = cells.obs["donor"].astype(str) + "|" + cells.obs[TYPE].astype(str)
    n_cells = label.value_counts()
    kept = np.sort(n_cells.index[n_cells >= MIN_CELLS].to_numpy(str))
    counts = cells.layers["counts"]
    sums = np.concatenate([np.asarray(counts[(label == k).to_numpy()].sum(0)) for k in kept])
    obs = pd.DataFrame([k.split("|") for k in kept], columns=["donor", TYPE], index=kept)
    adata = ad.AnnData(obs=obs, var=cells.var[[]])
    adata.layers["counts"] = sp.csr_matrix(sums, dtype=np.float32)
    return adata


# Methods -----------------------------------------------------------------------------------


def predictor(name: str, args: argparse.Namespace) -> Any:
    if name == "forest":
        return RandomForestRegressor(5 if args.quick else 100, random_state=args.seed)
    return name


def methods(
    name: str, train: AnnData, test: AnnData, seed: int, args: argparse.Namespace
) -> Iterator[tuple[tuple[str, str], Judged, Any]]:
    """Mean and law, how they are judged, and the model if it is one."""
    for mean in args.means:
        in_sample: Any = None
        for law_name, law, fitted in rivals(name, mean, train, test, seed, args):
            if "homoscedastic, in" in law_name:
                in_sample = fitted
            if mean == "ridge" or "out of" in law_name:
                yield (mean, law_name), judged(law, test), None
        yield hybrid(name, mean, "hybrid", predictor(mean, args), train, test, seed, args)
        if mean != "ridge":
            continue
        lie = CallableMean(in_sample.predict, out_of_sample="predict")
        yield hybrid(name, mean, IN_SAMPLE, lie, train, test, seed, args)
        for density in ("low_rank", "gaussian"):
            law_name = f"hybrid, {density}"
            yield hybrid(name, mean, law_name, mean, train, test, seed, args, density=density)
    exprgen.CondVAE.setup_anndata(train, categorical_condition_keys=KEYS[name])
    model = trained(exprgen.CondVAE(train, seed=seed), args)
    yield ("-", "CondVAE"), judged(of_model(model, test, seed), test), model


def rivals(
    name: str, mean: str, train: AnnData, test: AnnData, seed: int, args: argparse.Namespace
) -> Iterator[tuple[str, Law, Any]]:
    """The predictor with Gaussian noise of one variance and of one per gene."""
    keys, y = KEYS[name], np.asarray(train.X, dtype=float)
    groups = train.obs[DONOR[name]].astype(str).to_numpy() if name in DONOR else None
    fitted = as_mean(predictor(mean, args), categorical_keys=keys)
    fitted.fit(train.obs[keys], y, groups=groups, seed=seed)
    told = fitted.predict(test.obs[keys])
    left_out = fitted.out_of_sample(train.obs[keys], y, groups, seed=seed)
    observed = np.asarray(test.X, dtype=float)
    for which, of_train in (("in", fitted.predict(train.obs[keys])), ("out of", left_out)):
        square = np.square(y - of_train)
        for noise, variance in (("homoscedastic", square.mean()), ("per gene", square.mean(0))):
            sd = np.broadcast_to(np.sqrt(variance), told.shape)
            yield f"{noise}, {which} sample", normal_law(told, sd, observed), fitted


def hybrid(
    name: str,
    mean_name: str,
    law_name: str,
    mean: Any,
    train: AnnData,
    test: AnnData,
    seed: int,
    args: argparse.Namespace,
    **options: Any,
) -> tuple[tuple[str, str], Judged, Any]:
    exprgen.HybridResidualModel.setup_anndata(
        train, categorical_condition_keys=KEYS[name], donor_key=DONOR.get(name)
    )
    model = exprgen.HybridResidualModel(train, mean=mean, seed=seed, **options)
    trained(model, args)
    told = model.mean.predict(test.obs[KEYS[name]])
    return (mean_name, law_name), judged(of_model(model, test, seed), test, told), model


def trained(model: Any, args: argparse.Namespace) -> Any:
    """Trained; few epochs of what takes epochs with ``--quick``."""
    is_vae = isinstance(model, exprgen.CondVAE)
    short = {"max_epochs": 2} if args.quick and is_vae else {}
    model.train(accelerator="cpu", progress_bar=False, **short)
    return model


def milliseconds(model: Any, test: AnnData) -> str:
    """Per sample on the clock, one asked for and a thousand at once; the best of five."""
    one = test[:1].copy()
    text = []
    for n in (1, 1000):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            model.sample(one, n_obs=n, seed=0, **QUIET)
            times.append(1000 * (time.perf_counter() - start) / n)
        text.append(f"{min(times):.2g} ms per sample of {n:,}")
    return ", ".join(text)


# Table -------------------------------------------------------------------------------------


def table(found: dict[tuple[str, str], list[Judged]]) -> str:
    rows, names = [], []
    first = next(results for (_, law), results in found.items() if law == "hybrid")
    for (mean, law), results in found.items():
        per_split = pd.DataFrame([r.values for r in results])
        reference = found.get((mean, "hybrid"), first)
        ratio = per_split["CRPS"] / [r.values["CRPS"] for r in reference]
        row = {
            "law": law,
            "MSE": shown(*mean_sem(per_split["MSE"])),
            "/ predictor's": "",
            "CRPS": f"{per_split['CRPS'].mean():.4f}",
            "/ hybrid's": shown(*mean_sem(ratio)),
            "coverage": shown(*mean_sem(per_split["coverage"])),
            "median gene": shown(*jackknife(results, "median gene")),
            "variance": "",
            "spread": "",
        }
        if "MSE / predictor's" in per_split:
            row["/ predictor's"] = shown(*mean_sem(per_split["MSE / predictor's"]))
        if results[0].moments:
            for measure in ("variance", "spread"):
                row[measure] = shown(*jackknife(results, measure))
        rows.append(row)
        names.append(mean)
    return format_table(pd.DataFrame(rows, index=names), index="mean")


if __name__ == "__main__":
    main()
