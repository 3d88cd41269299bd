r"""The latent space of counts: y = [z, depth], decoded to a mean per gene.

.. math::
    x_g \mid z, \ell, c \sim \mathrm{NB}\big(e^{\ell} \rho_g(z, c)\, e^{u_{dg}}, \theta_g\big),
    \qquad \rho(z, c) = \mathrm{softmax}(f(z, c)),

or another likelihood of counts with that mean, with log depth :math:`\ell`
(:mod:`exprgen.spaces._depth`) and donor effect u
(:mod:`exprgen.spaces._donor`). The encoder reads expression and conditions, never the batch:
the latent integrates, and cells of a new batch can be mapped. Where depth is a size factor of the
user's, the modelled genes need not add up to it, and ρ is an exponential instead of a softmax.

Where a predictor's mean :math:`\mu(c)` is known, on the scale log(1 + counts per
:attr:`LatentSpace.unit` of depth), the decoder's f starts from it: its logarithm
:math:`\log(e^{\mu} - 1 + \tfrac1{10})` is added to f, and effects of conditions, which are shrunk
to none, are what the predictor misses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch

from exprgen.likelihoods import Start
from exprgen.spaces._base import Autoencoder, DataMoments, Decoded
from exprgen.spaces._depth import Depth
from exprgen.spaces._donor import DonorEffect
from exprgen.spaces._effects import label_effects

if TYPE_CHECKING:
    from torch import Tensor

    from exprgen._conditions import ConditionLayout
    from exprgen.likelihoods import Likelihood
    from exprgen.spaces._mean import KnownMean

__all__ = ["LatentSpace"]

# What effects leave alone, per unit of depth, and how much of it a gene is left with at least.
_LOG_FLOOR = math.log(1e-4)
_LEAST = 1e-4
# Of a known mean, per unit of depth: no predictor is sure that there will be none.
_LEAST_KNOWN = 0.1


class LatentSpace(Autoencoder):
    """Encoder, decoder and likelihood of counts around y = [z, standardised log depth].

    Parameters
    ----------
    n_vars
        Number of genes.
    layout
        Columns of the encoded conditions.
    likelihood
        p(x | location, extra), location being the log mean.
    n_latent
        Dimensions of z; y has one more.
    n_hidden, n_layers, dropout
        Shape of encoder and decoder.
    depth_is_observed
        Whether the library is a size factor given by the user.
    has_mean
        Whether a predictor's mean comes with the conditions.
    """

    depth: Depth
    unit: Tensor

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
        has_mean: bool = False,
    ) -> None:
        super().__init__(
            n_vars,
            layout,
            likelihood,
            n_latent=n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout=dropout,
            n_corrections=2,
            has_mean=has_mean,
        )
        self.n_dims = n_latent + 1
        self.depth = Depth(self.n_inputs, layout.n_donor, observed=depth_is_observed)
        if depth_is_observed:
            # Nothing to correct, and parallel training waits for every parameter's gradient.
            self.encoder.depth.requires_grad_(False)
        self.donors = DonorEffect(layout.n_donor, n_vars) if layout.n_donor else None
        if has_mean:
            self.register_buffer("unit", torch.tensor(1e4))

    @torch.no_grad()
    def initialize(self, moments: DataMoments) -> None:
        """Start from the data: depth, mean expression, effects of labels, and the likelihood."""
        self.depth.fit(moments.library, moments.inputs, moments.donors)
        if self.mean is not None:
            self._initialize_around(moments)
            return
        library, square = moments.library.sum(), moments.library.square().sum()
        # Half a count in all the data for a gene that was never seen.
        rho = moments.x.clamp(min=0.5) / library
        self.decoder.output.bias.copy_(rho.log())
        effects = label_effects(moments, rho, self.features.labels)
        self.decoder.offset.weight.copy_(effects.T)
        residual = moments.x_square - 2 * rho * moments.library_x + rho**2 * square
        self.likelihood.initialize(
            Start(
                n_obs=len(moments.library),
                expected=rho * library,
                expected_square=rho**2 * square,
                residual=residual,
                minimum=moments.minimum,
            )
        )

    def _initialize_around(self, moments: DataMoments) -> None:
        """Start from a known mean: what it is off by per gene, and the likelihood."""
        if moments.cells is None:
            raise ValueError("moments must have cells: each has a mean of its own.")
        x, c, library = moments.cells()
        expected = self._log_known(c).double().exp() * library.double()[:, None]
        # Half a count in all the data for a gene that was never seen.
        factor = x.sum(0).double().clamp(min=0.5) / expected.sum(0)
        self.decoder.output.bias.copy_(factor.log())
        expected = factor * expected
        self.likelihood.initialize(
            Start(
                n_obs=len(x),
                expected=expected.sum(0),
                expected_square=expected.square().sum(0),
                residual=(x.double() - expected).square().sum(0),
                minimum=moments.minimum,
            )
        )

    def _log_known(self, c: Tensor) -> Tensor:
        """Logarithm of the known mean per unit of depth, ``(n_obs, n_vars)``."""
        known = cast("KnownMean", self.mean).value(c).clamp(min=0)
        return (known.expm1() + _LEAST_KNOWN).log() - self.unit.log()

    @property
    def donor_depths(self) -> Tensor | None:
        """Known donors' deviations in log depth, ``(n_donors,)``; a size factor is the user's."""
        return None if self.depth.observed else self.depth.donor_offset

    def depth_offset(self, c: Tensor) -> Tensor:
        """Expected log depth of each row of encoded conditions, ``(n_obs,)``."""
        return self.depth.offset(self.inputs(c), self.features.donor(c))

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
        mean, sd, correction = self.encoder(torch.log1p(x), self.features.conditions(c))
        last_mean, last_sd = self.depth.posterior(library, self.depth_offset(c), correction)
        return torch.cat([mean, last_mean[:, None]], 1), torch.cat([sd, last_sd[:, None]], 1)

    def _composition(self, z: Tensor, c: Tensor) -> Decoded:
        """Log ρ(z, c), and the further heads."""
        logits, extra = self.decoder(z, self.inputs(c))
        if self.mean is not None:
            logits = logits + self._log_known(c)
        return Decoded(logits if self.depth.observed else logits.log_softmax(-1), extra)

    def log_composition(self, z: Tensor, c: Tensor) -> Tensor:
        """Log ρ(z, c), ``(n_obs, n_vars)``: log mean per unit of depth, without a donor."""
        return self._composition(z, c).location

    def decode_at(
        self, z: Tensor, log_depth: Tensor | None, c: Tensor, effect: Tensor | None = None
    ) -> Decoded:
        """Log mean of the counts at given log depths ``(n_obs,)`` (``None``: one unit)."""
        return self.moved(self._composition(z, c), log_depth, effect)

    @property
    def _log_floor(self) -> Tensor:
        """Logarithm of what :meth:`to_effects` adds, per unit of depth."""
        bias = self.decoder.output.bias.detach()
        # Per unit of a size factor means need not add up to 1; the biases say to what they do.
        total = bias.logsumexp(0) if self.depth.observed else bias.new_zeros(())
        return total + _LOG_FLOOR

    def to_effects(self, location: Tensor) -> Tensor:
        """Log(ρ + 1e-4): one count per ten thousand tells little of how strongly a gene is off.

        Effects multiply what is expressed, and add to what is not: where one type has hardly any
        of a gene, that another induces it a hundredfold does not say from what to multiply.
        """
        return torch.logaddexp(location, self._log_floor.to(location))

    def from_effects(self, values: Tensor) -> Tensor:
        """Undo :meth:`to_effects`; compositions add up to 1 again."""
        below = (self._log_floor.to(values) - values).clamp(max=-_LEAST)
        location = values + torch.log(-torch.expm1(below))
        return location if self.depth.observed else location.log_softmax(-1)

    def at_depth(self, decoded: Decoded, log_depth: Tensor) -> Decoded:
        """Log means that add up to a given depth, whatever a donor's factors are.

        Where depth is a size factor, means need not add up to it and are left as they are.
        """
        if self.depth.observed:
            return decoded
        location = decoded.location.log_softmax(-1) + log_depth[:, None]
        return decoded._replace(location=location)

    def within_reach(self, y: Tensor, c: Tensor) -> Tensor:
        """The same y, with drawn depths moved to the range of training, times ten either way."""
        last = self.depth.within_reach(y[:, -1], self.depth_offset(c))
        return torch.cat([y[:, :-1], last[:, None]], 1)

    def standardised_depth(self, log_depth: Tensor, c: Tensor) -> Tensor:
        """The last coordinate of y that stands for a log depth, both ``(n_obs,)``."""
        return self.depth.standardise(log_depth, self.depth_offset(c))

    def log_depth(self, y: Tensor, c: Tensor) -> Tensor:
        """Log depth that y stands for, ``(n_obs,)``."""
        return self.depth.log_depth(y[:, -1], self.depth_offset(c))
