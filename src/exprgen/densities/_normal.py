"""The standard normal law, whatever the conditions are; nothing in it is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from exprgen.densities._base import ConditionalDensity
from exprgen.densities._gaussian import normal_log_prob

__all__ = ["StandardNormal"]


class StandardNormal(ConditionalDensity):
    """N(0, I); ``log_prob`` is *exact*."""

    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Exact log-density, ``(n_obs,)``, nats."""
        return normal_log_prob(y, torch.zeros_like(y), torch.zeros_like(y)).sum(-1)

    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Exact log-density of the last coordinate, ``(n_obs,)``, nats."""
        return self.log_prob(last[:, None], features)

    def sample(
        self, features: Tensor, generator: torch.Generator, last: Tensor | None = None
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``."""
        y = torch.randn(len(features), self.n_dims, generator=generator).to(features)
        if last is not None:
            y[:, -1] = last
        return y

    def mean(self, features: Tensor) -> Tensor:
        """0, ``(n_obs, n_dims)``."""
        return features.new_zeros(len(features), self.n_dims)
