"""Seeds, generators, and the promise that the global random states are never touched."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BLOCK_SIZE",
    "generator",
    "isolated",
    "random_states",
    "resolve_seed",
    "set_random_states",
]

BLOCK_SIZE = 512
"""Cells per block of sampling; the noise of a block depends on the seed and its number only."""


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``, or scvi-tools' global seed, or fresh entropy.

    Parameters
    ----------
    seed
        An integer from 0 up, or ``None``.

    Raises
    ------
    TypeError, ValueError
        If it is no such integer.
    """
    if seed is None:
        from scvi import settings

        if settings.seed is not None:
            return int(settings.seed)
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer or None, got {seed!r}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}.")
    return int(seed)


def generator(seed: int, *key: int) -> torch.Generator:
    """CPU generator whose stream depends on ``seed`` and ``key``, such as (purpose, block)."""
    # A spawn key, for plain entropy is padded with zeros: (0, 1) would be the same as (0, 1, 0).
    sequence = np.random.SeedSequence(int(seed), spawn_key=[int(k) for k in key])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators inside, and restore them after.

    Training runs through libraries that draw from the global generators; the caller's streams
    go on as if it had not happened.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  (libraries draw from it)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def random_states() -> dict[str, Any]:
    """Where the global generators are that :func:`isolated` seeds, in plain types."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the global generators where they were; of GPUs as many as there are."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)
