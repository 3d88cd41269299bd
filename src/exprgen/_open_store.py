"""A zarr store that is still there.

Zarr takes what it does not find for what was never written, which is all 0: of a store that was
removed, or replaced by another, it reads counts of 0 and does not say so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from zarr.storage import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["OpenStore"]


class OpenStore(LocalStore):
    """A folder to read from, as long as it is the one that was opened.

    Parameters
    ----------
    root
        The folder.
    read_only
        As zarr takes it.
    """

    def __init__(self, root: Path, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self._opened = _identity(root)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Read a file of the store.

        Raises
        ------
        OSError
            If the folder is no longer the one that was opened.
        """
        value = await super().get(key, *args, **kwargs)
        if _identity(self.root) != self._opened:
            raise OSError(  # zarr takes a FileNotFoundError for a 0, too
                f"{self.root} was removed or replaced since it was opened: open it again."
            )
        return value


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        said = os.stat(folder)
    except OSError:
        return None
    return said.st_dev, said.st_ino
