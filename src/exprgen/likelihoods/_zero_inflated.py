r"""Zero-inflated negative binomial counts: a share of the counts is 0 whatever the mean is.

.. math::
    p(0) = \pi + (1 - \pi)\,\mathrm{NB}(0), \qquad
    p(x) = (1 - \pi)\,\mathrm{NB}(x) \quad (x \ge 1),

with :math:`\mathrm{logit}\,\pi_{ng} = d_g + h_{ng}`, a parameter of the gene and a head of the
decoder :cite:p:`Lopez2018`. With d the logit and
:math:`\log\mathrm{NB}(0)` known, :math:`\log p(0) = \mathrm{softplus}(\log\mathrm{NB}(0) - d) -
\mathrm{softplus}(-d)`, which neither over- nor underflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from exprgen.likelihoods._negative_binomial import (
    NegativeBinomial,
    log_prob_at_zero,
    negative_binomial_log_prob,
)

if TYPE_CHECKING:
    from torch import Generator

    from exprgen.likelihoods._base import Dispersion

__all__ = ["ZeroInflatedNegativeBinomial"]

# Two percent of a gene's counts: the start is close to the negative binomial's.
_START_LOGIT = -4.0


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Zero-inflated negative binomial counts; location = log mean of what is not inflated.

    Parameters
    ----------
    n_vars, dispersion
        See :class:`~exprgen.likelihoods.NegativeBinomial`.
    """

    def __init__(self, n_vars: int, *, dispersion: Dispersion = "gene") -> None:
        super().__init__(n_vars, dispersion=dispersion)
        self.n_heads += 1
        self.dropout_logit = nn.Parameter(torch.full((n_vars,), _START_LOGIT))

    def _logit(self, location: Tensor, extra: Tensor | None) -> Tensor:
        """Logit of the share of inflated zeros, ``(n_vars,)`` or ``(n_obs, n_vars)``."""
        logit = self.dropout_logit.to(location.dtype)
        return logit if extra is None else logit + extra[:, -1]

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Exact; nats per cell, in the precision of ``location``."""
        x, log_theta = x.to(location.dtype), self._log_theta(location, extra)
        logit = self._logit(location, extra).expand_as(location)
        log_zero = log_prob_at_zero(location, log_theta)
        # What inflation adds to the negative binomial's log-probability, of a zero and of others.
        of_zero = softplus(log_zero - logit) - softplus(-logit) - log_zero
        added = torch.where(x == 0, of_zero, -softplus(logit))
        return negative_binomial_log_prob(x, location, log_theta) + added.sum(-1)

    def draw(self, location: Tensor, generator: Generator, extra: Tensor | None = None) -> Tensor:
        """Integer counts as float32, on the CPU."""
        counts = super().draw(location, generator, extra)
        share = torch.sigmoid(self._logit(location, extra).detach()).cpu().expand_as(counts)
        detected = counts.nonzero(as_tuple=True)
        uniform = torch.rand(len(detected[0]), generator=generator)
        counts[detected] = torch.where(uniform < share[detected], 0.0, counts[detected])
        return counts

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``(1 - π) μ``, in counts."""
        return torch.sigmoid(-self._logit(location, extra)) * location.exp()

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``(1 - π) (μ + μ²/θ + π μ²)``, in counts squared."""
        logit = self._logit(location, extra)
        between = torch.sigmoid(logit) * location.exp().square()
        return torch.sigmoid(-logit) * (super().variance(location, extra) + between)
