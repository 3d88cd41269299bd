"""Solvers and log-densities on laws whose expected data and noise are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from exprgen.schedules import SCHEDULES, TARGETS, Prediction, predict, regression_target
from exprgen.solvers import (
    SOLVERS,
    ancestral,
    arc,
    euler,
    heun,
    n_evaluations,
    ode,
    ode_log_prob,
    predictor_corrector,
    solve,
)

EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
EACH_TARGET = pytest.mark.parametrize("target", TARGETS)
STOCHASTIC = [name for name, solver in SOLVERS.items() if solver.stochastic]


class Law:
    """A mixture of spherical Gaussians, and the field that a perfect network would give."""

    def __init__(self, schedule, weights, means, sds, target="velocity"):
        self.schedule, self.target = SCHEDULES[schedule], target
        self.weights, self.means, self.sds = (
            torch.tensor(value, dtype=torch.float64) for value in (weights, means, sds)
        )
        self.n_dims = self.means.shape[1]
        self.n_evaluations = 0

    def predict(self, y_t, t):
        self.n_evaluations += 1
        at = self.schedule(t)
        deviation = y_t[:, None] - at.alpha * self.means  # (n, K, d)
        variance = at.alpha**2 * self.sds**2 + at.sigma**2
        log_weight = self.weights.log() - 0.5 * self.n_dims * variance.log()
        log_weight = log_weight - 0.5 * deviation.square().sum(-1) / variance
        share = log_weight.softmax(1)[..., None]
        gain = (at.alpha * self.sds**2 / variance)[:, None]
        data = (share * (self.means + gain * deviation)).sum(1)
        noise = (share * (at.sigma / variance)[:, None] * deviation).sum(1)
        # There and back through what a network would have said.
        return predict(self.target, regression_target(self.target, data, noise, at), y_t, at)

    def log_prob(self, y):
        squares = (y[:, None] - self.means).square().sum(-1) / self.sds**2
        log_normal = -0.5 * (squares + self.n_dims * (2 * math.pi * self.sds**2).log())
        return torch.logsumexp(self.weights.log() + log_normal, 1)

    def moments(self):
        mean = self.weights @ self.means
        square = self.weights @ (self.sds[:, None] ** 2 + self.means**2)
        return mean, square - mean**2

    def draw(self, n, seed=100):
        generator = _generator(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.n_dims, generator=generator, dtype=torch.float64)
        return self.means[which] + self.sds[which, None] * noise

    def prior(self, n, seed=0):
        noise = torch.randn(n, self.n_dims, generator=_generator(seed), dtype=torch.float64)
        return self.schedule.prior_scale * noise


def _gaussian(schedule, target="velocity"):
    return Law(schedule, [1.0], [[0.5, -0.3]], [0.6], target)


def _mixture(schedule, target="velocity"):
    return Law(schedule, [0.3, 0.7], [[-1.0, 0.5], [0.8, -0.2]], [0.3, 0.6], target)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _energy(a, b):
    """Energy distance relative to the mean distance, from 0 (same law) to 1, square root."""
    between = torch.cdist(a, b).mean()
    return float(
        (1 - (torch.cdist(a, a).mean() + torch.cdist(b, b).mean()) / (2 * between))
        .clamp(min=0)
        .sqrt()
    )


def _assert_moments(draws, law, mean_error, variance_error):
    mean, variance = law.moments()
    assert (draws.mean(0) - mean).abs().max() < mean_error
    assert (draws.var(0) / variance - 1).abs().max() < variance_error


# Draws -----------------------------------------------------------------------------------


@EACH_SCHEDULE
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("make", [_gaussian, _mixture])
def test_every_solver_draws_the_law_on_every_schedule(schedule, solver, make):
    law, generator = make(schedule), _generator(1)
    n_steps = 140 if solver == "ddpm" else 70  # its draws are too narrow, less so with more steps
    draws = solve(solver, law, law.prior(3000), n_steps, generator)
    # Three standard errors of the mean are .05, of the variance 8 %; the rest is the steps'.
    _assert_moments(draws, law, 0.06, 0.12)
    assert _energy(draws[:1000], law.draw(1000)) < 0.08
    if n_evaluations(solver, n_steps) is not None:
        assert law.n_evaluations == n_evaluations(solver, n_steps)


@EACH_SCHEDULE
@EACH_TARGET
def test_every_target_gives_the_same_draws(schedule, target):
    law, reference = _mixture(schedule, target), _mixture(schedule)
    draws = heun(law, law.prior(500), 30)
    expected = heun(reference, reference.prior(500), 30)
    # Where noise says nothing about the data, the first step misses their mean.
    singular = target in ("noise", "score") and schedule in ("linear", "cosine")
    torch.testing.assert_close(draws, expected, rtol=0, atol=0.04 if singular else 1e-8)


@pytest.mark.parametrize("schedule", ["linear", "vp", "edm"])
def test_stochastic_and_deterministic_solvers_agree(schedule):
    """Energy distance at most that of two samples of the law, and .04."""
    law, n = _mixture(schedule), 2000
    flow = ode(law, law.prior(n))
    noise = _energy(law.draw(n, 5), law.draw(n, 6))
    for solver in STOCHASTIC:
        draws = solve(solver, law, law.prior(n, seed=7), 200, _generator(8))
        assert _energy(draws, flow) < noise + 0.04


def test_corrections_spread_what_the_predictor_left_at_one_point():
    law, n = _mixture("cosine"), 2000

    def without_noise(y, by, start, end, noise):
        return end.alpha * by.data + end.sigma * by.noise

    def error(n_corrections):
        how = {"n_corrections": n_corrections, "predictor": without_noise}
        draws = predictor_corrector(law, torch.zeros(n, 2).double(), 30, _generator(1), **how)
        return _energy(draws, law.draw(n))

    assert error(0) > 0.5
    assert error(5) < 0.1


def test_fifty_steps_of_ddim_are_as_good_as_a_thousand():
    law = _mixture("vp")
    few, many = (solve("ddim", law, law.prior(2000), n) for n in (50, 1000))
    assert _energy(few, many) < 0.05
    assert _energy(solve("ddim", law, law.prior(2000), 5), many) > 0.05  # it can tell


@EACH_SCHEDULE
def test_euler_is_ddim_and_eta_is_the_share_of_new_noise(schedule):
    law = _mixture(schedule)
    start = law.prior(200)
    torch.testing.assert_close(euler(law, start, 20), solve("ddim", law, start, 20))
    spreads = []
    for eta in (0.0, 0.5, 1.0):
        one = start[:1].expand(500, -1)
        spreads.append(ancestral(law, one, 40, _generator(), eta=eta).std(0).mean())
    assert spreads[0] < 1e-9
    assert spreads[0] < spreads[1] < spreads[2]


@EACH_SCHEDULE
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (arc, 2)])
def test_order_of_convergence(schedule, solver, order):
    """The slope of log error by log step."""
    law = _mixture(schedule)
    start = law.prior(200)
    exact = heun(law, start, 1000)
    n_steps = np.array([50, 100, 200])
    errors = [float((solver(law, start, n) - exact).abs().mean()) for n in n_steps]
    slope = np.polyfit(np.log(1 / n_steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


@EACH_SCHEDULE
def test_there_and_back_again(schedule):
    law = _mixture(schedule)
    y = law.draw(200)
    noise = ode(law, y, to="noise")
    assert (ode(law, noise) - y).abs().max() < 1e-3
    assert (noise - y).abs().max() > 0.1
    with pytest.raises(ValueError, match="to must be one of"):
        ode(law, y, to="nose")


@EACH_SCHEDULE
def test_steps_in_the_angle_are_exact_for_standard_normal_data_and_go_back(schedule):
    """Where Heun's method in data and noise changes their variance."""
    law = _mixture(schedule)
    start = law.prior(200)

    class Standard:
        schedule = law.schedule

        def predict(self, y_t, t):
            at = self.schedule(t)
            return Prediction(y_t * at.alpha / at.norm**2, y_t * at.sigma / at.norm**2)

    # The schedules end at the data but for a little noise, which makes no difference to the scale.
    end = law.schedule(torch.tensor(law.schedule.t_range[1], dtype=torch.float64)).norm
    expected = start / law.schedule.prior_scale * end
    torch.testing.assert_close(arc(Standard(), start, 3), expected)
    assert abs(heun(Standard(), start, 3).std() / expected.std() - 1) > 0.01
    drawn = arc(law, start, 200)
    assert (arc(law, drawn, 200, to="noise") - start).abs().max() < 0.02 * start.std()
    with pytest.raises(ValueError, match="to must be one of"):
        arc(law, drawn, 2, to="nose")


