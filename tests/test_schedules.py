"""Schedules, targets, weightings, times: against derivatives, formulas, their own inverses."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from exprgen.schedules import (
    SCHEDULES,
    TARGETS,
    TIMES,
    VE,
    VP,
    WEIGHTINGS,
    Linear,
    draw_times,
    predict,
    regression_target,
    schedule_of,
    weight_of,
)

EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
EACH_TARGET = pytest.mark.parametrize("target", TARGETS)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _slope(function, t):
    """Derivative of what depends on each time alone, of the times' shape."""
    return torch.func.grad(lambda t: function(t).sum())(t)


def _inside(schedule, n=60):
    """Times all along the path, its ends left out."""
    return schedule.times(n)[1:-1]


def _truth(schedule, n=60):
    t = _inside(schedule, n)[:, None]
    y = torch.randn(len(t), 3, generator=_generator(1), dtype=torch.float64)
    noise = torch.randn(len(t), 3, generator=_generator(2), dtype=torch.float64)
    at = schedule(t)
    return t, y, noise, at, at.alpha * y + at.sigma * noise


# Schedules -------------------------------------------------------------------------------


@EACH_SCHEDULE
def test_derivatives_are_those_of_automatic_differentiation(schedule):
    t = _inside(schedule)
    at = schedule(t)
    torch.testing.assert_close(at.d_alpha, _slope(lambda t: schedule(t).alpha, t))
    torch.testing.assert_close(at.d_sigma, _slope(lambda t: schedule(t).sigma, t))


