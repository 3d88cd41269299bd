"""How many steps ExprFlow and ExprDiffusion need, and what they cost.

Both at their defaults, trained on ``pbmc68k_reduced`` (700 blood cells) with the cell type as
condition. Latent states of the cells' types are drawn from the same noise by

- the adaptive solver ``"ode"``, which follows the path to its end within 1e-6, and
- Heun's method in a number of steps: 2 ``n_steps`` - 1 evaluations of the network.

``error`` is the root mean square of their difference, in standard deviations of each dimension:
how far a cell is from where the whole path leads. ``10k cells, CPU s`` is of ``sample``, counts
included, on one thread.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from _common import arguments, format_table, measured, prepare, say, trained_paths, write

import exprgen
from exprgen.solvers import n_evaluations

N_STEPS = (1, 2, 3, 5, 10, 20)
N_CELLS = 10_000


def main() -> None:
    args = arguments(__doc__).parse_args()
    prepare(args)
    adata = exprgen.datasets.pbmc68k_reduced()
    rows = []
    for name, model in trained_paths(adata, args):
        exact = states(model, args.seed, solver="ode")
        for n_steps in N_STEPS:
            with measured() as cost:
                model.sample(n_obs=N_CELLS, n_steps=n_steps, seed=args.seed, progress_bar=False)
            error = (states(model, args.seed, n_steps=n_steps) - exact) / exact.std(0)
            rows.append(
                {
                    "model": name,
                    "n_steps": n_steps,
                    "evaluations": n_evaluations(model.module.density.solver, n_steps),
                    "error": float(error.square().mean().sqrt()),
                    "10k cells, CPU s": cost.cpu,
                }
            )
    table = pd.DataFrame(rows)
    write(args, "steps", table, markdown(table))
    say("done")


@torch.no_grad()
def states(model: exprgen.ExprFlow, seed: int, **how: object) -> torch.Tensor:
    """A latent state for each of the model's cells, without depth."""
    table, embedding = model.schema.parse(model.adata, argument="adata")
    codes = torch.from_numpy(model.schema.encode(table, embedding))
    features = model.module.space.features.conditions(codes)
    noise = torch.Generator().manual_seed(seed)
    return model.module.density.sample(features, noise, **how)[:, :-1]


def markdown(table: pd.DataFrame) -> str:
    """A row per number of steps, a column per model and figure."""
    wide = table.pivot(index=["n_steps", "evaluations"], columns="model")
    text = pd.DataFrame(index=[f"{steps} ({calls})" for steps, calls in wide.index])
    for model in table["model"].unique():
        text[f"{model}: error"] = wide["error", model].map("{:.3f}".format).to_numpy()
        seconds = wide["10k cells, CPU s", model].to_numpy()
        text[f"{model}: 10k cells, CPU s"] = np.char.mod("%.1f", seconds)
    return format_table(text, index="n_steps (evaluations)")


if __name__ == "__main__":
    main()
