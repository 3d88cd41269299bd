"""The contract of a likelihood p(x | location)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

__all__ = ["Likelihood"]


class Likelihood(nn.Module, ABC):
    """p(x | location): what the decoder's output means for the data.

    ``location`` is ``(n_obs, n_vars)``; parameters that cells share live in the module.
    """

    is_count: bool
    """Whether draws are counts."""

    @abstractmethod
    def initialize(self, expected: Tensor, expected_square: Tensor, residual: Tensor) -> None:
        """Start from the training cells, as if only depth told them apart.

        Parameters
        ----------
        expected, expected_square, residual
            Sums over cells of the expected value Lρ, of its square, and of the squared difference
            from it, each ``(n_vars,)``.
        """

    @abstractmethod
    def log_prob(self, x: Tensor, location: Tensor) -> Tensor:
        """Log-probability (counts) or log-density, summed over genes: ``(n_obs,)``, nats."""

    @abstractmethod
    def draw(self, location: Tensor, generator: torch.Generator) -> Tensor:
        """Draw data, ``(n_obs, n_vars)``."""

    @abstractmethod
    def mean(self, location: Tensor) -> Tensor:
        """Expected value, ``(n_obs, n_vars)``."""

    def signal(self, location: Tensor) -> Tensor:
        """Expected value without outliers, ``(n_obs, n_vars)``: what denoising is after."""
        return self.mean(location)

    @abstractmethod
    def variance(self, location: Tensor) -> Tensor:
        """Variance given the location, ``(n_obs, n_vars)``."""
