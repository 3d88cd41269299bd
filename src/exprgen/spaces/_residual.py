r"""The space of residuals around a known mean: y = f, few factors that genes share.

.. math::
    x_g = \max\big(b_g,\; \mu_g(c) + s_g(c)\, Q_g(u_g)\big), \qquad
    u = \Lambda f + v_d + \psi \odot \varepsilon,

with the predictor's :math:`\mu`, scales s that depend on the conditions
(:mod:`exprgen.spaces._scale`), the law Q of each gene's residuals
(:class:`~exprgen.likelihoods.ResidualLaw`), factors f and donors' effects v
(:mod:`exprgen.spaces._factors`). All of it is fitted in closed form, to residuals of predictions
that never saw their cell; what is left for a density is p(f | c, μ(c)). Given a cell f is normal,
with the diagonal precision :math:`I + \Lambda^\top \psi^{-2} \Lambda`.

Where the predictor knows what its parameters leave open in its mean, a variance V(c), the scale is
:math:`\sqrt{s^2 + V}`: wider where there were few cells to learn from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch

from exprgen.likelihoods import ResidualLaw, Start
from exprgen.nn import normal_density
from exprgen.spaces._base import DataMoments, Decoded, GaussianPosterior
from exprgen.spaces._donor import LeftOutDonorEffect
from exprgen.spaces._factors import donor_effects, noise_of, shared_axes
from exprgen.spaces._scale import fit_log_scale, left_out_log_scale

if TYPE_CHECKING:
    from torch import Tensor

    from exprgen._layout import ConditionLayout
    from exprgen.spaces._mean import KnownMean

__all__ = ["ResidualSpace"]

_N_PARTS = 5
# Finite, for files; as good as none.
_NO_BOUND = -1e30
# What is left of a variance at least when that by the predictor's parameters is taken off.
_LEAST_SHARE = 0.2
# How much wider than anywhere in training a scale may be far from it; never narrower.
_BEYOND = math.log(3)


class ResidualSpace(GaussianPosterior):
    """Residuals around a known mean, and the factors that genes share in them.

    Parameters
    ----------
    n_vars
        Number of genes.
    layout
        Columns of the encoded conditions; behind them come the known means.
    n_latent
        Factors at most.
    is_correlated
        Whether there are any: without, residuals of genes are independent.
    """

    is_learned: ClassVar[bool] = False
    likelihood: ResidualLaw
    mean: KnownMean
    log_scale: Tensor
    reach: Tensor
    loadings: Tensor

    def __init__(
        self, n_vars: int, layout: ConditionLayout, *, n_latent: int, is_correlated: bool = True
    ) -> None:
        super().__init__(n_vars, layout, n_latent=n_latent, has_mean=True)
        self.likelihood = ResidualLaw(n_vars)
        self.is_correlated = is_correlated
        self.n_dims = n_latent
        self.depth = None
        self.donors = LeftOutDonorEffect(layout.n_donor, n_vars) if layout.n_donor else None
        if self.donors is not None:
            self.donors.requires_grad_(False)
        self.register_buffer("log_scale", torch.zeros(1 + sum(self.density_blocks), n_vars))
        self.register_buffer("reach", torch.tensor([-1e4, 1e4])[:, None].repeat(1, n_vars))
        self.register_buffer("loadings", torch.zeros(n_vars, n_latent))

    # What is fitted ------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, moments: DataMoments) -> None:
        """Fit all of the space to the training cells and what is predicted of them."""
        if moments.cells is None:
            raise ValueError("moments must have cells: residuals are fitted to them.")
        x, c, _ = moments.cells()
        residuals = (x.double() - self.mean.value(c).double()).numpy()
        features = self.density_features(c).double().numpy()
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        coefficients, precision = fit_log_scale(features, residuals, rng)
        log_scale = left_out_log_scale(features, residuals, coefficients, precision, rng)
        variance = self.mean.variance(c)
        if variance is not None:
            # Residuals as they would be if the predictor's parameters were known.
            total = np.exp(2 * log_scale)
            share = 1 - (variance.double().numpy() / total).clip(0, 1 - _LEAST_SHARE)
            coefficients, _ = fit_log_scale(features, residuals * np.sqrt(share), rng)
        self.log_scale.copy_(torch.from_numpy(coefficients))
        fitted = features @ coefficients
        self.reach[0] = torch.from_numpy(fitted.min(axis=0))
        self.reach[1] = torch.from_numpy(fitted.max(axis=0) + _BEYOND)
        standardised = residuals * np.exp(-log_scale)
        self.likelihood.fit(standardised)
        self.likelihood.initialize(_start(moments, residuals, _bound(x, moments.minimum)))
        scores, _ = self.likelihood.score(torch.from_numpy(standardised))
        self._fit_factors(scores.float(), self.features.donor(c))

    def _fit_factors(self, scores: Tensor, donors: Tensor) -> None:
        """Donors' effects and loadings from scores ``(n_obs, n_vars)``; the rest is noise."""
        common: Tensor | float = 0.0
        parts = torch.randperm(len(scores)) % _N_PARTS
        if self.donors is not None:
            mean, sd = donor_effects(scores, donors, self.donors.n_donors)
            self.donors.posterior_mean.copy_(mean)
            self.donors.posterior_log_sd.copy_(sd.log())
            scores = scores - self.donors.known(donors)
            common, parts = self.donors.variance(), donors
        if self.is_correlated:
            self.loadings.copy_(shared_axes(scores, self.n_latent, parts))
        self.likelihood.sd.copy_(noise_of(self.loadings, common).sqrt())
        # Rotated, factors are independent given a cell as well.
        weighted = self.loadings / self.likelihood.sd[:, None]
        _, rotation = torch.linalg.eigh(weighted.T @ weighted)
        self.loadings.copy_(self.loadings @ rotation.flip(1))

    # Verbs ---------------------------------------------------------------------------------

    def _heads(self, c: Tensor) -> Tensor:
        """Known mean and log scale of every value, ``(n_obs, 2, n_vars)``."""
        log_scale = self.density_features(c) @ self.log_scale
        log_scale = torch.minimum(torch.maximum(log_scale, self.reach[0]), self.reach[1])
        variance = self.mean.variance(c)
        if variance is not None:
            log_scale = 0.5 * torch.logaddexp(2 * log_scale, variance.clamp(min=1e-30).log())
        return torch.stack([self.mean.value(c), log_scale], 1)

    def parameter_share(self, c: Tensor) -> Tensor | None:
        """Share of each value's variance that the predictor's parameters leave, if it knows."""
        variance = self.mean.variance(c)
        if variance is None:
            return None
        return (variance * (-2 * self._heads(c)[:, 1]).exp()).clamp(max=1)

    def encode(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(f | x, c), both ``(n_obs, n_latent)``; ``library`` is not used.

        A value at the bound stands for all scores below its own, by their mean.

        Parameters
        ----------
        x
            Expression, ``(n_obs, n_vars)``.
        c
            Encoded conditions and known means.
        library
            Part of every space's signature.
        """
        score = self._scores(x, c)
        effect = self.known_effect(c)
        if effect is not None:
            score = score - effect
        weighted = self.loadings / self.likelihood.sd.square()[:, None]
        precision = 1 + (weighted * self.loadings).sum(0)
        mean = (score @ weighted) / precision
        return mean, precision.rsqrt().expand_as(mean)

    def _scores(self, x: Tensor, c: Tensor) -> Tensor:
        """Scores of values, ``(n_obs, n_vars)``; at the bound the mean of those below its own."""
        score, _, at_bound = self.likelihood.standardised(x, self._heads(c))
        below = -normal_density(score) / torch.special.ndtr(score).clamp(min=1e-12)
        return torch.where(at_bound, torch.maximum(below, score - 1), score)

    def held(self, x: Tensor, c: Tensor, new_c: Tensor) -> Decoded:
        """What values under conditions c are under others: their scores are held, no noise."""
        heads = self._heads(new_c)
        return Decoded(self._scores(x, c), torch.cat([heads, torch.zeros_like(heads[:, :1])], 1))

    def decode_at(
        self, z: Tensor, log_depth: Tensor | None, c: Tensor, effect: Tensor | None = None
    ) -> Decoded:
        """Mean scores, ``(n_obs, n_vars)``, and the heads of the law; there is no depth."""
        location = z @ self.loadings.T
        if effect is not None:
            location = cast("LeftOutDonorEffect", self.donors).move(location, effect)
        return Decoded(location, self._heads(c))


def _bound(x: Tensor, minimum: Tensor) -> Tensor:
    """Least value that draws can have, ``(n_vars,)``: a gene's own where cells pile up at it.

    Of other genes it is the least of all values, if several are as low: 0 of logarithms of
    counts. One cell's least value is no bound.
    """
    piles_up = (x.double() <= minimum).sum(0) > 1
    least = minimum.min()
    common = least if int((x.double() <= least).sum()) > 1 else torch.full_like(least, _NO_BOUND)
    return torch.where(piles_up, minimum, common)


def _start(moments: DataMoments, residuals: np.ndarray, lower: Tensor) -> Start:
    n_obs = len(moments.library)
    square = torch.from_numpy((residuals**2).mean(axis=0)) * n_obs
    return Start(
        n_obs=n_obs,
        expected=moments.x,
        expected_square=moments.x_square,
        residual=square,
        minimum=lower,
    )
