"""Cells that need not fit memory: simulated, trained on and sampled through zarr stores.

Eight types with a gamma law of means each are simulated straight into a sparse store, in blocks;
an ``NBVAE`` is trained on the store; as many cells are drawn into another. Each step is a process
of its own, so that its peak of resident memory is its own; "above import" is what it takes beyond
a process that has imported the package and trained on a handful of cells.

Then the speed: optimizer steps per second from the store, beside the same number of cells in
memory, on a part that fits, after one epoch that is not counted, by the clock.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import TYPE, arguments, format_table, prepare, say, write
from lightning.pytorch.callbacks import Callback

import exprgen
from exprgen._stores import new_store

if TYPE_CHECKING:
    from collections.abc import Callable

N_TYPES = 8
# Block of cells that is simulated at once.
BLOCK = 4096


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cells", type=int, default=50_000, help="in the store, and to sample")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--timed", type=int, default=50_000, help="cells to time steps on")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the stores")
    args = parser.parse_args()
    prepare(args)
    if args.quick:
        args.cells, args.genes, args.epochs, args.timed = 20_000, 50, 1, 20_000
    folder = args.scratch / "out_of_core"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    idle = apart(import_only, args, folder)["peak"]
    rows: list[dict[str, Any]] = []
    for name, step in STEPS.items():
        say(name)
        rows.append({"step": name, "idle": idle, **apart(step, args, folder)})
    for where in ("memory", "store"):
        say(f"steps from {where}")
        rows.append(
            {"step": f"steps from {where}", "idle": idle, **apart(timed, args, folder, where)}
        )
    results = pd.DataFrame(rows)
    text = markdown(results)
    del args.scratch  # it is nobody else's
    write(args, "out_of_core", results, text)
    print(text)
    shutil.rmtree(folder)


def apart(step: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Run in a process of its own; what it returns, its seconds and its peak in MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measured, (step, args))


def _measured(step: Callable[..., dict[str, float]], args: tuple[Any, ...]) -> dict[str, float]:
    prepare(args[0])
    start = time.perf_counter()
    found = step(*args)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak": peak, **found}


def import_only(args: Any, folder: Path) -> dict[str, float]:
    """What a process has that trains on a handful of cells."""
    few = exprgen.datasets.simulate_latent(200, n_vars=20)
    exprgen.NBVAE.setup_anndata(few, layer="counts")
    exprgen.NBVAE(few, seed=0).train(1, accelerator="cpu", progress_bar=False)
    return {}


def simulate(args: Any, folder: Path) -> dict[str, float]:
    """Counts of which about a tenth are not 0, block by block."""
    rng = np.random.default_rng(args.seed)
    types = rng.integers(0, N_TYPES, args.cells)
    mean = rng.gamma(0.3, 0.4, (N_TYPES, args.genes))
    with new_store(folder / "cells.zarr", overwrite=False) as store:
        for start in range(0, args.cells, BLOCK):
            of = types[start : start + BLOCK]
            depth = rng.lognormal(0, 0.4, (len(of), 1))
            store.append(sp.csr_matrix(rng.poisson(depth * mean[of]).astype(np.float32)))
        obs = pd.DataFrame(
            {TYPE: pd.Categorical.from_codes(types, [f"type {t}" for t in range(N_TYPES)])}
        )
        obs.index = "c" + obs.index.astype(str)
        var = pd.DataFrame(index=[f"g{i}" for i in range(args.genes)])
        store.write(ad.AnnData(obs=obs, var=var))
    return size_of(folder / "cells.zarr")


def train(args: Any, folder: Path) -> dict[str, float]:
    """Set up, train and save."""
    model = new_model(exprgen.datasets.open_zarr(folder / "cells.zarr"), args.seed)
    model.train(args.epochs, accelerator="cpu", progress_bar=False)
    model.save(folder / "model")
    return {}


def sample(args: Any, folder: Path) -> dict[str, float]:
    """As many cells as there were, into a store."""
    model = exprgen.NBVAE.load(folder / "model")
    model.sample(
        n_obs=args.cells, seed=args.seed, progress_bar=False, backed=folder / "drawn.zarr"
    )
    return size_of(folder / "drawn.zarr")


STEPS = {"simulate": simulate, "train": train, "sample": sample}


class Clock(Callback):
    """Seconds of the last epoch's steps."""

    def on_train_epoch_start(self, trainer: Any, plan: Any) -> None:
        """Read the clock, and count steps from here."""
        self.start, self.steps = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Validation is not timed."""
        self.seconds, self.n = time.perf_counter() - self.start, trainer.global_step - self.steps


def timed(args: Any, folder: Path, where: str) -> dict[str, float]:
    """Steps per second of the last of three epochs."""
    adata = exprgen.datasets.open_zarr(folder / "cells.zarr")
    if args.timed < adata.n_obs:
        adata = adata[: args.timed].to_memory()
        if where == "store":
            adata.write_zarr(folder / "part.zarr")
            adata = exprgen.datasets.open_zarr(folder / "part.zarr")
    elif where == "memory":
        adata = adata.to_memory()
    clock = Clock()
    new_model(adata, args.seed).train(
        3, accelerator="cpu", progress_bar=False, trainer_kwargs={"callbacks": [clock]}
    )
    return {"rate": clock.n / clock.seconds}


def new_model(adata: ad.AnnData, seed: int) -> exprgen.NBVAE:
    """At its defaults, given the cell type."""
    exprgen.NBVAE.setup_anndata(adata, categorical_condition_keys=[TYPE])
    return exprgen.NBVAE(adata, seed=seed)


def size_of(store: Path) -> dict[str, float]:
    """On disk, and what its values would take in memory as CSR, in MB."""
    nnz = exprgen.datasets.open_zarr(store).X.group["data"].shape[0]
    disk = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    return {"disk": disk / 1024**2, "csr": nnz * 8 / 1024**2}


def markdown(results: pd.DataFrame) -> str:
    """A row per step."""
    found = results.assign(above=results["peak"] - results["idle"])
    table = pd.DataFrame(
        {
            "seconds": in_words(found["seconds"], "{:,.0f}"),
            "peak, MB": in_words(found["peak"], "{:,.0f}"),
            "above import, MB": in_words(found["above"], "{:,.0f}"),
            "values as CSR, MB": in_words(found["csr"], "{:,.0f}"),
            "on disk, MB": in_words(found["disk"], "{:,.0f}"),
            "steps/s": in_words(found["rate"], "{:,.1f}"),
        }
    ).set_axis(results["step"])
    rates = results.set_index("step")["rate"]
    ratio = rates["steps from store"] / rates["steps from memory"]
    note = f"\nSteps from the store: {ratio:.2f} of those from memory.\n"
    return format_table(table, index="step") + note


def in_words(values: pd.Series, how: str) -> list[str]:
    """Numbers as text, nothing where there is none."""
    return ["" if np.isnan(value) else how.format(value) for value in values]


if __name__ == "__main__":
    main()
