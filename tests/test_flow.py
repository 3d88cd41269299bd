"""The normalizing flow: a density that integrates to 1, and samples that follow it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from exprgen.densities import NormalizingFlow

FEATURES = torch.tensor([[1.0, 1.0, -0.7], [1.0, 0.0, 1.2]]).double()
"""Two conditions; the first feature is the constant that networks always get."""


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _make(n_dims, *, scale=0.25, n_transforms=3):
    """Splines far from the identity, and conditions that move and scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = NormalizingFlow(n_dims, 3, n_hidden=12, n_bins=5, n_transforms=n_transforms)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(scale * torch.randn(parameter.shape))
    return flow.double().requires_grad_(False)


def _grid(flow, features, n=400):
    """Points around one condition's law, and the area of a point."""
    mean, log_sd = flow.frame.parameters_of(features[None])
    unit = torch.linspace(-9, 9, n, dtype=torch.float64)
    axes = [m + unit * s for m, s in zip(mean[0], log_sd[0].exp(), strict=True)]
    steps = [float(axis[1] - axis[0]) for axis in axes]
    return axes, torch.cartesian_prod(*axes).reshape(-1, len(axes)), steps


@pytest.mark.parametrize("condition", [0, 1])
def test_the_density_integrates_to_one_and_its_marginal_is_log_prob_last(condition):
    features = FEATURES[condition]
    for n_dims in (1, 2):
        flow = _make(n_dims, n_transforms=2)  # smooth on the scale of the grid
        axes, points, steps = _grid(flow, features)
        values = flow.log_prob(points, features.expand(len(points), -1)).exp()
        assert float(values.sum()) * np.prod(steps) == pytest.approx(1, abs=2e-3)
        last = flow.log_prob_last(axes[-1], features.expand(len(axes[-1]), -1)).exp()
        marginal = values.view(-1, len(axes[-1])).sum(0) * np.prod(steps[:-1])
        torch.testing.assert_close(marginal, last, rtol=0, atol=2e-3 * float(last.max()))


def test_the_noise_behind_a_sample_is_found_again():
    """Sampling inverts what the density evaluates."""
    flow, n = _make(4), 500
    features = FEATURES.repeat(n // 2, 1)
    noise = torch.randn(n, 4, generator=_generator(1))
    y = flow.sample(features, _generator(1))
    mean, log_sd = flow.frame.parameters_of(features)
    u = (y - mean) / log_sd.exp()
    context = torch.cat([features, u[:, -1:]], 1)
    found = flow.rest(context).transform(u[:, :-1]), flow.last(features).transform(u[:, -1:])
    torch.testing.assert_close(torch.cat(found, 1), noise.double(), rtol=0, atol=1e-6)
    assert (flow.rest(context).transform(u[:, :-1]) - u[:, :-1]).abs().max() > 0.3


@pytest.mark.parametrize("condition", [0, 1])
def test_samples_follow_the_density_also_given_the_last_coordinate(condition):
    flow, features, n = _make(2), FEATURES[condition], 20_000
    axes, points, steps = _grid(flow, features)
    joint = flow.log_prob(points, features.expand(len(points), -1)).exp().view(400, 400).numpy()
    y = flow.sample(features.expand(n, -1), _generator(2)).numpy()
    for k in (0, 1):
        law = np.interp(y[:, k], axes[k] + steps[k] / 2, np.cumsum(joint.sum(1 - k)) / joint.sum())
        assert stats.kstest(law, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(y.T)[0, 1]
    weight = joint / joint.sum()
    a, b = (axis.numpy() for axis in axes)
    a, b = a - weight.sum(1) @ a, b - weight.sum(0) @ b
    expected = a @ weight @ b / np.sqrt((weight.sum(1) @ a**2) * (weight.sum(0) @ b**2))
    assert correlation == pytest.approx(expected, abs=0.03)
    for column in (170, 200, 230):
        fixed = axes[1][column].expand(n)
        y = flow.sample(features.expand(n, -1), _generator(3), last=fixed)
        assert torch.equal(y[:, 1], fixed)
        cumulative = np.cumsum(joint[:, column]) / joint[:, column].sum()
        law = np.interp(y[:, 0], axes[0] + steps[0] / 2, cumulative)
        assert stats.kstest(law, "uniform").pvalue > 1e-3


def test_its_mean_is_an_estimate_that_does_not_change():
    flow, n = _make(3), 100_000
    means = flow.mean(FEATURES)
    assert torch.equal(means, flow.mean(FEATURES.flip(0)).flip(0))
    for features, mean in zip(FEATURES, means, strict=True):
        y = flow.sample(features.expand(n, -1), _generator(4))
        assert ((y.mean(0) - mean).abs() < 4.5 * y.std(0) / np.sqrt(2048)).all()
    assert flow.mean(FEATURES[:0]).shape == (0, 3)


def test_samples_depend_on_the_generator_alone():
    flow, features = _make(3), FEATURES.repeat(50, 1)
    before = torch.get_rng_state()
    first, again, other = (flow.sample(features, _generator(s)) for s in (1, 1, 2))
    flow.mean(features)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_reach_every_parameter_and_are_finite():
    flow = _make(3).requires_grad_(True)
    y = torch.randn(200, 3, generator=_generator()).double() * 8  # beyond the splines' ends, too
    features = FEATURES.repeat(100, 1)
    (flow.log_prob(y, features) + flow.log_prob_last(y[:, -1], features)).sum().backward()
    for name, parameter in flow.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
