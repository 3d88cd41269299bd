"""Lightning without its remarks on devices, products and its own future."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["quiet_lightning"]


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning says of devices, products and its own future; the rest stays."""
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = rank_zero.level
    rank_zero.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\)")
            # What is logged is over all processes already.
            warnings.filterwarnings("ignore", "It is recommended to use `self.log")
            yield
    finally:
        rank_zero.setLevel(level)
