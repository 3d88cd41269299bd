"""Conditional densities against torch's distributions, quadrature and Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions

from exprgen.densities import Gaussian, Mixture
from exprgen.densities._base import ConditionalDensity, gaussian_entropy

N_FEATURES = 3
FEATURES = torch.tensor([[1.0, 1.0, -0.7], [1.0, 0.0, 1.2]]).double()
"""Two conditions; the first feature is the constant that networks always get."""


def _randomised(density, *, seed=0, scale=0.35):
    """Weights far from where training starts, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in density.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + scale * noise)
    return density.double().requires_grad_(False)


def _make(kind, n_dims, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extra = {"n_components": 4} if kind is Mixture else {}
        return _randomised(kind(n_dims, N_FEATURES, n_hidden=8, **extra), **kwargs)


def _oracle(density, features):
    """The same law by torch.distributions, with covariances instead of whitening matrices."""
    if isinstance(density, Gaussian):
        mean, log_sd = density.parameters_of(features)
        return distributions.Independent(distributions.Normal(mean, log_sd.exp()), 1)
    log_weight, mean, *triangle = density._components(features)
    whitening = density._whitening(*triangle)
    covariance = torch.linalg.inv(whitening.mT @ whitening)
    return distributions.MixtureSameFamily(
        distributions.Categorical(logits=log_weight),
        distributions.MultivariateNormal(mean, covariance_matrix=(covariance + covariance.mT) / 2),
    )


def _moments(density, features):
    """Mean ``(n, d)`` and covariance ``(n, d, d)`` of the oracle."""
    law = _oracle(density, features)
    if isinstance(density, Gaussian):
        return law.mean, torch.diag_embed(law.variance)
    weight = law.mixture_distribution.probs
    means, within = law.component_distribution.mean, law.component_distribution.covariance_matrix
    deviation = means - law.mean.unsqueeze(1)
    each = within + deviation.unsqueeze(-1) * deviation.unsqueeze(-2)
    return law.mean, torch.einsum("nk,nkij->nij", weight, each)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _grid(density, features, n=501, width=9.0):
    """Points on a square that holds the whole law of one condition, and the area of a point."""
    mean, covariance = _moments(density, features[None])
    half = width * covariance[0].diagonal().sqrt()
    axes = [
        torch.linspace(-1, 1, n, dtype=torch.float64) * h + m
        for h, m in zip(half, mean[0], strict=True)
    ]
    points = torch.cartesian_prod(*axes)
    spacing = [float(axis[1] - axis[0]) for axis in axes]
    return axes, points, spacing


KINDS = pytest.mark.parametrize("kind", [Gaussian, Mixture])


@KINDS
@pytest.mark.parametrize("n_dims", [1, 2, 5])
def test_log_prob_is_that_of_torch(kind, n_dims):
    density = _make(kind, n_dims)
    features = torch.randn(300, N_FEATURES, generator=_generator(1)).double()
    y = 3 * torch.randn(300, n_dims, generator=_generator(2)).double()
    expected = _oracle(density, features).log_prob(y)
    torch.testing.assert_close(density.log_prob(y, features), expected, rtol=1e-7, atol=1e-7)


@KINDS
def test_density_integrates_to_one_and_its_marginal_is_log_prob_last(kind):
    density = _make(kind, 2)
    for features in FEATURES:
        (_, last), points, (step, step_last) = _grid(density, features)
        values = density.log_prob(points, features.expand(len(points), -1)).exp()
        values = values.view(-1, len(last))
        assert float(values.sum()) * step * step_last == pytest.approx(1, abs=1e-6)
        marginal = density.log_prob_last(last, features.expand(len(last), -1)).exp()
        torch.testing.assert_close(values.sum(0) * step, marginal, rtol=1e-5, atol=1e-9)


@KINDS
def test_mean_and_sample_moments_are_the_analytic_ones(kind):
    density, n = _make(kind, 3), 200_000
    mean, covariance = _moments(density, FEATURES)
    torch.testing.assert_close(density.mean(FEATURES), mean)
    for i, features in enumerate(FEATURES):
        y = density.sample(features.expand(n, -1), _generator())
        sd = covariance[i].diagonal().sqrt()
        assert ((y.mean(0) - mean[i]).abs() < 4 * sd / np.sqrt(n)).all()
        error = (torch.cov(y.T) - covariance[i]) / torch.outer(sd, sd)
        assert error.abs().max() < 0.03


@KINDS
def test_each_coordinate_of_a_sample_follows_its_marginal(kind):
    """Moments do not see the shape of a mixture; the distribution function does."""
    density = _make(kind, 2)
    for features in FEATURES:
        y = density.sample(features.expand(50_000, -1), _generator(3)).numpy()
        axes, points, steps = _grid(density, features)
        joint = density.log_prob(points, features.expand(len(points), -1)).exp()
        joint = joint.view(len(axes[0]), -1).numpy()
        for k in (0, 1):
            cumulative = np.cumsum(joint.sum(1 - k)) * steps[0] * steps[1]
            law = np.interp(y[:, k], axes[k] + steps[k] / 2, cumulative)
            assert stats.kstest(law, "uniform").pvalue > 1e-3


@KINDS
def test_sample_given_the_last_coordinate_follows_the_conditional_law(kind):
    density, n = _make(kind, 2), 20_000
    for features in FEATURES:
        (first, _), _, (step, _) = _grid(density, features)
        mean, covariance = _moments(density, features[None])
        for place in (-1.5, 0.0, 2.5):
            last = float(mean[0, 1] + place * covariance[0, 1, 1].sqrt())
            points = torch.stack([first, torch.full_like(first, last)], 1)
            pdf = density.log_prob(points, features.expand(len(points), -1)).exp().numpy()
            cumulative = np.cumsum(pdf) / pdf.sum()
            fixed = torch.full((n,), last).double()
            y = density.sample(features.expand(n, -1), _generator(4), last=fixed)
            torch.testing.assert_close(y[:, 1], fixed)
            law = np.interp(y[:, 0], first + step / 2, cumulative)
            assert stats.kstest(law, "uniform").pvalue > 1e-3


def test_sampling_the_last_coordinate_first_gives_the_same_joint_law():
    density, n = _make(Mixture, 4), 200_000
    features = FEATURES[:1].expand(n, -1)
    last = density.sample(features, _generator(5))[:, -1]
    y = density.sample(features, _generator(6), last=last)
    mean, covariance = _moments(density, FEATURES[:1])
    sd = covariance[0].diagonal().sqrt()
    assert ((y.mean(0) - mean[0]).abs() < 4 * sd / np.sqrt(n)).all()
    error = (torch.cov(y.T) - covariance[0]) / torch.outer(sd, sd)
    assert error.abs().max() < 0.03


@KINDS
def test_rows_are_independent_and_conditions_matter(kind):
    density = _make(kind, 3)
    y = torch.randn(2, 3, generator=_generator()).double()
    together = density.log_prob(y, FEATURES)
    alone = torch.cat([density.log_prob(y[i : i + 1], FEATURES[i : i + 1]) for i in (0, 1)])
    torch.testing.assert_close(together, alone)
    assert (density.log_prob(y, FEATURES.flip(0)) - together).abs().min() > 0.01
    assert (density.mean(FEATURES)[0] - density.mean(FEATURES)[1]).abs().max() > 0.1


@KINDS
def test_gradients_are_those_of_finite_differences(kind):
    density = _make(kind, 2).requires_grad_(True)
    y = torch.randn(2, 2, generator=_generator()).double().requires_grad_()
    parameters = list(density.parameters())

    def value(y, *parameters):
        return torch.cat([density.log_prob(y, FEATURES), density.log_prob_last(y[:, 1], FEATURES)])

    assert torch.autograd.gradcheck(value, (y, *parameters))


# Divergences -----------------------------------------------------------------------------


def _posterior(n_dims):
    mean = torch.randn(2, n_dims, generator=_generator(7)).double()
    return mean, (0.5 * torch.randn(2, n_dims, generator=_generator(8)).double()).exp()


def test_entropy_is_that_of_torch_and_skips_observed_coordinates():
    _, sd = _posterior(4)
    normal = distributions.Independent(distributions.Normal(torch.zeros_like(sd), sd), 1)
    torch.testing.assert_close(gaussian_entropy(sd), normal.entropy())
    with_data = torch.cat([sd, torch.zeros(2, 1)], 1)
    torch.testing.assert_close(gaussian_entropy(with_data), normal.entropy())


def test_closed_form_kl_is_that_of_torch_and_of_monte_carlo():
    density, (mean, sd) = _make(Gaussian, 3), _posterior(3)
    q = distributions.Independent(distributions.Normal(mean, sd), 1)
    exact = density.kl(mean, sd, mean, FEATURES)
    expected = distributions.kl_divergence(q, _oracle(density, FEATURES))
    torch.testing.assert_close(exact, expected)
    n = 100_000
    noise = torch.randn(n, 2, 3, generator=_generator(9)).double()
    y = mean + sd * noise
    draws = torch.stack(
        [
            ConditionalDensity.kl(
                density,
                mean[i].expand(n, -1),
                sd[i].expand(n, -1),
                y[:, i],
                FEATURES[i].expand(n, -1),
            )
            for i in (0, 1)
        ],
        1,
    )
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / np.sqrt(n)).all()


