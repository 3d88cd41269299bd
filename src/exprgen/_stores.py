"""Cells in a zarr store: written block by block, all of them or none, and read where they lie.

A store is written in a hidden folder beside its place, and comes into place by a rename when it is
whole. Its layout is AnnData's own: ``anndata.read_zarr`` reads it, zarr format 3.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from exprgen._random import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import zarr
    from anndata import AnnData

__all__ = ["CellStore", "check_store", "new_store", "open_zarr", "stores_of"]

# Of the parts of a sparse matrix, 512 KiB, so that neighbouring cells are read with few others.
_CHUNK_VALUES = 2**17
# That are appended at once, for every time the last chunk is written anew.
_APPENDED_VALUES = 2**20


class CellStore:
    """A store that is being written, see :func:`new_store`."""

    def __init__(self, group: zarr.Group) -> None:
        self.group = group
        self._pending: list[sparse.csr_matrix] = []
        self._write("layers", {})

    def write(self, adata: AnnData) -> None:
        """Write all of an AnnData but its ``X`` and its layers."""
        self.flush()
        self._narrow()
        for name in ("obs", "var"):
            self._write(name, getattr(adata, name))
        for name in ("obsm", "uns"):
            self._write(name, dict(getattr(adata, name)))
        self.group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})

    def append(self, values: sparse.csr_matrix | np.ndarray) -> None:
        """Append rows ``(n, n_vars)`` to ``X``."""
        if isinstance(values, np.ndarray):
            x = self.dense("X", (0, values.shape[1])) if "X" not in self.group else self.group["X"]
            start = x.shape[0]
            x.resize((start + len(values), values.shape[1]))
            x[start:] = values
            return
        if "X" not in self.group:
            # Wide enough for any number of counts.
            empty = sparse.csr_matrix((0, values.shape[1]), dtype=values.dtype)
            self._write("X", empty, chunks=(_CHUNK_VALUES,), indptr_dtype=np.int64)
        self._pending.append(values)
        if sum(part.nnz for part in self._pending) >= _APPENDED_VALUES:
            self.flush()

    def flush(self) -> None:
        """Write what has been appended and is still in memory."""
        from anndata.io import sparse_dataset

        if self._pending:
            with _quietly():
                sparse_dataset(self.group["X"]).append(sparse.vstack(self._pending, "csr"))
            self._pending.clear()

    def _narrow(self) -> None:
        """Let pointers be of the type of the indices if they can: scanpy wants one for both."""
        import zarr

        x = self.group.get("X")
        if isinstance(x, zarr.Group) and x["data"].shape[0] <= np.iinfo(np.int32).max:
            attributes = x["indptr"].attrs.asdict()
            x.create_array("indptr", data=x["indptr"][:].astype(np.int32), overwrite=True)
            x["indptr"].attrs.update(attributes)

    def dense(self, name: str, shape: tuple[int, int]) -> zarr.Array:
        """A new matrix of float32, of blocks of 512 rows."""
        chunks = (BLOCK_SIZE, max(1, shape[1]))
        self._write(name, np.zeros((0, shape[1]), np.float32), chunks=chunks)
        array = self.group[name]
        array.resize(shape)
        return array

    def _write(self, name: str, value: Any, **options: Any) -> None:
        from anndata.io import write_elem

        with _quietly():
            write_elem(self.group, name, value, dataset_kwargs=options)


@contextmanager
def new_store(path: Path, *, overwrite: bool) -> Iterator[CellStore]:
    """Inside, a store is written; at the end it is at ``path``, or nothing is if it failed."""
    import zarr

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        store = CellStore(zarr.open_group(folder / "new", mode="w", zarr_format=3))
        yield store
        store.flush()
        check_store(path, overwrite=overwrite)  # once more, for sampling takes its time
        if path.exists():
            path.rename(folder / "old")
        (folder / "new").rename(path)
    finally:
        if not path.exists() and (folder / "old").exists():
            (folder / "old").rename(path)
        shutil.rmtree(folder, ignore_errors=True)


def check_store(
    path: str | os.PathLike[str], *, overwrite: bool, reading: Iterable[Any] = ()
) -> Path:
    """Where a store is to be written; ``~`` is the home folder.

    Parameters
    ----------
    path
        As the user gave it.
    overwrite
        Whether a zarr store that is there may be replaced.
    reading
        What is in use: of these the AnnData's own stores may not.

    Raises
    ------
    TypeError
        If it is no path.
    ValueError
        If it is the name of something else than a folder here, or a store that is being read.
    FileExistsError
        If something is there, unless it is a zarr store and may be replaced.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"backed must be a path, such as 'cells.zarr', or None; got {path!r}.")
    if "://" in str(path) or Path(path).suffix in (".h5ad", ".h5", ".zip"):
        raise ValueError(
            f"backed={str(path)!r} is a zarr store to be written, a folder on this machine: give "
            "a path such as 'cells.zarr'."
        )
    place = Path(path).expanduser().absolute()
    if not os.path.lexists(place):
        return place
    if not overwrite:
        raise FileExistsError(
            f"backed={str(path)!r} exists. Give another path, or overwrite=True to replace it."
        )
    if place.is_symlink() or not any((place / name).is_file() for name in _ROOTS):
        raise FileExistsError(
            f"backed={str(path)!r} exists and is no zarr store: overwrite=True replaces only "
            "those. Give another path."
        )
    for root in (root for cells in reading for root in stores_of(cells)):
        if place.resolve() in (root.resolve(), *root.resolve().parents):
            raise ValueError(
                f"backed={str(path)!r} is where the cells are that this model reads: overwrite="
                "True would remove their counts. Give another path."
            )
    return place


