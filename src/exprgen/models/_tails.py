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
draws a thousand times as many would be needed as there are tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import special, stats

if TYPE_CHECKING:
    from torch import Tensor

    from exprgen.likelihoods import Likelihood
    from exprgen.spaces import Decoded
    from exprgen.spaces._donor import DonorEffect

__all__ = ["Tails", "tails_of_mean"]

_N_NODES, _REACH = 401, 6.0  # t up to sinh(6) = 202
_LARGEST_EFFECT = 50.0
_N_DRAWS = 2000


@dataclass(frozen=True)
class Tails:
    """Of the mean of ``n_cells`` values, per gene ``(n_vars,)``.

    ``expected`` is the mean of the law, ``at_most`` the probability of the observed mean or less,
    ``at_least`` of it or more; ``draws`` ``(n, n_vars)`` are means drawn from the law.
    """

    expected: np.ndarray
    at_most: np.ndarray
    at_least: np.ndarray
    draws: np.ndarray

    @property
    def p_value(self) -> np.ndarray:
        """Two-sided; of counts at least its nominal size."""
        return np.clip(2 * np.minimum(self.at_most, self.at_least), 1e-300, 1)


@torch.no_grad()
def tails_of_mean(
    likelihood: Likelihood,
    donors: DonorEffect,
    decoded: Decoded,
    observed: np.ndarray,
    n_cells: int,
    generator: torch.Generator,
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
    generator
        Source of ``draws``.
    """
    centre, scale = donors.heavy_law()
    at = np.linspace(-_REACH, _REACH, _N_NODES)
    weight = stats.t.pdf(np.sinh(at), donors.dof) * np.cosh(at)
    weight /= weight.sum()
    mean, variance = _moments(
        likelihood, donors, decoded, _effects(centre, scale, np.sinh(at)), n_cells
    )
    tails = _count_tails if likelihood.is_count else _normal_tails
    at_most, at_least = tails(observed, mean, variance)
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    drawn = np.sort(rng.standard_t(donors.dof, _N_DRAWS))
    moments = _moments(likelihood, donors, decoded, _effects(centre, scale, drawn), n_cells)
    lower = torch.as_tensor(likelihood.lower).double().cpu().numpy()
    draws = (_draw_counts if likelihood.is_count else _draw_normal)(rng, *moments) / n_cells
    return Tails(
        expected=donors.terms(likelihood, decoded, -1)[0].double().cpu().numpy(),
        at_most=np.clip(weight @ at_most, 0, 1),
        at_least=np.clip(weight @ at_least, 0, 1),
        draws=np.maximum(draws, lower),
    )


def _effects(centre: Tensor, scale: Tensor, standardised: np.ndarray) -> Tensor:
    """Effects of donors at standardised values, ``(n, n_vars)``."""
    effect = centre + scale * torch.from_numpy(standardised).to(scale)[:, None]
    return effect.clamp(-_LARGEST_EFFECT, _LARGEST_EFFECT)


def _moments(
    likelihood: Likelihood, donors: DonorEffect, decoded: Decoded, effect: Tensor, n_cells: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the sum over cells given each effect, ``(n, n_vars)``."""
    mean, variance = donors.moments_at(likelihood, decoded, effect)
    return n_cells * mean.numpy(), n_cells * variance.numpy()


def _dispersion(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Inverse dispersion of a negative binomial of these moments, so large that it is Poisson."""
    excess = np.maximum(variance - mean, 1e-9 * mean)
    return np.maximum(mean, 1e-30) ** 2 / np.maximum(excess, 1e-300)


def _count_tails(
    total: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """P(S <= total) and P(S >= total), each ``(n, n_vars)``."""
    mean = np.maximum(mean, 1e-30)
    size = _dispersion(mean, variance)
    share = mean / (mean + size)
    at_most = special.betainc(size, total + 1, 1 - share)
    at_least = np.where(total > 0, special.betainc(np.maximum(total, 1e-9), size, share), 1.0)
    return at_most, at_least


def _normal_tails(
    total: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same of a normal law."""
    z = (total - mean) / np.sqrt(np.maximum(variance, 1e-300))
    return special.ndtr(z), special.ndtr(-z)


def _draw_counts(rng: np.random.Generator, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    size = _dispersion(mean, variance)
    rate = rng.gamma(size) * np.maximum(mean, 1e-30) / size
    return rng.poisson(np.minimum(rate, 1e15)).astype(np.float64)


def _draw_normal(rng: np.random.Generator, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    return rng.normal(mean, np.sqrt(variance))
