r"""The network of a path whose data are normal scores of genes (:mod:`exprgen.nn`).

No network of a few hundred units passes on the noise of a thousand genes. Hence it says only
what the *state* of the cell changes in each gene, and the rest is in closed form. Were genes
independent given the state, and the law of a gene

.. math::
    p(u) \propto \varphi(u) \begin{cases} 1 & u < t \\
    e^{a + b (u - m) - \frac12 (e^s - 1)(u - m)^2} & u > t, \end{cases}

a tilt of the standard normal law above its threshold t, where m is the mean (at a = b = s = 0 it
is the law over all cells), then what is expected of u given the point :math:`u_t = \alpha u +
\sigma \varepsilon` is a ratio of normal integrals. With :math:`n^2 = \alpha^2 + \sigma^2`, the
posterior of a standard normal u is :math:`\mathcal N(\mu, \rho^2)`, with
:math:`\mu = \alpha u_t / n^2` and :math:`\rho = \sigma / n`; below t it stays so, above t it
becomes :math:`\mathcal N(M, S^2)` with the weight w:

.. math::
    S^2 = \frac{\rho^2}{d}, \quad M = m + \frac{\mu - m + b \rho^2}{d}, \quad
    d = 1 + (e^s - 1) \rho^2, \quad
    w = \exp\Big(a + \frac{b^2 \rho^2 + 2 b (\mu - m) - (e^s - 1)(\mu - m)^2}{2d}\Big)
    d^{-\frac12},

.. math::
    E[u \mid u_t] = \frac{\Phi_0 \mu - \rho\,\varphi_0
    + w\,\big((1 - \Phi_1) M + S\,\varphi_1\big)}{\Phi_0 + w\,(1 - \Phi_1)},

:math:`\Phi_0, \varphi_0` at :math:`(t - \mu) / \rho` and :math:`\Phi_1, \varphi_1` at
:math:`(t - M) / S`. The output is :math:`(E[u \mid u_t] - \mu) / \rho`, the target ``"edm"``
:cite:p:`karras2022`: 0 for the law over all cells, bounded, and near the data close to 0.

a, b and s are linear in the conditions, and a and b in factors that a :class:`Denoiser` makes of
the cell's principal components. Of a component with standard deviation :math:`\lambda` it reads

.. math::
    \frac{\lambda\, n^2}{\alpha^2 \lambda^2 + \sigma^2} \sum_g w_g\, E[\bar u_g \mid u_{t,g}],

:math:`\bar u` being u, or its mean below t: what is expected of every gene alone, in units of
:math:`\lambda`, times what makes it, were all normal, what is expected of the component.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exprgen.nn._denoiser import Denoiser, owners
from exprgen.nn._scores import normal_density

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exprgen.nn._scores import NormalScores

__all__ = ["GeneDenoiser", "Tilt", "expected_noise"]

_N_FACTORS = 32
# At the data the posterior has no width.
_SMALLEST_WIDTH = 1e-3
_LARGEST_LOG_WEIGHT, _LARGEST_SLOPE = 12.0, 6.0


class GeneDenoiser(nn.Module):
    """Tilts of genes' laws by conditions and by the state of the cell.

    Parameters
    ----------
    scores
        Thresholds and axes; shared with the space.
    blocks
        Width of each condition's features, in their order after the constant.
    n_hidden, n_layers
        Of the :class:`Denoiser` of the state.
    """

    _owner: Tensor

    def __init__(
        self, scores: NormalScores, blocks: Sequence[int], *, n_hidden: int, n_layers: int
    ) -> None:
        super().__init__()
        n_vars, n_axes = scores.axes.shape
        self.scores = scores
        self.state = Denoiser(
            n_axes, blocks, n_hidden=n_hidden, n_layers=n_layers, n_outputs=_N_FACTORS
        )
        self.loadings = nn.Linear(_N_FACTORS, 2 * n_vars, bias=False)
        self.offset = nn.Parameter(torch.zeros(1 + sum(blocks), 3 * n_vars))
        self.register_buffer("_owner", owners(blocks), persistent=False)

    def forward(
        self,
        y: Tensor,
        place: Tensor,
        features: Tensor,
        keep: Tensor | None = None,
        given: Tensor | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Predict the target ``"edm"``, ``(n_obs, n_vars)``.

        Parameters
        ----------
        y, place, features, keep, rows
            As in :meth:`Denoiser.forward`; points of unit variance.
        given
            Part of the signature; there are no further numbers.
        """
        angle = place.to(y).reshape(-1, 1) * (math.pi / 2)
        mean, width = angle.sin() * y, angle.cos().clamp(min=_SMALLEST_WIDTH)
        spread, axes = self.scores.spread, self.scores.axes
        gain = spread / (angle.sin().square() * spread.square() + angle.cos().square())
        components = gain * (self._alone(mean, width) @ axes)
        factors = self.state(components, place, features, keep, rows=rows)
        a, b = self.loadings(factors).chunk(2, dim=1)
        of_a, of_b, s = self._offset(features, keep, rows).chunk(3, dim=1)
        m = self.scores.mean_above
        return expected_noise(mean, width, self.scores.threshold, m, (a + of_a, b + of_b, s))

    def _alone(self, mean: Tensor, width: Tensor) -> Tensor:
        """Expected score of each gene, those of its least value taken as their mean."""
        white = (self.scores.threshold - mean) / width
        below = torch.special.ndtr(white)
        above = (1 - below) * mean + width * normal_density(white)
        return above + below * self.scores.mean_at_bound

    def _offset(self, features: Tensor, keep: Tensor | None, rows: Tensor | None) -> Tensor:
        if keep is not None:
            seen = keep.to(features)[..., self._owner].expand(len(features), -1)
            features = torch.cat([features[:, :1], features[:, 1:] * seen], dim=1)
        offset = features @ self.offset
        return offset if rows is None or len(offset) == 1 else offset.index_select(0, rows)


Tilt = tuple[Tensor, Tensor, Tensor]
"""a, b and s, each ``(n_obs, n_vars)``."""


def expected_noise(
    mean: Tensor, width: Tensor, threshold: Tensor, m: Tensor, tilt: Tilt
) -> Tensor:
    r""":math:`(E[u \mid u_t] - \mu) / \rho` under a tilted law, ``(n_obs, n_vars)``.

    Parameters
    ----------
    mean, width
        :math:`\mu`, ``(n_obs, n_vars)``, and :math:`\rho`, which broadcasts with it.
    threshold, m
        t and the mean above it, ``(n_vars,)``.
    tilt
        a, b and s.
    """
    a, b, s = tilt
    b = b.clamp(-_LARGEST_SLOPE, _LARGEST_SLOPE)
    narrower = torch.expm1(s.clamp(-1, 4))
    square, distance = width.square(), mean - m
    d = 1 + narrower * square
    moved, shrunk = (distance + b * square) / d, d.rsqrt()
    log_weight = a + 0.5 * (b * (b * square + 2 * distance) - narrower * distance.square()) / d
    weight = log_weight.clamp(-_LARGEST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT).exp() * shrunk
    white = (threshold - mean) / width
    white_above = (threshold - m - moved) / (width * shrunk)
    above = torch.special.ndtr(-white_above)
    shift = above * (moved - distance) / width + shrunk * normal_density(white_above)
    total = torch.special.ndtr(white) + weight * above
    return (weight * shift - normal_density(white)) / total.clamp(min=1e-20)