# Log-densities ---------------------------------------------------------------------------


@EACH_SCHEDULE
@pytest.mark.parametrize(
    ("make", "target"), [(_gaussian, "velocity")] + [(_mixture, target) for target in TARGETS]
)
def test_log_density_is_that_of_the_law(schedule, make, target):
    """Within .01 nats per dimension, on average over draws."""
    law = make(schedule, target)
    y = law.draw(100)
    error = ode_log_prob(law, y, n_steps=24) - law.log_prob(y)
    assert error.abs().mean() < 0.01 * law.n_dims


@pytest.mark.parametrize("schedule", ["linear", "vp", "edm"])
def test_log_density_of_chosen_steps_is_that_of_the_fixed_ones(schedule):
    law = _mixture(schedule)
    y = law.draw(100)
    adaptive = ode_log_prob(law, y, n_steps=None)
    torch.testing.assert_close(adaptive, ode_log_prob(law, y, n_steps=64), rtol=0, atol=1e-3)


@EACH_SCHEDULE
def test_the_density_integrates_to_one(schedule):
    one = Law(schedule, [0.4, 0.6], [[-1.0], [0.7]], [0.3, 0.5])
    axis = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    total = ode_log_prob(one, axis[:, None]).exp().sum() * 0.01
    assert float(total) == pytest.approx(1, abs=0.01)
    axis = torch.linspace(-4, 4, 65, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    total = ode_log_prob(_mixture(schedule), points, n_steps=16).exp().sum() / 64
    assert float(total) == pytest.approx(1, abs=0.01)


def test_the_estimated_trace_is_right_on_average():
    law = Law("linear", [0.3, 0.7], [[-1.0, 0.5, 0.0], [0.8, -0.2, 1.0]], [0.3, 0.6])
    n, y = 1000, law.draw(5)
    exact = ode_log_prob(law, y, n_steps=12)

    def estimates(seed):
        how = {"n_steps": 12, "trace": "hutchinson", "generator": _generator(seed)}
        return ode_log_prob(law, y.repeat(n, 1), **how).view(n, 5)

    draws = estimates(0)
    assert (draws.std(0) > 0.01).all()
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / math.sqrt(n)).all()
    assert torch.equal(estimates(0), draws)
    assert not torch.equal(estimates(1), draws)
    with pytest.raises(ValueError, match="trace must be one of 'exact', 'hutchinson'"):
        ode_log_prob(law, y, trace="hutchison")


