"""Likelihoods of counts: probabilities are those of scipy and mpmath, draws follow them."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from exprgen.likelihoods import (
    ContaminatedNegativeBinomial,
    NegativeBinomial,
    Start,
    draw_negative_binomial,
    negative_binomial_log_prob,
)
from exprgen.likelihoods._negative_binomial import _invert

# Mean and inverse dispersion: nearly all zeros, nearly Poisson, heavy tails far beyond the count
# at which the recursion hands over to scipy, both sides of the mean at which the method changes.
LAWS = [
    (0.02, 0.3),
    (0.5, 1.0),
    (0.7, 1e6),
    (3.0, 0.1),
    (8.0, 0.05),
    (12.0, 1e4),
    (15.99, 0.5),
    (16.0, 5.0),
    (16.01, 0.5),
    (200.0, 2.0),
    (3000.0, 50.0),
]
N_DRAWS = 400_000


def _law(mean, theta):
    return stats.nbinom(theta, theta / (theta + mean))


def _draw(mean, theta, *, n=N_DRAWS, seed=0):
    log_mean = torch.full((n // 1000, 1000), float(np.log(mean)))
    log_theta = torch.full((1000,), float(np.log(theta)))
    drawn = draw_negative_binomial(log_mean, log_theta, torch.Generator().manual_seed(seed))
    return drawn.numpy().ravel()


def _cells(per_cell, *, seed=0):
    """Counts of every size, a third of them 0, with means and dispersions over orders."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (40, 30)) * rng.integers(0, [3] * 20 + [5000] * 10)
    log_mean = rng.uniform(-8, 8, x.shape)
    log_theta = rng.uniform(-4, 9, x.shape if per_cell else x.shape[1])
    return x.astype(float), log_mean, log_theta


@pytest.mark.parametrize("per_cell", [False, True])
def test_log_prob_is_that_of_scipy(per_cell):
    x, log_mean, log_theta = _cells(per_cell)
    theta, mean = np.exp(log_theta), np.exp(log_mean)
    expected = stats.nbinom.logpmf(x, theta, theta / (theta + mean)).sum(1)
    got = negative_binomial_log_prob(*map(torch.from_numpy, (x, log_mean, log_theta)))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


def test_zero_counts_at_extreme_means():
    log_mean = np.linspace(-30, 30, 61)[:, None]
    zeros = torch.zeros(log_mean.shape, dtype=torch.float64)
    got = negative_binomial_log_prob(zeros, torch.from_numpy(log_mean), torch.ones(1).double())
    np.testing.assert_allclose(got, -np.e * np.log1p(np.exp(log_mean[:, 0] - 1)), rtol=1e-9)


@pytest.mark.parametrize(("theta", "tolerance"), [(1e4, 1e-9), (1e6, 1e-7), (1e8, 1e-5)])
def test_log_prob_keeps_its_digits_at_large_theta(theta, tolerance):
    """scipy's own loses them: the oracle is evaluated with 50 digits."""
    counts, means = [1, 7, 40, 5000], [0.3, 5.0, 5000.0]
    x, mean = (grid.ravel() for grid in np.meshgrid(counts, means))
    got = negative_binomial_log_prob(
        torch.tensor(x[:, None]).double(),
        torch.tensor(mean[:, None]).log(),
        torch.tensor([theta]).double().log(),
    )
    with mpmath.workdps(50):
        t = mpmath.mpf(theta)
        expected = [
            mpmath.loggamma(k + t)
            - mpmath.loggamma(t)
            - mpmath.loggamma(k + 1)
            + t * mpmath.log(t / (t + m))
            + k * mpmath.log(m / (t + m))
            for k, m in zip(map(int, x), map(mpmath.mpf, mean), strict=True)
        ]
    np.testing.assert_allclose(got, np.array(expected, float), rtol=0, atol=tolerance)


@pytest.mark.parametrize("per_cell", [False, True])
def test_gradient_is_that_of_finite_differences(per_cell):
    x, log_mean, log_theta = _cells(per_cell, seed=1)
    rows = np.r_[:6]
    x, log_mean = x[rows] % 40, log_mean[rows] / 3
    log_theta = (log_theta[rows] if per_cell else log_theta) / 3
    log_mean, log_theta = (torch.from_numpy(a).requires_grad_() for a in (log_mean, log_theta))
    counts = torch.from_numpy(x)
    assert torch.autograd.gradcheck(
        lambda m, t: negative_binomial_log_prob(counts, m, t), (log_mean, log_theta)
    )
    assert torch.autograd.gradcheck(
        lambda m: negative_binomial_log_prob(counts, m, log_theta.detach()), (log_mean,)
    )


@pytest.mark.parametrize("kind", [NegativeBinomial, ContaminatedNegativeBinomial])
def test_likelihood_computes_in_the_precision_of_the_location(kind):
    x, log_mean, _ = _cells(per_cell=False)
    likelihood = kind(x.shape[1])
    counts = torch.from_numpy(x).float()
    single = likelihood.log_prob(counts, torch.from_numpy(log_mean).float())
    double = likelihood.log_prob(counts, torch.from_numpy(log_mean))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    np.testing.assert_allclose(single.detach(), double.detach(), rtol=1e-5)


