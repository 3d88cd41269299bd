r"""What a network predicts, and how to read data and noise off it.

All targets are known combinations of data and noise, :math:`p_t\, y + q_t\, \varepsilon`:

========  ==========================================  =====================================
target    combination                                 source
========  ==========================================  =====================================
velocity  :math:`\dot\alpha y + \dot\sigma\varepsilon`  :cite:p:`lipman2023`
noise     :math:`\varepsilon`                         :cite:p:`ho2020`
data      :math:`y`
v         :math:`\alpha\varepsilon - \sigma y`        :cite:p:`salimans2022`; not the velocity
score     :math:`-\varepsilon / \sigma`               :cite:p:`song2021`
edm       :math:`(\sigma y - \alpha\varepsilon) / n`  :cite:p:`karras2022`
========  ==========================================  =====================================

with :math:`n = \sqrt{\alpha^2 + \sigma^2}`. The last is the preconditioned target of data of unit
variance, :math:`\hat y = c_{skip} y_t + c_{out} F` with :math:`c_{skip} = \alpha / n^2` and
:math:`c_{out} = \sigma / n`, for any schedule; its input is scaled by :math:`c_{in} = 1/n`.

Together with :math:`y_t = \alpha y + \sigma\varepsilon` this is two equations, whose solution is
the canonical :class:`Prediction`. It is regular at both ends for velocity, v and edm. Data tell
nothing about the noise where :math:`\sigma = 0`, noise and score nothing about the data where
:math:`\alpha = 0`. There the divisor is kept at .001: what is unknown is taken to be 0, its mean
over standardised data. A solver's first step from pure noise then misses the mean of a condition,
which matters where steps are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from exprgen.schedules._schedule import Coefficients

__all__ = ["TARGETS", "Prediction", "Target", "floored", "predict", "regression_target"]

Target = Literal["velocity", "noise", "data", "v", "score", "edm"]
TARGETS: tuple[Target, ...] = get_args(Target)

_FLOOR = 1e-3


def floored(scale: Tensor) -> Tensor:
    """A scale to divide by."""
    return scale.clamp(min=_FLOOR)


class Prediction(NamedTuple):
    """Expected data and expected noise given a point of the path, both ``(n_obs, n_dims)``."""

    data: Tensor
    noise: Tensor

    def velocity(self, at: Coefficients) -> Tensor:
        """Of the probability flow, ``(n_obs, n_dims)``."""
        return at.d_alpha * self.data + at.d_sigma * self.noise

    def score(self, at: Coefficients) -> Tensor:
        """Gradient of the log-density of :math:`y_t`, ``(n_obs, n_dims)``."""
        return -self.noise / floored(at.sigma)


def combination(target: Target, at: Coefficients) -> tuple[Tensor, Tensor]:
    """The coefficients p and q of data and noise in a target."""
    zero, one = torch.zeros_like(at.alpha), torch.ones_like(at.alpha)
    if target == "velocity":
        return at.d_alpha, at.d_sigma
    if target == "noise":
        return zero, one
    if target == "data":
        return one, zero
    if target == "v":
        return -at.sigma, at.alpha
    if target == "score":
        return zero, -1 / floored(at.sigma)
    return at.sigma / at.norm, -at.alpha / at.norm


def regression_target(target: Target, y: Tensor, noise: Tensor, at: Coefficients) -> Tensor:
    """What the network should have said, ``(n_obs, n_dims)``."""
    p, q = combination(target, at)
    return p * y + q * noise


def predict(target: Target, output: Tensor, y_t: Tensor, at: Coefficients) -> Prediction:
    """Data and noise from a network's output.

    Parameters
    ----------
    target
        What the output is.
    output, y_t
        The network's output and the point of the path, ``(n_obs, n_dims)``.
    at
        Coefficients there, of a shape that broadcasts with them.
    """
    p, q = combination(target, at)
    if target == "data":
        return Prediction(output, (y_t - at.alpha * output) / floored(at.sigma))
    if target in ("noise", "score"):
        noise = output / q
        return Prediction((y_t - at.sigma * noise) / floored(at.alpha), noise)
    determinant = at.alpha * q - at.sigma * p
    return Prediction(
        (q * y_t - at.sigma * output) / determinant, (at.alpha * output - p * y_t) / determinant
    )
