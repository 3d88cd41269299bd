"""What a word of a command is, or why it cannot be."""

from __future__ import annotations

from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exprgen._errors import closest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CELLS", "MODELS", "REPORTS", "TABLES", "items", "model", "pair", "path", "whole"]

MODELS = {
    "nbvae": "NBVAE",
    "zinbvae": "ZINBVAE",
    "condvae": "CondVAE",
    "flow": "ExprFlow",
    "diffusion": "ExprDiffusion",
    "hybrid": "HybridResidualModel",
}
"""Classes by their short names."""

CELLS, TABLES, REPORTS = (".h5ad", ".zarr"), (".csv", ".tsv"), (".csv", ".json", ".md")
"""How the names of files end that hold them."""


def model(word: str) -> str:
    """The class of a model that is named short, or by its class."""
    names = {**MODELS, **{name.lower(): name for name in MODELS.values()}}
    if word.lower() not in names:
        raise ArgumentTypeError(
            f"there is no model {word!r}.{closest(word, names)} Models are {', '.join(MODELS)}."
        )
    return names[word.lower()]


def pair(word: str) -> tuple[str, str]:
    """``key=value``."""
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise ArgumentTypeError(f"expected KEY=VALUE, as in cell_type=B, got {word!r}")
    return key, value


def path(*suffixes: str) -> Callable[[str], Path]:
    """A path that ends in one of ``suffixes``."""
    return partial(_path, suffixes=suffixes)


def _path(word: str, suffixes: tuple[str, ...]) -> Path:
    given = Path(word).expanduser()
    if given.suffix.lower() not in suffixes:
        raise ArgumentTypeError(f"{word!r} must end in {' or '.join(suffixes)}")
    return given


def whole(least: int) -> Callable[[str], int]:
    """A whole number that is no less."""
    return partial(_whole, least=least)


def _whole(word: str, least: int) -> int:
    if not word.isdecimal() or int(word) < least:
        raise ArgumentTypeError(f"expected a whole number from {least}, got {word!r}")
    return int(word)


def items(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Several, with commas between them."""
    return partial(_items, kind=kind)


def _items(word: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part.strip()) for part in word.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"expected numbers with commas, got {word!r}") from None
