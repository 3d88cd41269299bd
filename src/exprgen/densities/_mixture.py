r"""A mixture of Gaussians whose weights, means and covariances depend on the conditions.

.. math::
    p(y|c) = \sum_k \pi_k(c)\,\mathcal N\big(y; \mu_k(c), (A_k^\top A_k)^{-1}\big),

with :math:`A_k(c)` upper triangular and a positive diagonal, so that whitening is a product,
the determinant is the diagonal's, and the last coordinate's marginal and conditional laws can be
read off: :math:`(A(y-\mu))_d = A_{dd}(y_d-\mu_d)`. Fixing the depth and drawing the rest is
therefore exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from exprgen.densities._base import ConditionalDensity

__all__ = ["Mixture"]


class _Components(NamedTuple):
    """Per cell and component: log weight ``(n, K)``, mean and log diagonal of A ``(n, K, d)``.

    ``off_diagonal`` holds A's entries above the diagonal, ``(n, K, d (d - 1) / 2)``.
    """

    log_weight: Tensor
    mean: Tensor
    log_diagonal: Tensor
    off_diagonal: Tensor


class Mixture(ConditionalDensity):
    """Conditional mixture of full-covariance Gaussians; ``log_prob`` is *exact*.

    Parameters
    ----------
    n_dims, n_features
        See :class:`~exprgen.densities.ConditionalDensity`.
    n_components
        Number of Gaussians.
    n_hidden
        Width of the hidden layer through which conditions interact.
    """

    _rows: Tensor
    _columns: Tensor
    _to_rows: Tensor

    def __init__(
        self, n_dims: int, n_features: int, *, n_components: int = 10, n_hidden: int = 64
    ) -> None:
        super().__init__(n_dims, n_features)
        self.n_components = n_components
        n_off_diagonal = n_dims * (n_dims - 1) // 2
        self._sizes = [1, n_dims, n_dims, n_off_diagonal]
        n_outputs = n_components * sum(self._sizes)
        self.linear = nn.Linear(n_features, n_outputs, bias=False)
        last = nn.Linear(n_hidden, n_outputs)
        self.interaction = nn.Sequential(nn.Linear(n_features, n_hidden), nn.SiLU(), last)
        # Spread the means, everything else at 0: unit covariances, equal weights.
        for parameter in (self.linear.weight, last.weight, last.bias):
            nn.init.zeros_(parameter)
        with torch.no_grad():
            start = self.linear.weight[:, 0].view(n_components, sum(self._sizes))
            start[:, 1 : 1 + n_dims] = torch.randn(n_components, n_dims)
        rows, columns = torch.triu_indices(n_dims, n_dims, offset=1)
        self.register_buffer("_rows", rows, persistent=False)
        self.register_buffer("_columns", columns, persistent=False)
        to_rows = one_hot(rows, n_dims).float()
        self.register_buffer("_to_rows", to_rows, persistent=False)

    def _components(self, features: Tensor) -> _Components:
        raw = self.linear(features) + self.interaction(features)
        raw = raw.view(len(features), self.n_components, -1)
        logits, mean, log_diagonal, off_diagonal = raw.split(self._sizes, dim=-1)
        log_weight = logits.squeeze(-1).log_softmax(-1)
        return _Components(log_weight, mean, log_diagonal.clamp(-6, 6), off_diagonal)

    def _whitening(self, log_diagonal: Tensor, off_diagonal: Tensor) -> Tensor:
        """A as a matrix, ``(..., d, d)``."""
        whitening = torch.diag_embed(log_diagonal.exp())
        whitening[..., self._rows, self._columns] = off_diagonal
        return whitening

    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Exact log-density, ``(n_obs,)``, nats."""
        log_weight, mean, log_diagonal, off_diagonal = self._components(features)
        difference = y.unsqueeze(1) - mean
        # A (y - μ) without building A: products of its entries above the diagonal, summed by row.
        above = off_diagonal * difference.index_select(-1, self._columns)
        white = difference * log_diagonal.exp() + above @ self._to_rows.to(above.dtype)
        log_normal = log_diagonal.sum(-1) - 0.5 * (white * white).sum(-1)
        constant = 0.5 * self.n_dims * math.log(2 * math.pi)
        return torch.logsumexp(log_weight + log_normal, dim=-1) - constant

    def _last(self, last: Tensor, components: _Components) -> tuple[Tensor, Tensor]:
        """Whitened last coordinate and its log-density per component, both ``(n, K)``."""
        log_scale = components.log_diagonal[..., -1]
        white = log_scale.exp() * (last.unsqueeze(-1) - components.mean[..., -1])
        return white, log_scale - 0.5 * white.square() - 0.5 * math.log(2 * math.pi)

    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Exact log-density of the last coordinate, ``(n_obs,)``, nats."""
        components = self._components(features)
        return torch.logsumexp(components.log_weight + self._last(last, components)[1], dim=-1)

    def sample(
        self, features: Tensor, generator: torch.Generator, last: Tensor | None = None
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``: a component by its (posterior) weight, then a Gaussian."""
        components = self._components(features)
        log_weight, mean = components.log_weight, components.mean
        uniform = torch.rand(len(features), 1, generator=generator).to(mean)
        noise = torch.randn(len(features), self.n_dims, generator=generator).to(mean)
        if last is not None:
            white_last, log_normal = self._last(last, components)
            log_weight = (log_weight + log_normal).log_softmax(-1)
        cumulative = log_weight.exp().cumsum(-1)
        component = (uniform > cumulative).sum(-1).clamp(max=self.n_components - 1)
        chosen = torch.arange(len(features), device=mean.device), component
        if last is not None:
            noise[:, -1] = white_last[chosen]
        whitening = self._whitening(
            components.log_diagonal[chosen], components.off_diagonal[chosen]
        )
        offset = torch.linalg.solve_triangular(whitening, noise.unsqueeze(-1), upper=True)
        return mean[chosen] + offset.squeeze(-1)

    def mean(self, features: Tensor) -> Tensor:
        """E[y | c], ``(n_obs, n_dims)``."""
        components = self._components(features)
        return (components.log_weight.exp().unsqueeze(-1) * components.mean).sum(1)
