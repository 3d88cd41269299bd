r"""Stimulated cells of a type whose stimulated cells were held out, from its control cells.

``kang_ifnb_muscat``: blood cells of two donors, five types, control and stimulated with
interferon β. In turn the stimulated cells of each of ``--types`` are taken out of training, and
``counterfactual`` asks what that type's control cells would be under stimulation. Of log1p of
counts per ten thousand, against the held-out cells:

- ``R² of LFC``: the difference of means from the control cells, over genes, and over the fifty
  genes that really differ the most; 1 - SSE / SST;
- ``R² of variance``: the genes' variances;
- ``energy distance``: of 30 principal components of both sets together.

Each control cell gives ``--draws`` counterfactual cells. The measures are those of one draw per
cell, averaged over draws; ``all draws`` is the R² of LFC of all of them together, which has less
counting noise. Beside our models:

- ``add mean shift`` and ``add nearest shift``: the control cells plus the difference of means of
  the other types, on the average or of the one whose control cells correlate most; at least 0;
- ``SCVI``: condition as batch, all else by default; z given the control cell, decoded as
  stimulated at the cell's own total;
- ``real cells``: a random half of the held-out cells in the place of the generated ones, against
  the other half.

How the transport was chosen is in the section on counterfactuals of ``docs/architecture.md``: on
other types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import _scvi as rival
import numpy as np
import pandas as pd
import torch
from _common import TYPE, arguments, format_table, load, prepare, say, write
from scipy.sparse import csr_matrix

import exprgen
from exprgen import metrics

if TYPE_CHECKING:
    from anndata import AnnData

SET, CONDITION, CONTROL, TREATED = "kang_ifnb_muscat", "condition", "ctrl", "stim"
TYPES = ("B cells", "CD14+ Monocytes")
MODELS = (exprgen.NBVAE, exprgen.ExprFlow, exprgen.ExprDiffusion)
MEASURES = {
    "R² of LFC": 3,
    "R² of LFC, all draws": 3,
    "R² of LFC, top 50": 3,
    "R² of variance": 3,
    "energy distance": 2,
}
N_TOP, N_PCS = 50, 30


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--types", nargs="+", default=TYPES, help="held out in turn")
    parser.add_argument("--runs", type=int, default=2, help="seeds of training and drawing")
    parser.add_argument("--draws", type=int, default=5, help="cells from each control cell")
    parser.add_argument("--scvi-epochs", type=int, help="default: SCVI's own")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.scvi_epochs = 1, 2
    prepare(args)
    adata = load(args.data, SET)
    rows: list[dict[str, Any]] = []
    for held in args.types:
        for seed in range(args.seed, args.seed + args.runs):
            task = Task(adata, held, seed)
            for name, draws in cells_of(task, args):
                say(f"{held}, seed {seed}: {name}")
                rows.append({"held out": held, "seed": seed, "cells": name, **task.score(draws)})
            rows.append({"held out": held, "seed": seed, "cells": "real cells", **task.control()})
            results = pd.DataFrame(rows)
            write(args, "counterfactual", results, markdown(results))
    print(markdown(results))


class Task:
    """One type held out: what is there to train on, and what generated cells are judged by."""

    def __init__(self, adata: AnnData, held: str, seed: int) -> None:
        of_type = (adata.obs[TYPE] == held).to_numpy()
        treated = (adata.obs[CONDITION] == TREATED).to_numpy()
        self.train, self.seed = adata[~(of_type & treated)].copy(), seed
        self.control_cells = adata[of_type & ~treated].copy()
        values = metrics.log_cp10k(adata.layers["counts"]).toarray()
        self.real, self.before = values[of_type & treated], values[of_type & ~treated]
        self.others = {
            name: (values[rows & ~treated].mean(0), values[rows & treated].mean(0))
            for name in adata.obs[TYPE].unique()
            if name != held
            for rows in [(adata.obs[TYPE] == name).to_numpy()]
        }

    def shifted(self, *, nearest: bool) -> np.ndarray:
        """The control cells with the other types' difference of means added."""
        own, pairs = self.before.mean(0), list(self.others.values())
        if nearest:
            pairs = [max(pairs, key=lambda pair: np.corrcoef(pair[0], own)[0, 1])]
        shift = np.mean([after - before for before, after in pairs], axis=0)
        return np.maximum(self.before + shift, 0)

    def score(self, draws: list[np.ndarray]) -> dict[str, float]:
        """Measures of one draw per cell, averaged, and of all together."""
        scores = pd.DataFrame([self.compare(cells, self.real) for cells in draws]).mean()
        together = self.compare(np.concatenate(draws), self.real, with_energy=False)
        return {**scores, "R² of LFC, all draws": together["R² of LFC"]}

    def control(self, n_repeats: int = 10) -> dict[str, float]:
        """Real cells against real cells, over random halves."""
        rng, scores = np.random.default_rng(self.seed), []
        for _ in range(n_repeats):
            order = rng.permutation(len(self.real))
            half, other = np.array_split(order, 2)
            scores.append(self.compare(self.real[half], self.real[other]))
        return dict(pd.DataFrame(scores).mean())

    def compare(
        self, cells: np.ndarray, real: np.ndarray, *, with_energy: bool = True
    ) -> dict[str, float]:
        """Measures of a set of cells."""
        before = self.before.mean(0)
        found, true = cells.mean(0) - before, real.mean(0) - before
        top = np.argsort(-np.abs(true))[:N_TOP]
        scores = {
            "R² of LFC": r2(found, true),
            "R² of LFC, top 50": r2(found[top], true[top]),
            "R² of variance": r2(cells.var(0), real.var(0)),
        }
        if with_energy:
            pcs = metrics.pooled_pcs(cells, real, n_pcs=N_PCS)
            scores["energy distance"] = float(metrics.energy_distance(*pcs))
        return scores


