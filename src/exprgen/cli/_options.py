"""The options of each command: one line of help for each.

An option that stands for an argument of the library has its name as ``dest``, for messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exprgen.cli._words import CELLS, MODELS, REPORTS, TABLES, items, model, pair, path, whole

if TYPE_CHECKING:
    import argparse

__all__ = ["evaluate", "predict", "sample", "train"]

_MEANS = ("ridge", "group", "hierarchical")


def train(command: argparse.ArgumentParser) -> None:
    """What is trained, on what, and how."""
    add = command.add_argument
    add("cells", type=path(*CELLS), help="cells to train on, .h5ad or .zarr")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where to save the model")
    add("--model", type=model, default="nbvae", help=f"one of {', '.join(MODELS)}")
    add("--history", type=path(*TABLES), metavar="TABLE", help="losses by epoch, .csv or .tsv")

    add = command.add_argument_group("what the cells are (columns of obs)").add_argument
    many: dict[str, Any] = {"action": "append", "metavar": "KEY"}
    one: dict[str, Any] = {"metavar": "KEY"}
    add("--layer", help="layer to model; X if it is left out")
    add(
        "--condition",
        dest="categorical_condition_keys",
        **many,
        help="labels to generate on, as of types; may be repeated",
    )
    add(
        "--continuous",
        dest="continuous_condition_keys",
        **many,
        help="numbers to generate on, as doses; may be repeated",
    )
    add(
        "--embedding",
        dest="condition_embedding_key",
        **one,
        help="vectors to generate on, a key of obsm",
    )
    add("--batch", dest="batch_key", **one, help="batch, a nuisance that is averaged over")
    add("--donor", dest="donor_key", **one, help="donor, a random effect")
    add("--size-factor", dest="size_factor_key", **one, help="depth, in place of the totals")
    add("--allow-non-integer", action="store_true", help="counts may have fractions")

    add = command.add_argument_group("how to train").add_argument
    add(
        "--max-epochs",
        type=whole(1),
        metavar="N",
        help="epochs; by the number of cells if left out",
    )
    add(
        "--density-epochs",
        type=whole(1),
        metavar="N",
        help="of the second stage, where there is one",
    )
    add(
        "--split-key",
        metavar="KEY",
        help="column of 'train' and 'validation'; at random if left out",
    )
    add(
        "--mean",
        choices=_MEANS,
        metavar="NAME",
        help=f"of hybrid: {', '.join(_MEANS)} (default: {_MEANS[0]})",
    )
    add(
        "--accelerator",
        default="auto",
        metavar="NAME",
        help="auto, cpu, gpu, ... as Lightning has them",
    )
    add(
        "--backed",
        action="store_true",
        help="leave cells in the file, for files larger than memory",
    )
    add("--checkpoint-dir", type=Path, metavar="FOLDER", help="where to keep the state of the run")
    add("--resume", action="store_true", help="go on from --checkpoint-dir, if there is a state")
    add(
        "--donor-labels",
        action="store_true",
        help="save donors' labels, which says who was trained on",
    )


def sample(command: argparse.ArgumentParser) -> None:
    """What is drawn, and for what."""
    command.add_argument("model", type=Path, help="folder of a trained model")
    _asked(command)
    add = command.add_argument
    add("--n-obs", type=whole(1), default=1, metavar="N", help="cells for each row of conditions")
    add(
        "--marginalize",
        action="append",
        default=[],
        metavar="KEY",
        help="condition to average over; may be repeated",
    )
    add(
        "--library",
        type=float,
        metavar="TOTAL",
        help="fixed depth of the cells; drawn if left out",
    )
    add(
        "--out",
        type=path(*CELLS),
        required=True,
        metavar="CELLS",
        help=".h5ad, or .zarr, which is written as cells are drawn",
    )


def predict(command: argparse.ArgumentParser) -> None:
    """What is predicted, and for what."""
    command.add_argument("model", type=Path, help="folder of a trained model")
    command.add_argument(
        "cells", type=path(*CELLS), nargs="?", help="cells whose conditions are read"
    )
    _asked(command)
    add = command.add_argument
    add(
        "--of",
        choices=("cell", "mean"),
        default="cell",
        help="values of a cell, or means of cells",
    )
    add(
        "--n-cells",
        type=whole(1),
        metavar="N",
        help="cells in the mean; infinitely many if left out",
    )
    add("--genes", type=items(str), metavar="A,B,...", help="only these genes")
    add(
        "--library",
        type=float,
        metavar="TOTAL",
        help="fixed depth of the cells; drawn if left out",
    )
    add(
        "--n-samples",
        type=whole(1),
        default=1000,
        metavar="N",
        help="draws for each row of conditions",
    )
    add(
        "--quantiles",
        type=items(float),
        default="0.05,0.95",
        metavar="P,Q,...",
        help="quantiles to give",
    )
    add(
        "--out",
        type=path(*CELLS, *TABLES),
        required=True,
        metavar="FILE",
        help=".h5ad; .zarr, written block by block; or .csv or .tsv, a row for each gene",
    )


def _asked(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--condition",
        type=pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a condition of all rows; may be repeated",
    )
    add(
        "--conditions",
        type=path(*TABLES, *CELLS),
        metavar="TABLE",
        help="rows of conditions: .csv or .tsv, or cells in .h5ad or .zarr",
    )


def evaluate(command: argparse.ArgumentParser) -> None:
    """What is compared, and how."""
    add = command.add_argument
    add("train", type=path(*CELLS), help="cells the model was trained on")
    add("test", type=path(*CELLS), help="cells held out")
    add(
        "synthetic",
        type=path(*CELLS),
        nargs="+",
        help="cells drawn for the conditions of TEST, by model",
    )
    add(
        "--groupby",
        action="append",
        metavar="KEY",
        help="column whose composition is matched; may be repeated",
    )
    add("--layer", help="layer of the counts; X if it is left out")
    add(
        "--metrics",
        type=items(str),
        metavar="A,B,...",
        help="only these metrics or families of them",
    )
    add(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="leave out what a model must beat",
    )
    add(
        "--n-repeats",
        type=whole(1),
        default=5,
        metavar="N",
        help="random halves of the held-out cells",
    )
    add("--max-cells", type=whole(10), default=500, metavar="N", help="cells on each side")
    add(
        "--out",
        type=path(*REPORTS),
        metavar="REPORT",
        help="all rows and columns: .csv, .json or .md",
    )