@EACH_SCHEDULE
def test_all_is_finite_on_the_closed_range(schedule):
    ends = torch.tensor(schedule.t_range, dtype=torch.float64)
    at = schedule(ends)
    assert all(torch.isfinite(c).all() for c in at)
    assert (at.determinant < 0).all()
    rate = _slope(schedule.clock, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.isfinite(rate).all()
    assert at.sigma[1] < 0.0101  # hardly any noise is left
    assert at.alpha[0] / at.sigma[0] < 0.0201  # hardly any data is there
    assert schedule.prior_scale == pytest.approx(float(at.norm[0]))


@EACH_SCHEDULE
def test_the_ratio_of_noise_to_data_is_inverted_and_the_clock_runs_from_end_to_end(schedule):
    times = schedule.times(100)
    assert times.shape == (101,)
    assert (times.diff() > 0).all()
    ends = torch.tensor(schedule.t_range, dtype=torch.float64)
    torch.testing.assert_close(times[[0, -1]], ends, rtol=0, atol=1e-12)
    inside = _inside(schedule)
    at = schedule(inside)
    torch.testing.assert_close(schedule.time_of(at.sigma / at.alpha), inside)


def test_variance_preserving_diffusion_follows_its_stochastic_equation():
    """In s = 1 - t: dα = -β α / 2 and dσ² = β (1 - σ²), from α = 1 and σ = 0."""
    t, h = torch.linspace(0.01, 0.99, 50, dtype=torch.float64), 1e-6
    schedule = VP(beta_min=0.3, beta_max=11.0)
    beta = 0.3 + (1 - t) * (11.0 - 0.3)
    before, here, after = schedule(t - h), schedule(t), schedule(t + h)
    slope = (before.alpha - after.alpha) / (2 * h)
    torch.testing.assert_close(slope, -beta * here.alpha / 2, rtol=1e-5, atol=1e-8)
    slope = (before.sigma**2 - after.sigma**2) / (2 * h)
    torch.testing.assert_close(slope, beta * (1 - here.sigma**2), rtol=1e-5, atol=1e-8)


def test_edm_has_the_grid_of_its_authors():
    n, rho, low, high = 18, 7, 0.002, 80.0
    expected = [
        (high ** (1 / rho) + i / n * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(n + 1)
    ]
    schedule = SCHEDULES["edm"]
    torch.testing.assert_close(
        schedule(schedule.times(n)).sigma, torch.tensor(expected, dtype=torch.float64)
    )


def test_a_clock_with_large_rho_is_geometric():
    torch.testing.assert_close(VE(rho=1e6).times(10), VE().times(10), rtol=0, atol=1e-4)


def test_a_schedule_goes_by_name_or_as_it_is():
    schedule = VE(sigma_max=10.0)
    assert schedule_of(schedule) is schedule
    assert schedule_of("linear") == Linear()
    with pytest.raises(ValueError, match="schedule must be one of 'linear'.*'edm', got 'liner'"):
        schedule_of("liner")


# Targets ---------------------------------------------------------------------------------


@EACH_SCHEDULE
@EACH_TARGET
def test_data_and_noise_come_back_from_every_target(schedule, target):
    _, y, noise, at, y_t = _truth(schedule)
    found = predict(target, regression_target(target, y, noise, at), y_t, at)
    torch.testing.assert_close(found.data, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.noise, noise, rtol=1e-6, atol=1e-6)


@EACH_SCHEDULE
def test_velocity_is_the_derivative_of_the_path(schedule):
    t, y, noise, at, y_t = _truth(schedule)

    def path(t):
        return schedule(t).alpha * y + schedule(t).sigma * noise

    expected = torch.cat([_slope(lambda t, k=k: path(t)[:, k], t) for k in range(3)], 1)
    torch.testing.assert_close(regression_target("velocity", y, noise, at), expected)
    found = predict("velocity", expected, y_t, at).velocity(at)
    torch.testing.assert_close(found, expected)


@EACH_SCHEDULE
def test_score_is_the_gradient_of_the_log_density(schedule):
    """Of y_t = α y + σ ε with y ~ N(m, s²), whose expected noise is known."""
    _, _, _, at, y_t = _truth(schedule)
    mean, sd = 0.4, 1.3
    variance = (at.alpha * sd) ** 2 + at.sigma**2
    deviation = y_t - at.alpha * mean
    noise = at.sigma / variance * deviation
    point = y_t.clone().requires_grad_()
    (-0.5 * (point - at.alpha * mean) ** 2 / variance).sum().backward()
    found = predict("noise", noise, y_t, at).score(at)
    torch.testing.assert_close(found, point.grad)
    torch.testing.assert_close(regression_target("score", y_t, noise, at), point.grad)


@EACH_SCHEDULE
def test_the_edm_target_is_preconditioned_for_unit_variance(schedule):
    _, y, noise, at, y_t = _truth(schedule)
    skip, out = at.alpha / at.norm**2, at.sigma / at.norm
    output = regression_target("edm", y, noise, at)
    torch.testing.assert_close(skip * y_t + out * output, y)
    torch.testing.assert_close(regression_target("v", y, noise, at), -at.norm * output)
    p, q = (regression_target("edm", one, zero, at) for one, zero in [(1, 0), (0, 1)])
    torch.testing.assert_close(p**2 + q**2, torch.ones_like(p))  # its variance


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sub_vp", "vp"])
@EACH_TARGET
def test_predictions_are_finite_and_right_at_both_ends(schedule, target):
    """The expected values of y ~ N(0, 1), for which nothing is known of the missing half."""
    schedule = SCHEDULES[schedule]
    at = schedule(torch.tensor(schedule.t_range, dtype=torch.float64)[:, None])
    y_t = torch.tensor([[0.7], [-1.2]], dtype=torch.float64)
    data, noise = at.alpha / at.norm**2 * y_t, at.sigma / at.norm**2 * y_t
    found = predict(target, regression_target(target, data, noise, at), y_t, at)
    torch.testing.assert_close(found.data, data, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.noise, noise, rtol=0, atol=2e-3)
    assert torch.isfinite(found.score(at)).all()


# Weightings ------------------------------------------------------------------------------


@EACH_SCHEDULE
@EACH_TARGET
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uniform"])
def test_a_weighting_is_one_function_of_the_error_of_the_data(schedule, target, weighting):
    t, y, noise, at, y_t = _truth(schedule)
    weight = weight_of(weighting, target, at)
    assert (weight > 0).all()
    assert (weight <= 100).all()
    output = regression_target(target, y, noise, at)
    error = 0.1 * torch.randn(output.shape, generator=_generator(3), dtype=torch.float64)
    data_error = predict(target, output + error, y_t, at).data - y
    snr = (at.alpha / at.sigma) ** 2
    expected = {
        "min_snr": snr.clamp(max=5),
        "edm": 1 + snr,
        "likelihood": _slope(lambda t: 0.5 * (schedule(t).alpha / schedule(t).sigma) ** 2, t),
    }[weighting]
    free = (weight < 100).squeeze(1)
    assert free.sum() > 20
    torch.testing.assert_close(
        (weight * error**2)[free], (expected * data_error**2)[free], rtol=1e-6, atol=1e-12
    )


@EACH_SCHEDULE
def test_uniform_weights_and_edm_on_its_own_target_are_one(schedule):
    at = schedule(_inside(schedule))
    one = torch.ones_like(at.sigma)
    torch.testing.assert_close(weight_of("edm", "edm", at), one, rtol=1e-6, atol=1e-6)
    for target in TARGETS:
        expected = at.sigma**2 if target == "score" else one
        torch.testing.assert_close(weight_of("uniform", target, at), expected)


# Times -----------------------------------------------------------------------------------


@EACH_SCHEDULE
@pytest.mark.parametrize("times", TIMES)
def test_times_are_in_range_and_depend_on_the_generator_alone(schedule, times):
    before = torch.get_rng_state()
    first, again, other = (draw_times(times, 500, schedule, _generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    start, end = schedule.t_range
    assert first.min() >= start
    assert first.max() <= end
    assert draw_times(times, 0, schedule, _generator()).shape == (0,)


def test_uniform_times_are_spread_evenly_in_random_order():
    t = draw_times("uniform", 64, Linear(), _generator())
    assert torch.equal((t * 64).floor().sort()[0], torch.arange(64).double())
    assert abs(stats.spearmanr(t, torch.arange(64)).statistic) < 0.3


def _edm_normal(ratio):
    """Karras et al.: log σ ~ N(-1.2, 1.2²), for data of scale ½."""
    return ((ratio / 2).log() + 1.2) / 1.2


@pytest.mark.parametrize(
    ("times", "schedule", "to_normal"),
    [
        ("logit_normal", Linear(), torch.logit),
        ("log_normal", SCHEDULES["edm"], lambda t: _edm_normal(SCHEDULES["edm"](t).sigma)),
        ("log_normal", Linear(), lambda t: _edm_normal((1 - t) / t)),
    ],
)
def test_times_follow_their_law(times, schedule, to_normal):
    # One row of each batch: stratified rows together would look too good.
    one = [draw_times(times, 8, schedule, _generator(seed))[0] for seed in range(2000)]
    assert stats.kstest(to_normal(torch.stack(one)).numpy(), "norm").pvalue > 1e-3
