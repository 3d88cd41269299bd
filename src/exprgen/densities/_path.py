r"""Flow matching and diffusion: a density that is the end of a path from noise.

A network learns what is expected of data and noise at a point of the path
:math:`y_t = \alpha_t y + \sigma_t \varepsilon` :cite:p:`lipman2023,song2021`; solvers follow the
path to draw, and back to evaluate :cite:p:`chen2018`. See :mod:`exprgen.schedules` for
paths, targets and weightings, :mod:`exprgen.couplings`, and :mod:`exprgen.solvers`.

What conditions do to draws can be weighed, see :meth:`Path.sample`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from exprgen._arguments import check_choice, check_number, check_positive_int
from exprgen._errors import name_some
from exprgen._random import BLOCK_SIZE
from exprgen.couplings import COUPLINGS, labels_and_numbers
from exprgen.densities._base import ConditionalDensity
from exprgen.densities._guidance import (
    GuidedField,
    HidingMixture,
    Term,
    WatchedField,
    evaluate,
    terms_of,
)
from exprgen.nn import Denoiser
from exprgen.schedules import (
    TARGETS,
    TIMES,
    WEIGHTINGS,
    Coefficients,
    draw_times,
    regression_target,
    schedule_of,
    weight_of,
)
from exprgen.solvers import SOLVERS, arc, ode_log_prob, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exprgen.schedules import Schedule, Target, Times, Weighting
    from exprgen.solvers import Trace

__all__ = ["Path"]

# Targets whose velocity is finite at both ends of the path.
_REGULAR = ("velocity", "v", "edm")
_N_MEAN_DRAWS = 2048
_N_EXACT_TRACE = 32
_N_LIKELIHOOD_STEPS = 16
_N_MLE_STEPS = 8


class Path(ConditionalDensity):
    """Flow matching, diffusion or a continuous normalizing flow; ``mean`` is an *estimate*.

    Parameters
    ----------
    n_dims, n_features
        See :class:`~exprgen.densities.ConditionalDensity`.
    blocks
        Width of each condition's features, in their order after the constant.
    schedule
        Name of a schedule, see :data:`exprgen.schedules.SCHEDULES`, or one.
    target
        What the network predicts: ``"velocity"``, ``"noise"``, ``"data"``, ``"v"``, ``"score"``
        or ``"edm"``. The log-density needs one that is regular at both ends of the path:
        velocity, v or edm.
    weighting
        Of errors by time: ``"uniform"``, ``"min_snr"``, ``"likelihood"`` or ``"edm"``.
    times
        Law of the times of training: ``"uniform"``, ``"logit_normal"`` or ``"log_normal"``.
    coupling
        Of data and noise: ``"independent"`` or ``"optimal_transport"``.
    solver, n_steps
        How to draw, unless :meth:`sample` is told otherwise. Heun's method evaluates the
        network 2 ``n_steps`` - 1 times.
    condition_dropout
        Share of training rows in which a condition is hidden, each on its own.
    n_hidden, n_layers, dropout
        Of the network.
    network
        In place of a :class:`~exprgen.nn.Denoiser` of that shape; of the same signature.
    objective
        ``"matching"`` regresses on the target; ``"mle"`` maximises the likelihood of the flow,
        with Hutchinson's estimate of the trace :cite:p:`grathwohl2019`, through a solver.
    depth_first
        Whether the last coordinate is drawn first, from a mixture of its own, and the path is
        of the others given it. Fixing it, and its own density, are then *exact*.

    Raises
    ------
    ValueError
        If a name is unknown, the solver is stochastic and the coupling not independent, the
        blocks do not add up, or there is no coordinate besides the last.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        n_dims: int,
        n_features: int,
        *,
        blocks: Sequence[int],
        schedule: str | Schedule = "linear",
        target: Target = "velocity",
        weighting: Weighting = "uniform",
        times: Times = "uniform",
        coupling: Literal["independent", "optimal_transport"] = "independent",
        solver: str = "heun",
        n_steps: int = 5,
        condition_dropout: float = 0.1,
        n_hidden: int = 256,
        n_layers: int = 2,
        dropout: float = 0.0,
        network: nn.Module | None = None,
        objective: Literal["matching", "mle"] = "matching",
        depth_first: bool = False,
    ) -> None:
        super().__init__(n_dims, n_features)
        if 1 + sum(blocks) != n_features:
            raise ValueError(
                f"blocks must add up to n_features - 1 = {n_features - 1}, got {list(blocks)}."
            )
        if depth_first and n_dims < 2:
            raise ValueError(f"depth_first needs n_dims of at least 2, got {n_dims}.")
        self.schedule = schedule_of(schedule)
        self.target: Target = check_choice(target, "target", TARGETS)
        self.weighting: Weighting = check_choice(weighting, "weighting", WEIGHTINGS)
        self.times: Times = check_choice(times, "times", TIMES)
        self.coupling = check_choice(coupling, "coupling", tuple(COUPLINGS))
        self.solver = self._check_solver(solver)
        self.n_steps = check_positive_int(n_steps, "n_steps")
        self.condition_dropout = check_number(condition_dropout, "condition_dropout", "[0, 1)")
        self.objective = check_choice(objective, "objective", ("matching", "mle"))
        self.n_conditions = len(blocks)
        self.depth = HidingMixture(blocks) if depth_first else None
        self.n_path = n_dims - depth_first
        if network is None:
            network = Denoiser(
                self.n_path,
                blocks,
                n_given=int(depth_first),
                n_hidden=n_hidden,
                n_layers=n_layers,
                dropout=dropout,
            )
        self.network = network
        if self.condition_dropout == 0:
            # Nothing is hidden, and parallel training waits for every parameter's gradient.
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(not name.endswith("null"))
        exact = self.n_path <= _N_EXACT_TRACE
        self.estimator = "exact up to the solver's error" if exact else "estimate"
        self.register_buffer("shift", torch.zeros(n_dims))
        self.register_buffer("scale", torch.ones(n_dims))

    def _check_solver(self, solver: str) -> str:
        check_choice(solver, "solver", tuple(SOLVERS))
        if SOLVERS[solver].stochastic and self.coupling != "independent":
            # Noise that knows its data point is not -σ times the score, which they follow.
            allowed = [name for name, known in SOLVERS.items() if not known.stochastic]
            raise ValueError(
                f"solver must be one of {name_some(allowed, 20)} with coupling={self.coupling!r}, "
                f"got {solver!r}: stochastic solvers need independent noise."
            )
        return solver

    # Standard coordinates ------------------------------------------------------------------

    def standardise(self, y: Tensor) -> None:
        """Take shift and scale of the path's own coordinates from data, ``(n_obs, n_dims)``.

        Schedules and preconditioning are made for unit variance. Call it once, before training.
        """
        self.shift.copy_(y.mean(0))
        sd = y.std(0)
        self.scale.copy_(torch.where(sd > 0, sd, torch.ones_like(sd)))

    def _split(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Standardised coordinates of the path, and the last one where it comes first."""
        u = (y - self.shift) / self.scale
        return (u, None) if self.depth is None else (u[:, :-1], u[:, -1:])

    # Training ------------------------------------------------------------------------------

    def loss(
        self, y: Tensor, features: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """What training minimises, ``(n_obs,)``.

        Half the weighted squared error of the network, summed over dimensions; or minus the
        log-likelihood, nats. Either way with minus the log-density of the last coordinate, nats,
        where that comes first.

        Parameters
        ----------
        y, features
            Data ``(n_obs, n_dims)`` and condition features ``(n_obs, n_features)``.
        generator
            CPU generator of times, noise and hidden conditions: the same for the same state.
            torch's global one where ``None``.
        """
        keep: Tensor | None = None
        if self.condition_dropout and self.n_conditions:
            keep = torch.rand(len(y), self.n_conditions, generator=generator)
            keep = (keep >= self.condition_dropout).to(y.device)
        if self.objective == "mle":
            return -self._log_prob(y, features, keep, generator, "hutchinson", _N_MLE_STEPS)
        u, last = self._split(y)
        value = self._matching(u, last, features, keep, generator)
        return value if last is None else value - self._log_depth(last, features, keep)

    def _matching(
        self,
        u: Tensor,
        last: Tensor | None,
        features: Tensor,
        keep: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        noise = torch.randn(u.shape, generator=generator, dtype=u.dtype).to(u)
        labels, numbers = labels_and_numbers(features)
        if last is not None:
            numbers = torch.cat([numbers, last], dim=1)
        noise = COUPLINGS[self.coupling](u, noise, labels, numbers)
        t = draw_times(self.times, len(u), self.schedule, generator)[:, None]
        # In double precision until here: single has too few digits near the ends of the path.
        at = Coefficients(*(coefficient.to(u) for coefficient in self.schedule(t)))
        u_t = at.alpha * u + at.sigma * noise
        output = evaluate(self.network, u_t, at, features, keep, last)
        error = output - regression_target(self.target, u, noise, at)
        weight = weight_of(self.weighting, self.target, at)
        return 0.5 * (weight * error.square()).sum(1)

    # Density -------------------------------------------------------------------------------

    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Log-density, ``(n_obs,)``, nats.

        Exact but for the solver's error up to 32 dimensions; beyond, an estimate with signs that
        are the same in every call.

        Raises
        ------
        ValueError
            If the target is not regular at both ends of the path.
        """
        if self.target not in _REGULAR:
            raise ValueError(
                f"target={self.target!r} has no log-density that can be trusted: the velocity "
                "that follows from it has a pole at an end of the path. Train with one of "
                f"{list(_REGULAR)}; draws are not affected."
            )
        trace: Trace = "exact" if self.n_path <= _N_EXACT_TRACE else "hutchinson"
        parts = [
            self._log_prob(*block, None, torch.Generator().manual_seed(0), trace)
            for block in zip(y.split(BLOCK_SIZE), features.split(BLOCK_SIZE), strict=True)
        ]
        return torch.cat(parts)

    def _log_prob(
        self,
        y: Tensor,
        features: Tensor,
        keep: Tensor | None,
        generator: torch.Generator | None,
        trace: Trace,
        n_steps: int = _N_LIKELIHOOD_STEPS,
    ) -> Tensor:
        u, last = self._split(y)
        value = ode_log_prob(
            self._field(features, last, (Term(keep),)),
            u,
            trace=trace,
            generator=generator,
            n_steps=n_steps,
        )
        if last is not None:
            value = value + self._log_depth(last, features, keep)
        return value - self.scale.log().sum()

    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Exact log-density of the last coordinate, ``(n_obs,)``, nats.

        Raises
        ------
        ValueError
            If it has no law of its own.
        """
        self._check_depth("log_prob_last")
        u_last = ((last - self.shift[-1]) / self.scale[-1])[:, None]
        return self._log_depth(u_last, features, None) - self.scale[-1].log()

    def _log_depth(self, u_last: Tensor, features: Tensor, keep: Tensor | None) -> Tensor:
        depth = self._check_depth("depth")
        return depth.log_prob(u_last, depth.visible(features, keep))

    def _check_depth(self, what: str) -> HidingMixture:
        if self.depth is None:
            raise ValueError(
                f"{what} needs the law of the last coordinate, and this path has no depth of its "
                "own; build it with depth_first=True."
            )
        return self.depth

    # Draws ---------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        features: Tensor,
        generator: torch.Generator,
        last: Tensor | None = None,
        *,
        guidance: Sequence[float] | Tensor | None = None,
        solver: str | None = None,
        n_steps: int | None = None,
        paired: bool = False,
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``.

        Parameters
        ----------
        features
            Condition features, ``(n_obs, n_features)``.
        generator
            CPU generator of all noise.
        last
            The last coordinate where it is fixed, ``(n_obs,)``.
        guidance
            A weight per condition, from 0 up: 1 as trained, 0 as if it were not known, above 1
            sharper and narrower :cite:p:`ho2022`. The field is multilinear in the weights, and
            *exact* where all are 0 or 1; every other weight doubles the evaluations of the
            network. A last coordinate that comes first knows the conditions of weight above 0, as
            trained.
        solver, n_steps
            In place of the path's own.
        paired
            Whether every second row starts from the opposite of the noise before it, so that
            averages need fewer draws.

        Raises
        ------
        ValueError
            If the last coordinate is fixed and has no law of its own, the solver cannot serve, or
            there is not one weight per condition.
        RuntimeError
            If the solver meets points that are not finite; it names the step.
        """
        if last is not None:
            self._check_depth("last")
        terms = terms_of(guidance, self.n_conditions)
        solver = self.solver if solver is None else self._check_solver(solver)
        n_steps = check_positive_int(self.n_steps if n_steps is None else n_steps, "n_steps")
        draws = []
        # Blocks fit the cache: half the time of all rows at once.
        for rows in torch.arange(len(features), device=features.device).split(BLOCK_SIZE):
            block = features[rows]
            given = self._last(block, terms, None if last is None else last[rows], generator)
            noise = torch.randn(len(rows), self.n_path, generator=generator)
            if paired:
                noise[1::2] = -noise[: len(noise) - 1 : 2]
            start = self.schedule.prior_scale * noise.to(self.scale)
            distinct, row = torch.unique(block, dim=0, return_inverse=True)
            counted = None if SOLVERS[solver].per_step is None else n_steps
            field = WatchedField(self._field(distinct, given, terms, row), counted)
            u = solve(solver, field, start, n_steps, generator)
            field.check(u, torch.ones((), dtype=torch.float64))
            draws.append(u if given is None else torch.cat([u, given], dim=1))
        if not draws:
            return self.scale.new_zeros(0, self.n_dims)
        y = self.shift + self.scale * torch.cat(draws)
        return y if last is None else torch.cat([y[:, :-1], last[:, None].to(y)], dim=1)

    @torch.no_grad()
    def transport(
        self, y: Tensor, features: Tensor, to: Tensor, n_steps: int | None = None
    ) -> Tensor:
        """The same noise under other conditions, ``(n_obs, n_dims)``: back, and forth again.

        Exact but for the solver's error: what follows p(y | c) then follows p(y | c'). What stays
        under its own conditions stays as it is. Of paths of all coordinates only.

        Parameters
        ----------
        y, features, to
            Data ``(n_obs, n_dims)``, its condition features and others, ``(n_obs, n_features)``.
        n_steps
            Either way; ``None`` is four times as many as for a draw, for here the error of a
            single cell counts, and not that of a law.
        """
        n_steps = 4 * self.n_steps if n_steps is None else n_steps
        u, _ = self._split(y)
        noise = arc(self._field(features, None, (Term(),)), u, n_steps, to="noise")
        moved = arc(self._field(to, None, (Term(),)), noise, n_steps)
        stays = (features == to).all(1, keepdim=True)
        return torch.where(stays, y, self.shift + self.scale * moved)

    def _last(
        self,
        features: Tensor,
        terms: tuple[Term, ...],
        last: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor | None:
        """The standardised last coordinate where it comes first, ``(n_obs, 1)``."""
        if self.depth is None:
            return None
        if last is not None:
            return ((last - self.shift[-1]) / self.scale[-1])[:, None]
        return self.depth.sample(self.depth.visible(features, terms[-1].keep), generator)

    def _field(
        self,
        features: Tensor,
        last: Tensor | None,
        terms: tuple[Term, ...],
        rows: Tensor | None = None,
    ) -> GuidedField:
        return GuidedField(self.network, self.schedule, self.target, features, last, terms, rows)

    def mean(self, features: Tensor, n_draws: int = _N_MEAN_DRAWS) -> Tensor:
        """E[y | c], ``(n_obs, n_dims)``: an *estimate* from paired draws, always the same ones."""
        distinct, row = torch.unique(features, dim=0, return_inverse=True)
        means = [
            self.sample(
                one.expand(n_draws, -1), torch.Generator().manual_seed(0), paired=True
            ).mean(0)
            for one in distinct
        ]
        return torch.stack(means)[row] if means else features.new_zeros(0, self.n_dims)