def test_mean_and_variance_are_those_of_scipy():
    means, thetas = map(np.array, zip(*LAWS, strict=True))
    likelihood = NegativeBinomial(len(LAWS))
    likelihood.log_dispersion.data = torch.from_numpy(thetas).log()
    location = torch.from_numpy(means).log()[None]
    np.testing.assert_allclose(likelihood.mean(location)[0], means)
    variance = likelihood.variance(location)[0].detach()
    np.testing.assert_allclose(variance, _law(means, thetas).var())


@pytest.mark.parametrize(("mean", "theta"), LAWS)
def test_draws_follow_the_law_tails_included(mean, theta):
    """Chi-square over cells of at least 25 expected draws, the last ones deep in the tails."""
    law, drawn = _law(mean, theta), _draw(mean, theta)
    assert (drawn == np.round(drawn)).all()
    assert drawn.min() >= 0
    grid = np.r_[[0, 1e-4, 3e-4, 1e-3, 3e-3], np.linspace(0.01, 0.99, 60)]
    grid = np.r_[grid, 1 - np.array([3e-3, 1e-3, 3e-4, 1e-4, 0])]
    edges = np.unique(np.r_[-1, law.ppf(grid[1:-1]), np.inf])
    expected = np.diff(law.cdf(edges)) * N_DRAWS
    edges = edges[np.r_[True, expected >= 25]]
    edges[-1] = np.inf
    expected = np.diff(law.cdf(edges)) * N_DRAWS
    observed, _ = np.histogram(drawn, bins=np.r_[edges[:-1] + 0.5, np.inf])
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # The most extreme draw has a distribution too: both bugs that a prototype had were there.
    assert law.cdf(drawn.max()) ** N_DRAWS > 1e-4
    assert law.cdf(drawn.max() - 1) ** N_DRAWS < 1 - 1e-4


@pytest.mark.parametrize(("mean", "theta"), LAWS)
def test_draws_have_the_mean_and_variance(mean, theta):
    law, drawn = _law(mean, theta), _draw(mean, theta, seed=1).astype(np.float64)
    variance = law.var()
    z = (drawn.mean() - mean) / np.sqrt(variance / N_DRAWS)
    fourth = float(law.stats("k")) + 3
    z_variance = (drawn.var() / variance - 1) / np.sqrt((fourth - 1) / N_DRAWS)
    assert abs(z) < 4
    assert abs(z_variance) < 5


def test_inversion_is_the_quantile_function():
    """Also where no test by drawing gets to: 1 - 1e-13 lies far beyond the recursion's end."""
    rng = np.random.default_rng(0)
    n = 3000
    mean, theta = np.exp(rng.uniform(-6, np.log(16), n)), np.exp(rng.uniform(-3, 12, n))
    uniform = 1 - 10 ** rng.uniform(-13, 0, n)
    law = _law(mean, theta)
    todo = uniform > law.pmf(0)
    log_ratio = np.log(mean) - np.log(theta)
    arguments = (torch.from_numpy(a[todo]) for a in (uniform, log_ratio, theta))
    got = _invert(*arguments).numpy()
    expected = law.ppf(uniform)[todo]
    assert expected.max() > 100
    # Where the distribution function meets the number to rounding, either neighbour is right.
    different = got != expected
    law = _law(mean[todo], theta[todo])
    boundary = law.cdf(np.minimum(got, expected))
    assert (np.abs(boundary - uniform[todo])[different] < 1e-12).all()
    assert different.mean() < 0.02


def test_genes_and_cells_get_their_own_parameters():
    means = torch.tensor([[0.1, 5.0, 100.0], [20.0, 0.5, 2.0]]).repeat(20_000, 1)
    log_theta = torch.tensor([[0.0, 1.0, 2.0], [5.0, -1.0, 0.0]]).repeat(20_000, 1)
    drawn = draw_negative_binomial(means.log(), log_theta, torch.Generator().manual_seed(0))
    for cell in (0, 1):
        mean, theta = means[cell].numpy(), log_theta[cell].exp().numpy()
        own = drawn[cell::2].numpy()
        sd = _law(mean, theta).std()
        assert (np.abs(own.mean(0) - mean) < 4 * sd / np.sqrt(len(own))).all()
        np.testing.assert_allclose(own.std(0), sd, rtol=0.06)


def test_draws_depend_on_the_generator_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again, other = _draw(20, 2, n=2000), _draw(20, 2, n=2000), _draw(20, 2, n=2000, seed=1)
    small, small_again = _draw(2, 2, n=2000), _draw(2, 2, n=2000)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(small, small_again)
    assert (first != other).any()
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


# Outliers --------------------------------------------------------------------------------

RATE, OUTLIER_MEAN = 0.02, 12.0


