"""Counts: does a frozen network as mean keep integers, variances and likelihood?

``kang_ifnb_muscat``: 1,556 cells, control and stimulated; a fifth of them held out, in the shares
of type and condition. The network stands in for one that was trained elsewhere: from indicators of
type and condition to log(1 + counts per ten thousand), trained on other cells, then frozen.

- ``NBVAE`` and ``hybrid: ridge``, the default, of all training cells.
- ``hybrid: network in folds``: five networks, each trained without a fifth of the training cells:
  a layer has what they predict of that fifth; a sixth network, of all, says what is asked for.
- ``half of the cells``: the network is trained on one half of the training cells, and the models
  on the other, which it never saw (``out_of_sample="predict"``).

``log-likelihood`` of held-out cells, nats per cell, a bound; ``variance`` of log(1 + counts per
ten thousand) of drawn over held-out cells within type and condition, median gene, as
:func:`exprgen.metrics.variance_ratio` has it; means of types and conditions beside those of
held-out cells: their worst correlation, and their squared error. The control has training cells
for drawn ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from _common import TYPE, arguments, format_table, load, prepare, say, write
from _hybrid import mean_sem, shown
from sklearn.model_selection import KFold, train_test_split

import exprgen
from exprgen import metrics
from exprgen.means import Encoding, TorchMean

if TYPE_CHECKING:
    import argparse

    from anndata import AnnData

KEYS = [TYPE, "condition"]
GROUP, LAYER = "group", "left_out"
N_DRAWS = 20
CONTROL = "training cells"


def main() -> None:
    """Run the splits, saving after each."""
    parser = arguments(__doc__)
    parser.add_argument("--splits", type=int, default=3, help="train/test splits")
    args = parser.parse_args()
    prepare(args)
    adata = load(args.data, "kang_ifnb_muscat")
    adata.obs[KEYS] = adata.obs[KEYS].astype(str)
    adata.obs[GROUP] = adata.obs[KEYS].agg("|".join, axis=1)
    adata.obs = adata.obs[[*KEYS, GROUP]].copy()
    rows: list[dict[str, Any]] = []
    for split in range(args.seed, args.seed + (1 if args.quick else args.splits)):
        train, test = parted(adata, 0.2, split)
        rows.append(
            {
                "split": split,
                "model": CONTROL,
                **moments(train.layers["counts"], train.obs[GROUP], test),
            }
        )
        for name, model, more in models(train, split, args):
            rows.append({"split": split, "model": name, **judged(model, test, split, **more)})
            say(f"split {split}: {rows[-1]}")
        write(args, "hybrid_counts", pd.DataFrame(rows), table(pd.DataFrame(rows)))
    print(table(pd.DataFrame(rows)))


def parted(adata: AnnData, share: float, seed: int) -> tuple[AnnData, AnnData]:
    """Two parts with the same shares of types and conditions."""
    rows = train_test_split(
        np.arange(adata.n_obs), test_size=share, stratify=adata.obs[GROUP], random_state=seed
    )
    return adata[np.sort(rows[0])].copy(), adata[np.sort(rows[1])].copy()


def network(adata: AnnData, seed: int, n_epochs: int) -> TorchMean:
    """A network from conditions to log-normalised counts, trained on cells and frozen."""
    encoding = Encoding.fit(adata.obs[KEYS])
    x = torch.as_tensor(encoding(adata.obs[KEYS])).float()
    y = torch.as_tensor(metrics.log_cp10k(adata.layers["counts"]).toarray()).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], 64), torch.nn.GELU(), torch.nn.Linear(64, y.shape[1])
        )
        body[-1].bias.data = y.mean(0)
        optimiser = torch.optim.Adam(body.parameters(), lr=3e-3)
        for _ in range(n_epochs):
            for part in torch.randperm(len(x)).split(128):
                optimiser.zero_grad()
                torch.nn.functional.mse_loss(body(x[part]), y[part]).backward()
                optimiser.step()
    body.requires_grad_(False)
    return TorchMean(body, inputs=encoding, out_of_sample="predict")


def models(train: AnnData, seed: int, args: argparse.Namespace) -> Any:
    """Names, models, and what they are to be told beside the conditions."""
    n_epochs = 2 if args.quick else 100
    seen, fresh = parted(train, 0.5, seed)
    yield "NBVAE", trained(exprgen.NBVAE, train, seed, args), {}
    yield "hybrid: ridge", hybrid(train, "ridge", seed, args), {}
    left_out = np.zeros(train.shape, dtype=np.float32)
    for known, out in KFold(5, shuffle=True, random_state=seed).split(left_out):
        left_out[out] = network(train[known], seed, n_epochs).predict(train.obs[KEYS].iloc[out])
    train.layers[LAYER] = left_out
    of_all = network(train, seed, n_epochs)
    yield "hybrid: network in folds", hybrid(train, LAYER, seed, args), {"mean": of_all}
    yield "half of the cells: NBVAE", trained(exprgen.NBVAE, fresh, seed, args), {}
    frozen = network(seen, seed, n_epochs)
    yield "half of the cells: hybrid: network", hybrid(fresh, frozen, seed, args), {}


def hybrid(train: AnnData, mean: Any, seed: int, args: argparse.Namespace) -> Any:
    return trained(exprgen.HybridResidualModel, train, seed, args, mean=mean)


def trained(
    model_class: Any, train: AnnData, seed: int, args: argparse.Namespace, **options: Any
) -> Any:
    """A model at its defaults."""
    model_class.setup_anndata(train, layer="counts", categorical_condition_keys=KEYS)
    model = model_class(train, seed=seed, **options)
    model.train(accelerator="cpu", progress_bar=False, **({"max_epochs": 2} if args.quick else {}))
    return model


def judged(
    model: Any, test: AnnData, seed: int, mean: TorchMean | None = None
) -> dict[str, float]:
    """Measures of what a model draws for the held-out cells' conditions, and of its likelihood."""
    more = {}
    if mean is not None:
        test.layers[LAYER] = mean.predict(test.obs[KEYS])
    drawn = model.sample(test, n_obs=N_DRAWS, seed=seed, progress_bar=False)
    likelihood = model.log_likelihood(test, seed=seed, progress_bar=False)
    values = drawn.X.data
    more["integers"] = float(((values == np.rint(values)) & (values >= 0)).mean())
    of_drawn = np.repeat(test.obs[GROUP].to_numpy(), N_DRAWS)
    return {"log-likelihood": likelihood.mean(), **moments(drawn.X, of_drawn, test), **more}


