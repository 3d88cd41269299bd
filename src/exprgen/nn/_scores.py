r"""Normal scores of a gene: coordinates in which its values are standard normal.

With :math:`F_g` the distribution of gene g over the training cells, :math:`\Phi^{-1}(F_g(x))` is
standard normal wherever F is continuous. Expression has a peak besides, at the gene's least value
:math:`b_g`, which a share :math:`\pi_g` of the cells have: what is not detected. No smooth map
makes a peak of a normal law, so a value at the peak stands for an interval of scores,

.. math::
    u \sim \mathcal N(0, 1) \text{ given } u < t_g = \Phi^{-1}(\pi_g) \quad (x = b_g), \qquad
    u = \Phi^{-1}(F_g(x)) \ge t_g \quad (x > b_g),

from which it is drawn anew whenever it is needed: dequantisation :cite:p:`theis2016`. Over all
training cells every u is then N(0, 1), and :math:`u \mapsto x` is monotone: the least value up to
the threshold t, above it the inverse of F, here piecewise linear between quantiles, half of which
are evenly spaced in F and half in u, and linear beyond the largest value of training.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import special
from torch import Tensor, nn

__all__ = ["NormalScores", "normal_density"]

_N_KNOTS = 32
# Two knots are at least this share of a gene's spread apart: values that repeat would otherwise
# have an unbounded density. Over all knots it moves no value by more than a twentieth.
_SMALLEST_STEP = math.exp(-6) / 2
# Genes of fewer values above the bound take the typical slope of the others beyond their range.
_ENOUGH = 10
# Directions beyond the axes that are asked for, for the search to be accurate.
_N_OVERSAMPLED = 10


def normal_density(u: Tensor) -> Tensor:
    """Density of the standard normal law, of the same shape."""
    return (-0.5 * u.square()).exp() / math.sqrt(2 * math.pi)


class NormalScores(nn.Module):
    """Values of genes and their normal scores; and the cells' leading axes in these.

    Parameters
    ----------
    n_vars
        Genes.
    n_axes
        Principal axes of the scores.
    """

    values: Tensor
    scores: Tensor
    share: Tensor
    axes: Tensor
    spread: Tensor

    def __init__(self, n_vars: int, n_axes: int) -> None:
        super().__init__()
        line = torch.linspace(0, 1, _N_KNOTS + 2).repeat(n_vars, 1)
        # Knots of the map, the first at the bound and its threshold.
        self.register_buffer("values", line)
        self.register_buffer("scores", line.clone())
        self.register_buffer("share", torch.full((n_vars,), 0.5))
        self.register_buffer("axes", torch.zeros(n_vars, n_axes))
        self.register_buffer("spread", torch.ones(n_axes))

    @torch.no_grad()
    def fit(self, values: Tensor, lower: Tensor) -> None:
        """Take map and axes from data.

        Parameters
        ----------
        values
            Of training cells, ``(n_obs, n_vars)``.
        lower
            Each gene's least value in all of training, ``(n_vars,)``.
        """
        x, bound = values.double().numpy(), lower.double().numpy()
        n_obs, n_vars = x.shape
        above = [column[column > least] for column, least in zip(x.T, bound, strict=True)]
        # Half a cell for what no cell showed.
        share = np.array([1 - len(some) / n_obs for some in above])
        share = share.clip(0.5 / n_obs, 1 - 0.5 / n_obs)
        sd = np.array([some.std() if len(some) >= _ENOUGH else np.nan for some in above])
        spread = x.std(axis=0)
        typical = np.nanmedian(sd) if np.isfinite(sd).any() else 1.0
        sd = np.where(sd > 0, sd, typical if typical > 0 else 1.0)
        digits = 4 * np.finfo(np.float32).eps * np.abs(x).max(axis=0)
        step = np.maximum(_SMALLEST_STEP * np.where(spread > 0, spread, 1.0), digits)
        knots_x, knots_u = np.zeros((2, n_vars, _N_KNOTS + 2))
        for g, some in enumerate(above):
            knots_x[g], knots_u[g] = _knots(some, bound[g], share[g], sd[g])
        places = step[:, None] * np.arange(_N_KNOTS + 2)
        knots_x = np.maximum.accumulate(knots_x - places, axis=1) + places
        for buffer, array in (
            (self.values, knots_x),
            (self.scores, knots_u),
            (self.share, share),
        ):
            buffer.copy_(torch.from_numpy(array))
        mean, _ = self.moments(values.to(self.share))
        n_axes = min(len(self.spread), *mean.shape)
        some = min(n_axes + _N_OVERSAMPLED, *mean.shape)
        _, singular, axes = torch.svd_lowrank(mean, q=some, niter=4)
        singular, axes = singular[:n_axes], axes[:, :n_axes]
        # The sign of an axis is arbitrary: most of its weight is positive.
        axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)
        self.axes[:, :n_axes] = axes
        self.spread[:n_axes] = (singular / n_obs**0.5).clamp(min=1e-6)

    @property
    def lower(self) -> Tensor:
        """Each gene's least value, ``(n_vars,)``."""
        return self.values[:, 0]

    @property
    def threshold(self) -> Tensor:
        """Score below which a gene has its least value, ``(n_vars,)``."""
        return self.scores[:, 0]

    @property
    def mean_at_bound(self) -> Tensor:
        """Mean score of the least value, ``(n_vars,)``."""
        return -normal_density(self.threshold) / self.share

    @property
    def mean_above(self) -> Tensor:
        """Mean score of the values above it, ``(n_vars,)``."""
        return normal_density(self.threshold) / (1 - self.share)

    def at_bound(self, x: Tensor) -> Tensor:
        """Which values are the least, ``(n_obs, n_vars)``."""
        return x <= self.lower

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the scores of values, both ``(n_obs, n_vars)``; sd 0 above the bound."""
        mean, threshold = self.mean_at_bound, self.threshold
        variance = 1 + threshold * mean - mean.square()
        at_bound = self.at_bound(x)
        scores = _between(x, self.values, self.scores)
        sd = variance.clamp(min=1e-12).sqrt()
        return torch.where(at_bound, mean, scores), torch.where(at_bound, sd, torch.zeros_like(sd))

    def draw_below(self, n_obs: int, generator: torch.Generator | None = None) -> Tensor:
        """Scores of the least value, ``(n_obs, n_vars)``: normal, given below the threshold."""
        uniform = torch.rand(n_obs, len(self.share), generator=generator).to(self.share)
        return torch.special.ndtri(uniform.clamp(min=1e-7) * self.share)

    def value(self, u: Tensor) -> Tensor:
        """Values that scores stand for, ``(n_obs, n_vars)``."""
        x = _between(u, self.scores, self.values)
        return torch.where(u > self.threshold, x, self.lower)

    def log_slope(self, x: Tensor) -> Tensor:
        r"""Log-derivative :math:`\log du/dx` above the bound, 0 at it, ``(n_obs, n_vars)``."""
        slope = self.scores.diff() / self.values.diff()
        piece = _piece(x, self.values)
        of_piece = slope.log().T.gather(0, piece)
        return torch.where(self.at_bound(x), torch.zeros_like(of_piece), of_piece)


def _knots(above: np.ndarray, bound: float, share: float, sd: float) -> np.ndarray:
    """Values and scores of a gene's knots, ``(2, n_knots + 2)``."""
    n = max(len(above), 1)
    # Where the least and the largest value stand among those above the bound. Of few cells the
    # least is near the bound all the same: hardly any cell lies between.
    low, high = min(0.5 / n, 0.02), 1 - 0.5 / n
    first, last = special.ndtri(share + (1 - share) * np.array([low, high]))
    even = special.ndtri(share + (1 - share) * np.linspace(low, high, _N_KNOTS // 2 + 2)[1:-1])
    u = np.sort(np.r_[np.linspace(first, last, _N_KNOTS - _N_KNOTS // 2), even])
    rank = ((special.ndtr(u) - share) / (1 - share) - low) / (high - low)
    x = np.quantile(above, rank.clip(0, 1)) if len(above) else bound + sd * np.ones(_N_KNOTS)
    middle = _N_KNOTS // 2
    slope = max((x[-1] - x[middle]) / (u[-1] - u[middle]), sd)
    return np.array([[bound, *x, x[-1] + slope], [float(special.ndtri(share)), *u, u[-1] + 1]])


def _piece(x: Tensor, knots: Tensor) -> Tensor:
    """Number of the piece between knots ``(n_vars, n)`` that each x is in, ``(n_obs, n_vars)``."""
    place = torch.searchsorted(knots, x.T.contiguous()) - 1
    return place.clamp(0, knots.shape[1] - 2).T


def _between(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear function of x, ``(n_obs, n_vars)``; linear beyond the last knots."""
    piece = _piece(x, knots)
    slope = (values.diff() / knots.diff()).T.gather(0, piece)
    return values.T.gather(0, piece) + slope * (x - knots.T.gather(0, piece))