def test_kl_of_a_mixture_is_unbiased():
    """Against quadrature of q log(q / p) in two dimensions."""
    density, (mean, sd), n = _make(Mixture, 2), _posterior(2), 100_000
    axis = torch.linspace(-7, 7, 401, dtype=torch.float64)
    unit = torch.cartesian_prod(axis, axis)
    log_q = -0.5 * unit.square().sum(1) - np.log(2 * np.pi)
    weight = log_q.exp() * float(axis[1] - axis[0]) ** 2
    for i, features in enumerate(FEATURES):
        log_p = density.log_prob(mean[i] + sd[i] * unit, features.expand(len(unit), -1))
        exact = float((weight * (log_q - sd[i].log().sum() - log_p)).sum())
        y = mean[i] + sd[i] * torch.randn(n, 2, generator=_generator(10)).double()
        rows = mean[i].expand(n, -1), sd[i].expand(n, -1), y, features.expand(n, -1)
        draws = density.kl(*rows)
        assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / np.sqrt(n)


def test_kl_with_an_observed_coordinate_counts_it_as_data():
    """Its prior density stands where the divergence of a latent coordinate would be."""
    density, (mean, sd) = _make(Gaussian, 3), _posterior(3)
    sd[:, -1] = 0
    law = _oracle(density, FEATURES).base_dist
    latent = distributions.kl_divergence(
        distributions.Normal(mean[:, :-1], sd[:, :-1]),
        distributions.Normal(law.loc[:, :-1], law.scale[:, :-1]),
    ).sum(1)
    expected = latent - density.log_prob_last(mean[:, -1], FEATURES)
    torch.testing.assert_close(density.kl(mean, sd, mean, FEATURES), expected)


@KINDS
def test_samples_depend_on_the_generator_alone(kind):
    density = _make(kind, 3)
    features = FEATURES.repeat(50, 1)
    before = torch.get_rng_state()
    first, again, other = (density.sample(features, _generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
