"""From noise to data along a path, and back with the log-density."""

from exprgen.solvers._ode import Trace, ode, ode_log_prob
from exprgen.solvers._steps import (
    Field,
    ancestral,
    arc,
    ddim,
    ddpm,
    euler,
    euler_maruyama,
    heun,
    predictor_corrector,
)
from exprgen.solvers._table import SOLVERS, Solver, n_evaluations, solve

__all__ = [
    "SOLVERS",
    "Field",
    "Solver",
    "Trace",
    "ancestral",
    "arc",
    "ddim",
    "ddpm",
    "euler",
    "euler_maruyama",
    "heun",
    "n_evaluations",
    "ode",
    "ode_log_prob",
    "predictor_corrector",
    "solve",
]
