r"""Continuous expression as a mean that is known, and a residual with a law of its own.

.. math::
    x_g = \max\big(b_g,\; \mu_g(c) + s_g(c)\, r_g\big), \qquad r_g = Q_g(u_g), \qquad
    u_g = \lambda_g + \psi_g\,\varepsilon_g, \quad \varepsilon_g \sim \mathcal N(0, 1),

with the predicted mean :math:`\mu` and the scale s as further heads, the location
:math:`\lambda` of a cell's state, and the quantile function Q of a gene's standardised residuals
at normal probabilities: a residual need not be normal, but its score u is, over all cells.
Values cannot fall below the bound b: there, as in Tobin's law :cite:p:`tobin1958`, is a
probability, above it a density. Q is piecewise linear on an even grid of scores, and goes on so.

Residuals of few cells say little about the tails of a single gene, those of all genes together a
lot: of n cells the gene's own quantiles have the weight n / (n + 100), the rest is common.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import special
from torch import Tensor

from exprgen.likelihoods._gaussian import Rectified

if TYPE_CHECKING:
    from torch import Generator

__all__ = ["ResidualLaw"]

_LARGEST, _N_GRID = 5.0, 81
_STEP = 2 * _LARGEST / (_N_GRID - 1)
# Cells that the common law is worth.
_PRIOR_CELLS = 100.0
# Quantiles rise by at least this per unit of score, in units of the residual's spread: of values
# that repeat the density would otherwise have no bound.
_SMALLEST_SLOPE = math.exp(-6)
_N_NODES = 21
_MOST_POOLED = 1_000_000


class ResidualLaw(Rectified):
    """Residuals around a known mean; location = mean score, further heads the mean and log scale.

    A third head, if there is one, is the share of the noise that is left: 0 where the location is
    the score of a cell's own value.

    Parameters
    ----------
    n_vars
        Number of genes.
    """

    quantiles: Tensor
    sd: Tensor
    n_heads = 3

    def __init__(self, n_vars: int) -> None:
        super().__init__(n_vars)
        grid = torch.linspace(-_LARGEST, _LARGEST, _N_GRID)
        self.register_buffer("quantiles", grid.repeat(n_vars, 1))
        self.register_buffer("sd", torch.ones(n_vars))

    @torch.no_grad()
    def fit(self, residuals: np.ndarray) -> None:
        """Take the quantile functions from standardised residuals, ``(n_obs, n_vars)``.

        Each is shifted to have the mean 0: the mean is the predictor's.
        """
        grid = np.linspace(-_LARGEST, _LARGEST, _N_GRID)
        n_obs = len(residuals)
        own = _quantiles(np.sort(residuals, axis=0), grid)
        some = residuals.ravel()[:: max(1, residuals.size // _MOST_POOLED)]
        pooled = _quantiles(np.sort(some)[:, None], grid)
        weight = n_obs / (n_obs + _PRIOR_CELLS)
        curve = weight * own + (1 - weight) * pooled
        steps = (_SMALLEST_SLOPE * _STEP * np.arange(_N_GRID))[:, None]
        curve = np.maximum.accumulate(curve - steps, axis=0) + steps
        mass = np.exp(-0.5 * grid**2)
        curve = curve - (mass / mass.sum()) @ curve
        self.quantiles.copy_(torch.from_numpy(curve.T))

    def value(self, u: Tensor) -> Tensor:
        """Residuals of scores, ``(n_obs, n_vars)``."""
        return _on_grid(self.quantiles.to(u), u)

    def score(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of residuals, and how much a residual grows with its score there.

        Both ``(n_obs, n_vars)``.
        """
        curve = self.quantiles.to(r)
        left = (torch.searchsorted(curve, r.T.contiguous()) - 1).clamp(0, _N_GRID - 2).T
        at = left + _N_GRID * torch.arange(len(curve), device=r.device)
        low, high = curve.take(at), curve.take(at + 1)
        slope = (high - low) / _STEP
        return left * _STEP - _LARGEST + (r - low) / slope, slope

    def standardised(self, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of values, slopes there, and which values are at the bound.

        All ``(n_obs, n_vars)``; the score of the bound is that below which values are at it.
        """
        lower = self.lower.to(extra)
        at_bound = x <= lower
        values = torch.where(at_bound, lower.expand_as(x), x.to(extra))
        score, slope = self.score((values - extra[:, 0]) * (-extra[:, 1]).exp())
        return score, slope, at_bound

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Exact; nats per cell: a probability at the bound, a density above it."""
        extra = _heads(extra)
        score, slope, at_bound = self.standardised(x, extra)
        sd = self._noise(extra)
        white = (score - location) / sd
        log_width = sd.log() + slope.log() + extra[:, 1]
        density = -0.5 * white.square() - 0.5 * math.log(2 * math.pi) - log_width
        value = torch.where(at_bound, torch.special.log_ndtr(white), density)
        return value.masked_fill(self.below(x), -math.inf).sum(-1)

    def draw(self, location: Tensor, generator: Generator, extra: Tensor | None = None) -> Tensor:
        """Values as float32, on the CPU."""
        heads = _heads(extra)
        noise = torch.randn(location.shape, generator=generator).to(location)
        return self._values(location + self._noise(heads) * noise, heads).float().cpu()

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Of the clipped value, by quadrature over the noise, in units of the layer."""
        return self._moments(location, _heads(extra))[0]

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Of the clipped value, by quadrature over the noise."""
        return self._moments(location, _heads(extra))[1]

    def _moments(self, location: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, ``(n_obs, n_vars)``; of draws for one condition, from a grid."""
        if len(location) > _N_GRID and torch.allclose(extra, extra[:1], rtol=1e-5, atol=1e-6):
            grid = torch.linspace(-_LARGEST, _LARGEST, _N_GRID).to(location)
            of_grid = self._quadrature(grid[:, None].expand(-1, location.shape[1]), extra[:1])
            mean, variance = (_on_grid(table.T, location) for table in of_grid)
            return mean, variance.clamp(min=0)
        return self._quadrature(location, extra)

    def _quadrature(self, location: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        nodes, weights = np.polynomial.hermite_e.hermegauss(_N_NODES)
        sd = self._noise(extra)
        values = [self._values(location + sd * node, extra) for node in nodes.tolist()]
        weights = (weights / weights.sum()).tolist()
        mean = sum(w * v for w, v in zip(weights, values, strict=True))
        square = sum(w * (v - mean).square() for w, v in zip(weights, values, strict=True))
        return mean, square

    def _noise(self, extra: Tensor) -> Tensor:
        """Standard deviations of scores given a cell's state, ``(n_vars,)`` or of every value."""
        sd = self.sd.to(extra)
        return sd * extra[:, 2] if extra.shape[1] > 2 else sd

    def _values(self, u: Tensor, extra: Tensor) -> Tensor:
        values = extra[:, 0] + extra[:, 1].exp() * self.value(u)
        return torch.maximum(values, self.lower.to(values))


def _on_grid(curve: Tensor, u: Tensor) -> Tensor:
    """Piecewise linear functions ``(n_vars, n_grid)`` of u, ``(n_obs, n_vars)``."""
    curve = curve.contiguous()
    place = (u + _LARGEST) / _STEP
    left = place.floor().clamp(0, _N_GRID - 2)
    at = left.long() + _N_GRID * torch.arange(len(curve), device=u.device)
    low, high = curve.take(at), curve.take(at + 1)
    return low + (place - left) * (high - low)


def _heads(extra: Tensor | None) -> Tensor:
    if extra is None:
        raise ValueError("This law needs the mean and the log scale of every value.")
    return extra


def _quantiles(ordered: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Quantiles at normal scores, ``(n_grid, n_vars)``, of values in order, ``(n_obs, n_vars)``.

    The i-th of n values stands at the probability (i - ½) / n. Beyond the first and the last they
    go on as steeply as from the middle to there.
    """
    n_obs = len(ordered)
    if n_obs == 1:
        return np.zeros((len(grid), ordered.shape[1]))
    places = special.ndtri((np.arange(n_obs) + 0.5) / n_obs)
    left = (np.searchsorted(places, grid) - 1).clip(0, n_obs - 2)
    share = ((grid - places[left]) / (places[left + 1] - places[left])).clip(0, 1)[:, None]
    inner = (1 - share) * ordered[left] + share * ordered[left + 1]
    middle = np.median(ordered, axis=0)
    slope_low = (ordered[0] - middle) / places[0]
    slope_high = (ordered[-1] - middle) / places[-1]
    below = (grid - places[0]).clip(max=0)[:, None] * slope_low
    above = (grid - places[-1]).clip(min=0)[:, None] * slope_high
    return inner + below + above