def moments(counts: Any, groups: Any, test: AnnData) -> dict[str, float]:
    """Variances and means beside those of held-out cells, within types and conditions."""
    cells, real = (metrics.log_cp10k(x).toarray() for x in (counts, test.layers["counts"]))
    ours, theirs = (np.asarray(g).astype(str) for g in (groups, test.obs[GROUP]))
    means = [(cells[ours == g].mean(0), real[theirs == g].mean(0)) for g in np.unique(theirs)]
    return {
        "variance": metrics.variance_ratio(cells, real, groups_synthetic=ours, groups_real=theirs),
        "worst correlation": min(np.corrcoef(a, b)[0, 1] for a, b in means),
        "error of means": float(np.mean([np.square(a - b).mean() for a, b in means])),
    }


def table(rows: pd.DataFrame) -> str:
    """A row per model: means over splits with their standard errors."""
    shown_rows = {}
    for name, part in rows.groupby("model", sort=False):
        of_all = rows[rows["model"] == ("half of the cells: NBVAE" if "half" in name else "NBVAE")]
        gain = part["log-likelihood"].to_numpy() - of_all["log-likelihood"].to_numpy()
        is_control = name == CONTROL
        shown_rows[name] = {
            "log-likelihood": "" if is_control else f"{part['log-likelihood'].mean():.1f}",
            "over NBVAE's": "" if is_control else shown(*mean_sem(gain), 2),
            "variance": shown(*mean_sem(part["variance"])),
            "integers": "" if is_control else f"{part['integers'].mean():.3f}",
            "worst correlation of means": f"{part['worst correlation'].mean():.3f}",
            "error of means": f"{part['error of means'].mean():.4f}",
        }
    return format_table(pd.DataFrame(shown_rows).T, index="")


if __name__ == "__main__":
    main()