def r2(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the sum of squares around the mean that is explained; below 0 if none is."""
    return float(1 - np.square(found - true).sum() / np.square(true - true.mean()).sum())


def cells_of(task: Task, args: Any) -> Any:
    """Names and draws, each a list of log-normalised cells ``(n_cells, n_genes)``."""
    yield "add mean shift", [task.shifted(nearest=False)]
    yield "add nearest shift", [task.shifted(nearest=True)]
    yield "SCVI", scvi_draws(task, args)
    for model_class in MODELS:
        model_class.setup_anndata(
            task.train, layer="counts", categorical_condition_keys=[TYPE, CONDITION]
        )
        model = model_class(task.train, seed=task.seed)
        short: dict[str, Any] = {"max_epochs": 2} if args.quick else {}
        if args.quick and model_class is not exprgen.NBVAE:
            short["density_kwargs"] = {"max_epochs": 2}
        model.train(accelerator="cpu", progress_bar=False, **short)
        draws = [
            model.counterfactual(
                task.control_cells,
                to={CONDITION: TREATED},
                n_samples=1,
                on_extrapolation="ignore",
                seed=task.seed + 1000 * draw,
                progress_bar=False,
            )
            for draw in range(args.draws)
        ]
        if not all((cells.obs["support"] == "unseen combination").all() for cells in draws):
            raise RuntimeError("Cells of a combination never seen do not say so.")
        yield model_class.__name__, [normalised(cells.layers["counts"]) for cells in draws]


def normalised(counts: Any) -> np.ndarray:
    """Log1p of counts per ten thousand, dense."""
    return metrics.log_cp10k(csr_matrix(counts)).toarray()


@torch.no_grad()
def scvi_draws(task: Task, args: Any) -> list[np.ndarray]:
    """The control cells' z, decoded as if they came from the batch of treated cells."""
    rival.setup(task.train, batch=CONDITION)
    model = rival.fit(task.train, seed=task.seed, max_epochs=args.scvi_epochs)
    module, counts = model.module.eval(), task.control_cells.layers["counts"]
    levels = list(model.adata_manager.get_state_registry("batch").categorical_mapping)
    x = torch.from_numpy(counts.toarray())
    own, other = (torch.full((len(x), 1), levels.index(name)) for name in (CONTROL, TREATED))
    torch.manual_seed(task.seed)
    draws = []
    for _ in range(args.draws):
        state = module.inference(x, own)
        drawn = module.generative(state["z"], x.sum(1, keepdim=True).log(), other)["px"]
        draws.append(normalised(drawn.sample().numpy()))
    return draws


def markdown(results: pd.DataFrame) -> str:
    """A row per kind of cells; types side by side, means over seeds."""
    held = list(results["held out"].unique())
    means = results.groupby(["cells", "held out"], sort=False)[list(MEASURES)].mean()
    text = {
        measure: {
            name: " / ".join(
                ""
                if np.isnan(means.loc[(name, one), measure])
                else f"{means.loc[(name, one), measure]:.{digits}f}"
                for one in held
            ).strip(" /")
            for name in results["cells"].unique()
        }
        for measure, digits in MEASURES.items()
    }
    table = pd.DataFrame(text)
    table = table.loc[["real cells", *(name for name in table.index if name != "real cells")]]
    note = f"\n{' / '.join(held)}; mean of {results['seed'].nunique()} seed(s).\n"
    return format_table(table, index="cells") + note


if __name__ == "__main__":
    main()
