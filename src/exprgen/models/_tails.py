r"""How far out the mean of a new donor's cells lies: tail probabilities without a resolution.

Given the donor's effect u, the sum S of a gene's counts over n cells has a mean M(u) and a
variance V(u) in closed form (:mod:`exprgen.spaces._donor`). It is taken as negative binomial of
these two moments, which it is exactly where cells are independent negative binomials of one mean,
and Poisson where :math:`V \le M`; the mean of continuous values as normal. Then

.. math::
    P(S \ge s) = \int t(u)\, P(S \ge s \mid u)\, du

over a new donor's Student t law, by the trapezoidal rule in :math:`\operatorname{arsinh}` of the
standardised effect: nodes that are even near the centre and even in the logarithm far out, so that
probabilities of one in a billion are as exact, relative to their size, as those of one in ten. Of
draws a thousand times as many would be needed as there are tests. An interval of the mean is where
these probabilities, and no others, cross a level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import special, stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from exprgen.likelihoods import Likelihood
    from exprgen.spaces import Decoded
    from exprgen.spaces._donor import DonorEffect

__all__ = ["Tails", "tails_of_mean"]

_N_NODES, _REACH = 401, 6.0  # t up to sinh(6) = 202
_LARGEST_EFFECT = 50.0
_LEAST_TAIL = 1e-290
_MOST_STEPS = 1e15  # whole numbers are exact up to here, and beyond


@dataclass(frozen=True)
class Tails:
    """Of the mean of ``n_cells`` values, per gene ``(n_vars,)``.

    ``expected`` is the mean of the law, ``at_most`` the probability of the observed mean or less,
    ``at_least`` of it or more; ``law`` is that of the sum, no value lies below ``least``.
    """

    expected: np.ndarray
    at_most: np.ndarray
    at_least: np.ndarray
    law: _LawOfSum
    least: np.ndarray
    n_cells: int

    @property
    def p_value(self) -> np.ndarray:
        """Two-sided; of counts at least its nominal size."""
        return np.clip(2 * np.minimum(self.at_most, self.at_least), 1e-300, 1)

    def interval(self, beyond: float) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest mean neither of whose tails is below ``beyond``, each ``(n_vars,)``.

        The tails are those of ``p_value``, so that the observed mean is outside if its smaller one
        is below ``beyond``, and only then.
        """
        ends = self.law.interval(max(beyond, _LEAST_TAIL))
        lower, upper = (np.maximum(end / self.n_cells, self.least) for end in ends)
        return lower, upper


@torch.no_grad()
def tails_of_mean(
    likelihood: Likelihood,
    donors: DonorEffect,
    decoded: Decoded,
    observed: np.ndarray,
    n_cells: int,
    parameter_share: Tensor | None = None,
) -> Tails:
    """Place of an observed mean in its law for a new donor.

    Parameters
    ----------
    likelihood, donors
        Of the model's space.
    decoded
        Draws of the decoder's output, without a donor.
    observed
        Sum over ``n_cells`` cells, ``(n_vars,)``.
    n_cells
        Cells in the mean.
    parameter_share
        Share of a value's variance that a predictor's parameters leave, ``(n_vars,)``: it is the
        same in all cells, and does not average out.
    """
    centre, scale = donors.heavy_law()
    at = np.linspace(-_REACH, _REACH, _N_NODES)
    weight = stats.t.pdf(np.sinh(at), donors.dof) * np.cosh(at)
    effect = centre + scale * torch.from_numpy(np.sinh(at)).to(scale)[:, None]
    effect = effect.clamp(-_LARGEST_EFFECT, _LARGEST_EFFECT)
    mean, variance = (part.numpy() for part in donors.moments_at(likelihood, decoded, effect))
    shared = 0.0 if parameter_share is None else parameter_share.double().cpu().numpy()
    law = (_LawOfCounts if likelihood.is_count else _LawOfValues)(
        weight / weight.sum(), n_cells * mean, n_cells * (1 + (n_cells - 1) * shared) * variance
    )
    genes = np.arange(len(observed))
    return Tails(
        expected=donors.terms(likelihood, decoded, -1)[0].double().cpu().numpy(),
        at_most=law.at_most(observed, genes),
        at_least=law.at_least(observed, genes),
        law=law,
        least=torch.as_tensor(likelihood.lower).double().cpu().numpy(),
        n_cells=n_cells,
    )


