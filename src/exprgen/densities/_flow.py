r"""A normalizing flow whose splines depend on the conditions.

.. math::
    p(y|c) = p(y_d \mid c)\; p(y_{1 \dots d-1} \mid y_d, c), \qquad
    y = \mu(c) + \sigma(c) \odot u,

with each factor of u's law the image of a standard Gaussian under rational-quadratic splines
:cite:p:`durkan2019`, which have a closed inverse. Each transformation couples two halves of the
coordinates; autoregressive ones fitted no better and took 2.5 times as long to sample. The last
coordinate comes first: its marginal and the law of the rest given it can be read off, as fixing
the depth needs. Splines act on [-5, 5] and leave what lies outside as it is; conditions therefore
move and scale y beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exprgen.densities._base import ConditionalDensity
from exprgen.densities._gaussian import Gaussian, normal_log_prob

__all__ = ["NormalizingFlow"]

_N_MEAN_DRAWS = 2048


class NormalizingFlow(ConditionalDensity):
    """Conditional neural spline flow; ``log_prob`` is *exact*, ``mean`` an *estimate*.

    Parameters
    ----------
    n_dims, n_features
        See :class:`~exprgen.densities.ConditionalDensity`.
    n_transforms
        Spline transformations of all coordinates but the last, one after the other.
    n_bins
        Pieces of each spline.
    n_hidden
        Width of the hidden layers that give the splines.
    """

    def __init__(
        self,
        n_dims: int,
        n_features: int,
        *,
        n_transforms: int = 4,
        n_bins: int = 8,
        n_hidden: int = 64,
    ) -> None:
        super().__init__(n_dims, n_features)
        from zuko.flows import NSF

        hidden = {"hidden_features": (n_hidden, n_hidden), "activation": nn.SiLU}
        self.frame = Gaussian(n_dims, n_features, n_hidden=n_hidden)
        self.last = NSF(1, n_features, bins=n_bins, transforms=1, **hidden)
        self.rest: nn.Module | None = None
        if n_dims > 1:
            self.rest = NSF(
                n_dims - 1,
                n_features + 1,
                bins=n_bins,
                transforms=n_transforms,
                passes=2,
                **hidden,
            )

    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Exact log-density, ``(n_obs,)``, nats."""
        mean, log_sd = self.frame.parameters_of(features)
        u = (y - mean) * (-log_sd).exp()
        value = _log_prob(self.last(features), u[:, -1:]) - log_sd.sum(-1)
        if self.rest is None:
            return value
        context = torch.cat([features, u[:, -1:]], 1)
        return value + _log_prob(self.rest(context), u[:, :-1])

    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Exact log-density of the last coordinate, ``(n_obs,)``, nats."""
        mean, log_sd = self.frame.parameters_of(features)
        u = (last - mean[:, -1]) * (-log_sd[:, -1]).exp()
        return _log_prob(self.last(features), u[:, None]) - log_sd[:, -1]

    def sample(
        self, features: Tensor, generator: torch.Generator, last: Tensor | None = None
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``: Gaussian noise through the inverse transformations."""
        mean, log_sd = self.frame.parameters_of(features)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        if last is None:
            u_last = self.last(features).transform.inv(noise[:, -1:])
        else:
            u_last = ((last - mean[:, -1]) * (-log_sd[:, -1]).exp())[:, None]
        parts = [u_last]
        if self.rest is not None:
            context = torch.cat([features, u_last], 1)
            parts.insert(0, self.rest(context).transform.inv(noise[:, :-1]))
        y = mean + log_sd.exp() * torch.cat(parts, 1)
        return y if last is None else torch.cat([y[:, :-1], last[:, None].to(y)], 1)

    def mean(self, features: Tensor) -> Tensor:
        """E[y | c], ``(n_obs, n_dims)``: an *estimate* from 2,048 draws, always the same ones."""
        distinct, row = torch.unique(features, dim=0, return_inverse=True)
        means = [
            self.sample(one.expand(_N_MEAN_DRAWS, -1), torch.Generator().manual_seed(0)).mean(0)
            for one in distinct
        ]
        return torch.stack(means)[row] if means else features.new_zeros(0, self.n_dims)


def _log_prob(law: Any, u: Tensor) -> Tensor:
    """Log-density of standardised coordinates under a flow, ``(n_obs,)``."""
    noise, log_det = law.transform.call_and_ladj(u)
    zero = torch.zeros_like(noise)
    return normal_log_prob(noise, zero, zero).sum(-1) + log_det
