r"""Solvers of a fixed number of steps.

The probability flow of a path moves its points by

.. math::
    dy = \hat y\, d\alpha + \hat\varepsilon\, d\sigma,

with the expected data and noise given the point. The solvers step in :math:`(\alpha, \sigma)`
themselves rather than in time: a step is then exact while :math:`\hat y` and
:math:`\hat\varepsilon` do not change, whatever the schedule makes of time. Euler's method in this
form is DDIM :cite:p:`song2021ddim`.

The same laws are those of stochastic equations :cite:p:`song2021`, in our direction of time

.. math::
    dy = \Big(u_t + \tfrac{g^2}{2}\, s_t\Big)\, dt + g\, dW, \qquad
    g^2 = 2 \sigma^2 \Big(\frac{\dot\alpha}{\alpha} - \frac{\dot\sigma}{\sigma}\Big),

u being the velocity and s the score: the noise drives points apart and the score, with a plus,
takes them back to where they are likely. The last step of all stochastic solvers adds no noise.

Many dimensions that are nearly standard normal call for another step. Divided by their standard
deviation :math:`n = \sqrt{\alpha^2 + \sigma^2}`, points of such data stand still, and all that
moves them is what the law has besides; in the angle :math:`\theta = \arctan(\alpha / \sigma)`,

.. math::
    \frac{d}{d\theta} \frac{y}{n} =
    \frac{\sigma \hat y - \alpha \hat\varepsilon}{n}.

Solvers that hold :math:`\hat y` and :math:`\hat\varepsilon` in a step change their scale a bit.

All have the arguments of :func:`euler`; their noise comes from a CPU generator.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from exprgen._arguments import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from exprgen.schedules import Coefficients, Prediction, Schedule

__all__ = [
    "Field",
    "ancestral",
    "arc",
    "ddim",
    "ddpm",
    "euler",
    "euler_maruyama",
    "heun",
    "predictor_corrector",
]


class Field(Protocol):
    """A schedule, and what is expected of data and noise at its points."""

    @property
    def schedule(self) -> Schedule:
        """The schedule of the path."""

    def predict(self, y_t: Tensor, t: Tensor) -> Prediction:
        """Predict from points ``(n_obs, n_dims)`` at a time ``()``, float64."""


def _steps(field: Field, n_steps: int) -> Iterator[tuple[Tensor, Coefficients, Coefficients]]:
    """Time and coefficients where each step starts, and coefficients where it ends."""
    for start, end in pairwise(field.schedule.times(n_steps)):
        yield start, field.schedule(start), field.schedule(end)


def _noise_like(y: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y)


def _move(y: Tensor, by: Prediction, start: Coefficients, end: Coefficients) -> Tensor:
    change = (end.alpha - start.alpha) * by.data + (end.sigma - start.sigma) * by.noise
    return y + change


def euler(
    field: Field, y: Tensor, n_steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Euler's method, of first order: one evaluation a step.

    Parameters
    ----------
    field
        Schedule and network.
    y
        Draws from the prior, normal of scale ``field.schedule.prior_scale``, ``(n_obs, n_dims)``.
    n_steps
        Steps, at the schedule's own times.
    generator
        CPU generator of the noise, for those that use any.

    Returns
    -------
    Draws of the data, ``(n_obs, n_dims)``.
    """
    for t, start, end in _steps(field, n_steps):
        y = _move(y, field.predict(y, t), start, end)
    return y


