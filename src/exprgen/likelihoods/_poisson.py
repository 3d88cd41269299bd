r"""Poisson counts: the negative binomial without dispersion.

.. math::
    \log p(x) = x \log\mu - \mu - \log\Gamma(x + 1).

Given a latent state and depth this is what sampling molecules alone gives; whatever cells differ
by beyond that, the latent state has to explain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exprgen.likelihoods._base import Likelihood, Start
from exprgen.likelihoods._negative_binomial import check_drawable
from exprgen.likelihoods._sparse import Nonzero

if TYPE_CHECKING:
    from torch import Generator

__all__ = ["Poisson"]


class Poisson(Likelihood):
    """Poisson counts; location = log mean. It has no parameters of its own.

    Parameters
    ----------
    n_vars
        Number of genes; part of every likelihood's signature.
    """

    is_count = True
    lower = 0.0

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.n_vars = n_vars

    def initialize(self, start: Start) -> None:
        """Nothing to start."""

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Exact; nats per cell, in the precision of ``location``."""
        nonzero = Nonzero.of(x.to(location.dtype))
        terms = nonzero.counts * nonzero.of_gene_or_cell(location)
        terms = terms - torch.lgamma(nonzero.counts + 1)
        return nonzero.add_to_rows(-location.exp().sum(-1), terms)

    def draw(self, location: Tensor, generator: Generator, extra: Tensor | None = None) -> Tensor:
        """Integer counts as float32, on the CPU."""
        check_drawable(location)
        # Double precision: float32 holds no integer steps of large means.
        return torch.poisson(location.cpu().double().exp(), generator=generator).float()

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``exp(location)``, in counts."""
        return location.exp()

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``exp(location)``, in counts squared."""
        return location.exp()