@dataclass(frozen=True)
class _LawOfSum(ABC):
    """Mixture over nodes of ``weight`` ``(n,)``; moments of the sum at each, ``(n, n_vars)``."""

    weight: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @abstractmethod
    def at_most(self, total: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """P(S <= total) of some genes, ``(len(genes),)``."""

    @abstractmethod
    def at_least(self, total: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """P(S >= total) of some genes, ``(len(genes),)``."""

    @property
    @abstractmethod
    def unit(self) -> np.ndarray:
        """To how much an end of an interval is known, ``(n_vars,)``."""

    def interval(self, beyond: float) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest sum neither of whose tails is below ``beyond``, ``(n_vars,)``."""
        unit, edge = self.unit, special.ndtri(beyond)

        def lower(steps: np.ndarray, genes: np.ndarray) -> np.ndarray:
            return _probit(self.at_most(unit[genes] * steps, genes)) - edge

        def upper(steps: np.ndarray, genes: np.ndarray) -> np.ndarray:
            return edge - _probit(self.at_least(unit[genes] * steps, genes))

        low, high = (self._roughly(tail, edge) / unit for tail in (beyond, 1 - beyond))
        middle = self.mean[len(self.mean) // 2] / unit
        return (
            unit * _first(lower, middle - low, low / 4),
            unit * (_first(upper, middle + high, high / 4) - 1),
        )

    def _roughly(self, tail: float, edge: float) -> np.ndarray:
        """Distance of a quantile from the middle, as if donors and cells were normal."""
        node = min(int(np.searchsorted(self.weight.cumsum(), tail)), len(self.weight) - 1)
        between = self.mean[node] - self.mean[len(self.mean) // 2]
        return np.hypot(between, edge * np.sqrt(self.variance[node]))


class _LawOfCounts(_LawOfSum):
    """Negative binomial at each node."""

    def at_most(self, total: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """Of a total that is no whole number as of the next smaller one."""
        size, share = self._shape(genes)
        total = np.floor(total)
        tails = special.betainc(size, np.maximum(total, 0) + 1, 1 - share)
        return np.where(total < 0, 0.0, np.clip(self.weight @ tails, 0, 1))

    def at_least(self, total: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """Of a total that is no whole number as of the next larger one."""
        size, share = self._shape(genes)
        total = np.ceil(total)
        tails = special.betainc(np.maximum(total, 1), size, share)
        return np.where(total < 1, 1.0, np.clip(self.weight @ tails, 0, 1))

    def _shape(self, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inverse dispersion, so large that it is Poisson where it must be, and p."""
        mean = np.maximum(self.mean[:, genes], 1e-30)
        excess = np.maximum(self.variance[:, genes] - mean, 1e-9 * mean)
        size = mean**2 / np.maximum(excess, 1e-300)
        return size, mean / (mean + size)

    @property
    def unit(self) -> np.ndarray:
        return np.ones(self.mean.shape[1])


class _LawOfValues(_LawOfSum):
    """Normal at each node."""

    def at_most(self, total: np.ndarray, genes: np.ndarray) -> np.ndarray:
        return np.clip(self.weight @ special.ndtr(self._score(total, genes)), 0, 1)

    def at_least(self, total: np.ndarray, genes: np.ndarray) -> np.ndarray:
        return np.clip(self.weight @ special.ndtr(-self._score(total, genes)), 0, 1)

    def _score(self, total: np.ndarray, genes: np.ndarray) -> np.ndarray:
        sd = np.sqrt(np.maximum(self.variance[:, genes], 1e-300))
        return (total - self.mean[:, genes]) / sd

    @property
    def unit(self) -> np.ndarray:
        middle = len(self.mean) // 2
        sd = np.sqrt(self.variance[middle])
        return 1e-6 * sd + 1e-9 * np.abs(self.mean[middle]) + 1e-12


def _probit(probability: np.ndarray) -> np.ndarray:
    return special.ndtri(np.clip(probability, 1e-300, 1 - 1e-16))


def _first(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], start: np.ndarray, step: np.ndarray
) -> np.ndarray:
    """Least whole number at which an increasing function is 0 or more, per gene ``(n_vars,)``.

    Bracketed in growing steps from ``start``, then by false position and bisection in turn.
    ``score`` takes numbers and the genes that they are of.
    """
    start, step = start.clip(-_MOST_STEPS, _MOST_STEPS), step.clip(1, _MOST_STEPS)
    low, high = np.floor(start - step), np.ceil(start + step)
    genes = np.arange(len(start))
    at_low, at_high = score(low, genes), score(high, genes)
    while (far := np.flatnonzero((at_low >= 0) & (low > -_MOST_STEPS))).size:
        step[far] *= 4
        high[far], at_high[far] = low[far], at_low[far]
        low[far] = np.floor(np.maximum(low[far] - step[far], -_MOST_STEPS))
        at_low[far] = score(low[far], far)
    while (far := np.flatnonzero((at_high < 0) & (high < _MOST_STEPS))).size:
        step[far] *= 4
        low[far], at_low[far] = high[far], at_high[far]
        high[far] = np.ceil(np.minimum(high[far] + step[far], _MOST_STEPS))
        at_high[far] = score(high[far], far)
    interpolate = True
    found = (at_low < 0) & (at_high >= 0)  # else it lies beyond all steps
    while (open_ := np.flatnonzero(found & (high - low > 1))).size:
        left, right = low[open_], high[open_]
        share = at_low[open_] / (at_low[open_] - at_high[open_]) if interpolate else 0.5
        at = np.clip(np.floor(left + share * (right - left)), left + 1, right - 1)
        value = score(at, open_)
        above = value >= 0
        high[open_[above]], at_high[open_[above]] = at[above], value[above]
        low[open_[~above]], at_low[open_[~above]] = at[~above], value[~above]
        interpolate = not interpolate
    return high
