r"""The space of the genes themselves: y = u, a normal score for every gene.

.. math::
    x_g = F_g^{-1}\big(\Phi(u_g)\big) \quad (u_g > t_g), \qquad x_g = b_g \quad (u_g \le t_g),

with the least value b and the threshold t of :mod:`exprgen.nn`. Nothing is learned but a density:
there is no autoencoder. A cell leaves nothing of its y open but the scores of what was not
detected,

.. math::
    q(u \mid x) = \prod_{g:\,x_g = b_g} \frac{\varphi(u_g)}{\Phi(t_g)}\, 1[u_g < t_g]
    \prod_{g:\,x_g > b_g} \delta\big(u_g - u_g(x_g)\big),

which is exactly p(u | x) under the law of all cells. As x is a function of u,

.. math::
    \log p(x \mid c) \ge \mathbb E_q\Big[\log p(u \mid c)
    + \sum_{x_g > b_g} \log \frac{du_g}{dx_g}
    - \sum_{x_g = b_g} \log \frac{\varphi(u_g)}{\Phi(t_g)}\Big].

The latent representation is the principal components of u, open scores at their mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch

from exprgen.likelihoods import PointMass, Start
from exprgen.nn import NormalScores
from exprgen.spaces._base import DataMoments, Decoded, Space

if TYPE_CHECKING:
    from torch import Tensor

    from exprgen._conditions import ConditionLayout

__all__ = ["GeneSpace"]


class GeneSpace(Space):
    """Normal scores of continuous values; conditions change nothing here.

    Parameters
    ----------
    n_vars
        Number of genes.
    layout
        Columns of the encoded conditions.
    n_latent
        Principal components.
    """

    is_learned: ClassVar[bool] = False
    has_noise: ClassVar[bool] = False
    likelihood: PointMass

    def __init__(self, n_vars: int, layout: ConditionLayout, *, n_latent: int) -> None:
        super().__init__(n_vars, layout, n_latent=n_latent)
        self.likelihood = PointMass(n_vars)
        self.n_dims = n_vars
        self.depth = self.donors = None
        self.scores = NormalScores(n_vars, n_latent)

    @torch.no_grad()
    def initialize(self, moments: DataMoments) -> None:
        """Start from the data: laws of the genes, principal axes of their scores."""
        if moments.cells is None:
            raise ValueError("moments must have cells: genes' laws are fitted to them.")
        x, _, _ = moments.cells()
        self.scores.fit(x, moments.minimum)
        n_obs = len(moments.library)
        square = moments.x.square() / n_obs
        self.likelihood.initialize(
            Start(
                n_obs=n_obs,
                expected=moments.x,
                expected_square=square,
                residual=(moments.x_square - square).clamp(min=0),
                minimum=moments.minimum,
            )
        )

    def encode(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the scores of values, both ``(n_obs, n_vars)``.

        Parameters
        ----------
        x
            Expression, ``(n_obs, n_vars)``.
        c, library
            Part of every space's signature.
        """
        return self.scores.moments(x)

    def draw(self, mean: Tensor, sd: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scores, ``(n_obs, n_vars)``; where sd is positive, below the threshold."""
        return torch.where(sd > 0, self.scores.draw_below(len(mean), generator), mean)

    def log_posterior(self, y: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        """Log q(u | x), ``(n_obs,)``, nats, float64."""
        log_normal = -0.5 * y.double().square() - 0.5 * math.log(2 * math.pi)
        return ((sd > 0) * (log_normal - self.scores.share.double().log())).sum(-1)

    def log_prob(self, x: Tensor, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Tensor:
        """Log-derivative of the scores, ``(n_obs,)``, nats, float64; y agrees with x.

        Minus infinity for a cell with a value below its gene's least.
        """
        value = self.scores.log_slope(x).double().sum(-1)
        return value.masked_fill(self.likelihood.below(x).any(-1), -math.inf)

    def decode(self, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Decoded:
        """The values that scores stand for, ``(n_obs, n_vars)``; there are no donors."""
        return Decoded(self.scores.value(y))

    def represent(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of the principal components of u given x, both ``(n_obs, n_latent)``."""
        mean, sd = self.encode(x, c, library)
        axes = self.scores.axes
        return mean @ axes, (sd.square() @ axes.square()).sqrt()
