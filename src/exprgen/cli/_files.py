"""Files of the command line: cells and models in, results out, whole or not at all."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from anndata import AnnData

    from exprgen.models import GenerativeModel

__all__ = ["check_place", "new_file", "read_cells", "read_model", "write_cells", "write_table"]

logger = logging.getLogger("exprgen")


def read_cells(path: Path, *, backed: bool = False) -> AnnData:
    """Cells of an h5ad file or a zarr store.

    Parameters
    ----------
    path
        Of the file.
    backed
        Whether to leave matrices where they are.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    ValueError
        If it holds no AnnData.
    """
    import anndata

    from exprgen.datasets import open_zarr

    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix.lower() == ".zarr":
            cells = open_zarr(path)
            cells = cells if backed else cells.to_memory()
        else:
            cells = anndata.read_h5ad(path, backed="r" if backed else None)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as cells: {error}") from error
    logger.info("%s: %d cells x %d genes.", path, *cells.shape)
    return cells


def read_model(folder: Path) -> GenerativeModel:
    """A saved model, of whichever class, without data.

    Raises
    ------
    FileNotFoundError, CheckpointError, UntrustedFileError
        If there is no model, or a damaged one.
    """
    from exprgen import models
    from exprgen._errors import CheckpointError
    from exprgen._manifest import MANIFEST, read_manifest
    from exprgen.cli._words import MODELS

    name = read_manifest(folder.expanduser() / MANIFEST)["class"]
    if name not in MODELS.values():
        raise CheckpointError(f"{folder} holds a {name!r}, which is no model of this version.")
    model = getattr(models, name).load(folder, adata=False)
    logger.info("%s: %s of %d genes.", folder, name, len(model.var_names))
    return model


def check_place(path: Path, option: str, *, overwrite: bool, is_folder: bool = False) -> None:
    """Refuse a place that could not be written to, before anything is done.

    Parameters
    ----------
    path
        Of a file that is to be written, or a folder that is to hold a model.
    option
        What the user calls it.
    overwrite
        Whether a file, or the files of a model, that are there may be replaced.
    is_folder
        Whether it is a folder.

    Raises
    ------
    OSError
        Saying so: :class:`FileExistsError`, :class:`IsADirectoryError` ...
    """
    path = path.expanduser().absolute()
    if path.is_dir() and not is_folder:
        raise IsADirectoryError(f"{option} {path} is a folder; a file is to be written there.")
    if path.exists() and is_folder and not path.is_dir():
        raise NotADirectoryError(f"{option} {path} is a file; a model needs a folder.")
    # What is hidden in a folder, such as a lock, is no model.
    taken = os.path.lexists(path)
    if taken and is_folder:
        taken = any(not file.name.startswith(".") for file in path.iterdir())
    if taken and not overwrite:
        raise FileExistsError(f"{option} {path} exists. Give another place, or --overwrite.")
    above = path if path.is_dir() else next(p for p in path.parents if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise type(error)(f"{option} {path}: nothing can be written to {above}.") from error


@contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Inside, a file is written elsewhere; at the end it is at ``path``, if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        yield new
        check_place(path, "--out", overwrite=overwrite)  # once more: the work took its time
        new.replace(path)
    logger.info("Wrote %s.", path)


def write_cells(cells: AnnData, path: Path, *, overwrite: bool) -> None:
    """Write cells to an h5ad file."""
    with new_file(path, overwrite=overwrite) as file:
        cells.write_h5ad(file)


def write_table(table: pd.DataFrame, path: Path, *, overwrite: bool, index: bool) -> None:
    """Write a table, with commas between its columns or, in a .tsv, with tabs."""
    with new_file(path, overwrite=overwrite) as file:
        table.to_csv(file, sep="\t" if path.suffix.lower() == ".tsv" else ",", index=index)
