"""The bound against exact marginals: in closed form for a linear model, by quadrature for counts.

The linear Gaussian model has everything in closed form, its posterior included. For counts three
genes and one latent dimension leave a two-dimensional integral over z and depth; adding up the
probabilities of all count vectors shows that p(x | c) is a distribution, and comparing them with
the frequencies of sampled vectors that sampler and likelihood are the same law.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, distributions, nn

from exprgen._layout import ConditionLayout
from exprgen.densities import Gaussian, Mixture
from exprgen.likelihoods import NegativeBinomial
from exprgen.module import ExpressionModule
from exprgen.spaces import Autoencoder, Decoded, LatentSpace


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _randomise(module, scale, seed=0):
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.requires_grad_(False)


# A linear Gaussian model -----------------------------------------------------------------

NOISE_SD = 0.7


class Linear(nn.Module):
    """x = W y + noise, with orthogonal columns of W so that the exact posterior is diagonal.

    Stands in for a LatentSpace; ``shift`` and ``widen`` spoil the posterior.
    """

    draw, log_posterior = Autoencoder.draw, Autoencoder.log_posterior
    log_prob = Autoencoder.log_prob

    def __init__(self, prior, *, observed=False, shift=0.0, widen=1.0):
        super().__init__()
        orthogonal, _ = torch.linalg.qr(torch.randn(6, 3, generator=_generator()).double())
        self.weight = orthogonal * torch.tensor([0.8, 2.0, 1.3]).double()
        self.density_features = lambda c: c
        self.depth = SimpleNamespace(observed=observed)
        self.standardised_depth = lambda log_depth, c: log_depth - 0.5
        self.likelihood = SimpleNamespace(
            is_count=True,
            log_prob=lambda x, location, extra=None: (
                distributions.Normal(location, NOISE_SD).log_prob(x).sum(-1)
            ),
        )
        self.prior, self.shift, self.widen, self.donors = prior, shift, widen, None
        self.prior_cost = lambda kl_weight: 0.0

    def encode(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_sd = self.prior.parameters_of(c)
        precision = (-2 * log_sd).exp() + self.weight.square().sum(0) / NOISE_SD**2
        posterior = (x @ self.weight / NOISE_SD**2 + mean * (-2 * log_sd).exp()) / precision
        sd = precision.rsqrt()
        return posterior + self.shift * sd, self.widen * sd

    def decode(self, y: Tensor, c: Tensor, effect: Tensor | None = None) -> Decoded:
        return Decoded(y @ self.weight.T)

    def known_effect(self, c: Tensor) -> None:
        return None


def _linear(n=60, **kwargs):
    """A module, its data, and the exact log p(x | c) and log p(x | last coordinate, c)."""
    prior = _randomise(Gaussian(3, 2, n_hidden=4), 0.4).double()
    space = Linear(prior, **kwargs)
    c = torch.randn(n, 2, generator=_generator(1)).double()
    mean, log_sd = prior.parameters_of(c)
    y = mean + log_sd.exp() * torch.randn(n, 3, generator=_generator(2)).double()
    x = y @ space.weight.T + NOISE_SD * torch.randn(n, 6, generator=_generator(3)).double()
    library = (y[:, -1] + 0.5).exp().clamp(min=0.5)
    last = library.log() - 0.5

    def marginal(columns, centre):
        w = space.weight[:, columns]
        spread = w * (2 * log_sd[:, None, columns]).exp() @ w.T
        covariance = spread + NOISE_SD**2 * torch.eye(6).double()
        return distributions.MultivariateNormal(centre @ space.weight.T, covariance).log_prob(x)

    given = torch.cat([mean[:, :2], last[:, None]], 1)
    exact = marginal([0, 1, 2], mean), marginal([0, 1], given)
    return ExpressionModule(space, prior), (x, c, library), exact


def test_the_bound_is_exact_with_the_exact_posterior():
    module, data, (exact, _) = _linear()
    for k in (1, 7):
        bound = module.log_likelihood(*data, n_samples=k, generator=_generator())
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("observed", [False, True])
def test_given_depth_the_bound_is_on_the_conditional(observed):
    module, data, (_, exact) = _linear(observed=observed)
    bound = module.log_likelihood(
        *data, n_samples=3, generator=_generator(), given_depth=not observed
    )
    torch.testing.assert_close(bound, exact, rtol=0, atol=1e-6)


def test_one_sample_falls_short_by_the_divergence_and_many_close_the_gap():
    module, data, (exact, _) = _linear(shift=0.5, widen=1.3)
    d = 3
    divergence = d * (0.5 * (1.3**2 + 0.5**2 - 1) - math.log(1.3))
    n = 400
    gaps = torch.stack(
        [module.log_likelihood(*data, n_samples=1, generator=_generator(s)) for s in range(n)]
    )
    gap = (gaps - exact).mean(1)
    assert abs(float(gap.mean()) + divergence) < 4 * float(gap.std()) / math.sqrt(n)
    gap_of = {}
    for k in (10, 100, 5000):
        bound = module.log_likelihood(*data, n_samples=k, generator=_generator())
        gap_of[k] = float((bound - exact).mean())
    assert -divergence < gap_of[10] < gap_of[100] < 0.02
    assert gap_of[5000] == pytest.approx(0, abs=0.01)


def test_the_loss_is_minus_the_elbo():
    module, (x, c, library), (exact, _) = _linear(shift=0.5, widen=1.3)
    divergence = 3 * (0.5 * (1.3**2 + 0.5**2 - 1) - math.log(1.3))
    batch = {"x": x, "c": c, "library": library}
    losses, weighted = [], []
    for seed in range(400):
        mean, sd = module.space.encode(x, c, library)
        y = mean + sd * torch.randn(sd.shape, generator=_generator(seed)).double()
        drawn = {"mean": mean, "sd": sd, "y": y}, {"decoded": module.space.decode(y, c)}
        output = module.loss(batch, *drawn)
        losses.append(float(output.loss))
        assert float((output.reconstruction_loss_sum + output.kl_local_sum) / len(x)) == (
            pytest.approx(losses[-1])
        )
        weighted.append(float(module.loss(batch, *drawn, kl_weight=0.25).loss))
        assert losses[-1] - weighted[-1] == pytest.approx(
            0.75 * float(output.kl_local_sum) / len(x)
        )
    error = float(-exact.mean() + divergence) - np.mean(losses)
    assert abs(error) < 4 * np.std(losses) / math.sqrt(len(losses))


# Counts ----------------------------------------------------------------------------------


def _toy(n_vars=3, *, observed=False, mean_log_depth=2.0, donors=0, widen=0.7):
    """A count model of one latent dimension with random weights that make it correlate."""
    layout = ConditionLayout(n_categories=(2,), n_batch=2, n_donor=donors)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        space = LatentSpace(
            n_vars,
            layout,
            NegativeBinomial(n_vars),
            n_latent=1,
            n_hidden=8,
            n_layers=1,
            dropout=0.0,
            depth_is_observed=observed,
        )
        density = Mixture(2, space.features.n_features, n_components=3, n_hidden=4)
    _randomise(space, 0.5, seed=1)
    _randomise(density, 0.3, seed=2)
    # A posterior that covers the exact one, or importance weights have no variance.
    space.encoder.latent.weight.mul_(0.1)
    space.encoder.latent.bias.copy_(torch.tensor([0.0, math.log(2)]))
    space.encoder.depth.bias.copy_(torch.tensor([0.0, widen]))
    space.likelihood.log_dispersion.fill_(math.log(2))
    space.depth.coefficients.copy_(torch.tensor([mean_log_depth, 0.2, 0.0, 0.3, 0.0]))
    space.depth.scale.fill_(0.5)
    space.depth.prior_precision.fill_(5.0)
    return ExpressionModule(space, density).eval()


CELLS = torch.tensor([[0, 0], [1, 1], [0, -1.0]])
"""Codes of label and batch."""


def _quadrature(module, x, c, *, last=None, n=160, width=7.0):
    """log p(x | c) of counts ``(m, n_vars)`` under one row of codes ``c``, by the trapezium rule.

    Probabilities are scipy's. With ``last`` the integral is over z alone, given that coordinate.
    """
    features = module.space.features.conditions(c[None])
    z = torch.linspace(-width, width, n)
    rest = torch.linspace(-width, width, n) if last is None else last[None]
    y = torch.cartesian_prod(z, rest).reshape(-1, 2)
    cell = float(z[1] - z[0]) ** (2 if last is None else 1)
    log_prior = module.density.log_prob(y, features.expand(len(y), -1)).double().numpy()
    if last is not None:
        log_prior = log_prior - float(module.density.log_prob_last(last[None], features))
    mean = module.space.decode(y, c.expand(len(y), -1)).location.double().exp().numpy()
    theta = module.space.likelihood.log_dispersion.exp().double().numpy()
    log_p = np.zeros((len(x), len(y)))
    for g in range(x.shape[1]):
        counts = np.arange(int(x[:, g].max()) + 1)[:, None]
        p = theta[g] / (theta[g] + mean[:, g])
        log_p += stats.nbinom.logpmf(counts, theta[g], p)[x[:, g].long().numpy()]
    log_p += log_prior + math.log(cell)
    highest = log_p.max(1)
    return torch.from_numpy(np.log(np.exp(log_p - highest[:, None]).sum(1)) + highest)


def _all_counts(n_vars, limit):
    return torch.tensor(list(itertools.product(range(limit), repeat=n_vars))).float()


def _expand(c, x):
    return x, c.expand(len(x), -1), x.sum(1)


COUNTS = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 3, 2], [7, 1, 4], [20, 2, 9], [1, 30, 0.0]])


def _repeated(module, data, *, n_samples, n=400, **kwargs):
    """Bounds of independent runs, ``(n, n_cells)``."""
    data = [part.repeat(n, *[1] * (part.dim() - 1)) for part in data]
    bound = module.log_likelihood(*data, n_samples=n_samples, generator=_generator(), **kwargs)
    return bound.view(n, -1)


def _pooled(bounds):
    """The bound of all samples together: runs are averaged as probabilities."""
    return torch.logsumexp(bounds, 0) - math.log(len(bounds))


@pytest.mark.parametrize("cell", range(len(CELLS)))
def test_the_bound_reaches_the_integral_over_latent_state_and_depth(cell):
    """Empty cells and unknown batches included."""
    module, c = _toy(), CELLS[cell]
    exact = _quadrature(module, COUNTS, c)
    data = _expand(c, COUNTS)
    shortfall = {}
    for k in (1, 10, 100):
        bounds = _repeated(module, data, n_samples=k)
        assert ((bounds.mean(0) - exact) < 4 * bounds.std(0) / math.sqrt(len(bounds))).all()
        shortfall[k] = exact - bounds.mean(0)
    assert (shortfall[1] > 2 * shortfall[10]).all()
    assert (shortfall[10] > 2 * shortfall[100]).all()
    np.testing.assert_allclose(_pooled(bounds), exact, atol=0.08)


@pytest.mark.parametrize("observed", [False, True])
def test_the_bound_given_depth_reaches_the_integral_over_the_latent_state(observed):
    module, c = _toy(observed=observed), CELLS[1]
    # With a size factor depth is any positive number; without, the observed total.
    library = torch.tensor([2.0, 0.7, 5, 9, 40, 11]) if observed else COUNTS.sum(1).clamp(min=0.5)
    offset = module.space.depth_offset(c[None])
    last = module.space.depth.standardise(library.log(), offset)
    rows = zip(COUNTS, last, strict=True)
    exact = torch.cat([_quadrature(module, x[None], c, last=at) for x, at in rows])
    data = COUNTS, c.expand(len(COUNTS), -1), library
    bounds = _repeated(module, data, n_samples=100, given_depth=not observed)
    assert ((bounds.mean(0) - exact) < 4 * bounds.std(0) / math.sqrt(len(bounds))).all()
    np.testing.assert_allclose(_pooled(bounds), exact, atol=0.08)


def test_probabilities_of_all_count_vectors_add_up_to_one():
    """So does exp(bound), whose expectation is p(x | c); a point mass at the total gave .66."""
    module, c = _toy(2, mean_log_depth=0.7, widen=1.4), CELLS[0]
    x = _all_counts(2, 50)
    exact = float(_quadrature(module, x, c, n=60).exp().sum())
    assert exact == pytest.approx(1, abs=3e-3)
    bound = module.log_likelihood(*_expand(c, x), n_samples=500, generator=_generator())
    assert float(bound.exp().sum()) == pytest.approx(exact, abs=0.02)


def test_the_bound_keeps_its_digits_at_large_dispersions():
    """In single precision the gamma terms of one count of 5000 are off by .04 nats."""
    module = _toy(mean_log_depth=9.5)
    module.space.likelihood.log_dispersion.fill_(math.log(1e6))
    x = torch.tensor([[5000.0, 4000.0, 3000.0]])
    bounds = {}
    for dtype in (torch.float32, torch.float64):
        module = module.to(dtype)
        data = (part.to(dtype) for part in _expand(CELLS[0], x))
        bounds[dtype] = module.log_likelihood(*data, n_samples=2000, generator=_generator())
        assert bounds[dtype].dtype == torch.float64
    torch.testing.assert_close(*bounds.values(), rtol=0, atol=0.01)


def test_sampled_counts_follow_the_likelihood():
    """The chain density -> decoder -> counts and the integral are the same law, cell by cell."""
    module, n = _toy(2, mean_log_depth=0.7), 120_000
    for c in CELLS:
        noise = _generator(4)
        _, (location, _) = module.sample(c.expand(n, -1), noise)
        drawn = module.space.likelihood.draw(location, noise)
        x = _all_counts(2, 12)
        expected = _quadrature(module, x, c).exp().numpy() * n
        drawn = drawn.numpy().astype(int)
        inside = (drawn < 12).all(1)
        observed = np.bincount(drawn[inside] @ [12, 1], minlength=144)
        common = expected > 20
        observed = np.r_[observed[common], n - observed[common].sum()]
        expected = np.r_[expected[common], n - expected[common].sum()]
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_fixed_depth_and_effects_reach_the_counts():
    module = _toy(donors=3)
    c = torch.tensor([[0, 0, 1.0]]).expand(20_000, -1)
    fixed = torch.full((len(c),), math.log(50.0))
    effect = torch.tensor([0.0, math.log(4), 0.0]).expand(len(c), -1)
    y, (location, _) = module.sample(c, _generator(), log_depth=fixed)
    torch.testing.assert_close(module.space.log_depth(y, c), fixed)
    torch.testing.assert_close(location.exp().sum(1), torch.full((len(c),), 50.0))
    _, (shifted, _) = module.sample(c, _generator(), log_depth=fixed, effect=effect)
    # A donor changes the composition, not the depth that was asked for.
    torch.testing.assert_close(shifted.exp().sum(1), torch.full((len(c),), 50.0))
    moved = shifted - location
    torch.testing.assert_close(moved - moved[:, :1], effect, atol=1e-5, rtol=0)


def test_effects_are_paid_for_once_per_training_set():
    module = _toy(donors=3)
    batch = {"x": COUNTS, "c": torch.zeros(6, 3), "library": COUNTS.sum(1)}

    def loss(**kwargs):
        noise = _generator()
        _, _, output = module(
            batch,
            inference_kwargs={"generator": noise},
            generative_kwargs={"generator": noise},
            loss_kwargs=kwargs,
        )
        return float(output.loss)

    kl, prior = float(module.space.donors.kl()), float(module.space.prior_cost(0.0))
    assert kl > 1
    assert prior > 1
    for weight in (1.0, 0.5):
        difference = loss(n_obs_training=10, kl_weight=weight) - loss(
            n_obs_training=1000, kl_weight=weight
        )
        assert difference == pytest.approx((weight * kl + prior) * (1 / 10 - 1 / 1000), rel=1e-3)
