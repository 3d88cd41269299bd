r"""Few factors that residuals of genes share, and donors' effects in them; in closed form.

Scores of n cells, :math:`u_i \in \mathbb R^G`, with variance 1, are

.. math::
    u_i = \Lambda f_i + v_{d(i)} + \psi \odot \varepsilon_i, \qquad f_i, \varepsilon_i \sim
    \mathcal N(0, I), \quad v_{dg} \sim \mathcal N(0, \tau_g^2).

Directions of :math:`\Lambda` are the leading principal axes. With few cells and many genes the
eigenvalues of noise alone reach :math:`(1 + \sqrt\gamma)^2, \gamma = G / n`: axes within that are
dropped, and of those beyond it eigenvalues and directions are off by known amounts. Their variance
is shrunk to what is best in squared error :cite:p:`donoho2018`. That theory takes cells to be
independent. How many axes there are is therefore decided by the likelihood of parts of the cells,
whole donors where there are some, that were left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["donor_effects", "noise_of", "shared_axes"]

_MOST_COMMON = 0.9
_LEAST_NOISE = 0.1
_N_OVERSAMPLED = 10
_N_SWEEPS = 30


def shared_axes(scores: Tensor, n_axes: int, parts: Tensor) -> Tensor:
    """Loadings of the factors, ``(n_vars, n_axes)``, 0 where there is no more than noise.

    Parameters
    ----------
    scores
        ``(n_obs, n_vars)``, with mean 0 and variance about 1.
    n_axes
        The most that there can be.
    parts
        Codes of what is left out together to choose their number, ``(n_obs,)``.
    """
    gains = torch.zeros(n_axes + 1, dtype=torch.float64)
    for part in parts.unique():
        out = parts == part
        if not out.all():
            gains += _left_out_gain(_axes(scores[~out], n_axes), scores[out])
    loadings = _axes(scores, n_axes)
    loadings[:, int(gains.argmax()) :] = 0
    return loadings


def noise_of(loadings: Tensor, common: Tensor | float = 0.0) -> Tensor:
    """Variance that factors and what else is ``common`` leave of 1, ``(n_vars,)``."""
    return (1 - loadings.square().sum(1) - common).clamp(min=_LEAST_NOISE)


def _left_out_gain(loadings: Tensor, scores: Tensor) -> Tensor:
    """Log-likelihood of scores with none, one, two ... of the factors, nats."""
    gains = []
    for rank in range(loadings.shape[1] + 1):
        some = loadings[:, :rank]
        noise = noise_of(some)
        weighted = some / noise[:, None]
        precision = torch.eye(rank) + some.T @ weighted
        projected = scores @ weighted
        square = (scores.square() / noise).sum()
        square = square - (projected * torch.linalg.solve(precision, projected.T).T).sum()
        log_det = noise.log().sum() + torch.logdet(precision)
        gains.append(-0.5 * (square + len(scores) * log_det).double())
    return torch.stack(gains)


def _axes(scores: Tensor, n_axes: int) -> Tensor:
    """Leading axes with their shrunken spread, the largest first, ``(n_vars, n_axes)``."""
    n_obs, n_vars = scores.shape
    q = min(n_axes + _N_OVERSAMPLED, n_obs, n_vars)
    _, singular, axes = torch.svd_lowrank(scores, q=q, niter=6)
    n_found = min(n_axes, q)
    eigenvalues, axes = (singular.square() / n_obs)[:n_found], axes[:, :n_found]
    total = scores.square().sum() / n_obs
    noise = ((total - eigenvalues.sum()) / max(n_vars - n_found, 1)).clamp(min=1e-6)
    gamma = n_vars / n_obs
    y = eigenvalues / noise
    distance = ((y + 1 - gamma).square() - 4 * y).clamp(min=0).sqrt()
    spike = (0.5 * (y + 1 - gamma + distance) - 1).clamp(min=1e-6)
    cosine = (1 - gamma / spike.square()).clamp(min=0) / (1 + gamma / spike)
    is_signal = y > (1 + gamma**0.5) ** 2
    variance = torch.where(is_signal, spike * cosine * noise, torch.zeros_like(spike))
    loadings = axes * variance.sqrt()
    common = loadings.square().sum(1, keepdim=True)
    loadings = loadings * (_MOST_COMMON / common.clamp(min=_MOST_COMMON)).sqrt()
    return torch.nn.functional.pad(loadings, (0, n_axes - n_found))


def donor_effects(scores: Tensor, donors: Tensor, n_donors: int) -> tuple[Tensor, Tensor]:
    """Posterior mean and sd of each donor's effects, ``(n_donors, n_vars)``.

    Expectation maximisation of a one-way random effects model; the variance between donors is the
    genes' common one by half.

    Parameters
    ----------
    scores
        ``(n_obs, n_vars)``.
    donors
        Codes, ``(n_obs,)``; -1 where unknown.
    n_donors
        How many there are.
    """
    known = donors >= 0
    x, code = scores[known], donors[known]
    n_cells = torch.bincount(code, minlength=n_donors).to(x)[:, None]
    sums = torch.zeros(n_donors, x.shape[1]).to(x).index_add(0, code, x)
    square = x.square().sum(0)
    within, between = x.square().mean(0), 0.1 * x.square().mean(0)
    for _ in range(_N_SWEEPS):
        variance = 1 / (n_cells / within + 1 / between.clamp(min=1e-6))
        mean = variance * sums / within
        spread = (mean.square() + variance).mean(0)
        between = 0.5 * (spread + spread.mean())
        residual = square - 2 * (mean * sums).sum(0)
        residual = residual + (n_cells * (mean.square() + variance)).sum(0)
        within = (residual / len(x)).clamp(min=1e-6)
    return mean, variance.sqrt()
