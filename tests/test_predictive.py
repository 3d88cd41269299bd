"""Predictive statistics: terms of the variance in closed form, coverage of order statistics."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from exprgen.likelihoods import (
    ContaminatedNegativeBinomial,
    Gaussian,
    MixtureOfGaussians,
    NegativeBinomial,
    Start,
)
from exprgen.models._statistics import (
    Moments,
    order_statistics,
    predictive_of_cell,
    predictive_of_mean,
)
from exprgen.spaces import AdditiveDonorEffect, Decoded, DonorEffect

N_VARS = 4
CENTRE = np.array([-1.0, 0.5, 2.0, 3.0])
SD = np.array([0.1, 0.8, 0.3, 0.5])
THETA = np.array([0.5, 2.0, 10.0, 100.0])
N_SAMPLES = 200_000
DEPTHS = torch.tensor([0.2, -0.15, 0.05, -0.2, 0.15, 0.0])


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _module(n_donors=0, kind=NegativeBinomial):
    """What the statistics read of a module: a likelihood, and donors of clear effects."""
    likelihood, donors = kind(N_VARS), None
    likelihood.log_dispersion.data = torch.from_numpy(THETA).log().float()
    if n_donors:
        donors = DonorEffect(n_donors, N_VARS)
        with torch.no_grad():
            noise = torch.randn(n_donors, N_VARS, generator=_generator())
            donors.posterior_mean.copy_(0.3 * noise)
            donors.posterior_log_sd.fill_(np.log(0.15))
    space = SimpleNamespace(likelihood=likelihood.requires_grad_(False), donors=donors)
    return SimpleNamespace(space=space)


def _location(n=N_SAMPLES, seed=1):
    """Log means that are Gaussian, so that all moments of means are known."""
    noise = torch.randn(n, N_VARS, generator=_generator(seed))
    return Decoded(torch.from_numpy(CENTRE).float() + torch.from_numpy(SD).float() * noise)


@pytest.mark.parametrize(("donor", "depths"), [(None, None), (-1, None), (-1, DEPTHS), (2, None)])
def test_the_terms_of_the_variance_are_the_closed_ones(donor, depths):
    module = _module(0 if donor is None else 6)
    code = -1 if donor is None else donor
    law = predictive_of_cell(module, _location(), code, _generator(2), depths)
    u_mean = u_variance = np.zeros(N_VARS)
    if donor is not None:
        moments = module.space.donors.law(donor, depths)
        u_mean, u_variance = (part.detach().numpy() for part in moments)
    mean_square = np.exp(2 * CENTRE + SD**2)
    second = np.exp(2 * u_mean + 2 * u_variance)
    mean = np.exp(CENTRE + SD**2 / 2 + u_mean + u_variance / 2)
    latent = mean_square * np.expm1(SD**2) * second
    between = mean_square * (second - np.exp(2 * u_mean + u_variance))
    decoder = mean + np.exp(SD**2) * mean_square * second / THETA
    np.testing.assert_allclose(law.mean, mean, rtol=0.01)
    np.testing.assert_allclose(law.latent, latent, rtol=0.04)
    np.testing.assert_allclose(law.decoder, decoder, rtol=0.04)
    if donor is None:
        assert law.donor is None
    else:
        np.testing.assert_allclose(law.donor, between, rtol=0.02)
    # What is written is the square root of the sum, and that of the draws themselves.
    slots = law.slots((0.05, 0.95), ["q05", "q95"])
    np.testing.assert_allclose(slots["std"] ** 2, decoder + latent + between, rtol=0.03)
    np.testing.assert_allclose(law.draws.var(0), slots["std"] ** 2, rtol=0.1)
    np.testing.assert_allclose(law.draws.mean(0), mean, rtol=0.02)
    assert ("std_donor" in slots) == (donor is not None)


@pytest.mark.parametrize("donor", [-1, 2])
def test_outliers_are_part_of_mean_and_spread(donor):
    """Donors do not scale them."""
    module = _module(6, ContaminatedNegativeBinomial)
    module.space.likelihood.outlier_logit.fill_(np.log(0.02))
    module.space.likelihood.decay_logit.fill_(2.5)
    law = predictive_of_cell(module, _location(), donor, _generator(2))
    slots = law.slots((), [])
    np.testing.assert_allclose(law.draws.mean(0), slots["mean"], rtol=0.02)
    np.testing.assert_allclose(law.draws.std(0), slots["std"], rtol=0.12)
    without = predictive_of_cell(_module(6), _location(), donor, _generator(2)).slots((), [])
    assert slots["std"][0] > 1.2 * without["std"][0]


@pytest.mark.parametrize(("donor", "depths"), [(-1, None), (-1, DEPTHS), (2, DEPTHS)])
def test_the_mean_of_cells_of_one_donor_is_that_of_simulated_cells(donor, depths):
    """Cells share their donor's effect; averaging removes the rest of the variance only."""
    n_cells, n = 40, 4000
    module = _module(6)
    law = predictive_of_mean(module, _location(20_000), donor, _generator(3), n_cells, depths)
    mean, variance = module.space.donors.law(donor, depths)
    effect = mean + variance.sqrt() * torch.randn(n, N_VARS, generator=_generator(4))
    location = (
        _location(n * n_cells, seed=5).location + effect.repeat_interleave(n_cells, 0).detach()
    )
    cells = module.space.likelihood.draw(location, _generator(6)).numpy()
    means = cells.reshape(n, n_cells, N_VARS).mean(1)
    slots = law.slots((0.05, 0.95), ["q05", "q95"])
    np.testing.assert_allclose(slots["mean"], means.mean(0), rtol=0.03)
    np.testing.assert_allclose(slots["std"], means.std(0), rtol=0.07)
    inside = ((slots["q05"] <= means) & (means <= slots["q95"])).mean(0)
    # Means of few, small counts are not quite Gaussian; quantiles of new donors are those of a t.
    assert ((inside > 0.88) & (inside < 0.95)).all()


