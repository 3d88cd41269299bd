r"""Draws of p(x | c) reduced to moments and quantiles.

With m the log mean without donor and u the donor's log factor, the variance of a count splits into

.. math::
    \underbrace{E\,\mathrm{Var}(x \mid y, u)}_{\text{decoder}} +
    \underbrace{\mathrm{Var}(e^m)\,E\,e^{2u}}_{\text{latent}} +
    \underbrace{(E\,e^m)^2\,\mathrm{Var}(e^u)}_{\text{donor}},

the donor's term in closed form because its factor stands outside the softmax. Where a donor
shifts continuous expression the terms are those of
:class:`~exprgen.spaces.AdditiveDonorEffect`. Quantiles are order statistics of n draws, at ranks
:math:`\lfloor q(n+1)\rfloor` below the median and :math:`\lceil q(n+1)\rceil` above: a new draw
falls between two of them with the nominal probability or a little more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from exprgen.module import ExpressionModule
    from exprgen.spaces import Decoded

__all__ = [
    "Moments",
    "Predictive",
    "mixture",
    "order_statistics",
    "pooled",
    "predictive_of_cell",
    "predictive_of_mean",
]


class Moments:
    """Running mean and variance of tensors of one shape (Welford)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._square = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in one more draw."""
        self.n += 1
        difference = values.double() - self.mean
        self.mean = self.mean + difference / self.n
        self._square = self._square + difference * (values.double() - self.mean)

    def variance(self) -> Tensor:
        """Unbiased variance; 0 of a single draw."""
        return self._square / max(self.n - 1, 1)


@dataclass(frozen=True)
class Predictive:
    """Per gene: mean, the terms of the variance, all ``(n_vars,)``, and draws.

    ``draws`` is ``(n_samples, n_vars)``; ``donor`` is ``None`` without donors, ``parameter``
    where nothing knows what a predictor's parameters leave open.
    """

    mean: np.ndarray
    decoder: np.ndarray
    latent: np.ndarray
    donor: np.ndarray | None
    parameter: np.ndarray | None
    draws: np.ndarray

    def slots(self, quantiles: Sequence[float], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Values by the name of the slot they go to; ``names`` are the quantiles'."""
        terms = {"latent": self.latent, "donor": self.donor, "parameter": self.parameter}
        known = {f"std_{name}": term for name, term in terms.items() if term is not None}
        total = self.decoder + sum(known.values())
        slots = {"mean": self.mean, "std": np.sqrt(total)}
        slots |= {name: np.sqrt(term) for name, term in known.items()}
        return slots | dict(zip(names, order_statistics(self.draws, quantiles), strict=True))


@torch.no_grad()
def predictive_of_cell(
    module: ExpressionModule,
    decoded: Decoded,
    donor: int,
    generator: torch.Generator,
    depths: Tensor | None = None,
    parameter_share: Tensor | None = None,
) -> Predictive:
    """Law of one cell's values from ``n_samples`` draws of the decoder's output, without donor.

    Where ``depths`` ``(n_donors,)`` are those of the known donors, a new one has its own.
    Of the variance that is drawn, ``parameter_share`` ``(n_vars,)`` is a predictor's parameters'.
    """
    likelihood, donors = module.space.likelihood, module.space.donors
    donor_variance = None
    if donors is None:
        expected = likelihood.mean(*decoded).double()
        mean, latent = expected.mean(0), expected.var(0, unbiased=len(expected) > 1)
    else:
        mean, latent, between = donors.terms(likelihood, decoded, donor, depths)
        donor_variance = _array(between)
        effect = donors.draw(donor, len(decoded.location), generator, depths)
        decoded = decoded._replace(location=donors.move(decoded.location, effect))
    decoder, parameter = likelihood.variance(*decoded).double().mean(0), None
    if parameter_share is not None:
        share = parameter_share.double()
        parameter = _array(share * (decoder + latent))
        decoder, latent = (1 - share) * decoder, (1 - share) * latent
    return Predictive(
        mean=_array(mean),
        decoder=_array(decoder),
        latent=_array(latent),
        donor=donor_variance,
        parameter=parameter,
        draws=likelihood.draw(decoded.location, generator, decoded.extra).numpy(),
    )


@torch.no_grad()
def predictive_of_mean(
    module: ExpressionModule,
    decoded: Decoded,
    donor: int,
    generator: torch.Generator,
    n_cells: int | None,
    depths: Tensor | None = None,
    parameter_share: Tensor | None = None,
) -> Predictive:
    """Law of the mean of ``n_cells`` cells of one donor (``None``: of infinitely many)."""
    cell = predictive_of_cell(module, decoded, donor, generator, depths, parameter_share)
    share = 0.0 if n_cells is None else 1 / n_cells
    # All cells of the mean share what is not known of the predictor's parameters.
    within = (cell.decoder + cell.latent) * share
    if cell.parameter is not None:
        within = within + cell.parameter
    likelihood, donors = module.space.likelihood, module.space.donors
    n = len(decoded.location)
    noise = torch.randn(decoded.location.shape, generator=generator).double().numpy()
    centre = cell.mean
    if donors is not None:
        effect = (
            donors.draw(donor, n, generator)
            if donor >= 0
            else donors.draw_heavy(n, generator, depths)
        )
        centre = _array(donors.expected(likelihood, decoded, effect))
    lower = _array(torch.as_tensor(likelihood.lower))
    draws = np.clip(centre + np.sqrt(within) * noise, lower, None)
    return replace(cell, decoder=cell.decoder * share, latent=cell.latent * share, draws=draws)


def mixture(laws: Sequence[Predictive]) -> Predictive:
    r"""The law of a draw from one of several laws, each as likely.

    Its variance is :math:`\frac1K\sum_k v_k + \frac1K\sum_k (m_k - \bar m)^2`: the second
    term, between the means, goes to ``parameter``.
    """
    if len(laws) == 1:
        return laws[0]
    means = np.stack([law.mean for law in laws])
    donors = [law.donor for law in laws if law.donor is not None]
    own = [law.parameter for law in laws if law.parameter is not None]
    return Predictive(
        mean=means.mean(0),
        decoder=np.mean([law.decoder for law in laws], 0),
        latent=np.mean([law.latent for law in laws], 0),
        donor=np.mean(donors, 0) if donors else None,
        parameter=means.var(0) + (np.mean(own, 0) if own else 0.0),
        draws=np.concatenate([law.draws for law in laws]),
    )


def pooled(
    laws: Sequence[Iterator[tuple[np.ndarray, Predictive]]],
) -> Iterator[tuple[np.ndarray, Predictive]]:
    """The mixture of what several models say, row by row of the same conditions."""
    for parts in zip(*laws, strict=True):
        yield parts[0][0], mixture([law for _, law in parts])


def order_statistics(draws: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles of draws ``(n, n_vars)`` as order statistics, ``(n_quantiles, n_vars)``."""
    n = len(draws)
    ranks = [
        math.floor(q * (n + 1) + 1e-9) if q < 0.5 else math.ceil(q * (n + 1) - 1e-9)
        for q in quantiles
    ]
    positions = [min(max(rank, 1), n) - 1 for rank in ranks]
    if not positions:
        return np.zeros((0, draws.shape[1]))
    return np.partition(draws, sorted(set(positions)), axis=0)[positions]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
