"""Conditions as they are typed: text, which becomes what the model's own columns hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exprgen.cli._files import read_cells
from exprgen.cli._words import CELLS

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData

    from exprgen._conditions import ConditionSchema
    from exprgen._labels import Label

__all__ = ["check_asked", "read_conditions"]


def check_asked(arguments: Namespace) -> None:
    """Refuse, as wrong use, conditions that contradict each other."""
    keys = [key for key, _ in arguments.condition]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        arguments.parser.error(
            f"argument --condition: {twice[0]} is given twice; for several rows give a table by "
            "--conditions"
        )
    table = arguments.conditions
    if keys and table is not None and table.suffix.lower() in CELLS:
        arguments.parser.error("argument --condition: not beside cells, which have their own")


def read_conditions(
    arguments: Namespace, schema: ConditionSchema
) -> AnnData | dict[str, Any] | None:
    """What was asked for, as verbs take it; ``None`` if nothing was.

    Raises
    ------
    FileNotFoundError, ValueError
        If the table cannot be read, or has values that are no numbers where the model has them.
    """
    path, given = arguments.conditions, dict(arguments.condition)
    if path is None:
        return typed({key: [text] for key, text in given.items()}, schema) if given else None
    if path.suffix.lower() in CELLS:
        return read_cells(path)
    table = _read_table(path)
    if both := [key for key in given if key in table]:
        raise ValueError(f"--condition {both[0]} is a column of {path} as well: leave out one.")
    texts = {key: table[key].tolist() for key in table}
    return typed({**texts, **{key: [text] * len(table) for key, text in given.items()}}, schema)


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        # Text: what is a number, the model knows; "NA" may be a label.
        table = pd.read_csv(
            path,
            sep="\t" if path.suffix.lower() == ".tsv" else ",",
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if table.empty:
        raise ValueError(f"{path} has no row of conditions under its header.")
    return table


def typed(texts: dict[str, list[str]], schema: ConditionSchema) -> dict[str, Any]:
    """Columns of text as what the model's columns hold; others as they are, to be refused.

    Parameters
    ----------
    texts
        Columns of text, of one length; an embedding ``key`` as columns ``key_0``, ``key_1`` ...
    schema
        The model's conditions. "1" is the label 1 where labels are numbers.

    Raises
    ------
    ValueError
        If a quantity is no number.
    """
    import numpy as np

    columns: dict[str, Any] = dict(texts)
    for part in schema.label_columns:
        if part.key in texts:
            columns[part.key] = [_label(text, part.labels) for text in texts[part.key]]
    for key in schema.continuous_keys:
        if key in texts:
            columns[key] = _numbers(texts[key], key)
    if schema.embedding is not None:
        key = schema.embedding.key
        names = [f"{key}_{i}" for i in range(len(schema.embedding))]
        if all(name in texts for name in names):
            columns[key] = np.array([_numbers(columns.pop(name), name) for name in names]).T
    return columns


def _label(text: str, labels: Iterable[Label]) -> Label:
    """The label that was meant; the text itself where none was."""
    for label in labels:
        if str(label) == text or (isinstance(label, bool) and str(label).lower() == text.lower()):
            return label
        if isinstance(label, int | float) and not isinstance(label, bool) and _equals(label, text):
            return label
    return text


def _equals(number: float, text: str) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _numbers(texts: list[str], key: str) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"--condition {key} must be a number: {error}.") from None
