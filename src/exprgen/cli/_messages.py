"""What the command line says on stderr, in the words of its options.

The library speaks of its arguments; who types a command knows options. An option has the argument
that it stands for as its ``dest``, so that ``overwrite=True`` becomes ``--overwrite``.
"""

from __future__ import annotations

import logging
import re
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["in_options", "report_to"]

_ASKED = re.compile(r"\bconditions\[(['\"])(.+?)\1\]")
_NONE = re.compile(r"(--[\w-]+) None\b")
_VALUE = re.compile(r"(--[\w-]+ )\[('[^']*')\]")

# Forests that grow on several threads empty each other's list of warning filters for a moment, and
# scikit-learn then takes them for somebody's own threads.
_OF_THREADS = "`sklearn.utils.parallel.delayed` should be used with"


def in_options(message: object, options: Mapping[str, str]) -> str:
    """A message of the library on one line, with options in place of arguments.

    Parameters
    ----------
    message
        Text, or what was raised.
    options
        Names of options by names of arguments.
    """
    if isinstance(message, KeyError) and message.args:  # its text is a repr
        message = message.args[0]
    text = " ".join(str(message).split()) or type(message).__name__
    text = _ASKED.sub(r"--condition \2", text)
    for name, option in options.items():
        text = re.sub(rf"(?<![\w-]){name}=(True|False)\b", option, text)
        text = re.sub(rf"(?<![\w-]){name}=", f"{option} ", text)
        text = re.sub(rf"^{name}(?= (must|has|names)\b)", option, text)
        if "_" in name:  # others are words of English
            text = re.sub(rf"(?<![\w-]){name}\b", option, text)
    return _VALUE.sub(r"\1\2", _NONE.sub(r"no \1", text))


@contextmanager
def report_to(stream: TextIO, options: Mapping[str, str], *, quiet: bool) -> Iterator[None]:
    """Inside, logs and warnings (each once) are lines of ``stream``; ``quiet`` leaves out logs."""
    logger = logging.getLogger("exprgen")
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    said: set[str] = set()

    def show(message: Warning | str, *where: Any, **others: Any) -> None:
        text = in_options(message, options)
        if text not in said and not text.startswith(_OF_THREADS):
            said.add(text)
            stream.write(f"warning: {text}\n")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
