"""Drugs that were never seen: is who asks for them told?

``tggates_drug_dose_normalised``, a fifth of the 146 drugs left out at a time. With the drug as a
label they cannot be asked for. With an embedding of the drug, the leading components of its
response at Middle after 24 hours, they can, at High here: rows are flagged, and a warning goes
with them, where the vector is further from the mean than all of training's. The drug is registered
as donor: residuals are of drugs that were left out whole, and so are held-out drugs.

``MSE`` and ``coverage`` of 90 % intervals are those of the held-out drugs at High.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _common import arguments, format_table, prepare, say, write
from _hybrid import judged, mean_sem, of_model, shown
from hybrid_dose import DOSES, DRUG, KEYS, RANK, TIME, cell_mean, samples, trained

from exprgen._errors import ExtrapolationWarning, UnseenCategoryError

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData

EMBEDDING, N_COMPONENTS = "X_drug", 10


def main() -> None:
    """Ask for all drugs, each by models that never saw it."""
    args = arguments(__doc__).parse_args()
    prepare(args)
    found = held_out_drugs(samples(args), args)
    write(args, "hybrid_drugs", found, drugs_table(found))
    print(drugs_table(found))


def held_out_drugs(adata: AnnData, args: argparse.Namespace) -> pd.DataFrame:
    """Ask for drugs that training never saw, as a label and by an embedding."""
    drugs = np.random.default_rng(args.seed).permutation(np.sort(adata.obs[DRUG].unique()))
    adata.obsm[EMBEDDING] = responses(adata)
    rows = []
    for split, some in enumerate(np.array_split(drugs, 5)[: 1 if args.quick else 5]):
        out = adata.obs[DRUG].isin(some).to_numpy()
        train, test = adata[~out].copy(), adata[out].copy()
        label = trained(train, KEYS, "ridge", split, density="gaussian")
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
        say(
            f"drugs, split {split}: flagged {flagged.mean():.3f}, seen {flags(model, seen).mean()}"
        )
    return pd.DataFrame(rows)


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
    warned = any(issubclass(w.category, ExtrapolationWarning) for w in said)
    if flagged.any() and not warned:
        raise RuntimeError("Rows were flagged without a warning.")
    return flagged


def refused(model: Any, drug: str) -> bool:
    """Whether asking for a label that training never saw is an error."""
    try:
        model.sample({DRUG: drug, TIME: "24", RANK: 3.0}, progress_bar=False)
    except UnseenCategoryError:
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
