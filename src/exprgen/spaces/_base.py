"""The contract of a space, and what spaces with an encoder and a decoder share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from exprgen.densities._base import gaussian_entropy
from exprgen.nn import ConditionFeatures, Decoder, Encoder
from exprgen.spaces._mean import KnownMean

if TYPE_CHECKING:
    from collections.abc import Callable

    from exprgen._conditions import ConditionLayout
    from exprgen.likelihoods import Likelihood
    from exprgen.spaces._depth import Depth
    from exprgen.spaces._donor import DonorEffect

__all__ = ["Autoencoder", "DataMoments", "Decoded", "GaussianPosterior", "Space"]


@dataclass(frozen=True)
class DataMoments:
    """What ``initialize`` needs of the training cells; sums over cells, float64.

    ``library`` ``(n_obs,)`` and ``inputs`` ``(n_obs, n_inputs)``, what the decoder reads besides
    z, and ``donors``, codes ``(n_obs,)``, are per cell; ``x``, ``x_square`` and ``library_x``
    ``(n_vars,)`` are Σx, Σx² and Σ library·x, ``inputs_x`` ``(n_inputs, n_vars)`` is Σ inputs·x;
    ``minimum`` ``(n_vars,)`` is each gene's least value. ``cells()`` reads cells themselves, all
    or as many as are enough, drawn at random: expression ``(n, n_vars)``, encoded conditions and
    library.
    """

    library: Tensor
    inputs: Tensor
    donors: Tensor
    inputs_x: Tensor
    x: Tensor
    x_square: Tensor
    library_x: Tensor
    minimum: Tensor
    cells: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None


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
    """How expression and y, whose first ``n_latent`` coordinates are z, correspond.

    Parameters
    ----------
    n_vars
        Number of genes.
    layout
        Columns of the encoded conditions.
    n_latent
        Dimensions of z.
    has_mean
        Whether conditions come with what a predictor says of them.
    """

    is_learned: ClassVar[bool] = True
    """Whether there is an autoencoder to train."""

    n_dims: int
    """Dimensions of y."""

    likelihood: Likelihood
    """p(x | location, extra)."""

    depth: Depth | None
    """The last coordinate of y where depth is part of the space."""

    donors: DonorEffect | None
    """Donors' random effects where a donor is registered."""

    has_noise: ClassVar[bool] = True
    """Whether values have noise of their own, given y."""

    def __init__(
        self, n_vars: int, layout: ConditionLayout, *, n_latent: int, has_mean: bool = False
    ) -> None:
        super().__init__()
        self.n_vars = n_vars
        self.n_latent = n_latent
        self.features = ConditionFeatures(layout)
        self.n_inputs = self.features.n_features + layout.n_batch
        self.mean = KnownMean(layout, n_vars) if has_mean else None

    @property
    def density_blocks(self) -> list[int]:
        """Width of each part of what a density reads, after the constant."""
        own = [] if self.mean is None else [self.mean.n_axes]
        return [*self.features.blocks, *own]

    def density_features(self, c: Tensor) -> Tensor:
        """What a density reads: conditions, and the axes of their mean if one is known.

        Shape ``(n_obs, 1 + sum(density_blocks))``.
        """
        conditions = self.features.conditions(c)
        return conditions if self.mean is None else torch.cat([conditions, self.mean(c)], 1)

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

    @abstractmethod
    def draw(self, mean: Tensor, sd: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw y from q(y | x, c) of these moments, ``(n_obs, n_dims)``."""

    @abstractmethod
    def log_posterior(self, y: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        """Log q(y | x, c), ``(n_obs,)``, nats, float64; coordinates with sd 0 are data."""

    @abstractmethod
    def log_prob(self, x: Tensor, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Tensor:
        """Log p(x | y, c), ``(n_obs,)``, nats, float64."""

    @abstractmethod
    def decode(self, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Decoded:
        """What the likelihood reads, given y; ``effect`` ``(n_obs, n_vars)`` is the donors'."""

    def represent(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(z | x, c), both ``(n_obs, n_latent)``."""
        mean, sd = self.encode(x, c, library)
        return mean[:, : self.n_latent], sd[:, : self.n_latent]

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

    def parameter_share(self, c: Tensor) -> Tensor | None:
        """Share of each value's variance that a predictor's parameters leave, if that is known.

        Shape ``(n_obs, n_vars)``.
        """
        return None

    @property
    def donor_depths(self) -> Tensor | None:
        """Known donors' deviations in log depth, ``(n_donors,)``, where a new one has its own."""
        return None

    def known_effect(self, c: Tensor) -> Tensor | None:
        """Posterior mean of the cells' donors' effects, ``(n_obs, n_vars)``; 0 if unknown."""
        return None if self.donors is None else self.donors.known(self.features.donor(c))

    def inputs(self, c: Tensor) -> Tensor:
        """Conditions and batch, ``(n_obs, n_inputs)``: what a decoder reads besides z."""
        return torch.cat([self.features.conditions(c), self.features.batch(c)], dim=1)


class GaussianPosterior(Space):
    """A space in which q(y | x, c) is a diagonal Gaussian, and y is decoded to a likelihood."""

    def draw(self, mean: Tensor, sd: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw y from a Gaussian, ``(n_obs, n_dims)``."""
        return mean + sd * torch.randn(mean.shape, generator=generator).to(mean)

    def log_posterior(self, y: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
        """Log-density of the Gaussian, ``(n_obs,)``, nats, float64."""
        inferred = sd > 0
        white = (y - mean).double() / torch.where(inferred, sd, torch.ones_like(sd)).double()
        return 0.5 * (inferred * (1 - white.square())).sum(-1) - gaussian_entropy(sd)

    def log_prob(self, x: Tensor, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Tensor:
        """The likelihood of the decoded y, ``(n_obs,)``, nats, float64."""
        return self.likelihood.log_prob(x.double(), *self.decode(y, c, effect).double())

    def decode(self, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Decoded:
        """What the likelihood reads, given y; ``effect`` ``(n_obs, n_vars)`` is the donors'."""
        return self.decode_at(y[:, : self.n_latent], self.log_depth(y, c), c, effect)

    @abstractmethod
    def decode_at(
        self, z: Tensor, log_depth: Tensor | None, c: Tensor, effect: Tensor | None = None
    ) -> Decoded:
        """What the likelihood reads, given z and the log depth ``(n_obs,)``, if there is one."""


class Autoencoder(GaussianPosterior):
    """Encoder, decoder and likelihood, learned together.

    Parameters
    ----------
    n_vars, layout, n_latent, has_mean
        See :class:`Space`.
    likelihood
        p(x | location, extra).
    n_hidden, n_layers, dropout
        Shape of encoder and decoder.
    n_corrections
        See :class:`~exprgen.nn.Encoder`.
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
        n_corrections: int = 0,
        has_mean: bool = False,
    ) -> None:
        super().__init__(n_vars, layout, n_latent=n_latent, has_mean=has_mean)
        n_features = self.features.n_features
        shape: dict[str, Any] = {"n_hidden": n_hidden, "n_layers": n_layers, "dropout": dropout}
        self.encoder = Encoder(n_vars, n_features, n_latent, n_corrections=n_corrections, **shape)
        self.decoder = Decoder(
            n_latent, self.n_inputs, n_vars, n_heads=likelihood.n_heads, **shape
        )
        self.likelihood = likelihood

    def to_effects(self, location: Tensor) -> Tensor:
        """Locations per unit of depth, on the scale on which effects of conditions add up."""
        return location

    def from_effects(self, values: Tensor) -> Tensor:
        """Undo :meth:`to_effects`."""
        return values

    def moved(
        self, decoded: Decoded, log_depth: Tensor | None, effect: Tensor | None = None
    ) -> Decoded:
        """What was decoded per unit of depth, at a depth and with a donor's effect."""
        location = decoded.location
        if log_depth is not None:
            location = location + log_depth[:, None]
        if effect is not None:
            location = location + effect.to(location)
        return decoded._replace(location=location)

    def prior_cost(self, kl_weight: float) -> Tensor:
        """What the training set pays once, nats: for weights, and effects that have a prior."""
        cost = self.encoder.cost() + self.decoder.cost()
        return cost if self.donors is None else cost + kl_weight * self.donors.kl()
