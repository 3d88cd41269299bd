r"""Schedules: how much data and how much noise is in a point of the path.

.. math::
    y_t = \alpha_t\, y + \sigma_t\, \varepsilon, \qquad \varepsilon \sim \mathcal N(0, I),
    \qquad t \in [0, 1],

with noise at t = 0 and data at t = 1. Flow matching :cite:p:`lipman2023` and diffusion
:cite:p:`song2021` differ in :math:`(\alpha, \sigma)` and in nothing else here. The velocity of
the path is :math:`\dot\alpha_t\, y + \dot\sigma_t\, \varepsilon`, hence the derivatives.

The ratio :math:`r = \sigma / \alpha` falls from noise to data and says where on the path a point
is, whatever the schedule. Each schedule inverts it, and has a *clock*: the time at which a share
of the way is behind, such that equal shares are equally hard to integrate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from exprgen._arguments import check_choice

__all__ = [
    "SCHEDULES",
    "VE",
    "VP",
    "Coefficients",
    "Cosine",
    "Linear",
    "Schedule",
    "SubVP",
    "schedule_of",
]


class Coefficients(NamedTuple):
    """Scales of data and noise and their derivatives by time, each of the times' shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def norm(self) -> Tensor:
        """Standard deviation of :math:`y_t` for data of unit variance."""
        return (self.alpha.square() + self.sigma.square()).sqrt()

    @property
    def determinant(self) -> Tensor:
        r""":math:`\alpha\dot\sigma - \sigma\dot\alpha`, negative: the noise recedes."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha


class Schedule(ABC):
    """Scales of data and noise along the path."""

    t_range: tuple[float, float] = (0.0, 1.0)
    """From noise to data: where coefficients and velocity are finite, and solvers integrate."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at the times ``t``, of any shape."""

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        r"""The time at which :math:`\sigma / \alpha` is ``ratio``, of the same shape."""

    def clock(self, share: Tensor) -> Tensor:
        """The time at which a ``share``, from 0 to 1, of the way from noise to data is behind."""
        start, end = self.t_range
        return start + share * (end - start)

    def times(self, n_steps: int) -> Tensor:
        """Times of ``n_steps`` steps from noise to data, ``(n_steps + 1,)``, float64."""
        return self.clock(torch.linspace(0, 1, n_steps + 1, dtype=torch.float64))

    @property
    def prior_scale(self) -> float:
        """Standard deviation of :math:`y_t` at the noise end, for data of unit variance."""
        start = torch.tensor(self.t_range[0], dtype=torch.float64)
        return float(self(start).norm)


@dataclass(frozen=True)
class Linear(Schedule):
    r"""Straight lines, :math:`\alpha = t`, :math:`\sigma = 1 - t` :cite:p:`lipman2023`."""

    def __call__(self, t: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one)

    def time_of(self, ratio: Tensor) -> Tensor:
        """:math:`1 / (1 + r)`."""
        return 1 / (1 + ratio)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""An arc at constant speed, the angle :math:`\arctan(\alpha / \sigma) = \pi t / 2`.

    The schedule of :cite:p:`nichol2021` without its offset.
    """

    def __call__(self, t: Tensor) -> Coefficients:
        alpha, sigma = (t * math.pi / 2).sin(), (t * math.pi / 2).cos()
        return Coefficients(alpha, sigma, sigma * math.pi / 2, -alpha * math.pi / 2)

    def time_of(self, ratio: Tensor) -> Tensor:
        r""":math:`1 - (2 / \pi) \arctan r`."""
        return 1 - ratio.atan() * 2 / math.pi


@dataclass(frozen=True)
class VP(Schedule):
    r"""Variance preserving diffusion :cite:p:`ho2020,song2021`.

    With :math:`s = 1 - t` and :math:`B(s) = \beta_{min} s + \tfrac12 (\beta_{max} -
    \beta_{min}) s^2`, :math:`\alpha = e^{-B/2}` and :math:`\sigma^2 = 1 - e^{-B}`. The derivative
    of :math:`\sigma` is infinite at the data, where the path therefore ends a little earlier, with
    :math:`\sigma` = .001. The clock runs evenly in the angle :math:`\arctan(\sigma / \alpha)`.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_range = (0.0, 1 - 1e-5)

    def _decay(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """B and its derivative by s, β."""
        s, slope = 1 - t, self.beta_max - self.beta_min
        return self.beta_min * s + 0.5 * slope * s.square(), self.beta_min + slope * s

    def _time_of_decay(self, decay: Tensor) -> Tensor:
        # The root of a quadratic, in the form that does not cancel where s is small.
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 + 2 * slope * decay).sqrt()
        return 1 - 2 * decay / (self.beta_min + root)

    def __call__(self, t: Tensor) -> Coefficients:
        decay, beta = self._decay(t)
        alpha, sigma = (-decay / 2).exp(), (-torch.expm1(-decay)).sqrt()
        return Coefficients(alpha, sigma, alpha * beta / 2, -beta * alpha.square() / (2 * sigma))

    def time_of(self, ratio: Tensor) -> Tensor:
        r"""From :math:`B = \log(1 + r^2)`."""
        return self._time_of_decay(ratio.square().log1p())

    def clock(self, share: Tensor) -> Tensor:
        """Even in the angle, in which this path is the arc of :class:`Cosine`."""
        ends = self(torch.tensor(self.t_range, dtype=torch.float64))
        first, last = torch.atan2(ends.sigma, ends.alpha).tolist()
        return self.time_of((first + share * (last - first)).tan())


