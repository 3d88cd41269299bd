r"""Likelihoods of expression given its mean.

The negative binomial with mean :math:`\mu` and inverse dispersion :math:`\theta` (variance
:math:`\mu + \mu^2/\theta`) is written in :math:`s = \log\mu - \log\theta`:

.. math::
    \log p(x) = x s - (\theta + x)\,\mathrm{softplus}(s)
                + \log\Gamma(x+\theta) - \log\Gamma(\theta) - \log\Gamma(x+1).

Every gamma term vanishes where the count is 0, so that log-gammas (and digammas in the gradient)
are evaluated on the non-zero counts only, about one in ten of a droplet experiment; the form is
exact, and stays finite for any :math:`\theta`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["Likelihood", "NegativeBinomial", "draw_negative_binomial", "negative_binomial_log_prob"]

# Above this mean, inverting the distribution function term by term is slower than drawing a
# gamma and a Poisson number.
_INVERSION_MAX_MEAN = 16.0
# The recursion of the probabilities stops here; the far tail is inverted by scipy.
_INVERSION_MAX_COUNT = 63


class _NegativeBinomialLogProb(torch.autograd.Function):
    """Log-probability summed over genes, with the analytic gradient.

    With ``s = log_mean - log_dispersion`` and σ the logistic function, the derivatives are
    ``x - (θ + x) σ(s)`` by ``s`` and, at fixed ``log_mean``, minus that plus
    ``θ (digamma(x + θ) - digamma(θ) - softplus(s))`` by ``log_dispersion``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
        s = log_mean - log_dispersion
        theta = log_dispersion.exp()
        log1p_ratio = softplus(s)
        value = (x * s - (theta + x) * log1p_ratio).sum(-1)
        rows, genes = x.nonzero(as_tuple=True)
        counts = x[rows, genes]
        theta_nz = theta[genes] if theta.dim() == 1 else theta[rows, genes]
        gammas = (
            torch.lgamma(counts + theta_nz) - torch.lgamma(theta_nz) - torch.lgamma(counts + 1)
        )
        value = value.index_add(0, rows, gammas)
        ctx.save_for_backward(x, s, theta, log1p_ratio, rows, genes)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor | None]:
        x, s, theta, log1p_ratio, rows, genes = ctx.saved_tensors
        weight = grad.unsqueeze(-1)
        by_log_mean = x - (theta + x) * torch.sigmoid(s)
        by_log_mean *= weight
        if not ctx.needs_input_grad[2]:
            return None, by_log_mean, None
        counts = x[rows, genes]
        theta_nz = theta[genes] if theta.dim() == 1 else theta[rows, genes]
        digammas = (torch.digamma(counts + theta_nz) - torch.digamma(theta_nz)) * grad[rows]
        if theta.dim() == 1:
            by_theta = (-(weight * log1p_ratio).sum(0)).index_add(0, genes, digammas)
            return None, by_log_mean, theta * by_theta - by_log_mean.sum(0)
        by_theta = (-weight * log1p_ratio).index_put((rows, genes), digammas, accumulate=True)
        return None, by_log_mean, theta * by_theta - by_log_mean