def _contaminated(thetas, *, rate=RATE, mean=OUTLIER_MEAN):
    likelihood = ContaminatedNegativeBinomial(len(thetas)).double()
    with torch.no_grad():
        likelihood.log_dispersion.copy_(torch.tensor(thetas).log())
        likelihood.outlier_logit.fill_(np.log(rate / (1 - rate)))
        likelihood.decay_logit.fill_(np.log(mean - 1))
    return likelihood.requires_grad_(False)


def _contaminated_pmf(x, mean, theta):
    law = _law(mean, theta)
    return (1 - RATE) * law.pmf(x) + RATE * stats.geom(1 / OUTLIER_MEAN).pmf(x)


def test_outliers_are_geometric_numbers_in_place_of_counts():
    x, log_mean, log_theta = _cells(per_cell=False)
    likelihood = _contaminated(np.exp(log_theta))
    np.testing.assert_allclose(likelihood.outlier_rate, RATE)
    assert float(likelihood.outlier_mean) == pytest.approx(OUTLIER_MEAN)
    theta, mean = np.exp(log_theta), np.exp(log_mean)
    clean = np.log1p(-RATE) + stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    outlier = np.log(RATE) + stats.geom(1 / OUTLIER_MEAN).logpmf(x)
    expected = np.logaddexp(clean, outlier).sum(1)
    got = likelihood.log_prob(torch.from_numpy(x), torch.from_numpy(log_mean))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_gradient_with_outliers_is_that_of_finite_differences():
    x, log_mean, log_theta = _cells(per_cell=False, seed=2)
    likelihood = _contaminated(np.exp(log_theta / 3)).requires_grad_(True)
    counts = torch.from_numpy(x[:5] % 40)
    names = [name for name, _ in likelihood.named_parameters()]

    def value(location, *parameters):
        given = dict(zip(names, parameters, strict=True)) | dict(likelihood.named_buffers())
        return torch.func.functional_call(
            likelihood, given, (counts, location), strict=True, tie_weights=False
        )

    likelihood.forward = likelihood.log_prob
    location = torch.from_numpy(log_mean[:5] / 3).requires_grad_()
    assert torch.autograd.gradcheck(value, (location, *likelihood.parameters()))


def test_rare_genes_have_outliers_as_rarely_as_they_are_detected():
    total, n_obs = torch.tensor([1.0, 100.0, 5000.0]), 1000
    likelihood = _contaminated([1.0, 1.0, 1.0])
    likelihood.initialize(Start(n_obs, total, total, total, torch.zeros(3)))
    detected = 1 - np.exp(-total.numpy() / n_obs)
    np.testing.assert_allclose(likelihood.outlier_rate, RATE * detected, rtol=1e-4)
    # So a gene's outliers are a bounded share of what it is counted at all.
    assert (likelihood.background.numpy() <= RATE * OUTLIER_MEAN * total.numpy() / n_obs).all()


@pytest.mark.parametrize(("mean", "theta"), [(0.05, 1.0), (5.0, 0.5), (15.0, 1e4), (300.0, 3.0)])
def test_draws_with_outliers_follow_the_law(mean, theta):
    likelihood = _contaminated([theta] * 1000).float()
    location = torch.full((N_DRAWS // 1000, 1000), float(np.log(mean)))
    generator = torch.Generator().manual_seed(0)
    drawn = likelihood.draw(location, generator).numpy().ravel().astype(int)
    pmf = _contaminated_pmf(np.arange(20_000), mean, theta)
    assert pmf.sum() == pytest.approx(1)
    # Counts in order, in cells of 40 expected draws or more.
    cell = np.floor(np.cumsum(pmf) * N_DRAWS / 40.000001).astype(int)
    expected = np.bincount(cell, pmf) * N_DRAWS
    observed = np.bincount(cell[drawn], minlength=len(expected))
    kept = expected > 20
    observed, expected = observed[kept], expected[kept]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    again = likelihood.draw(location, torch.Generator().manual_seed(0)).numpy().ravel()
    np.testing.assert_array_equal(drawn, again)


def test_moments_with_outliers_are_those_of_the_law():
    means, thetas = np.array([0.05, 5.0, 15.0, 300.0]), np.array([1.0, 0.5, 1e4, 3.0])
    likelihood = _contaminated(thetas)
    location = torch.from_numpy(means).log()[None]
    x = np.arange(40_000)[:, None]
    pmf = _contaminated_pmf(x, means, thetas)
    mean = (pmf * x).sum(0)
    np.testing.assert_allclose(likelihood.mean(location)[0], mean)
    variance = (pmf * (x - mean) ** 2).sum(0)
    np.testing.assert_allclose(likelihood.variance(location)[0], variance)
    np.testing.assert_allclose(likelihood.signal(location)[0], means)


def test_variance_keeps_its_digits_at_large_means():
    likelihood, location = _contaminated([1e8], rate=1e-6), torch.tensor([[1e6]]).log()
    exact = likelihood.variance(location.double())
    single = likelihood.float().variance(location)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=0)
