r"""Log-probabilities of counts by cell, at the price of the counts that are not 0.

Most counts are 0, so a sum over genes is split into what every entry adds as if it were 0, one
elementwise pass, and what the others add beyond that, on about one entry in ten:

.. math::
    \sum_g \log p(x_g) = \sum_g \log p_g(0)
                         + \sum_{g:\,x_g > 0} \big(\log p_g(x_g) - \log p_g(0)\big).

The gradients are written out where automatic differentiation would keep more passes over all
entries, sort indices that are known to be distinct, or evaluate digamma functions to double
precision; the tests compare them with finite differences. None of them can be differentiated
twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["Nonzero", "log_gamma", "sum_at_zero"]


class Nonzero(NamedTuple):
    """Entries of a matrix of counts that are not 0, each ``(n_nonzero,)``.

    ``position`` is the place in the flattened matrix.
    """

    counts: Tensor
    rows: Tensor
    genes: Tensor
    position: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Nonzero:
        """Find them in ``x``, ``(n_obs, n_vars)``."""
        flat = x.reshape(-1)
        if flat.device.type == "cpu":
            # Several times as fast as torch's.
            index = torch.from_numpy(np.flatnonzero(flat.numpy() != 0))
        else:
            index = flat.nonzero().squeeze(1)
        rows = index.div(x.shape[1], rounding_mode="floor")
        return cls(flat.index_select(0, index), rows, index - rows * x.shape[1], index)

    def of_gene_or_cell(self, values: Tensor) -> Tensor:
        """``values``, ``(n_vars,)`` or ``(n_obs, n_vars)``, at these entries."""
        if values.dim() == 1:
            return values.index_select(0, self.genes)
        return _Take.apply(values, self.position)

    def add_to_rows(self, sums: Tensor, terms: Tensor) -> Tensor:
        """``sums``, ``(n_obs,)``, plus each row's ``terms``."""
        return sums.index_add(0, self.rows, terms)


class _Take(Function):
    """Entries of a matrix by distinct positions in it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = values.shape
        return values.reshape(-1).index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        scattered = gradient.new_zeros(ctx.shape)
        scattered.view(-1).index_copy_(0, index, gradient)
        return scattered, None


def sum_at_zero(log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    r"""Log-probability under negative binomials that all genes of a cell are 0, ``(n_obs,)``.

    :math:`-\sum_g \theta_g \log(1 + \mu_g / \theta_g)`; *exact*.

    Parameters
    ----------
    log_mean
        ``(n_obs, n_vars)``.
    log_dispersion
        Log θ, ``(n_vars,)`` or ``(n_obs, n_vars)``.
    """
    return _SumAtZero.apply(log_mean, log_dispersion)


class _SumAtZero(Function):
    @staticmethod
    def forward(ctx: Any, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
        theta = log_dispersion.exp()
        # Beyond e^80 means are no counts, and float32 would overflow.
        ratio = (log_mean - log_dispersion).clamp_(max=80.0).exp_()
        log1p_ratio = ratio.log1p()
        ctx.save_for_backward(ratio, log1p_ratio, theta)
        if theta.dim() == 1:
            return -(log1p_ratio @ theta)
        return -(log1p_ratio * theta).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        ratio, log1p_ratio, theta = ctx.saved_tensors
        minus = -gradient.unsqueeze(-1)
        to_mean = (ratio / (ratio + 1)).mul_(theta).mul_(minus)
        if theta.dim() == 1:
            return to_mean, -(gradient @ log1p_ratio) * theta - to_mean.sum(0)
        return to_mean, (log1p_ratio * theta).mul_(minus).sub_(to_mean)


def log_gamma(y: Tensor) -> Tensor:
    """Log Γ(y) for y > 0, *exact*; its gradient is good to about 1e-8."""
    return _LogGamma.apply(y)


class _LogGamma(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return torch.lgamma(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * _digamma(y)


def _digamma(y: Tensor) -> Tensor:
    r"""ψ(y) by ψ(y) = ψ(y + 6) - Σ 1/(y + i) and the asymptotic series of ψ(y + 6).

    Abramowitz and Stegun, 6.3.5 and 6.3.18; the first term left out is below 3e-9.
    """
    # 1/(y+i) + 1/(y+5-i) = (2y + 5) / (y² + 5y + i(5-i)), i = 0, 1, 2.
    product = y * (y + 5)
    recurrence = product.reciprocal() + (product + 4).reciprocal() + (product + 6).reciprocal()
    shifted = y + 6
    inverse = shifted.reciprocal()
    square = inverse * inverse
    series = square * (1 / 12 - square * (1 / 120 - square / 252)) + inverse / 2
    return shifted.log() - series - recurrence * (2 * y + 5)
