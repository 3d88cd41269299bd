"""What the benchmarks share: the data and their splits, what a step costs, how results are kept.

Costs are CPU seconds of the process on one thread, which other work on the machine disturbs less
than time on the clock, and the growth of resident memory. Compare them within one run only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp
import torch
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import exprgen

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

__all__ = [
    "SETS",
    "TYPE",
    "Cost",
    "arguments",
    "format_table",
    "load",
    "measured",
    "prepare",
    "say",
    "train_test",
    "trained_paths",
    "variable_genes",
    "write",
]

# The data sets with cell types, and the column of obs that holds these.
SETS = ("pbmc3k_labelled", "kang_ctrl_8donors", "paul15_tradeseq")
TYPE = "cell_type"

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("EXPRGEN_TEST_DATA", HERE.parents[1] / "shared" / "data"))
PACKAGES = ("exprgen", "scvi-tools", "torch", "anndata", "scanpy", "scikit-learn", "numpy")

_START = time.perf_counter()


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data sets")
    parser.add_argument(
        "--out", type=Path, help="where results go (default: results/, with --quick out/)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first split or run")
    parser.add_argument(
        "--quick", action="store_true", help="few cells, few epochs: does it run? Numbers are void"
    )
    return parser


def prepare(args: argparse.Namespace) -> None:
    """One thread, no chatter from the libraries, and a folder for the results."""
    if args.out is None:
        args.out = HERE / ("out" if args.quick else "results")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    threadpool_limits(1)
    for name in ("exprgen", "scvi", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Advice on loader workers and on deprecations between other packages.
    warnings.filterwarnings("ignore", module=r"lightning|scvi|torch|anndata")
    warnings.filterwarnings("ignore", category=FutureWarning)


def load(folder: Path, name: str) -> ad.AnnData:
    """A data set with its counts as CSR float32 in ``layers["counts"]``."""
    path = folder / f"{name}.h5ad"
    if not path.is_file():
        sys.exit(
            f"{path} is missing. These benchmarks read data sets that are not part of the "
            "project: name the folder that holds them by --data or EXPRGEN_TEST_DATA."
        )
    adata = ad.read_h5ad(path)
    adata.layers["counts"] = sp.csr_matrix(adata.X, dtype=np.float32)
    return adata


def train_test(
    adata: ad.AnnData, key: str, test_size: float, seed: int
) -> tuple[ad.AnnData, ad.AnnData]:
    """Two parts with the same share of every label of ``obs[key]``."""
    rows = train_test_split(
        np.arange(adata.n_obs), test_size=test_size, stratify=adata.obs[key], random_state=seed
    )
    return adata[np.sort(rows[0])].copy(), adata[np.sort(rows[1])].copy()


def trained_paths(
    adata: ad.AnnData, args: argparse.Namespace
) -> Iterator[tuple[str, exprgen.ExprFlow | exprgen.ExprDiffusion]]:
    """Names and models of a flow and a diffusion at their defaults, given the cell type."""
    for model_class in (exprgen.ExprFlow, exprgen.ExprDiffusion):
        say(f"{model_class.__name__}: training")
        model_class.setup_anndata(adata, layer="counts", categorical_condition_keys=[TYPE])
        model = model_class(adata, seed=args.seed)
        short = {"max_epochs": 2, "density_kwargs": {"max_epochs": 2}} if args.quick else {}
        model.train(accelerator="cpu", progress_bar=False, **short)
        yield model_class.__name__, model


def variable_genes(train: ad.AnnData, n_genes: int) -> pd.Index:
    """Names of the highly variable genes, scanpy's defaults on log-normalised counts."""
    normalised = sc.AnnData(train.layers["counts"].copy(), var=train.var[[]].copy())
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    sc.pp.highly_variable_genes(normalised, n_top_genes=min(n_genes, train.n_vars))
    return normalised.var_names[normalised.var["highly_variable"]]


def say(text: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"[{time.perf_counter() - _START:6.0f} s] {text}", flush=True)


@dataclass
class Cost:
    """CPU seconds, and by how many GB resident memory grew at its peak (nan if unknown)."""

    cpu: float = float("nan")
    memory: float = float("nan")


@contextmanager
def measured() -> Iterator[Cost]:
    """What the block costs; the numbers are there when it ends."""
    cost = Cost()
    gc.collect()
    # scanpy's numba functions share torch's OpenMP and set its threads to the number of cores.
    torch.set_num_threads(1)
    before = _restart_memory()
    start = time.process_time()
    yield cost
    cost.cpu = time.process_time() - start
    cost.memory = _status("VmHWM") - before


def _restart_memory() -> float:
    """Give freed memory back, forget the peak, and say what is in use, in GB (Linux only)."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return _status("VmRSS")


def _status(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) / 1024**2 for line in lines if line.startswith(field))


def format_table(table: pd.DataFrame, *, index: str) -> str:
    """Markdown of a table whose cells are text already."""
    rows = [[index, *table.columns], ["---"] * (table.shape[1] + 1)]
    rows += [[name, *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def write(args: argparse.Namespace, name: str, rows: pd.DataFrame, markdown: str) -> None:
    """Keep the rows as CSV, how they came about as JSON, and the table that people read."""
    rows.to_csv(args.out / f"{name}.csv", index=False, float_format="%.6g")
    (args.out / f"{name}.md").write_text(markdown)
    options: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    how = {
        "options": options,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "threads": 1,
    }
    (args.out / f"{name}.json").write_text(json.dumps(how, indent=2) + "\n")
