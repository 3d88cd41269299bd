"""The contract of a conditional density p(y | c)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["ConditionalDensity", "gaussian_entropy"]


def gaussian_entropy(sd: Tensor) -> Tensor:
    """Entropy of a diagonal Gaussian, ``(n_obs,)``, nats; coordinates with sd 0 are data.

    A coordinate that is observed rather than inferred has no posterior, hence no entropy.
    """
    inferred = sd > 0
    log_sd = torch.where(inferred, sd, torch.ones_like(sd)).log()
    return log_sd.sum(-1) + inferred.sum(-1) * 0.5 * math.log(2 * math.pi * math.e)


class ConditionalDensity(nn.Module, ABC):
    """p(y | c) for y of shape ``(n_obs, n_dims)``, given condition features.

    Parameters
    ----------
    n_dims
        Dimensions of y.
    n_features
        Width of the condition features.
    """

    estimator: str = "exact"
    """What ``log_prob`` is: exact, estimate or bound."""

    def __init__(self, n_dims: int, n_features: int) -> None:
        super().__init__()
        self.n_dims = n_dims
        self.n_features = n_features

    @abstractmethod
    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Log-density, ``(n_obs,)``, nats."""

    @abstractmethod
    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Log-density of the last coordinate alone, ``(n_obs,)``, nats."""

    @abstractmethod
    def sample(
        self, features: Tensor, generator: torch.Generator, last: Tensor | None = None
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``; with ``last`` ``(n_obs,)``, given its last coordinate.

        The noise comes from the CPU ``generator`` and is moved to the features' device.
        """

    @abstractmethod
    def mean(self, features: Tensor) -> Tensor:
        """E[y | c], ``(n_obs, n_dims)``."""

    def kl(self, mean: Tensor, sd: Tensor, y: Tensor, features: Tensor) -> Tensor:
        """KL(q ‖ p) of q = N(mean, sd²) from its draw ``y``, ``(n_obs,)``: an unbiased estimate.

        The entropy of q is exact, its cross-entropy with p a single draw's.
        """
        return -gaussian_entropy(sd) - self.log_prob(y, features)
