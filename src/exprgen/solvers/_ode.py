r"""The probability flow as an ordinary differential equation, and its log-density.

.. math::
    \frac{dy}{dt} = u_t(y), \qquad
    \log p(y_1) = \log p_0(y_0) - \int_0^1 \nabla \cdot u_t(y_t)\, dt,

the instantaneous change of variables :cite:p:`chen2018`. Integration runs in the share of the way
that the schedule's clock tells, where no schedule is singular. The divergence is the trace of a
Jacobian: *exact*, one vector-Jacobian product per dimension; or Hutchinson's *estimate*
:math:`v^\top \nabla u\, v`, one product with random signs v that stay the same along the way
:cite:p:`grathwohl2019`.

Gradients are taken by :mod:`torch.func`, which works where gradients are off; it does not under
``torch.inference_mode``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from exprgen._arguments import check_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from exprgen.solvers._steps import Field

__all__ = ["Trace", "ode", "ode_log_prob"]

Trace = Literal["exact", "hutchinson"]


def _velocity(field: Field, share: Tensor, y: Tensor) -> Tensor:
    """Change of y by the share of the way, ``(n_obs, n_dims)``."""
    share = share.detach().cpu().double()
    rate, t = torch.func.grad_and_value(field.schedule.clock)(share)
    return rate * field.predict(y, t).velocity(field.schedule(t))


def ode(
    field: Field,
    y: Tensor,
    n_steps: int | None = None,
    generator: torch.Generator | None = None,
    *,
    to: Literal["data", "noise"] = "data",
    rtol: float = 1e-6,
    atol: float = 1e-6,
) -> Tensor:
    """Integrate by Dormand and Prince's method, which chooses its steps.

    Parameters
    ----------
    field, y, generator
        See :func:`euler`; nothing is random.
    n_steps
        Not used: there are as many as the tolerance needs.
    to
        Where to: from data to noise the same way back.
    rtol, atol
        Relative and absolute tolerance of a step's error.

    Returns
    -------
    Points at the other end, ``(n_obs, n_dims)``.
    """
    from torchdiffeq import odeint

    ends = [0.0, 1.0] if check_choice(to, "to", ("data", "noise")) == "data" else [1.0, 0.0]
    shares = torch.tensor(ends, dtype=y.dtype, device=y.device)
    path = odeint(
        lambda share, y: _velocity(field, share, y),
        y,
        shares,
        rtol=rtol,
        atol=atol,
        options=_stop_at(shares),
    )
    return path[-1]


def ode_log_prob(
    field: Field,
    y: Tensor,
    *,
    trace: Trace = "exact",
    generator: torch.Generator | None = None,
    n_steps: int | None = 32,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Tensor:
    """Log-density of data under the probability flow, nats.

    Parameters
    ----------
    field
        Schedule and network.
    y
        Data, ``(n_obs, n_dims)``.
    trace
        Divergence, ``"exact"`` or ``"hutchinson"``, which is an unbiased *estimate*.
    generator
        CPU generator of Hutchinson's signs, drawn once.
    n_steps
        Steps of the classical Runge–Kutta method, with four evaluations each. Rows then do not
        depend on each other. ``None`` is Dormand and Prince's method within ``rtol`` and ``atol``.
    rtol, atol
        See :func:`ode`.
    adjoint_params
        Parameters to find gradients of by solving the adjoint equation :cite:p:`chen2018`, in
        memory that does not grow with steps; ``None`` goes back through the solver instead.

    Returns
    -------
    Log-densities, ``(n_obs,)``.
    """
    from torchdiffeq import odeint, odeint_adjoint

    n_dims = y.shape[1]
    if check_choice(trace, "trace", ("exact", "hutchinson")) == "exact":
        divergence = _exact(n_dims)
    else:
        divergence = _hutchinson(torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1)

    def change(share: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        velocity, pull = torch.func.vjp(lambda y: _velocity(field, share, y), state[0])[:2]
        return velocity, divergence(pull, velocity)

    shares = torch.tensor([1.0, 0.0], dtype=y.dtype, device=y.device)
    options: dict[str, object] = {"rtol": rtol, "atol": atol, "options": _stop_at(shares)}
    if n_steps is not None:
        # Without further options the fixed method steps from one given point to the next.
        shares = torch.linspace(1, 0, n_steps + 1, dtype=y.dtype, device=y.device)
        options = {"method": "rk4"}
    start = (y, y.new_zeros(len(y)))
    if adjoint_params is None:
        noises, integrals = odeint(change, start, shares, **options)
    else:
        parameters = tuple(adjoint_params)
        noises, integrals = odeint_adjoint(
            change, start, shares, adjoint_params=parameters, **options
        )
    # The integral runs from data to noise, hence has the sign of the formula already.
    scale = field.schedule.prior_scale
    log_prior = -0.5 * (noises[-1] / scale).square().sum(1)
    log_prior = log_prior - n_dims * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    return log_prior + integrals[-1]


def _stop_at(shares: Tensor) -> dict[str, Tensor]:
    """Options that keep an adaptive method from stepping past the end, where no path is."""
    return {"step_t": shares[1:]}


def _exact(n_dims: int) -> Callable[..., Tensor]:
    """Trace of the Jacobian of each row, by a product with every unit vector."""

    def divergence(pull: Callable[[Tensor], tuple[Tensor]], velocity: Tensor) -> Tensor:
        units = torch.eye(n_dims, dtype=velocity.dtype, device=velocity.device)
        rows = torch.func.vmap(lambda unit: pull(unit.expand_as(velocity))[0])(units)
        return torch.einsum("knk->n", rows)

    return divergence


def _hutchinson(signs: Tensor) -> Callable[..., Tensor]:
    """Unbiased estimate of the trace from one product with random signs."""

    def divergence(pull: Callable[[Tensor], tuple[Tensor]], velocity: Tensor) -> Tensor:
        return (pull(signs)[0] * signs).sum(1)

    return divergence