def heun(
    field: Field, y: Tensor, n_steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Heun's method, of second order: two evaluations a step, and one in the last.

    The last step is Euler's, as in :cite:p:`karras2022`. It costs no order, and at the data some
    targets say nothing about the noise.
    """
    times = field.schedule.times(n_steps)
    for i, (t, start, end) in enumerate(_steps(field, n_steps)):
        here = field.predict(y, t)
        moved = _move(y, here, start, end)
        if i < n_steps - 1:
            there = field.predict(moved, times[i + 1])
            both = type(here)((here.data + there.data) / 2, (here.noise + there.noise) / 2)
            moved = _move(y, both, start, end)
        y = moved
    return y


def arc(
    field: Field,
    y: Tensor,
    n_steps: int,
    generator: torch.Generator | None = None,
    *,
    to: Literal["data", "noise"] = "data",
) -> Tensor:
    """Heun's method in the angle: standard normal data are drawn exactly by any steps.

    The last step is Euler's, as in :func:`heun`.

    Parameters
    ----------
    field, y, n_steps, generator
        See :func:`euler`; nothing is random.
    to
        Where to: from data to noise the same way back.

    Returns
    -------
    Points at the other end, ``(n_obs, n_dims)``.
    """

    def turn(point: Tensor, t: Tensor) -> Tensor:
        at = field.schedule(t)
        expected = field.predict(point * at.norm.to(point), t)
        return (at.sigma * expected.data - at.alpha * expected.noise) / at.norm

    times = field.schedule.times(n_steps)
    if check_choice(to, "to", ("data", "noise")) == "noise":
        times = times.flip(0)
    along = field.schedule(times)
    angles, norms = torch.atan2(along.alpha, along.sigma), along.norm
    point = y / norms[0].to(y)
    for i in range(n_steps):
        by, slope = angles[i + 1] - angles[i], turn(point, times[i])
        if i < n_steps - 1:
            slope = (slope + turn(point + by * slope, times[i + 1])) / 2
        point = point + by * slope
    return point * norms[-1].to(y)


def _euler_maruyama_step(
    y: Tensor, by: Prediction, start: Coefficients, end: Coefficients, noise: Tensor
) -> Tensor:
    # ∫ g² dt over the step. At α = 0 the rate α'/α is infinite, the share α gains is not.
    gained = 1 - start.alpha / end.alpha
    variance = start.sigma**2 - end.sigma**2 + 2 * start.sigma**2 * gained
    drift = variance / (2 * start.sigma) * by.noise
    return _move(y, by, start, end) - drift + variance.sqrt() * noise


def euler_maruyama(
    field: Field, y: Tensor, n_steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Euler and Maruyama's method for the stochastic equation: one evaluation a step."""
    for i, (t, start, end) in enumerate(_steps(field, n_steps)):
        here = field.predict(y, t)
        if i < n_steps - 1:
            y = _euler_maruyama_step(y, here, start, end, _noise_like(y, generator))
        else:
            y = _move(y, here, start, end)
    return y


def _ancestral_step(
    y: Tensor, by: Prediction, start: Coefficients, end: Coefficients, noise: Tensor, eta: float
) -> Tensor:
    # Variance of the less noisy point given the noisier one and the data.
    forward = start.sigma**2 - (start.alpha / end.alpha * end.sigma) ** 2
    variance = eta**2 * (end.sigma / start.sigma) ** 2 * forward
    kept = (end.sigma**2 - variance).clamp(min=0).sqrt()
    return end.alpha * by.data + kept * by.noise + variance.sqrt() * noise


def ancestral(
    field: Field,
    y: Tensor,
    n_steps: int,
    generator: torch.Generator | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """Denoise, and put back the noise of the next time: one evaluation a step.

    Parameters
    ----------
    field, y, n_steps, generator
        See :func:`euler`.
    eta
        Which share of that noise is new: all that the forward process would have added at 1, as
        in DDPM :cite:p:`ho2020`; none at 0, as in DDIM :cite:p:`song2021ddim`.
    """
    for i, (t, start, end) in enumerate(_steps(field, n_steps)):
        fresh = eta if i < n_steps - 1 else 0.0
        noise = _noise_like(y, generator) if fresh else torch.zeros_like(y)
        y = _ancestral_step(y, field.predict(y, t), start, end, noise, fresh)
    return y


def ddim(
    field: Field, y: Tensor, n_steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """:func:`ancestral` without new noise."""
    return ancestral(field, y, n_steps, generator, eta=0.0)


def ddpm(
    field: Field, y: Tensor, n_steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """:func:`ancestral` with all noise new."""
    return ancestral(field, y, n_steps, generator, eta=1.0)


def predictor_corrector(
    field: Field,
    y: Tensor,
    n_steps: int,
    generator: torch.Generator | None = None,
    *,
    n_corrections: int = 1,
    signal_to_noise: float = 0.16,
    predictor: Callable[..., Tensor] = _euler_maruyama_step,
) -> Tensor:
    r"""Steps of the stochastic equation, each corrected by Langevin steps :cite:p:`song2021`.

    Parameters
    ----------
    field, y, n_steps, generator
        See :func:`euler`.
    n_corrections
        Langevin steps, of one evaluation each, after every step but the last.
    signal_to_noise
        r in the step size :math:`2 (r \sigma)^2`. It is Song's, with the norms of score and noise
        replaced by their expectations, so that rows do not depend on each other.
    predictor
        Step of the stochastic equation.
    """
    times = field.schedule.times(n_steps)
    for i, (t, start, end) in enumerate(_steps(field, n_steps)):
        here = field.predict(y, t)
        if i == n_steps - 1:
            return _move(y, here, start, end)
        y = predictor(y, here, start, end, _noise_like(y, generator))
        step = 2 * (signal_to_noise * end.sigma) ** 2
        for _ in range(n_corrections):
            score = field.predict(y, times[i + 1]).score(end)
            y = y + step * score + (2 * step).sqrt() * _noise_like(y, generator)
    return y
