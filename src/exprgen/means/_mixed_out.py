"""What the linear mixed model predicts of rows and groups that it is not given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from exprgen.means._mixed import Posterior, Sums, blocks, given_coefficients

if TYPE_CHECKING:
    from torch import Tensor

    from exprgen.means._mixed import Hyperparameters, Rows

__all__ = ["without_rows", "without_units"]


def without_rows(rows: Rows, sums: Sums, hyper: Hyperparameters) -> Tensor:
    r"""Population mean of each row's conditions from the posterior without this row; exact.

    With the leverage :math:`h_i = w_i\,(\tilde z_i S^{-1} \tilde z_i^\top + \rho_d)` of
    :math:`\tilde z_i = z_i - \rho_d s_d` and the residual :math:`r_i` from row i's donor's own
    mean, the coefficients without row i are :math:`\hat\beta - S^{-1} \tilde z_i^\top w_i r_i/(1 -
    h_i)`, and the weights of the ratios lose the predictive density of :math:`y_i`, a Student t.
    """
    full = Posterior.of(sums, hyper)
    rho = given_coefficients(hyper.ratios, sums)
    effects = rho[:, :, None] * (sums.y - sums.z @ full.coefficients)
    log_full = (full.weights.log() + full.dof / 2 * full.error.log())[:, None]
    predicted = torch.empty_like(rows.y)
    for at in blocks(len(rows.z), full.weights.numel()):
        z, y, mass, donor = rows.take(at)
        own = z - rho[:, donor, None] * sums.z[donor]
        half = own @ full.covariance
        left = 1 - mass * ((half * own).sum(2) + rho[:, donor])
        population = z @ full.coefficients
        residual = y - population - effects[:, donor]
        pull = mass / left * (half * z).sum(2)
        dof = (full.dof - (mass > 0).to(y))[:, None]
        error = full.error[:, None] - (mass / left)[:, :, None] * residual.square()
        log_weights = log_full - left.log()[:, :, None] / 2 - dof / 2 * error.log()
        weights = torch.softmax(log_weights, 0)
        predicted[at] = (weights * (population - pull[:, :, None] * residual)).sum(0)
    return predicted


def without_units(rows: Rows, units: np.ndarray, sums: Sums, hyper: Hyperparameters) -> Tensor:
    """Population mean of each row's conditions from the posterior without its unit; exact."""
    predicted = torch.empty_like(rows.y)
    order = np.argsort(units, kind="stable")
    for part in np.split(order, np.cumsum(np.bincount(units))[:-1]):
        at = torch.from_numpy(part)
        rest = sums - Sums.of(rows.take(at), len(sums.mass))
        predicted[at] = rows.z[at] @ Posterior.of(rest, hyper).mean()
    return predicted