class Shrinking(torch.nn.Module):
    """A field with a parameter, nonlinear in the point."""

    schedule = SCHEDULES["linear"]

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def predict(self, y_t, t):
        return Prediction((self.rate * y_t).tanh(), 0.5 * y_t.sin())


def test_gradients_of_the_adjoint_are_those_through_the_solver():
    field = Shrinking()
    y = torch.randn(20, 2, generator=_generator(), dtype=torch.float64)

    def gradient(**how):
        field.rate.grad = None
        ode_log_prob(field, y, n_steps=40, **how).sum().backward()
        return field.rate.grad.clone()

    through = gradient()
    assert (through.abs() > 0.1).all()
    adjoint = gradient(adjoint_params=list(field.parameters()))
    torch.testing.assert_close(adjoint, through, rtol=1e-4, atol=1e-4)
    signs = {"trace": "hutchinson", "generator": _generator()}
    assert torch.isfinite(gradient(**signs)).all()
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            field.rate[0] += shift
            values.append(float(ode_log_prob(field, y, n_steps=40).sum()))
            field.rate[0] -= shift
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(through[0]), rel=1e-4)


# Contracts -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_draws_depend_on_the_generator_alone_and_keep_their_precision(solver):
    law = _mixture("cosine")
    start = law.prior(30)
    before = torch.get_rng_state()
    first, again, other = (solve(solver, law, start, 8, _generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (solver not in STOCHASTIC)
    assert first.dtype == torch.float64
    law.means, law.sds, law.weights = law.means.float(), law.sds.float(), law.weights.float()
    single = solve(solver, law, start.float(), 8, _generator(1))
    assert single.dtype == torch.float32
    assert ode_log_prob(law, start.float(), n_steps=4).dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(
        single.double(), first, rtol=0, atol=5 if solver in STOCHASTIC else 1e-3
    )


def test_an_unknown_solver_is_named():
    law = _gaussian("linear")
    with pytest.raises(ValueError, match="solver must be one of 'euler', 'heun'.*got 'huen'"):
        solve("huen", law, law.prior(3), 5)