def negative_binomial_log_prob(x: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """Log-probability of counts under negative binomials, summed over genes. *Exact.*

    Parameters
    ----------
    x
        Counts, ``(n_obs, n_vars)``, not negative.
    log_mean
        Natural logarithm of the means, ``(n_obs, n_vars)``.
    log_dispersion
        Natural logarithm of the inverse dispersions θ, ``(n_vars,)`` or ``(n_obs, n_vars)``.

    Returns
    -------
    ``(n_obs,)``, nats per cell, in the precision of the arguments: held-out likelihoods want
    float64, for in float32 the gamma terms lose digits at large θ.
    """
    return _NegativeBinomialLogProb.apply(x, log_mean, log_dispersion)


def draw_negative_binomial(
    log_mean: Tensor, log_dispersion: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw counts: inversion of the distribution function where the mean is small.

    Most genes of most cells are 0, which one uniform number and one exponential decide; the
    recursion ``p(k+1) = p(k) (k+θ)/(k+1) σ(s)`` then runs on the few that are left. Large means
    are drawn as Poisson numbers with gamma-distributed rates.

    Parameters
    ----------
    log_mean
        ``(n_obs, n_vars)``, on the CPU.
    log_dispersion
        ``(n_vars,)`` or ``(n_obs, n_vars)``.
    generator
        A CPU generator; the global one is not touched.

    Returns
    -------
    Counts ``(n_obs, n_vars)``, float32.
    """
    log_dispersion = log_dispersion.expand_as(log_mean)
    s = log_mean - log_dispersion
    log_p0 = -log_dispersion.exp() * softplus(s)
    counts = torch.zeros_like(log_mean, dtype=torch.float32)
    # Double precision: a float32 uniform number cannot reach quantiles beyond 1 - 6e-8.
    uniform = torch.rand(log_mean.shape, generator=generator, dtype=torch.float64)
    large = log_mean > np.log(_INVERSION_MAX_MEAN)
    todo = ((uniform > log_p0.exp()) & ~large).nonzero(as_tuple=True)
    counts[todo] = _invert(uniform[todo], s[todo].double(), log_dispersion[todo].double().exp())
    if large.any():
        theta = log_dispersion[large].double().exp()
        rate = torch._standard_gamma(theta, generator=generator) * s[large].double().exp()
        counts[large] = torch.poisson(rate, generator=generator).float()
    return counts


def _invert(uniform: Tensor, s: Tensor, theta: Tensor) -> Tensor:
    """Smallest count whose distribution function reaches ``uniform``; all float64, ``(n,)``."""
    counts = torch.zeros_like(uniform, dtype=torch.float32)
    success = torch.sigmoid(s)
    probability = torch.exp(-theta * softplus(s))
    cumulative = probability.clone()
    index = torch.arange(len(uniform))
    for k in range(1, _INVERSION_MAX_COUNT + 1):
        probability = probability * success * ((k - 1 + theta) / k)
        cumulative = cumulative + probability
        found = uniform <= cumulative
        counts[index[found]] = k
        rest = ~found
        index, uniform, theta = index[rest], uniform[rest], theta[rest]
        success, probability, cumulative = success[rest], probability[rest], cumulative[rest]
        if len(index) == 0:
            return counts
    tail = stats.nbinom.ppf(uniform.numpy(), theta.numpy(), 1 - success.numpy())
    counts[index] = torch.from_numpy(tail).float()
    return counts


class Likelihood(nn.Module, ABC):
    """p(x | location): what the decoder's output means for the data.

    ``location`` is ``(n_obs, n_vars)``; parameters that cells share live in the module.
    """

    is_count: bool
    """Whether draws are counts."""

    @abstractmethod
    def log_prob(self, x: Tensor, location: Tensor) -> Tensor:
        """Log-probability (counts) or log-density, summed over genes: ``(n_obs,)``, nats."""

    @abstractmethod
    def draw(self, location: Tensor, generator: torch.Generator) -> Tensor:
        """Draw data, ``(n_obs, n_vars)``."""

    @abstractmethod
    def mean(self, location: Tensor) -> Tensor:
        """Expected value, ``(n_obs, n_vars)``."""

    @abstractmethod
    def variance(self, location: Tensor) -> Tensor:
        """Variance given the location, ``(n_obs, n_vars)``."""


class NegativeBinomial(Likelihood):
    """Negative binomial counts with one inverse dispersion per gene; location = log mean.

    Parameters
    ----------
    n_vars
        Number of genes.
    """

    is_count = True

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.log_dispersion = nn.Parameter(torch.zeros(n_vars))

    def log_prob(self, x: Tensor, location: Tensor) -> Tensor:
        """Exact; nats per cell, in the precision of ``location``."""
        return negative_binomial_log_prob(
            x.to(location.dtype), location, self.log_dispersion.to(location.dtype)
        )

    def draw(self, location: Tensor, generator: torch.Generator) -> Tensor:
        """Integer counts as float32, on the CPU."""
        return draw_negative_binomial(
            location.cpu(), self.log_dispersion.detach().cpu(), generator
        )

    def mean(self, location: Tensor) -> Tensor:
        """``exp(location)``, in counts."""
        return location.exp()

    def variance(self, location: Tensor) -> Tensor:
        """``μ + μ²/θ``, in counts squared."""
        mean = location.exp()
        return mean + mean.square() * (-self.log_dispersion).exp()