def stores_of(cells: Any) -> list[Path]:
    """The folders that matrices of an AnnData are read from; of anything else none."""
    from anndata import AnnData

    if not isinstance(cells, AnnData) or cells.isbacked:
        return []
    if cells.is_view:  # whose matrices would be read
        return stores_of(cells._adata_ref)
    matrices = (cells.X, *cells.layers.values())
    stores = (getattr(getattr(matrix, "group", matrix), "store", None) for matrix in matrices)
    roots = (getattr(store, "root", None) for store in stores)
    return [Path(root) for root in roots if root is not None]


_ROOTS = ("zarr.json", ".zgroup")


def open_zarr(path: str | os.PathLike[str]) -> AnnData:
    """Open cells in a zarr store without reading their matrices.

    ``X`` and layers stay where they are, and are read as far as they are asked for;
    ``.to_memory()`` reads everything. Every model can be set up with and trained on what is
    returned, see the guide on large data.

    Parameters
    ----------
    path
        What :func:`anndata.AnnData.write_zarr` wrote, or ``sample(backed=...)``. Of the latter
        counts are stored once: they are ``X`` and the layer of setup.

    Returns
    -------
    AnnData that cannot write to the store.

    Raises
    ------
    TypeError
        If it is no path.
    FileNotFoundError
        If nothing is there.
    OSError
        Later, when matrices are read, if the store is no longer the one that was opened.
    ValueError
        If it is no AnnData.
    """
    import zarr
    from anndata import AnnData
    from anndata.io import read_elem

    from exprgen._open_store import OpenStore

    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a path, such as 'cells.zarr', got {path!r}.")
    place = Path(path).expanduser().absolute()
    if not place.exists():
        raise FileNotFoundError(f"There is no zarr store {place}.")
    is_store = any((place / name).is_file() for name in _ROOTS)
    group = zarr.open(OpenStore(place), mode="r") if is_store else None
    if group is None or group.attrs.get("encoding-type") != "anndata":
        raise ValueError(
            f"{str(path)!r} holds no AnnData as zarr: write one by adata.write_zarr(path). An "
            "h5ad is opened by anndata.read_h5ad(path, backed='r')."
        )
    names = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp")
    parts = {name: read_elem(group[name]) for name in names if name in group}
    layers = {name: _opened(group["layers"][name]) for name in group.get("layers", ())}
    adata = AnnData(_opened(group["X"]) if "X" in group else None, layers=layers, **parts)
    layer = parts.get("uns", {}).get("exprgen", {}).get("layer", "")
    if layer and layer not in layers and adata.obs.get("synthetic", False) is not False:
        adata.layers[layer] = adata.X
    return adata


def _opened(element: zarr.Array | zarr.Group) -> Any:
    from anndata.io import read_elem, sparse_dataset

    kind = element.attrs.get("encoding-type", "array")
    if kind in ("csr_matrix", "csc_matrix"):
        return sparse_dataset(element)
    return element if kind == "array" else read_elem(element)


@contextmanager
def _quietly() -> Iterator[None]:
    """Chunks as asked for, and no advice on what anndata's next version does."""
    from anndata import settings

    name = "auto_shard_zarr_v3"
    chunks = settings.override(**{name: False}) if hasattr(settings, name) else nullcontext()
    with chunks, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
