"""The four commands of the command line, what each is for, and how wrong use is told."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import NoReturn

from exprgen.cli import _options
from exprgen.cli._words import whole

__all__ = ["options_of", "parser"]

# Arguments of the library that no option has for its ``dest``.
_STAND_INS = {"density_kwargs": "--density-epochs", "backed": "--out", "adata.obs": "obs"}

_ABOUT = """\
Conditional generative models of gene expression, on files.

  exprgen train train.h5ad --condition cell_type --out model
  exprgen sample model --conditions test.h5ad --n-obs 2 --out synthetic.h5ad
  exprgen evaluate train.h5ad test.h5ad synthetic.h5ad --groupby cell_type

"exprgen COMMAND --help" explains a command. "python -m exprgen" is the same program."""
_TRAIN = """\
Train a model on the cells of a file, and save it to a folder that holds no cells.

  exprgen train cells.h5ad --layer counts --condition cell_type --continuous dose --out model"""
_SAMPLE = """\
Draw new cells for given conditions; without any, for conditions as they occur in training.

  exprgen sample model --condition cell_type=B --condition dose=1.5 --n-obs 100 --out new.h5ad
  exprgen sample model --conditions table.csv --n-obs 1000 --out new.zarr"""
_PREDICT = """\
Mean, spread and quantiles of each gene for given conditions; cells' own counts are not used.

  exprgen predict model cells.h5ad --out annotated.h5ad
  exprgen predict model --conditions table.csv --genes CD3D,LYZ --out genes.csv"""
_EVALUATE = """\
Compare synthetic with held-out cells, beside held-out with held-out cells.

The table of the models goes to stdout; that of baselines as well, with all columns, to --out.

  exprgen evaluate train.h5ad test.h5ad synthetic.h5ad --groupby cell_type --out report.csv"""


class _Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """One line per option, with the default where there is one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or isinstance(action.default, bool | list)
        if silent or not action.option_strings or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = _Parser("exprgen", description=_ABOUT, formatter_class=_Help, allow_abbrev=False)
    top.add_argument("--version", action="version", version=version("exprgen"))
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, about, describe in (
        ("train", _TRAIN, _options.train),
        ("sample", _SAMPLE, _options.sample),
        ("predict", _PREDICT, _options.predict),
        ("evaluate", _EVALUATE, _options.evaluate),
    ):
        command = commands.add_parser(
            name,
            help=about.partition("\n")[0],
            description=about,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        describe(command)
        add = command.add_argument_group("all commands").add_argument
        add("--seed", type=whole(0), default=0, help="the same seed gives the same result")
        add("--overwrite", action="store_true", help="replace what is at the place of a result")
        add("--quiet", action="store_true", help="say nothing on stderr but warnings and errors")
        add("--traceback", action="store_true", help="with an error, where in the code it arose")
        command.set_defaults(parser=command)
    return top


def options_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Names of a command's options by those of the library's arguments."""
    actions = arguments.parser._actions
    named = {action.dest: action.option_strings[0] for action in actions if action.option_strings}
    return {**_STAND_INS, **named}
