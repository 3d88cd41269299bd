"""What spaces with an encoder and a decoder share, whatever is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from exprgen.nn import ConditionFeatures, Decoder, Encoder

if TYPE_CHECKING:
    from exprgen._conditions import ConditionLayout
    from exprgen.likelihoods import Likelihood
    from exprgen.spaces._depth import Depth
    from exprgen.spaces._donor import DonorEffect

__all__ = ["DataMoments", "Decoded", "Space"]


@dataclass(frozen=True)
class DataMoments:
    """What ``initialize`` needs of the training cells; sums over cells, float64.

    ``library`` ``(n_obs,)`` and ``inputs`` ``(n_obs, n_inputs)``, what the decoder reads besides
    z, and ``donors``, codes ``(n_obs,)``, are per cell; ``x``, ``x_square`` and ``library_x``
    ``(n_vars,)`` are Σx, Σx² and Σ library·x, ``inputs_x`` ``(n_inputs, n_vars)`` is Σ inputs·x;
    ``minimum`` ``(n_vars,)`` is each gene's least value.
    """

    library: Tensor
    inputs: Tensor
    donors: Tensor
    inputs_x: Tensor
    x: Tensor
    x_square: Tensor
    library_x: Tensor
    minimum: Tensor


class Decoded(NamedTuple):
    """What a likelihood reads: ``location`` ``(n_obs, n_vars)``, and further heads if it has any.

    ``extra`` is ``(n_obs, n_heads - 1, n_vars)``. What moves expression moves the location alone.
    """

    location: Tensor
    extra: Tensor | None = None

    def double(self) -> Decoded:
        """In float64."""
        return Decoded(self.location.double(), None if self.extra is None else self.extra.double())


class Space(nn.Module, ABC):
    """Encoder, decoder and likelihood around y, whose first ``n_latent`` coordinates are z.

    Parameters
    ----------
    n_vars
        Number of genes.
    layout
        Columns of the encoded conditions.
    likelihood
        p(x | location, extra).
    n_latent
        Dimensions of z.
    n_hidden, n_layers, dropout
        Shape of encoder and decoder.
    n_corrections
        See :class:`~exprgen.nn.Encoder`.
    """

    n_dims: int
    """Dimensions of y."""

    depth: Depth | None
    """The last coordinate of y where depth is part of the space."""

    donors: DonorEffect | None
    """Donors' random effects where a donor is registered."""

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
        n_corrections: int = 0,
    ) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.n_latent = n_latent
        self.features = ConditionFeatures(layout)
        n_features = self.features.n_features
        self.n_inputs = n_features + layout.n_batch
        shape: dict[str, Any] = {"n_hidden": n_hidden, "n_layers": n_layers, "dropout": dropout}
        self.encoder = Encoder(n_vars, n_features, n_latent, n_corrections=n_corrections, **shape)
        self.decoder = Decoder(
            n_latent, self.n_inputs, n_vars, n_heads=likelihood.n_heads, **shape
        )
        self.likelihood = likelihood

    @abstractmethod
    def initialize(self, moments: DataMoments) -> None:
        """Start from the data."""

    @abstractmethod
    def encode(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(y | x, c), both ``(n_obs, n_dims)``.

        Parameters
        ----------
        x
            Expression, ``(n_obs, n_vars)``.
        c
            Encoded conditions, ``(n_obs, width)``.
        library
            Totals of the counts, or the size factors, ``(n_obs,)``; not used without depth.
        """

    def decode(self, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Decoded:
        """What the likelihood reads, given y; ``effect`` ``(n_obs, n_vars)`` is the donors'."""
        return self.decode_at(y[:, : self.n_latent], self.log_depth(y, c), c, effect)

    @abstractmethod
    def decode_at(
        self, z: Tensor, log_depth: Tensor | None, c: Tensor, effect: Tensor | None = None
    ) -> Decoded:
        """What the likelihood reads, given z and the log depth ``(n_obs,)``, if there is one."""

    def at_depth(self, decoded: Decoded, log_depth: Tensor) -> Decoded:
        """The same at a depth that holds whatever a donor's effect is; without depth, as it is."""
        return decoded

    def within_reach(self, y: Tensor, c: Tensor) -> Tensor:
        """The same y, ``(n_obs, n_dims)``, but for depths that no cell could have."""
        return y

    def standardised_depth(self, log_depth: Tensor, c: Tensor) -> Tensor:
        """The last coordinate of y that stands for a log depth, both ``(n_obs,)``.

        Raises
        ------
        ValueError
            If the space has no depth.
        """
        raise ValueError("Expression in this space is normalised for depth: there is none to fix.")

    def log_depth(self, y: Tensor, c: Tensor) -> Tensor | None:
        """Log depth that y stands for, ``(n_obs,)``."""
        return None

    def known_effect(self, c: Tensor) -> Tensor | None:
        """Posterior mean of the cells' donors' effects, ``(n_obs, n_vars)``; 0 if unknown."""
        return None if self.donors is None else self.donors.known(self.features.donor(c))

    def prior_cost(self, kl_weight: float) -> Tensor:
        """What the training set pays once, nats: for weights, and effects that have a prior."""
        cost = self.encoder.cost() + self.decoder.cost()
        return cost if self.donors is None else cost + kl_weight * self.donors.kl()

    def inputs(self, c: Tensor) -> Tensor:
        """Conditions and batch, ``(n_obs, n_inputs)``: what the decoder reads besides z."""
        return torch.cat([self.features.conditions(c), self.features.batch(c)], dim=1)
