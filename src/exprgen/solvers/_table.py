"""The solvers by name, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from exprgen._arguments import check_choice
from exprgen.solvers._ode import ode
from exprgen.solvers._steps import (
    arc,
    ddim,
    ddpm,
    euler,
    euler_maruyama,
    heun,
    predictor_corrector,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from exprgen.solvers._steps import Field

__all__ = ["SOLVERS", "Solver", "n_evaluations", "solve"]


class Solver(NamedTuple):
    """A solver, and how often it evaluates the network."""

    function: Callable[..., Tensor]
    per_step: int | None
    """Evaluations a step, but one in the last; ``None`` where the tolerance decides."""
    stochastic: bool = False
    """Whether it follows the score, hence needs noise that is independent of the data."""
    usual_steps: int = 5
    """Steps in which it is about as good as the others."""


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, 1, usual_steps=25),
    "heun": Solver(heun, 2),
    "euler_maruyama": Solver(euler_maruyama, 1, stochastic=True, usual_steps=50),
    "ddim": Solver(ddim, 1, usual_steps=25),
    "ddpm": Solver(ddpm, 1, stochastic=True, usual_steps=50),
    "predictor_corrector": Solver(predictor_corrector, 2, stochastic=True, usual_steps=50),
    "ode": Solver(ode, None),
    "arc": Solver(arc, 2),
}


def n_evaluations(solver: str, n_steps: int) -> int | None:
    """Evaluations of the network; ``None`` where the tolerance decides."""
    per_step = SOLVERS[solver].per_step
    return None if per_step is None else per_step * (n_steps - 1) + 1


def solve(
    solver: str, field: Field, y: Tensor, n_steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Take draws of the prior to data, by the solver of this name.

    Raises
    ------
    ValueError
        If there is no such solver.
    """
    known = SOLVERS[check_choice(solver, "solver", tuple(SOLVERS))]
    return known.function(field, y, n_steps, generator)
