"""The command line: ``python -m exprgen {train,sample,predict,evaluate}``.

A command reads files, calls the library as a reader of the guide would, and writes files. What is
said on the way goes to stderr; stdout has results only. Exit status: 0; 1 for what is wrong with
the data, the model or a file; 2 for what is wrong with the command itself, whatever the files
hold; 130 if it was interrupted.

Modules are imported by the command that needs them: ``--help`` waits for none.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING

from exprgen.cli._messages import in_options, report_to
from exprgen.cli._parser import options_of, parser

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

# What the library raises where something is wrong that its message explains; anything else is
# a fault of ours, whose traceback is wanted.
_EXPLAINED = (ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv
        Its words, without the program's name; ``None`` takes those of the process.

    Returns
    -------
    The exit status.

    Raises
    ------
    SystemExit
        With status 2 if the command cannot be understood, 0 after ``--help``.
    """
    arguments = parser().parse_args(argv)
    options = options_of(arguments)
    results, messages = sys.stdout, sys.stderr
    try:
        # Lightning draws its bar on stdout.
        with report_to(messages, options, quiet=arguments.quiet), redirect_stdout(messages):
            command = import_module(f"exprgen.cli._{arguments.command}")
            written = command.run(arguments)
    except KeyboardInterrupt as stop:
        messages.write(f"error: interrupted. {stop}".rstrip() + "\n")
        return _INTERRUPTED
    except _EXPLAINED as error:
        if arguments.traceback:
            traceback.print_exception(error, file=messages)
        messages.write(f"error: {in_options(error, options)}\n")
        return 1
    results.write(written)
    return 0