@dataclass(frozen=True)
class SubVP(VP):
    r"""Less noise than :class:`VP` with the same :math:`\alpha` :cite:p:`song2021`.

    :math:`\sigma = 1 - e^{-B}`, which is smooth up to the data.
    """

    t_range = (0.0, 1.0)

    def __call__(self, t: Tensor) -> Coefficients:
        decay, beta = self._decay(t)
        alpha = (-decay / 2).exp()
        return Coefficients(alpha, -torch.expm1(-decay), alpha * beta / 2, -beta * alpha.square())

    def time_of(self, ratio: Tensor) -> Tensor:
        r"""From :math:`\alpha = \sqrt{1 + r^2 / 4} - r / 2`."""
        return self._time_of_decay(2 * (ratio / 2).asinh())


@dataclass(frozen=True)
class VE(Schedule):
    r"""Variance exploding, :math:`\alpha = 1`, :math:`\sigma` geometric in t :cite:p:`song2021`.

    Parameters
    ----------
    sigma_min, sigma_max
        Scale of the noise at the data and at the noise end, in units of the data's.
    rho
        The clock runs evenly in :math:`\sigma^{1/\rho}` :cite:p:`karras2022`, the larger the
        closer to geometric. Steps are then longer where there is most noise.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    rho: float = math.inf

    def __call__(self, t: Tensor) -> Coefficients:
        rate = math.log(self.sigma_min / self.sigma_max)
        sigma = self.sigma_max * (t * rate).exp()
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), rate * sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        r""":math:`\log(r / \sigma_{max}) / \log(\sigma_{min} / \sigma_{max})`."""
        return (ratio / self.sigma_max).log() / math.log(self.sigma_min / self.sigma_max)

    def clock(self, share: Tensor) -> Tensor:
        r"""Even in :math:`\sigma^{1/\rho}`."""
        if math.isinf(self.rho):
            return share
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return self.time_of((first + share * (last - first)) ** self.rho)


SCHEDULES: dict[str, Schedule] = {
    "linear": Linear(),
    "cosine": Cosine(),
    "vp": VP(),
    "sub_vp": SubVP(),
    "ve": VE(),
    "edm": VE(sigma_min=0.002, sigma_max=80.0, rho=7.0),
}
"""Schedules by name. ``"edm"`` is the choice of :cite:p:`karras2022`; its other parts are the
target ``"edm"``, the weighting ``"edm"`` and the times ``"log_normal"``."""


def schedule_of(schedule: str | Schedule) -> Schedule:
    """Return a schedule, by name or as it is.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if isinstance(schedule, Schedule):
        return schedule
    return SCHEDULES[check_choice(schedule, "schedule", tuple(SCHEDULES))]
