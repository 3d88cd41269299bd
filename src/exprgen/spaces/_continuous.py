r"""The latent space of continuous expression: y = z, decoded to a centre per gene.

.. math::
    x_g \mid z, c \sim p\big(\mu_g + s_g\,(f_g(z, c) + u_{dg})\big),

with :math:`\mu_g, s_g` the mean and standard deviation of gene g in training, so that the network
and the donors' effects u are in units of the gene's own spread. The encoder reads standardised
values. Values that are normalised for depth hold none: y is the latent state alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from exprgen.likelihoods import Start
from exprgen.spaces._base import Autoencoder, DataMoments, Decoded
from exprgen.spaces._donor import AdditiveDonorEffect

if TYPE_CHECKING:
    from torch import Tensor

    from exprgen._conditions import ConditionLayout
    from exprgen.likelihoods import Likelihood

__all__ = ["ContinuousLatentSpace"]

# A gene seen in one cell of thousands would reach the encoder at tens of standard deviations.
_LARGEST_INPUT = 10.0
_BELOW = 4.0


class ContinuousLatentSpace(Autoencoder):
    """Encoder, decoder and likelihood of continuous values around y = z.

    Parameters
    ----------
    n_vars, layout, n_latent, n_hidden, n_layers, dropout
        See :class:`~exprgen.spaces.LatentSpace`.
    likelihood
        p(x | location, extra), location being the centre.
    """

    centre: Tensor
    scale: Tensor

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
    ) -> None:
        super().__init__(
            n_vars,
            layout,
            likelihood,
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout=dropout,
        )
        self.n_dims = n_latent
        self.depth = None
        self.register_buffer("centre", torch.zeros(n_vars))
        self.register_buffer("scale", torch.ones(n_vars))
        self.donors = AdditiveDonorEffect(layout.n_donor, n_vars) if layout.n_donor else None

    @torch.no_grad()
    def initialize(self, moments: DataMoments) -> None:
        """Start from the data: mean and spread of each gene, and the likelihood."""
        n_obs = len(moments.library)
        mean = moments.x / n_obs
        sd = (moments.x_square / n_obs - mean.square()).clamp(min=0).sqrt()
        # A constant gene has no spread to be measured in, and starts well below its only value.
        constant = sd <= 1e-6 * mean.abs()
        typical = sd[~constant].median() if not constant.all() else sd.new_ones(())
        self.centre.copy_(mean)
        self.scale.copy_(torch.where(constant, typical, sd))
        self.decoder.output.bias.copy_(-_BELOW * constant)
        if isinstance(self.donors, AdditiveDonorEffect):
            self.donors.scale.copy_(self.scale)
        self.likelihood.initialize(
            Start(
                n_obs=n_obs,
                expected=moments.x,
                expected_square=n_obs * mean.square(),
                residual=n_obs * self.scale.double().square(),
                minimum=moments.minimum,
            )
        )

    def encode(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(z | x, c), both ``(n_obs, n_latent)``; ``library`` is not used.

        Parameters
        ----------
        x
            Expression, ``(n_obs, n_vars)``.
        c
            Encoded conditions, ``(n_obs, width)``.
        library
            Part of every space's signature.
        """
        standardised = (x - self.centre) / self.scale
        standardised = standardised.clamp(-_LARGEST_INPUT, _LARGEST_INPUT)
        mean, sd, _ = self.encoder(standardised, self.features.conditions(c))
        return mean, sd

    def decode_at(
        self, z: Tensor, log_depth: Tensor | None, c: Tensor, effect: Tensor | None = None
    ) -> Decoded:
        """Centre of each gene, ``(n_obs, n_vars)``, and further heads; there is no depth."""
        location, extra = self.decoder(z, self.inputs(c))
        return self.moved(Decoded(self.centre + self.scale * location, extra), None, effect)

    def moved(
        self, decoded: Decoded, log_depth: Tensor | None, effect: Tensor | None = None
    ) -> Decoded:
        """What was decoded without a donor, with its effect; there is no depth."""
        if effect is None:
            return decoded
        return decoded._replace(location=decoded.location + self.scale * effect.to(self.scale))
