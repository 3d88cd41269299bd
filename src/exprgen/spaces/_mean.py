"""What a predictor says of cells' conditions, as the torch side reads it.

Behind the encoded conditions stand, in columns, the predicted mean of every gene, its scores on
the leading axes of all means, and, if the predictor knows it, the variance that its parameters
leave in the mean. What predicts is not known here: it may be anything that maps a table of
conditions to expression.

In training the mean is the one that never saw the cell, but the scores are those of the
prediction for its conditions. What leaves out a cell tells of it: of equal conditions, that whose
mean is the lowest belongs to the cell that is the highest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
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

    def __init__(self, layout: ConditionLayout, n_vars: int) -> None:
        super().__init__()
        # Without conditions there is one mean.
        has_conditions = bool(layout.n_categories or layout.n_continuous or layout.n_embedding)
        self.n_axes = _N_AXES * has_conditions
        ends = np.cumsum([layout.width, n_vars, self.n_axes, n_vars]).tolist()
        self._value, self._scores, self._variance = map(slice, ends[:-1], ends[1:])
        self.register_buffer("centre", torch.zeros(n_vars))
        self.register_buffer("axes", torch.zeros(n_vars, self.n_axes))

    @torch.no_grad()
    def fit(self, means: np.ndarray) -> None:
        """Find the axes from the means of training cells' conditions, ``(n_obs, n_vars)``."""
        values = torch.from_numpy(means).to(self.centre)
        self.centre.copy_(values.mean(0))
        q = min(self.n_axes, *values.shape)
        if q == 0:
            return
        _, singular, axes = torch.svd_lowrank(values - self.centre, q=q, niter=4)
        spread = singular / len(values) ** 0.5
        kept = spread > _LEAST_SPREAD * torch.maximum(spread[0], self.centre.abs().mean())
        # The sign of an axis is arbitrary: most of its weight is positive.
        sign = torch.where(axes.sum(0) < 0, -1.0, 1.0)
        scaled = torch.where(kept, sign / spread.clamp(min=1e-12), torch.zeros_like(spread))
        self.axes.zero_()
        self.axes[:, :q] = axes * scaled

    def columns(
        self,
        means: np.ndarray,
        variance: np.ndarray | None = None,
        left_out: np.ndarray | None = None,
    ) -> np.ndarray:
        """What stands behind encoded conditions, ``(n_obs, m)`` float32.

        Parameters
        ----------
        means
            Predicted of the conditions, ``(n_obs, n_vars)``.
        variance
            Of the means by the predictor's parameters, of the same shape, if it is known.
        left_out
            Means that never saw the cell, in training.
        """
        scores = (means - self.centre.cpu().numpy()) @ self.axes.cpu().numpy()
        parts = [means if left_out is None else left_out, scores]
        parts += [] if variance is None else [variance]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def value(self, c: Tensor) -> Tensor:
        """Predicted means, ``(n_obs, n_vars)``."""
        return c[:, self._value]

    def forward(self, c: Tensor) -> Tensor:
        """Scores on the leading axes, of unit variance over training, ``(n_obs, n_axes)``."""
        return c[:, self._scores]

    def variance(self, c: Tensor) -> Tensor | None:
        """Variance of the means by the predictor's parameters, ``(n_obs, n_vars)``, if known."""
        return c[:, self._variance] if c.shape[1] > self._scores.stop else None
