r"""Continuous expression: Gaussians, alone or mixed, that cannot fall below a gene's least value.

Normalised, log-transformed expression is continuous but for one value: what was not detected is 0,
in nine of ten entries of a droplet experiment. A Gaussian density sees these zeros as a peak, and
draws that are clipped at 0 afterwards come out too large, by what the negative half was meant to
balance. Hence the law here is that of the clipped variable itself (Tobin's censored, or rectified,
Gaussian :cite:p:`tobin1958`): with b the gene's least value in training,

.. math::
    x = \max(b, \mu + \sigma\varepsilon), \qquad
    p(x) = \begin{cases} 0 & x < b \\ \Phi(a) & x = b \\
    \frac1\sigma\,\varphi\big(\tfrac{x - \mu}{\sigma}\big) & x > b \end{cases},
    \qquad a = \frac{b - \mu}{\sigma},

a probability at b, a density above and nothing below. Likelihood, draws, mean and variance are of
this one law. Its moments are :math:`E x = \mu + \sigma m_1` and
:math:`\mathrm{Var}\,x = \sigma^2 (m_2 - m_1^2)` with

.. math::
    m_1 = \varphi(a) + a\,\Phi(a), \qquad m_2 = 1 - \Phi(a) + a\,\varphi(a) + a^2\,\Phi(a).

For data without a peak, whose least value is one cell's, it is a Gaussian to all intents. The
*mixture* gives a gene several such modes, at distances and with spreads of its own, and lets the
cell decide with which weights, and where they lie together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exprgen.likelihoods._base import Dispersion, Likelihood, Start

if TYPE_CHECKING:
    from torch import Generator

__all__ = ["Gaussian", "MixtureOfGaussians", "PointMass", "Rectified"]

# No component is narrower than this share of the gene's own spread, e^-6: a value that repeats
# would otherwise have an unbounded density.
_SMALLEST_LOG_SD = -6.0
# A value that is the bound but for rounding, in shares of the gene's spread and of the bound.
_ROUNDING = 1e-5, 1e-6
# So far below the mean a bound is none; and its square is a number.
_NO_BOUND = -40.0


class Rectified(Likelihood):
    """What both have: a scale and a bound per gene, and the law of the rectified Gaussian."""

    is_count = False
    lower: Tensor
    scale: Tensor

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(n_vars))
        # Finite, for files; as good as none.
        self.register_buffer("lower", torch.full((n_vars,), -1e30))

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """Spread and least value of each gene; the rest is relative to these."""
        self.scale.copy_((start.residual / start.n_obs).sqrt())
        self.lower.copy_(start.minimum)

    def below(self, x: Tensor) -> Tensor:
        """Which values lie below the bound by more than rounding: no draw can be there."""
        of_spread, of_bound = _ROUNDING
        lower = self.lower.to(x)
        return x < lower - of_spread * self.scale.to(x) - of_bound * lower.abs()

    def _sd(self, log_sd: Tensor, like: Tensor) -> Tensor:
        """Standard deviations from logarithms relative to the gene's spread."""
        return self.scale.to(like) * log_sd.to(like).clamp(min=_SMALLEST_LOG_SD, max=4).exp()

    def _log_prob(self, x: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        """Log-probability at the bound, log-density above it, minus infinity below it."""
        lower = self.lower.to(mean)
        at_bound = x <= lower
        standardised = (torch.where(at_bound, lower.expand_as(x), x) - mean) / sd
        density = -0.5 * standardised.square() - sd.log() - 0.5 * math.log(2 * math.pi)
        # Each branch gets arguments at which its gradient is finite.
        mass = torch.special.log_ndtr(torch.where(at_bound, standardised, 0.0))
        value = torch.where(at_bound, mass, torch.where(at_bound, 0.0, density))
        return value.masked_fill(self.below(x), -math.inf)

    def _moments(self, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the rectified Gaussian."""
        a = ((self.lower.to(mean) - mean) / sd).clamp(min=_NO_BOUND)
        below = torch.special.ndtr(a)
        density = (-0.5 * a.square()).exp() / math.sqrt(2 * math.pi)
        first = density + a * below
        second = torch.special.ndtr(-a) + a * density + a.square() * below
        return mean + sd * first, sd.square() * (second - first.square()).clamp(min=0)

    @staticmethod
    def _log_mass(lower: Tensor, upper: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        """Log-probability of an interval before clipping, without loss of digits in the tails."""
        low, high = (lower - mean) / sd, (upper - mean) / sd
        flip = low > 0
        low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
        log_high = torch.special.log_ndtr(high)
        ratio = (torch.special.log_ndtr(low) - log_high).exp().clamp(max=1 - 1e-16)
        return log_high + torch.log1p(-ratio)


class Gaussian(Rectified):
    """Gaussian values, at least the gene's least in training; location = centre.

    Parameters
    ----------
    n_vars
        Number of genes.
    dispersion
        ``"gene"``: one standard deviation per gene. ``"gene-cell"``: a further head of the
        decoder is added to its logarithm.
    """

    def __init__(self, n_vars: int, *, dispersion: Dispersion = "gene") -> None:
        super().__init__(n_vars)
        self.n_heads = 1 + (dispersion == "gene-cell")
        self.log_sd = nn.Parameter(torch.zeros(n_vars))

    def sd(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Standard deviation before clipping, ``(n_vars,)`` or ``(n_obs, n_vars)``."""
        log_sd = self.log_sd if extra is None else self.log_sd + extra[:, 0]
        return self._sd(log_sd, location)

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Exact; nats per cell, in the precision of ``location``: a density above the bound."""
        return self._log_prob(x.to(location.dtype), location, self.sd(location, extra)).sum(-1)

    def log_interval(
        self, lower: Tensor, upper: Tensor, location: Tensor, extra: Tensor | None = None
    ) -> Tensor:
        """Log-probability, before clipping, of ``(lower, upper]`` of each gene: sum, ``(n_obs,)``.

        Both bounds are ``(n_obs, n_vars)``; the lower ones may be minus infinity.
        """
        return self._log_mass(lower, upper, location, self.sd(location, extra)).sum(-1)

    def draw(self, location: Tensor, generator: Generator, extra: Tensor | None = None) -> Tensor:
        """Values as float32, on the CPU."""
        noise = torch.randn(location.shape, generator=generator)
        drawn = location.cpu() + self.sd(location, extra).detach().cpu() * noise
        return torch.maximum(drawn.float(), self.lower.cpu().float())

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Of the clipped value, in units of the layer."""
        return self._moments(location, self.sd(location, extra))[0]

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Of the clipped value, in squared units of the layer."""
        return self._moments(location, self.sd(location, extra))[1]


class PointMass(Rectified):
    """Values without noise: location = value. For spaces in which y says all of a cell."""

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Log-probability, 0 or minus infinity."""
        same = (x.to(location.dtype) == location).all(-1)
        return torch.where(same, 0.0, -math.inf).to(location.dtype)

    def draw(self, location: Tensor, generator: Generator, extra: Tensor | None = None) -> Tensor:
        """The location as float32, on the CPU."""
        return location.cpu().float()

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """The location."""
        return location

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """None."""
        return torch.zeros_like(location)


class MixtureOfGaussians(Rectified):
    """A mixture of Gaussian values, at least the gene's least in training.

    The location is a common centre. Distances of the components from it, and their spreads,
    belong to the gene; weights to gene and cell, by one head of the decoder for each component
    but the first. Distances per cell as well would leave nothing for the centre to say.

    Parameters
    ----------
    n_vars
        Number of genes.
    n_components
        Number of Gaussians, at least 2.
    """

    def __init__(self, n_vars: int, *, n_components: int = 2) -> None:
        super().__init__(n_vars)
        self.n_components = n_components
        self.n_heads = n_components
        # Apart by one standard deviation in all, whose sum of variances is that of the gene.
        offset = torch.linspace(-0.5, 0.5, n_components)
        within = 0.5 * float((1 - offset.square().mean()).log())
        self.logit = nn.Parameter(torch.zeros(n_components, n_vars))
        self.offset = nn.Parameter(offset[:, None].repeat(1, n_vars))
        self.log_sd = nn.Parameter(torch.full((n_components, n_vars), within))

    def components(
        self, location: Tensor, extra: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and standard deviations, broadcastable to ``(n_obs, K, n_vars)``."""
        logit = self.logit.to(location)[None]
        if extra is not None:
            logit = logit + torch.cat([torch.zeros_like(extra[:, :1]), extra], 1)
        mean = location[:, None] + self.scale.to(location) * self.offset.to(location)
        return logit.log_softmax(1), mean, self._sd(self.log_sd, location)[None]

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Exact; nats per cell, in the precision of ``location``: a density above the bound."""
        log_weight, mean, sd = self.components(location, extra)
        x = x.to(location.dtype)[:, None].expand_as(mean)
        return (log_weight + self._log_prob(x, mean, sd)).logsumexp(1).sum(-1)

    def log_interval(
        self, lower: Tensor, upper: Tensor, location: Tensor, extra: Tensor | None = None
    ) -> Tensor:
        """As :meth:`Gaussian.log_interval`, of the mixture."""
        log_weight, mean, sd = self.components(location, extra)
        log_mass = self._log_mass(lower[:, None], upper[:, None], mean, sd)
        return (log_weight + log_mass).logsumexp(1).sum(-1)

    def draw(self, location: Tensor, generator: Generator, extra: Tensor | None = None) -> Tensor:
        """Values as float32, on the CPU."""
        parts = (part.detach().cpu() for part in self.components(location, extra))
        log_weight, mean, sd = torch.broadcast_tensors(*parts)
        uniform = torch.rand(location.shape, generator=generator)
        noise = torch.randn(location.shape, generator=generator)
        chosen = (uniform[:, None] > log_weight.exp().cumsum(1)).sum(1, keepdim=True)
        chosen = chosen.clamp(max=self.n_components - 1)
        drawn = mean.gather(1, chosen)[:, 0] + sd.gather(1, chosen)[:, 0] * noise
        return torch.maximum(drawn.float(), self.lower.cpu().float())

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Of the clipped value, in units of the layer."""
        log_weight, mean, sd = self.components(location, extra)
        return (log_weight.exp() * self._moments(mean, sd)[0]).sum(1)

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Of the clipped value, in squared units of the layer: within components and between."""
        log_weight, mean, sd = self.components(location, extra)
        weight = log_weight.exp()
        means, variances = self._moments(mean, sd)
        total = (weight * means).sum(1, keepdim=True)
        return (weight * (variances + (means - total).square())).sum(1)
