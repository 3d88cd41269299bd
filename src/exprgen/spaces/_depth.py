r"""Sequencing depth as a latent variable that the observed total only measures.

With :math:`\ell` the log depth, :math:`L` a cell's total and :math:`\mu_c` the least-squares fit
of log totals on conditions and batch (residual variance v), the approximate posterior is

.. math::
    P = L + 1/\tau^2, \quad
    m_\ell = \frac{L \log\max(L, ½) + \mu_c/\tau^2}{P} + a(x,c), \quad
    s_\ell = e^{b(x,c)}/\sqrt P, \quad
    \tau^2 = \max(.2\,v,\; v - \overline{1/L}),

with a and b outputs of the encoder that start at 0. A point mass at log L would make the KL
divergence infinite, and sampling would count the noise of the total twice. Densities model the
standardised residual :math:`(\ell - \mu_c)/\sqrt v`, so that a batch moves depth and nothing
else of y. Where the user gives a size factor, :math:`\ell` is its logarithm, and data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Depth"]

# A donor's mean log depth is shrunk towards 0 as if one more batch of cells without any
# deviation had been seen.
_DONOR_PRIOR_CELLS = 20.0
# Drawn log depths leave the range of training by at most a factor of ten.
_BEYOND = 2.3


class Depth(nn.Module):
    """Log depth: its regression on conditions, batch and donor, and its posterior.

    Parameters
    ----------
    n_inputs
        Width of condition features and one-hot batch together.
    n_donors
        Donors known to the model; 0 where none is registered.
    observed
        Whether depth is given (a size factor) rather than inferred from the total.
    """

    coefficients: Tensor
    donor_offset: Tensor
    scale: Tensor
    prior_precision: Tensor
    reach: Tensor

    def __init__(self, n_inputs: int, n_donors: int, *, observed: bool) -> None:
        super().__init__()
        self.observed = observed
        self.register_buffer("coefficients", torch.zeros(n_inputs))
        self.register_buffer("donor_offset", torch.zeros(n_donors))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("prior_precision", torch.ones(()))
        self.register_buffer("reach", torch.tensor([-50.0, 50.0]))

    @torch.no_grad()
    def fit(self, library: Tensor, inputs: Tensor, donors: Tensor) -> None:
        """Fit the regression to the training cells.

        Parameters
        ----------
        library
            Totals or size factors, ``(n_obs,)``, float64.
        inputs
            Condition features and one-hot batch, ``(n_obs, n_inputs)``.
        donors
            Donor codes, ``(n_obs,)``; -1 where unknown.
        """
        log_depth = library.clamp(min=0.5).log()
        solution = torch.linalg.lstsq(inputs.double(), log_depth.unsqueeze(1), driver="gelsd")
        coefficients = solution.solution.squeeze(1)
        residual = log_depth - inputs.double() @ coefficients
        self.coefficients.copy_(coefficients)
        if len(self.donor_offset) > 0:
            known = donors >= 0
            n_cells = torch.bincount(donors[known], minlength=len(self.donor_offset))
            total = torch.zeros(len(self.donor_offset), dtype=torch.float64)
            total.index_add_(0, donors[known], residual[known])
            offset = total / (n_cells + _DONOR_PRIOR_CELLS)
            self.donor_offset.copy_(offset)
            residual = residual - torch.where(known, offset[donors.clamp(min=0)], 0.0)
        self.reach[0] = log_depth.min() - _BEYOND
        self.reach[1] = log_depth.max() + _BEYOND
        variance = residual.var(unbiased=False).clamp(min=1e-4)
        measurement = 0.0 if self.observed else library.clamp(min=0.5).reciprocal().mean()
        self.scale.copy_(variance.sqrt())
        self.prior_precision.copy_(1 / torch.maximum(0.2 * variance, variance - measurement))

    def offset(self, inputs: Tensor, donors: Tensor) -> Tensor:
        """Expected log depth, ``(n_obs,)``; an unknown donor adds nothing."""
        offset = inputs @ self.coefficients
        if len(self.donor_offset) > 0:
            known = donors >= 0
            offset = offset + torch.where(known, self.donor_offset[donors.clamp(min=0)], 0.0)
        return offset

    def posterior(
        self, library: Tensor, offset: Tensor, correction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and sd of the standardised log depth, both ``(n_obs,)``; sd 0 where observed.

        Parameters
        ----------
        library
            Totals or size factors, ``(n_obs,)``.
        offset
            Expected log depth, ``(n_obs,)``.
        correction
            The encoder's a and b, ``(n_obs, 2)``.
        """
        log_library = library.clamp(min=0.5).log()
        if self.observed:
            return (log_library - offset) / self.scale, torch.zeros_like(offset)
        precision = library + self.prior_precision
        mean = (library * log_library + self.prior_precision * offset) / precision
        mean = mean + correction[:, 0]
        sd = correction[:, 1].clamp(-4, 4).exp() / precision.sqrt()
        return (mean - offset) / self.scale, sd / self.scale

    def standardise(self, log_depth: Tensor, offset: Tensor) -> Tensor:
        """Log depth -> the last coordinate of y."""
        return (log_depth - offset) / self.scale

    def within_reach(self, last: Tensor, offset: Tensor) -> Tensor:
        """The last coordinate of y, moved to where depth is one that a cell could have.

        Far outside the trained conditions a linear law can say that depth is e to the 60.
        """
        low, high = (self.standardise(bound, offset) for bound in self.reach)
        return last.clamp(low, high)

    def log_depth(self, last: Tensor, offset: Tensor) -> Tensor:
        """The last coordinate of y -> log depth."""
        return offset + last * self.scale
