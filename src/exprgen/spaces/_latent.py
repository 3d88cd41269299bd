r"""The latent space of counts: y = [z, depth], decoded to a mean per gene.

.. math::
    x_g \mid z, \ell, c \sim \mathrm{NB}\big(e^{\ell} \rho_g(z, c)\, e^{u_{dg}}, \theta_g\big),
    \qquad \rho(z, c) = \mathrm{softmax}(f(z, c)),

with log depth :math:`\ell` (:mod:`exprgen.spaces._depth`) and donor effect u
(:mod:`exprgen.spaces._donor`). The encoder reads expression and conditions, never the batch:
the latent integrates, and cells of a new batch can be mapped. Where depth is a size factor of the
user's, the modelled genes need not add up to it, and ρ is an exponential instead of a softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from exprgen.nn import ConditionFeatures, Decoder, Encoder
from exprgen.spaces._depth import Depth
from exprgen.spaces._donor import DonorEffect

if TYPE_CHECKING:
    from exprgen._conditions import ConditionLayout
    from exprgen.likelihoods import Likelihood

__all__ = ["DataMoments", "LatentSpace"]


@dataclass(frozen=True)
class DataMoments:
    """What ``initialize`` needs of the training cells; sums over cells, float64.

    ``library`` ``(n_obs,)`` and ``conditions`` ``(n_obs, width)`` are per cell; ``x``,
    ``x_square`` and ``library_x`` ``(n_vars,)`` are Σx, Σx² and Σ library·x.
    """

    library: Tensor
    conditions: Tensor
    x: Tensor
    x_square: Tensor
    library_x: Tensor


class LatentSpace(nn.Module):
    """Encoder, decoder and likelihood around y = [z, standardised log depth].

    Parameters
    ----------
    n_vars
        Number of genes.
    layout
        Columns of the encoded conditions.
    likelihood
        p(x | location), location being the log mean.
    n_latent
        Dimensions of z; y has one more.
    n_hidden, n_layers, dropout
        Shape of encoder and decoder.
    depth_is_observed
        Whether the library is a size factor given by the user.
    """

    def __init__(
        self,
        n_vars: int,
        layout: ConditionLayout,
        likelihood: Likelihood,
        *,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        dropout: float,
        depth_is_observed: bool,
    ) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.n_latent = n_latent
        self.n_dims = n_latent + 1
        self.features = ConditionFeatures(layout)
        n_features = self.features.n_features
        n_inputs = n_features + layout.n_batch
        shape: dict[str, Any] = {"n_hidden": n_hidden, "n_layers": n_layers, "dropout": dropout}
        self.encoder = Encoder(n_vars, n_features, n_latent, **shape)
        self.decoder = Decoder(n_latent, n_inputs, n_vars, **shape)
        self.likelihood = likelihood
        self.depth = Depth(n_inputs, layout.n_donor, observed=depth_is_observed)
        if depth_is_observed:
            # Nothing to correct, and parallel training waits for every parameter's gradient.
            self.encoder.depth.requires_grad_(False)
        self.donors = DonorEffect(layout.n_donor, n_vars) if layout.n_donor else None

    @torch.no_grad()
    def initialize(self, moments: DataMoments) -> None:
        """Start from the data: the depth regression, mean expression, and the likelihood."""
        inputs = self._inputs(moments.conditions)
        self.depth.fit(moments.library, inputs, self.features.donor(moments.conditions))
        library, square = moments.library.sum(), moments.library.square().sum()
        # Half a count in all the data for a gene that was never seen.
        rho = moments.x.clamp(min=0.5) / library
        self.decoder.output.bias.copy_(rho.log())
        residual = moments.x_square - 2 * rho * moments.library_x + rho**2 * square
        self.likelihood.initialize(rho * library, rho**2 * square, residual)

    def _inputs(self, c: Tensor) -> Tensor:
        """Conditions and batch, ``(n_obs, n_inputs)``."""
        return torch.cat([self.features.conditions(c), self.features.batch(c)], dim=1)

    def depth_offset(self, c: Tensor) -> Tensor:
        """Expected log depth of each row of encoded conditions, ``(n_obs,)``."""
        return self.depth.offset(self._inputs(c), self.features.donor(c))

    def encode(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(y | x, c), both ``(n_obs, n_dims)``.

        Parameters
        ----------
        x
            Counts, ``(n_obs, n_vars)``.
        c
            Encoded conditions, ``(n_obs, width)``.
        library
            Totals of the counts, or the size factors, ``(n_obs,)``.
        """
        mean, sd, correction = self.encoder(x, self.features.conditions(c))
        last_mean, last_sd = self.depth.posterior(library, self.depth_offset(c), correction)
        return torch.cat([mean, last_mean[:, None]], 1), torch.cat([sd, last_sd[:, None]], 1)

    def log_composition(self, z: Tensor, c: Tensor) -> Tensor:
        """Log ρ(z, c), ``(n_obs, n_vars)``: log mean per unit of depth, without a donor."""
        logits = self.decoder(z, self._inputs(c))
        return logits if self.depth.observed else logits.log_softmax(-1)

    def decode(self, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Tensor:
        """Log mean of the counts, ``(n_obs, n_vars)``; ``effect`` is the donors' log factor."""
        return self.decode_at(y[:, :-1], self.log_depth(y, c), c, effect)

    def decode_at(
        self, z: Tensor, log_depth: Tensor, c: Tensor, effect: Tensor | None = None
    ) -> Tensor:
        """Log mean of the counts at given log depths ``(n_obs,)``: ``(n_obs, n_vars)``."""
        location = self.log_composition(z, c) + log_depth[:, None]
        return location if effect is None else location + effect.to(location)

    def at_depth(self, location: Tensor, log_depth: Tensor) -> Tensor:
        """Log means that add up to a given depth, whatever a donor's factors are.

        Where depth is a size factor, means need not add up to it and are left as they are.
        """
        if self.depth.observed:
            return location
        return location.log_softmax(-1) + log_depth[:, None]

    def log_depth(self, y: Tensor, c: Tensor) -> Tensor:
        """Log depth that y stands for, ``(n_obs,)``."""
        return self.depth.log_depth(y[:, -1], self.depth_offset(c))

    def known_effect(self, c: Tensor) -> Tensor | None:
        """Posterior mean of the cells' donors' log factors, ``(n_obs, n_vars)``; 0 if unknown."""
        return None if self.donors is None else self.donors.known(self.features.donor(c))
