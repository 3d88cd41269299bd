"""The contract of a likelihood p(x | decoder's output).

The decoder gives every cell and gene a *location*, and further numbers where a likelihood has more
than one *head*. Whatever moves expression (a donor, a planted change, a fixed depth) moves the
location; the other heads are left alone, and start at 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

__all__ = ["Dispersion", "Likelihood", "Start"]

Dispersion = Literal["gene", "gene-cell"]
"""Whether spread is one number per gene, or also depends on the cell through a head."""


@dataclass(frozen=True)
class Start:
    """Training cells as if only depth told them apart, to start a likelihood from.

    ``expected``, ``expected_square`` and ``residual`` are sums over the ``n_obs`` cells of the
    expected value, of its square, and of the squared difference from it; ``minimum`` is the least
    value; all ``(n_vars,)``.
    """

    n_obs: int
    expected: Tensor
    expected_square: Tensor
    residual: Tensor
    minimum: Tensor


class Likelihood(nn.Module, ABC):
    """p(x | location, extra): what the decoder's output means for the data.

    ``location`` is ``(n_obs, n_vars)``, ``extra`` ``(n_obs, n_heads - 1, n_vars)`` or ``None``,
    which stands for 0; parameters that cells share live in the module.
    """

    is_count: bool
    """Whether draws are counts."""

    n_heads: int = 1
    """Numbers per gene that the decoder gives."""

    lower: Tensor | float
    """Least value that a draw can have, a number or ``(n_vars,)``."""

    background: Tensor | float = 0.0
    """Part of the expected count that does not scale with ``exp(location)``."""

    @abstractmethod
    def initialize(self, start: Start) -> None:
        """Start from the training cells, as if only depth told them apart."""

    @abstractmethod
    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Log-probability (counts) or log-density, summed over genes: ``(n_obs,)``, nats."""

    @abstractmethod
    def draw(
        self, location: Tensor, generator: torch.Generator, extra: Tensor | None = None
    ) -> Tensor:
        """Draw data, ``(n_obs, n_vars)``, on the CPU."""

    @abstractmethod
    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Expected value, ``(n_obs, n_vars)``."""

    def signal(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Expected value without outliers, ``(n_obs, n_vars)``: what denoising is after."""
        return self.mean(location, extra)

    @abstractmethod
    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Variance given the decoder's output, ``(n_obs, n_vars)``."""
