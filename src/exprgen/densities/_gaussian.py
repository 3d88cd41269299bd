r"""A Gaussian with mean and standard deviation that depend on the conditions.

:math:`p(y|c) = \mathcal N(\mu(c), \mathrm{diag}\,\sigma^2(c))`; its KL divergence from a
diagonal Gaussian has a closed form. Without conditions it is scVI's prior with a learned scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from exprgen.densities._base import ConditionalDensity

__all__ = ["Gaussian", "normal_log_prob"]


class Gaussian(ConditionalDensity):
    """Diagonal conditional Gaussian; ``log_prob`` is *exact*.

    Parameters
    ----------
    n_dims, n_features
        See :class:`~exprgen.densities.ConditionalDensity`.
    n_hidden
        Width of the hidden layer through which conditions interact.
    """

    def __init__(self, n_dims: int, n_features: int, *, n_hidden: int = 64) -> None:
        super().__init__(n_dims, n_features)
        self.linear = nn.Linear(n_features, 2 * n_dims, bias=False)
        self.interaction = nn.Sequential(
            nn.Linear(n_features, n_hidden), nn.SiLU(), nn.Linear(n_hidden, 2 * n_dims)
        )
        for layer in (self.linear, self.interaction[-1]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def parameters_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log standard deviations, both ``(n_obs, n_dims)``."""
        mean, log_sd = (self.linear(features) + self.interaction(features)).chunk(2, dim=-1)
        return mean, log_sd

    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Exact log-density, ``(n_obs,)``, nats."""
        mean, log_sd = self.parameters_of(features)
        return normal_log_prob(y, mean, log_sd).sum(-1)

    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Exact log-density of the last coordinate, ``(n_obs,)``, nats."""
        mean, log_sd = self.parameters_of(features)
        return normal_log_prob(last, mean[:, -1], log_sd[:, -1])

    def sample(
        self, features: Tensor, generator: torch.Generator, last: Tensor | None = None
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``; coordinates are independent given the conditions."""
        mean, log_sd = self.parameters_of(features)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        y = mean + log_sd.exp() * noise
        if last is not None:
            y[:, -1] = last
        return y

    def mean(self, features: Tensor) -> Tensor:
        """E[y | c], ``(n_obs, n_dims)``."""
        return self.parameters_of(features)[0]

    def kl(self, mean: Tensor, sd: Tensor, y: Tensor, features: Tensor) -> Tensor:
        """KL(q ‖ p) in closed form, ``(n_obs,)``; an observed coordinate (sd 0) enters as data."""
        prior_mean, prior_log_sd = self.parameters_of(features)
        ratio = (sd.square() + (mean - prior_mean).square()) * (-2 * prior_log_sd).exp()
        inferred = sd > 0
        log_sd = torch.where(inferred, sd, torch.ones_like(sd)).log()
        constant = torch.where(inferred, -1.0, math.log(2 * math.pi))
        return (0.5 * (ratio + constant) + prior_log_sd - log_sd).sum(-1)


def normal_log_prob(y: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """Log-density of Gaussians, in the shape that the arguments broadcast to, nats."""
    standardised = (y - mean) * (-log_sd).exp()
    return -0.5 * standardised.square() - log_sd - 0.5 * math.log(2 * math.pi)
