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

import torch
from torch import Tensor, nn

from exprgen.densities._base import ConditionalDensity

__all__ = ["Mixture"]


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

    def _components(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights ``(n, K)``, means ``(n, K, d)`` and whitening matrices ``(n, K, d, d)``."""
        raw = self.linear(features) + self.interaction(features)
        raw = raw.view(len(features), self.n_components, -1)
        logits, mean, log_diagonal, off_diagonal = raw.split(self._sizes, dim=-1)
        whitening = torch.diag_embed(log_diagonal.clamp(-6, 6).exp())
        whitening[..., self._rows, self._columns] = off_diagonal
        return logits.squeeze(-1).log_softmax(-1), mean, whitening

    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Exact log-density, ``(n_obs,)``, nats."""
        log_weight, mean, whitening = self._components(features)
        white = torch.einsum("nkij,nkj->nki", whitening, y.unsqueeze(1) - mean)
        log_det = whitening.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_normal = log_det - 0.5 * white.square().sum(-1)
        constant = 0.5 * self.n_dims * math.log(2 * math.pi)
        return torch.logsumexp(log_weight + log_normal, dim=-1) - constant

    def _last(self, last: Tensor, mean: Tensor, whitening: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened last coordinate and its log-density per component, both ``(n, K)``."""
        scale = whitening[..., -1, -1]
        white = scale * (last.unsqueeze(-1) - mean[..., -1])
        return white, scale.log() - 0.5 * white.square() - 0.5 * math.log(2 * math.pi)

    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Exact log-density of the last coordinate, ``(n_obs,)``, nats."""
        log_weight, mean, whitening = self._components(features)
        return torch.logsumexp(log_weight + self._last(last, mean, whitening)[1], dim=-1)

    def sample(
        self, features: Tensor, generator: torch.Generator, last: Tensor | None = None
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``: a component by its (posterior) weight, then a Gaussian."""
        log_weight, mean, whitening = self._components(features)
        uniform = torch.rand(len(features), 1, generator=generator).to(mean)
        noise = torch.randn(len(features), self.n_dims, generator=generator).to(mean)
        if last is not None:
            white_last, log_normal = self._last(last, mean, whitening)
            log_weight = (log_weight + log_normal).log_softmax(-1)
        cumulative = log_weight.exp().cumsum(-1)
        component = (uniform > cumulative).sum(-1).clamp(max=self.n_components - 1)
        chosen = torch.arange(len(features), device=mean.device), component
        if last is not None:
            noise[:, -1] = white_last[chosen]
        offset = torch.linalg.solve_triangular(
            whitening[chosen], noise.unsqueeze(-1), upper=True
        ).squeeze(-1)
        return mean[chosen] + offset

    def mean(self, features: Tensor) -> Tensor:
        """E[y | c], ``(n_obs, n_dims)``."""
        log_weight, mean, _ = self._components(features)
        return (log_weight.exp().unsqueeze(-1) * mean).sum(1)
