"""What a predictor says of cells' conditions, as the torch side reads it.

The columns behind the encoded conditions hold the predicted mean of every gene, and behind these,
if the predictor knows it, the variance that its parameters leave in that mean. What predicts is
not known here: it may be anything that maps a table of conditions to expression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from exprgen._layout import ConditionLayout

__all__ = ["KnownMean"]

_N_AXES = 5
# Of the leading axis's spread: beyond it is rounding.
_LEAST_SPREAD = 1e-3


class KnownMean(nn.Module):
    """The predicted mean, and its leading axes over the training cells.

    Parameters
    ----------
    layout
        Columns of the encoded conditions, which come first.
    n_vars
        Number of genes.
    """

    centre: Tensor
    axes: Tensor
    n_axes = _N_AXES

    def __init__(self, layout: ConditionLayout, n_vars: int) -> None:
        super().__init__()
        self._value = slice(layout.width, layout.width + n_vars)
        self._variance = slice(layout.width + n_vars, layout.width + 2 * n_vars)
        self.register_buffer("centre", torch.zeros(n_vars))
        self.register_buffer("axes", torch.zeros(n_vars, _N_AXES))

    def value(self, c: Tensor) -> Tensor:
        """Predicted means, ``(n_obs, n_vars)``."""
        return c[:, self._value]

    def variance(self, c: Tensor) -> Tensor | None:
        """Variance of the means by the predictor's parameters, ``(n_obs, n_vars)``, if known."""
        return c[:, self._variance] if c.shape[1] > self._value.stop else None

    def forward(self, c: Tensor) -> Tensor:
        """Scores on the leading axes, of unit variance over training, ``(n_obs, n_axes)``."""
        return (self.value(c) - self.centre) @ self.axes

    @torch.no_grad()
    def fit(self, c: Tensor) -> None:
        """Find the axes from the encoded conditions of training cells, ``(n_obs, width)``."""
        value = self.value(c)
        self.centre.copy_(value.mean(0))
        q = min(_N_AXES, *value.shape)
        _, singular, axes = torch.svd_lowrank(value - self.centre, q=q, niter=4)
        spread = singular / len(value) ** 0.5
        kept = spread > _LEAST_SPREAD * spread[0].clamp(min=1e-12)
        # The sign of an axis is arbitrary: most of its weight is positive.
        sign = torch.where(axes.sum(0) < 0, -1.0, 1.0)
        scaled = torch.where(kept, sign / spread.clamp(min=1e-12), torch.zeros_like(spread))
        self.axes.zero_()
        self.axes[:, :q] = axes * scaled