@pytest.mark.parametrize("depths", [None, DEPTHS])
def test_the_mean_of_infinitely_many_cells_varies_between_donors_alone(depths):
    module = _module(6)
    donors = module.space.donors
    law = predictive_of_mean(module, _location(50_000), -1, _generator(7), None, depths)
    slots = law.slots((0.05, 0.5, 0.95), ["q05", "q50", "q95"])
    assert (slots["std_latent"] == 0).all()
    np.testing.assert_allclose(slots["std"], slots["std_donor"], rtol=1e-6)
    centre = np.exp(CENTRE + SD**2 / 2)
    scale = donors.new_donor_scale(depths).detach().numpy()
    mean, variance = donors.law(-1, depths)
    median = centre * (mean + variance / 2).exp().detach().numpy() * np.exp(-(scale**2) / 2)
    for q in (5, 50, 95):
        expected = median * np.exp(stats.t(donors.dof).ppf(q / 100) * scale)
        np.testing.assert_allclose(slots[f"q{q:02d}"], expected, rtol=0.03)


def test_one_draw_has_no_spread_but_is_finite():
    law = predictive_of_cell(_module(), _location(1), -1, _generator())
    slots = law.slots((0.05, 0.95), ["q05", "q95"])
    assert (slots["std_latent"] == 0).all()
    assert all(np.isfinite(value).all() for value in slots.values())


@pytest.mark.parametrize("n", [19, 100, 999, 1000])
@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5])
def test_intervals_of_order_statistics_cover_at_least_what_they_say(n, alpha):
    """A new draw is equally likely to fall into each of the n + 1 gaps between the others."""
    low, high = order_statistics(np.arange(1, n + 1)[:, None], [alpha / 2, 1 - alpha / 2])[:, 0]
    covered = (high - low) / (n + 1)
    assert 1 - alpha - 1e-9 <= covered <= 1 - alpha + 2 / (n + 1)
    assert low + high == n + 1


def test_closed_intervals_of_counts_cover_at_least_what_they_say():
    rng = np.random.default_rng(0)
    draws, new = rng.negative_binomial(1.5, 0.2, (2, 199, 5000))
    low, high = order_statistics(draws, [0.05, 0.95])
    assert 0.9 <= ((low <= new) & (new <= high)).mean() < 0.97


def test_quantiles_are_those_of_the_law():
    draws = np.random.default_rng(0).normal(size=(100_000, 2))
    quantiles = [0.025, 0.5, 0.9]
    got = order_statistics(draws, quantiles)
    np.testing.assert_allclose(got, stats.norm.ppf(quantiles)[:, None] * [[1, 1]], atol=0.02)
    assert order_statistics(draws, []).shape == (0, 2)


def test_running_moments_are_those_of_numpy():
    """Far from zero, where summing squares would lose all digits."""
    values = 1e6 + torch.randn(50, 3, 2, generator=_generator())
    moments = Moments()
    for value in values:
        moments.add(value)
    exact = values.double().numpy()
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance(), exact.var(0, ddof=1), rtol=1e-6)
    single = Moments()
    single.add(values[0])
    assert (single.variance() == 0).all()


# Continuous values -----------------------------------------------------------------------


