"""Poisson, zero-inflated, Gaussian; further heads: against scipy, scvi-tools, brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from exprgen.likelihoods import (
    ContaminatedNegativeBinomial,
    Gaussian,
    MixtureOfGaussians,
    NegativeBinomial,
    Poisson,
    Start,
    ZeroInflatedNegativeBinomial,
)

N = 200_000


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _randomised(likelihood, *, scale=0.5, seed=0):
    """Parameters away from the start, in float64."""
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return likelihood.double().requires_grad_(False)


def _counts(n=40, n_vars=12, n_heads=1, *, seed=0):
    """Counts of every size, log means over orders, and heads."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (n, n_vars)) * rng.integers(0, [4] * 8 + [400] * (n_vars - 8))
    location = rng.uniform(-6, 6, x.shape)
    extra = rng.normal(size=(n, n_heads - 1, n_vars))
    tensors = (torch.from_numpy(a.astype(float)) for a in (x, location, extra))
    return tuple(tensors)


def _check_draws(likelihood, location, extra, pmf):
    """Chi-square of draws of one law against its probabilities, at 0, 1, 2, ..."""
    location = torch.full((N // 500, 500), float(location))
    extra = None if extra is None else torch.tensor(extra)[None, :, None].expand(N // 500, -1, 500)
    drawn = likelihood.draw(location, _generator(), extra).numpy().ravel().astype(int)
    again = likelihood.draw(location, _generator(), extra).numpy().ravel()
    np.testing.assert_array_equal(drawn, again)
    cell = np.floor(np.cumsum(pmf) * N / 40.000001).astype(int)
    expected = np.bincount(cell, pmf) * N
    observed = np.bincount(cell[drawn], minlength=len(expected))
    kept = expected > 20
    observed, expected = observed[kept], expected[kept]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def _gradcheck(likelihood, x, location, extra):
    """Analytic gradients in the decoder's output and in every parameter."""
    likelihood.requires_grad_(True)
    names = [name for name, _ in likelihood.named_parameters()]

    def value(location, extra, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(likelihood, given, (x, location, extra))

    likelihood.forward = likelihood.log_prob
    extra = None if extra is None else extra.requires_grad_()
    inputs = (location.requires_grad_(), extra, *likelihood.parameters())
    assert torch.autograd.gradcheck(value, inputs)


# Poisson ---------------------------------------------------------------------------------


def test_poisson_is_that_of_scipy_and_the_limit_of_the_negative_binomial():
    x, location, _ = _counts()
    got = Poisson(12).log_prob(x, location)
    expected = stats.poisson.logpmf(x.numpy(), location.exp().numpy()).sum(1)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    limit = NegativeBinomial(12).double()
    limit.log_dispersion.data.fill_(np.log(1e12))
    torch.testing.assert_close(got, limit.log_prob(x, location).detach(), rtol=1e-4, atol=1e-3)
    assert torch.equal(Poisson(12).variance(location), Poisson(12).mean(location))


@pytest.mark.parametrize("mean", [0.05, 3.0, 80.0])
def test_poisson_draws_follow_the_law(mean):
    _check_draws(Poisson(500), np.log(mean), None, stats.poisson(mean).pmf(np.arange(300)))


@pytest.mark.parametrize("kind", [Poisson, NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_means_that_are_no_counts_are_refused(kind):
    with pytest.raises(ValueError, match="cannot be drawn as counts"):
        kind(2).draw(torch.tensor([[0.0, 30.0]]), _generator())


# Dispersion per gene and cell ------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [NegativeBinomial, ContaminatedNegativeBinomial, ZeroInflatedNegativeBinomial]
)
def test_a_head_adds_to_the_log_dispersion(kind):
    """Each cell has the law of a model whose genes have that cell's dispersion."""
    likelihood = _randomised(kind(12, dispersion="gene-cell"))
    x, location, extra = _counts(n_heads=likelihood.n_heads)
    drawn = likelihood.draw(location, _generator(), extra)
    for verb in ("log_prob", "mean", "variance", "signal"):
        given = (x, location, extra)[verb != "log_prob" :]
        whole = getattr(likelihood, verb)(*given)
        for i in (0, 7):
            own = kind(12).double().requires_grad_(False)
            own.load_state_dict(likelihood.state_dict())
            own.log_dispersion += extra[i, 0]
            rest = extra[i : i + 1, 1:] if own.n_heads > 1 else None
            row = (x[i : i + 1], location[i : i + 1])[verb != "log_prob" :]
            torch.testing.assert_close(whole[i], getattr(own, verb)(*row, rest)[0])
    assert drawn.shape == x.shape
    without = likelihood.log_prob(x, location)
    torch.testing.assert_close(without, likelihood.log_prob(x, location, 0 * extra))


def test_draws_have_the_dispersion_of_their_cell():
    likelihood = NegativeBinomial(2, dispersion="gene-cell").requires_grad_(False)
    extra = torch.tensor([[[-1.0, 2.0]], [[3.0, 0.0]]]).repeat(40_000, 1, 1)
    location = torch.full((80_000, 2), np.log(4.0))
    drawn = likelihood.draw(location, _generator(), extra)
    for cell in (0, 1):
        expected = likelihood.variance(location[:2], extra[:2])[cell]
        np.testing.assert_allclose(drawn[cell::2].var(0), expected, rtol=0.06)


# Zero inflation --------------------------------------------------------------------------


@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
def test_zero_inflation_is_that_of_scvi(dispersion):
    from scvi.distributions import ZeroInflatedNegativeBinomial as Oracle

    likelihood = _randomised(ZeroInflatedNegativeBinomial(12, dispersion=dispersion), scale=2)
    x, location, extra = _counts(n_heads=likelihood.n_heads)
    log_theta = likelihood.log_dispersion + (extra[:, 0] if dispersion == "gene-cell" else 0)
    law = Oracle(
        mu=location.exp(),
        theta=log_theta.exp().expand_as(location),
        zi_logits=likelihood.dropout_logit + extra[:, -1],
    )
    got = likelihood.log_prob(x, location, extra)
    np.testing.assert_allclose(got, law.log_prob(x).sum(1), rtol=1e-6)
    torch.testing.assert_close(likelihood.mean(location, extra), law.mean)


def test_without_inflation_it_is_the_negative_binomial():
    x, location, _ = _counts()
    inflated, plain = ZeroInflatedNegativeBinomial(12).double(), NegativeBinomial(12).double()
    inflated.dropout_logit.data.fill_(-50)
    torch.testing.assert_close(inflated.log_prob(x, location), plain.log_prob(x, location))
    inflated.dropout_logit.data.fill_(50)  # and with nothing else, a count is all but impossible
    assert (inflated.log_prob(0 * x, location).abs() < 1e-9).all()
    assert (inflated.log_prob(x, location) < -50).all()


@pytest.mark.parametrize(("mean", "theta", "share"), [(0.3, 0.5, 0.3), (9.0, 2.0, 0.6)])
def test_inflated_draws_and_moments_follow_the_law(mean, theta, share):
    likelihood = ZeroInflatedNegativeBinomial(500).requires_grad_(False)
    likelihood.log_dispersion.fill_(np.log(theta))
    likelihood.dropout_logit.fill_(np.log(share / (1 - share)) - 1)
    x = np.arange(3000)
    pmf = (1 - share) * stats.nbinom(theta, theta / (theta + mean)).pmf(x)
    pmf[0] += share
    assert pmf.sum() == pytest.approx(1)
    _check_draws(likelihood, np.log(mean), [1.0], pmf)
    location, extra = torch.full((1, 500), np.log(mean)), torch.ones(1, 1, 500)
    first = (pmf * x).sum()
    np.testing.assert_allclose(likelihood.mean(location, extra), first, rtol=1e-5)
    variance = (pmf * (x - first) ** 2).sum()
    np.testing.assert_allclose(likelihood.variance(location, extra), variance, rtol=1e-5)


def test_gradients_with_inflation_are_those_of_finite_differences():
    likelihood = _randomised(ZeroInflatedNegativeBinomial(12, dispersion="gene-cell"))
    x, location, extra = _counts(n=3, n_heads=3)
    _gradcheck(likelihood, x % 30, location / 3, extra / 3)


# Continuous ------------------------------------------------------------------------------

LOWER, SCALE = 0.5, 1.5
KINDS = [
    pytest.param(lambda n: Gaussian(n), id="Gaussian"),
    pytest.param(lambda n: Gaussian(n, dispersion="gene-cell"), id="Gaussian per cell"),
    pytest.param(lambda n: MixtureOfGaussians(n), id="mixture"),
    pytest.param(lambda n: MixtureOfGaussians(n, n_components=3), id="mixture of three"),
]


def _continuous(kind, n_vars=4, *, lower=LOWER, seed=0):
    likelihood = kind(n_vars)
    moments = torch.full((n_vars,), 10 * SCALE**2)
    zero = torch.zeros(n_vars)
    likelihood.initialize(Start(10, zero, zero, moments, torch.full((n_vars,), float(lower))))
    return _randomised(likelihood, seed=seed)


def _parts(likelihood, location, extra):
    """Weights, means and standard deviations of one cell, ``(K, n_vars)``, by hand."""
    if isinstance(likelihood, Gaussian):
        log_sd = likelihood.log_sd + (extra[:, 0] if likelihood.n_heads > 1 else 0)
        sd = SCALE * log_sd.exp().expand_as(location)
        return np.ones_like(location), location.numpy(), sd.numpy()
    zero = torch.zeros(1, location.shape[1]).double()
    weight = (likelihood.logit + torch.cat([zero, extra[0]])).softmax(0)
    mean = location + SCALE * likelihood.offset
    return weight.numpy(), mean.numpy(), SCALE * likelihood.log_sd.exp().numpy()


def _one(likelihood, seed=1):
    n_vars = len(likelihood.scale)
    location = torch.randn(1, n_vars, generator=_generator(seed)).double()
    extra = torch.randn(1, likelihood.n_heads - 1, n_vars, generator=_generator(seed + 1)).double()
    return location, extra if likelihood.n_heads > 1 else None


def _law(parts, x, lower=LOWER):
    weight, mean, sd = parts
    mass, density = stats.norm.logcdf(lower, mean, sd), stats.norm.logpdf(x, mean, sd)
    return (weight * np.exp(np.where(x <= lower, mass, density))).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rectified_law_is_a_probability_at_the_bound_and_a_density_above(kind):
    likelihood = _continuous(kind)
    location, extra = _one(likelihood)
    parts = _parts(likelihood, location, extra)
    for x in ([LOWER, 2.0, LOWER, 0.51], [5.0, LOWER, LOWER, 1.0], [LOWER, 0.9, 3.0, LOWER]):
        got = likelihood.log_prob(torch.tensor([x]), location, extra)
        assert float(got) == pytest.approx(np.log(_law(parts, np.array(x))).sum(), rel=1e-7)
        # Below the bound there is nothing, but for rounding.
        almost = torch.tensor([x]).double() - 1e-8
        got = likelihood.log_prob(almost, location, extra)
        assert float(got) == pytest.approx(np.log(_law(parts, almost.numpy()[0])).sum(), rel=1e-7)
        x[0] = LOWER - 0.01
        assert likelihood.log_prob(torch.tensor([x]), location, extra) == -np.inf


@pytest.mark.parametrize("kind", KINDS)
def test_mass_and_moments_are_those_of_quadrature(kind):
    likelihood = _continuous(kind)
    location, extra = _one(likelihood)
    parts = _parts(likelihood, location, extra)
    mean = likelihood.mean(location, extra)[0].numpy()
    variance = likelihood.variance(location, extra)[0].numpy()
    for g in range(4):
        own = [part[:, g] for part in parts]

        def moment(power, own=own):
            def integrand(x):
                return x**power * _law(own, x)

            above = integrate.quad(integrand, LOWER, 30, points=[1, 3, 6], limit=200)[0]
            return above + LOWER**power * _law(own, LOWER)

        assert moment(0) == pytest.approx(1, abs=1e-7)
        assert mean[g] == pytest.approx(moment(1), abs=1e-7)
        assert variance[g] == pytest.approx(moment(2) - moment(1) ** 2, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rectified_draws_follow_the_law(kind):
    likelihood = _continuous(kind)
    location, extra = _one(likelihood)
    n = 40_000
    many = None if extra is None else extra.float().expand(n, -1, -1)
    drawn = likelihood.draw(location.float().expand(n, -1), _generator(3), many).numpy()
    assert drawn.dtype == np.float32
    assert drawn.min() == np.float32(LOWER)
    weight, mean, sd = _parts(likelihood, location, extra)
    for g in range(4):
        at_bound = drawn[:, g] == np.float32(LOWER)
        mass = (weight[:, g] * stats.norm.cdf(LOWER, mean[:, g], sd[:, g])).sum()
        assert stats.binomtest(int(at_bound.sum()), n, mass).pvalue > 1e-3
        above = drawn[~at_bound, g][:, None]
        cdf = (weight[:, g] * stats.norm.cdf(above, mean[:, g], sd[:, g])).sum(1)
        assert stats.kstest((cdf - mass) / (1 - mass), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_far_above_the_bound_there_is_none(kind):
    likelihood = _continuous(kind, lower=-1e4)
    location, extra = _one(likelihood)
    weight, mean, sd = _parts(likelihood, location, extra)
    total = (weight * mean).sum(0)
    np.testing.assert_allclose(likelihood.mean(location, extra)[0], total)
    variance = (weight * (sd**2 + (mean - total) ** 2)).sum(0)
    np.testing.assert_allclose(likelihood.variance(location, extra)[0], variance)


@pytest.mark.parametrize("kind", KINDS)
def test_rectified_gradients_are_those_of_finite_differences(kind):
    likelihood = _continuous(kind)
    location, extra = _one(likelihood)
    x = torch.tensor([[LOWER, 2.0, LOWER, 0.51]]).double()
    _gradcheck(likelihood, x, location, extra)


@pytest.mark.parametrize("kind", KINDS)
def test_values_far_from_what_is_expected_have_finite_gradients(kind):
    likelihood = kind(3)
    likelihood.initialize(Start(1, *torch.ones(3, 3), torch.zeros(3)))
    location = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    value = likelihood.log_prob(torch.tensor([[0.0, 30.0, 200.0]]), location)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(location.grad).all()
    assert (location.grad != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuous_likelihood_starts_with_the_genes_own_spread(kind):
    """As if only noise told cells apart: mean and variance are those of the data."""
    likelihood = kind(2)
    variance = torch.tensor([0.25, 9.0])
    unbounded = torch.full((2,), -1e6)
    likelihood.initialize(Start(50, torch.zeros(2), torch.zeros(2), 50 * variance, unbounded))
    location = torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(likelihood.mean(location).detach(), location)
    torch.testing.assert_close(likelihood.variance(location)[0].detach(), variance)
