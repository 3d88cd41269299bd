"""Progress bars that appear only when there is something to wait for, and can be turned off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

from exprgen._random import BLOCK_SIZE

__all__ = ["blocks", "track"]

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, show: bool) -> Iterable[T]:
    """``items``, under a progress bar that appears after two seconds."""
    total = len(items) if isinstance(items, Sized) else None
    return tqdm(items, desc=description, total=total, disable=not show, delay=2, leave=False)


def blocks(n: int, description: str, *, show: bool) -> Iterator[tuple[int, slice]]:
    """Numbered slices of at most ``BLOCK_SIZE`` rows, under a progress bar."""
    for block, start in enumerate(track(range(0, n, BLOCK_SIZE), description, show=show)):
        yield block, slice(start, min(start + BLOCK_SIZE, n))
