r"""At which times a network is trained, and what its errors weigh.

A weighting is stated as a function w of time that multiplies the squared error of the *data*,
:math:`\|\hat y - y\|^2`, with times uniform. Since :math:`\hat y` is linear in the network's
output, with slope b, the error of the output is multiplied by :math:`w\, b^2`:

==========  =========================================================================
weighting   w
==========  =========================================================================
uniform     :math:`b^{-2}`: the target's own squared error as it is
min_snr     :math:`\min(\alpha^2 / \sigma^2, 5)` :cite:p:`hang2023`
likelihood  :math:`\tfrac12\, d(\alpha^2 / \sigma^2) / dt`, which bounds the log-likelihood
            :cite:p:`kingma2021,song2021likelihood`
edm         :math:`1 + \alpha^2 / \sigma^2`, uniform for the target ``"edm"``
            :cite:p:`karras2022`
==========  =========================================================================

Weights of the output's error are at most 100, so that one row cannot drown a batch; without that
the likelihood weighting of a velocity is infinite at the data. The uniform weight of a *score*,
whose errors grow as :math:`1 / \sigma`, is :math:`\sigma^2`, as in :cite:p:`song2021`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from exprgen.schedules._target import combination, floored

if TYPE_CHECKING:
    from exprgen.schedules._schedule import Coefficients, Schedule
    from exprgen.schedules._target import Target

__all__ = ["TIMES", "WEIGHTINGS", "Times", "Weighting", "draw_times", "weight_of"]

Weighting = Literal["uniform", "min_snr", "likelihood", "edm"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
Times = Literal["uniform", "logit_normal", "log_normal"]
TIMES: tuple[Times, ...] = get_args(Times)

_LARGEST_WEIGHT = 100.0
_SNR_BOUND = 5.0
# Of log(σ / α), for data of unit variance: Karras et al. give -1.2 for data of scale ½.
_LOG_RATIO_MEAN, _LOG_RATIO_SD = -1.2 + math.log(2), 1.2


def weight_of(weighting: Weighting, target: Target, at: Coefficients) -> Tensor:
    """Weight of the squared error of a network's output, of the coefficients' shape."""
    if weighting == "uniform":
        return at.sigma.square() if target == "score" else torch.ones_like(at.sigma)
    alpha, sigma = floored(at.alpha), floored(at.sigma)
    p, q = combination(target, at)
    slope = sigma / (alpha * q - sigma * p)
    snr = (alpha / sigma).square()
    if weighting == "min_snr":
        weight = snr.clamp(max=_SNR_BOUND)
    elif weighting == "likelihood":
        weight = -at.determinant * alpha / sigma**3
    else:
        weight = 1 + snr
    return (weight * slope.square()).clamp(max=_LARGEST_WEIGHT)


def draw_times(
    times: Times, n_obs: int, schedule: Schedule, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a time per row, ``(n_obs,)``, float64, on the CPU.

    The rows share one uniform number and are spread evenly over its law, in random order
    :cite:p:`kingma2021`: the loss of a batch varies less.

    Parameters
    ----------
    times
        ``"uniform"``; ``"logit_normal"``, more often half-way :cite:p:`esser2024`;
        ``"log_normal"``, of the ratio of noise to data :cite:p:`karras2022`.
    n_obs
        Rows.
    schedule
        Its range of times is kept to.
    generator
        CPU generator; torch's global one where ``None``.
    """
    first = torch.rand((), generator=generator, dtype=torch.float64)
    share = (torch.randperm(n_obs, generator=generator) + first) / max(n_obs, 1)
    start, end = schedule.t_range
    if times == "log_normal":
        ratio = (_LOG_RATIO_MEAN + _LOG_RATIO_SD * torch.special.ndtri(share)).exp()
        return schedule.time_of(ratio).clamp(start, end)
    if times == "logit_normal":
        share = torch.special.ndtri(share).sigmoid()
    return start + share * (end - start)