def _continuous_module(n_donors, kind, lower):
    """Genes with a bound near what donors and cells reach, and scales apart."""
    likelihood, scale = kind(N_VARS), torch.tensor([0.5, 1.0, 2.0, 1.0])
    centre = torch.tensor([0.3, 1.5, 4.0, 0.0])
    zero = torch.zeros(N_VARS)
    likelihood.initialize(Start(10, zero, zero, 10 * scale**2, zero + lower))
    donors = None
    if n_donors:
        donors = AdditiveDonorEffect(n_donors, N_VARS).requires_grad_(False)
        donors.posterior_mean.copy_(0.4 * torch.randn(n_donors, N_VARS, generator=_generator()))
        donors.posterior_log_sd.fill_(np.log(0.2))
        donors.scale.copy_(scale)
    space = SimpleNamespace(likelihood=likelihood.requires_grad_(False), donors=donors)
    noise = torch.randn(40_000, N_VARS, generator=_generator(1))
    extra = None
    if likelihood.n_heads > 1:
        shape = (len(noise), likelihood.n_heads - 1, N_VARS)
        extra = 0.5 * torch.randn(shape, generator=_generator(8))
    return SimpleNamespace(space=space), Decoded(centre + 0.7 * scale * noise, extra)


@pytest.mark.parametrize("kind", [Gaussian, MixtureOfGaussians])
@pytest.mark.parametrize("donor", [None, -1, 2])
def test_terms_of_continuous_values_are_those_of_simulation(kind, donor):
    """The bound bends how donors and latent states add up; nested simulation does not mind."""
    module, decoded = _continuous_module(0 if donor is None else 6, kind, 0.0)
    law = predictive_of_cell(module, decoded, -1 if donor is None else donor, _generator(2))
    slots = law.slots((0.05, 0.95), ["q05", "q95"])
    np.testing.assert_allclose(law.draws.mean(0), law.mean, rtol=0.03)
    np.testing.assert_allclose(law.draws.std(0), slots["std"], rtol=0.03)
    assert law.draws.min() == 0
    if donor is None:
        return
    space, few = module.space, Decoded(*(None if p is None else p[:500] for p in decoded))
    effects = space.donors.draw(donor, 3000, _generator(3))
    by_donor = torch.stack(
        [
            space.likelihood.mean(space.donors.move(few.location, u), few.extra).mean(0)
            for u in effects
        ]
    )
    small = predictive_of_cell(module, few, donor, _generator(2))
    np.testing.assert_allclose(small.donor, by_donor.var(0), rtol=0.12)
    np.testing.assert_allclose(small.mean, by_donor.mean(0), rtol=0.03)


def test_without_a_bound_the_terms_are_the_closed_ones():
    module, decoded = _continuous_module(6, Gaussian, -1e6)
    for donor in (-1, 2):
        law = predictive_of_cell(module, decoded, donor, _generator(2))
        donors = module.space.donors
        mean, variance = donors.law(donor)
        np.testing.assert_allclose(
            law.mean, decoded.location.double().mean(0) + donors.scale * mean, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(law.latent, decoded.location.double().var(0), rtol=1e-4)
        np.testing.assert_allclose(law.donor, donors.scale**2 * variance, rtol=1e-4)
        np.testing.assert_allclose(law.decoder, donors.scale**2, rtol=1e-5)


@pytest.mark.parametrize("donor", [-1, 2])
def test_the_mean_of_continuous_cells_is_that_of_simulated_cells(donor):
    """The interpolation between donors' effects included; a new donor's law has heavy tails."""
    module, decoded = _continuous_module(6, MixtureOfGaussians, 0.0)
    few = Decoded(decoded.location[:4000], decoded.extra[:4000])
    law = predictive_of_mean(module, few, donor, _generator(3), 40)
    space = module.space
    effects = (
        space.donors.draw_heavy(1500, _generator(4))
        if donor < 0
        else space.donors.draw(donor, 1500, _generator(4))
    )
    rng, means = _generator(5), []
    for u in effects:
        rows = torch.randint(len(decoded.location), (40,), generator=rng)
        location = space.donors.move(decoded.location[rows], u)
        means.append(space.likelihood.draw(location, rng, decoded.extra[rows]).mean(0))
    means = torch.stack(means).numpy()
    slots = law.slots((0.05, 0.95), ["q05", "q95"])
    np.testing.assert_allclose(slots["mean"], means.mean(0), rtol=0.05)
    inside = ((slots["q05"] <= means) & (means <= slots["q95"])).mean(0)
    assert ((inside > 0.87) & (inside < 0.94)).all()
    assert law.draws.min() >= 0
