"""Depth, donors and the latent space: the formulas as they were derived, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions

from exprgen._layout import ConditionLayout
from exprgen.likelihoods import NegativeBinomial
from exprgen.spaces import DataMoments, Depth, DonorEffect, LatentSpace
from exprgen.spaces._effects import label_effects


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Depth -----------------------------------------------------------------------------------


def _depth_data(n=4000, *, sd=0.4, mean=6.0, n_groups=2, n_donors=0, seed=0):
    """Totals that are Poisson given a log-normal depth; groups differ by 1, donors by 0.5."""
    rng = np.random.default_rng(seed)
    group, donor = rng.integers(n_groups, size=n), rng.integers(max(n_donors, 1), size=n)
    effect = rng.normal(0, 0.5, max(n_donors, 1)) * (n_donors > 0)
    log_depth = mean + group + effect[donor] + rng.normal(0, sd, n)
    library = torch.from_numpy(rng.poisson(np.exp(log_depth)).astype(float))
    inputs = torch.from_numpy(np.c_[np.ones(n), np.eye(n_groups)[group]])
    return library, inputs, torch.from_numpy(donor), log_depth, effect


@pytest.mark.parametrize(("mean", "observed"), [(6.0, False), (0.5, False), (6.0, True)])
def test_depth_follows_its_formulas(mean, observed):
    library, inputs, donors, *_ = _depth_data(mean=mean)
    depth = Depth(3, 0, observed=observed).double()
    depth.fit(library, inputs, donors)
    log_total = np.log(library.clamp(min=0.5).numpy())
    fitted = inputs.numpy() @ np.linalg.lstsq(inputs.numpy(), log_total, rcond=None)[0]
    v = ((log_total - fitted) ** 2).mean()
    noise = 0 if observed else (1 / np.maximum(library.numpy(), 0.5)).mean()
    tau2 = max(0.2 * v, v - noise)
    offset = depth.offset(inputs, donors)
    np.testing.assert_allclose(offset, fitted, rtol=1e-6)
    assert float(depth.scale) == pytest.approx(np.sqrt(v))
    assert float(depth.prior_precision) == pytest.approx(1 / tau2)
    correction = torch.randn(len(library), 2, generator=_generator()).double()
    got_mean, got_sd = depth.posterior(library, offset, correction)
    if observed:
        np.testing.assert_allclose(got_mean, (log_total - fitted) / np.sqrt(v), rtol=1e-6)
        assert (got_sd == 0).all()
        return
    total, (a, b) = library.numpy(), correction.numpy().T
    precision = total + 1 / tau2
    m = (total * log_total + fitted / tau2) / precision + a
    s = np.exp(np.clip(b, -4, 4)) / np.sqrt(precision)
    np.testing.assert_allclose(got_mean, (m - fitted) / np.sqrt(v), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got_sd, s / np.sqrt(v), rtol=1e-6)


def test_both_branches_of_the_variance_are_used():
    """At low depth counting noise exceeds what the totals vary by; a fifth is kept then."""
    for mean, sd, share in [(0.5, 0.05, 0.2), (8.0, 0.4, 1.0)]:
        library, inputs, donors, *_ = _depth_data(mean=mean, sd=sd)
        depth = Depth(3, 0, observed=False).double()
        depth.fit(library, inputs, donors)
        assert float(1 / depth.prior_precision / depth.scale**2) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("total", [33, 200, 5000])
def test_depth_posterior_starts_at_the_exact_one_of_a_poisson_total(total):
    """The encoder only corrects it for what the total does not tell."""
    mean, tau = 4.0, 0.5
    depth = Depth(1, 0, observed=False).double()
    depth.prior_precision.fill_(1 / tau**2)
    grid = np.linspace(mean - 5, mean + 6, 50_001)
    log_p = stats.norm.logpdf(grid, mean, tau) + stats.poisson.logpmf(total, np.exp(grid))
    weight = np.exp(log_p - log_p.max())
    weight /= weight.sum()
    exact_mean = weight @ grid
    exact_sd = np.sqrt(weight @ (grid - exact_mean) ** 2)
    offset = torch.tensor([mean]).double()
    m, s = depth.posterior(torch.tensor([total]).double(), offset, torch.zeros(1, 2).double())
    assert abs(float(m) + mean - exact_mean) < 0.1 * exact_sd
    assert float(s) == pytest.approx(exact_sd, rel=0.05)


def test_an_empty_cell_has_the_prior_depth():
    """Its total says that the depth is low, but the logarithm not how low."""
    depth = Depth(1, 0, observed=False)
    depth.prior_precision.fill_(4.0)
    depth.scale.fill_(0.8)
    m, s = depth.posterior(torch.zeros(1), torch.tensor([3.0]), torch.zeros(1, 2))
    assert (float(m), float(s)) == pytest.approx((0, 0.5 / 0.8))


def test_batches_are_recovered_and_unknown_ones_are_their_average():
    library, inputs, donors, *_ = _depth_data(n=20_000, mean=7.0, n_groups=3)
    depth = Depth(4, 0, observed=False)
    depth.fit(library, inputs, donors)
    new = torch.cat([torch.ones(4, 1), torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)])], 1)
    offset = depth.offset(new, torch.full((4,), -1))
    np.testing.assert_allclose(offset, [7, 8, 9, 8], atol=0.02)
    assert float(depth.scale) == pytest.approx(0.4, abs=0.01)


def test_donors_are_shrunk_and_a_new_one_adds_nothing():
    library, inputs, donors, _, effect = _depth_data(n=600, n_donors=6, n_groups=1)
    inputs = inputs[:, :1]
    depth = Depth(1, 6, observed=False).double()
    depth.fit(library, inputs, donors)
    residual = np.log(library.numpy())
    residual = residual - residual.mean()
    groups = [residual[donors.numpy() == d] for d in range(6)]
    expected = [group.sum() / (len(group) + 20) for group in groups]
    np.testing.assert_allclose(depth.donor_offset, expected, rtol=1e-6)
    assert np.corrcoef(depth.donor_offset, effect)[0, 1] > 0.97
    one = torch.ones(3, 1).double()
    known = depth.offset(one, torch.tensor([-1, 0, 5]))
    np.testing.assert_allclose(known - known[0], [0, expected[0], expected[5]])
    # What donors explain is no longer spread between cells.
    assert float(depth.scale) < 0.47 < residual.std()


def test_standardising_depth_has_an_inverse():
    library, inputs, donors, log_depth, _ = _depth_data(n=100)
    depth = Depth(3, 0, observed=False).double()
    depth.fit(library, inputs, donors)
    offset, log_depth = depth.offset(inputs, donors), torch.from_numpy(log_depth)
    last = depth.standardise(log_depth, offset)
    torch.testing.assert_close(depth.log_depth(last, offset), log_depth)
    assert float(last.std()) == pytest.approx(1, abs=0.3)


def test_depth_of_equal_or_empty_cells_is_finite():
    for value in (0.0, 7.0):
        library = torch.full((20,), value).double()
        depth = Depth(1, 0, observed=False)
        depth.fit(library, torch.ones(20, 1).double(), torch.full((20,), -1))
        offset = depth.offset(torch.ones(20, 1), torch.full((20,), -1))
        mean, sd = depth.posterior(library.float(), offset, torch.zeros(20, 2))
        assert bool(torch.isfinite(mean).all())
        assert bool(((sd > 0) & torch.isfinite(sd)).all())


# Donors ----------------------------------------------------------------------------------


@pytest.fixture
def donors():
    effect = DonorEffect(4, 50)
    with torch.no_grad():
        scale = torch.linspace(0.05, 0.8, 50)
        effect.posterior_mean.copy_(scale * torch.randn(4, 50, generator=_generator()))
        effect.posterior_log_sd.copy_(-2 + 0.3 * torch.randn(4, 50, generator=_generator(1)))
    return effect.requires_grad_(False)


DEPTHS = torch.tensor([0.5, -0.3, 0.1, -0.1])


@pytest.mark.parametrize("depths", [None, DEPTHS])
def test_donor_variance_and_new_donor_law_follow_their_formulas(donors, depths):
    """Known donors' depths are in the expected depth of their cells, not in their effects."""
    offset, kappa2 = (0, 0) if depths is None else (DEPTHS.numpy()[:, None], 0.36 / 3)
    mean, sd = donors.posterior_mean.numpy(), np.exp(donors.posterior_log_sd.numpy())
    square = (mean**2 + sd**2).mean(0)
    tau2 = (4 * square.mean() + 4 * square) / (4 + 4)
    np.testing.assert_allclose(donors.variance(), tau2, rtol=1e-5)
    scale = np.sqrt(1.25 * (tau2 + kappa2))
    np.testing.assert_allclose(donors.new_donor_scale(depths), scale, rtol=1e-5)
    assert donors.dof == 7
    new_mean, new_variance = donors.law(-1, depths)
    # A new donor's mean factor is that of the known ones, however wide its law.
    factor = np.exp(mean + offset + sd**2 / 2).mean(0)
    np.testing.assert_allclose((new_mean + new_variance / 2).exp(), factor, rtol=1e-5)
    np.testing.assert_allclose(new_variance, stats.t(7, scale=scale).var(), 1e-5)
    own_mean, own_variance = donors.law(2, depths)
    np.testing.assert_allclose(own_mean, mean[2])
    np.testing.assert_allclose(own_variance, sd[2] ** 2, rtol=1e-5)


def test_donor_kl_is_that_of_torch(donors):
    prior = distributions.Normal(torch.zeros(50), donors.variance().sqrt())
    posterior = distributions.Normal(donors.posterior_mean, donors.posterior_log_sd.exp())
    expected = distributions.kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(donors.kl(), expected)


@pytest.mark.parametrize(("donor", "depths"), [(-1, None), (-1, DEPTHS), (2, DEPTHS)])
def test_donor_draws_have_the_moments_of_the_law(donors, donor, depths):
    mean, variance = donors.law(donor, depths)
    draws = donors.draw(donor, 40_000, _generator(2), depths)
    assert ((draws.mean(0) - mean).abs() < 4.5 * (variance / len(draws)).sqrt()).all()
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.04)


def test_genes_of_a_new_donor_have_its_depth_in_common(donors):
    """All that genes covary by is the depth's variance, 1.25 κ² with the variance of a t of 7."""
    for depths, expected in ((None, 0.0), (DEPTHS, 1.25 * 0.36 / 3 * 7 / 5)):
        for draws in (
            donors.draw(-1, 40_000, _generator(2), depths),
            donors.draw_heavy(40_000, _generator(2), depths),
        ):
            covariance = np.cov(draws.numpy().T)
            off_diagonal = covariance[~np.eye(50, dtype=bool)].mean()
            assert off_diagonal == pytest.approx(expected, rel=0.05, abs=0.002)


@pytest.mark.parametrize("depths", [None, DEPTHS])
def test_heavy_draws_follow_a_t_law(donors, depths):
    mean, sd = donors.posterior_mean, donors.posterior_log_sd.exp()
    offset = 0 if depths is None else depths[:, None]
    factor = (mean + offset + sd.square() / 2).exp().mean(0)
    scale = donors.new_donor_scale(depths)
    centre = factor.log() - scale.square() / 2
    draws = (donors.draw_heavy(40_000, _generator(3), depths) - centre).numpy()
    law = stats.t(donors.dof, scale=scale.numpy())
    quantiles = [0.01, 0.05, 0.5, 0.95, 0.99]
    below = (draws[None] < law.ppf(np.array(quantiles)[:, None])[:, None]).mean(1)
    for share, q in zip(below, quantiles, strict=True):
        assert (np.abs(share - q) < 4.5 * np.sqrt(q * (1 - q) / len(draws))).all()
    gene = draws[:, 25] / scale[25].item()
    assert stats.kstest(gene, stats.t(donors.dof).cdf).pvalue > 1e-3


def test_cells_of_a_donor_share_its_effect_and_unknown_ones_have_none(donors):
    codes = torch.tensor([0, 3, 0, -1, 3])
    drawn = donors(codes, _generator())
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[4])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn[3] == 0).all()
    assert torch.equal(donors.known(codes)[:2], donors.posterior_mean[[0, 3]])
    assert (donors.known(codes)[3] == 0).all()
    n = 20_000
    many = torch.stack([donors(torch.tensor([1]), _generator(s))[0] for s in range(n // 10)])
    sd = donors.posterior_log_sd[1].exp()
    error = (many.mean(0) - donors.posterior_mean[1]).abs()
    assert (error < 4.5 * sd / np.sqrt(len(many))).all()
    np.testing.assert_allclose(many.std(0), sd, rtol=0.1)


# The latent space ------------------------------------------------------------------------

LAYOUT = ConditionLayout(n_categories=(3,), n_continuous=1, n_batch=2, n_donor=2)


def _space(layout=LAYOUT, *, n_vars=6, observed=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        space = LatentSpace(
            n_vars,
            layout,
            NegativeBinomial(n_vars),
            n_latent=2,
            n_hidden=16,
            n_layers=1,
            dropout=0.1,
            depth_is_observed=observed,
        )
        with torch.no_grad():
            for parameter in space.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            space.depth.coefficients.normal_()
    return space.eval().requires_grad_(False)


def _cells():
    """Counts, codes (label, quantity, batch, donor) and totals."""
    x = torch.poisson(torch.full((5, 6), 4.0), generator=_generator())
    c = torch.tensor([[0, 0.3, 0, 0], [1, -1, 1, 1], [2, 0, 0, 1], [0, 1, 1, 0], [1, 2, 0, 1.0]])
    return x, c, x.sum(1)


def _change(c, column, value):
    c = c.clone()
    c[:, column] = value
    return c


def test_the_encoder_sees_conditions_but_neither_batch_nor_donor():
    space, (x, c, library) = _space(), _cells()
    mean, sd = (part[:, :-1] for part in space.encode(x, c, library))
    for column, value in [(2, -1), (2, 1), (3, -1), (3, 0)]:
        other_mean, other_sd = space.encode(x, _change(c, column, value), library)
        assert torch.equal(other_mean[:, :-1], mean)
        assert torch.equal(other_sd[:, :-1], sd)
    for column, value in [(0, 2), (1, 5)]:
        other_mean, _ = space.encode(x, _change(c, column, value), library)
        assert (other_mean[:, :-1] != mean).any()


def test_new_donors_have_a_depth_of_their_own_unless_the_user_gives_it():
    latent = _space()
    assert torch.equal(latent.donor_depths, latent.depth.donor_offset)
    assert _space(observed=True).donor_depths is None


def test_decoding_multiplies_depth_composition_and_donor():
    space, (_, c, _) = _space(), _cells()
    y = torch.randn(5, 3, generator=_generator())
    log_rho = space.log_composition(y[:, :2], c)
    torch.testing.assert_close(log_rho.exp().sum(1), torch.ones(5))
    effect = torch.randn(5, 6, generator=_generator(1))
    expected = log_rho + space.log_depth(y, c)[:, None] + effect
    torch.testing.assert_close(space.decode(y, c, effect).location, expected)
    assert torch.equal(space.known_effect(c), space.donors.posterior_mean[c[:, 3].long()])
    # Composition depends on the conditions and the batch, not on the donor.
    assert torch.equal(space.log_composition(y[:, :2], _change(c, 3, -1)), log_rho)
    for column, value in [(0, 2), (1, 5), (2, 1)]:
        assert (space.log_composition(y[:, :2], _change(c, column, value)) != log_rho).any()


def test_given_a_size_factor_compositions_need_not_sum_to_one():
    space, (x, c, _) = _space(observed=True), _cells()
    size = torch.tensor([0.5, 1.0, 2.0, 3.0, 10.0])
    mean, sd = space.encode(x, c, size)
    assert (sd[:, -1] == 0).all()
    torch.testing.assert_close(space.log_depth(mean, c), size.log())
    total = space.log_composition(mean[:, :2], c).exp().sum(1)
    assert ((total - 1).abs() > 0.05).all()


def test_an_unknown_batch_is_the_average_of_all():
    space, (_, c, _) = _space(), _cells()
    features = space.features
    unknown = features.batch(_change(c, 2, -1))
    assert torch.equal(unknown, torch.full((5, 2), 0.5))
    assert features.batch_is_unknown(_change(c, 2, -1)).all()
    assert not features.batch_is_unknown(c).any()
    assert torch.equal(features.with_batch(c, 1)[:, 2], torch.ones(5))
    known = torch.stack([space.depth_offset(features.with_batch(c, k)) for k in (0, 1)])
    torch.testing.assert_close(space.depth_offset(_change(c, 2, -1)), known.mean(0))


def test_a_model_without_any_condition_has_one_feature():
    space = _space(ConditionLayout())
    c = torch.zeros(4, 0)
    assert torch.equal(space.features.conditions(c), torch.ones(4, 1))
    assert space.features.batch(c).shape == (4, 0)
    assert (space.features.donor(c) == -1).all()
    assert space.known_effect(c) is None


def _moments_of(x, inputs, library=None):
    """What training hands to a space, of counts and inputs."""
    library = x.sum(1) if library is None else library
    sums = x.sum(0), x.square().sum(0), library @ x, x.amin(0)
    donors = torch.full((len(x),), -1)
    return DataMoments(library, inputs, donors, inputs.double().T @ x, *sums)


@pytest.mark.parametrize("observed", [False, True])
def test_initialize_starts_from_mean_expression_and_dispersion(observed):
    """On cells of one profile the method of moments has nothing left to learn."""
    rng = np.random.default_rng(0)
    n, theta = 20_000, np.array([0.3, 1.0, 3.0, 1.0, 0.7, 1e3])
    rho = np.array([0.4, 0.3, 0.15, 0.1, 0.0499, 0.0001])
    depth = np.exp(rng.normal(4, 0.3, n))
    mean = depth[:, None] * rho
    x = rng.poisson(rng.gamma(theta, mean / theta)).astype(float)
    library = depth if observed else x.sum(1)
    x, library = torch.from_numpy(x), torch.from_numpy(library)
    moments = _moments_of(x, torch.ones(n, 1), library)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        space = LatentSpace(
            6,
            ConditionLayout(),
            NegativeBinomial(6),
            n_latent=2,
            n_hidden=8,
            n_layers=1,
            dropout=0.0,
            depth_is_observed=observed,
        ).eval()
    space.initialize(moments)
    bias = space.decoder.output.bias.detach()
    np.testing.assert_allclose(bias.exp(), x.sum(0) / library.sum(), rtol=1e-5)
    started = space.likelihood.log_dispersion.exp().detach().numpy()
    if observed:
        np.testing.assert_allclose(started[:5], theta[:5], rtol=0.15)
    # A gene of a handful of counts starts from the common value.
    assert started[5] == pytest.approx(5, rel=0.3)


def test_depth_far_outside_training_is_one_that_a_cell_could_have():
    depth = Depth(1, 0, observed=False)
    library = torch.tensor([100.0, 200.0, 1000.0]).double()
    depth.fit(library, torch.ones(3, 1), torch.full((3,), -1))
    offset = depth.offset(torch.ones(3, 1), torch.full((3,), -1))
    last = depth.standardise(torch.tensor([-50.0, np.log(500.0), 64.0]), offset)
    log_depth = depth.log_depth(depth.within_reach(last, offset), offset)
    np.testing.assert_allclose(log_depth.exp(), [10.0, 500.0, 10_000.0], rtol=0.01)


def _crossed(n_cells, type_effect, batch_effect, batch_of_type, seed=0):
    """Counts of two types in two batches whose effects on genes multiply."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(2, size=n_cells)
    batch = (rng.random(n_cells) < np.asarray(batch_of_type)[kind]).astype(int)
    rho = np.full(len(type_effect), 1 / len(type_effect))
    mean = rng.lognormal(7, 0.3, n_cells)[:, None] * rho
    mean = mean * np.exp(kind[:, None] * type_effect + batch[:, None] * batch_effect)
    x = torch.from_numpy(rng.poisson(mean).astype(float))
    inputs = np.c_[np.ones(n_cells), np.eye(2)[kind], rng.normal(size=n_cells), np.eye(2)[batch]]
    return x, torch.from_numpy(inputs).float()


def test_label_effects_find_each_conditions_own_fold_changes():
    """Types and batches are correlated: what the type explains is not given to the batch."""
    n_vars = 40
    of_type, of_batch = np.zeros(n_vars), np.zeros(n_vars)
    of_type[0], of_type[1], of_batch[2], of_batch[3] = 2.0, -1.5, 1.0, -0.7
    x, inputs = _crossed(4000, of_type, of_batch, batch_of_type=[0.2, 0.8])
    moments = _moments_of(x, inputs)
    labels = [slice(1, 3), slice(4, 6)]
    effects = label_effects(moments, moments.x / moments.library.sum(), labels).numpy()
    between = effects[2] - effects[1], effects[5] - effects[4]
    # Counts are parts of a total: where some genes rise, all others fall.
    between = [difference - np.median(difference) for difference in between]
    np.testing.assert_allclose(between[0][:2], of_type[:2], atol=0.15)
    np.testing.assert_allclose(between[1][2:4], of_batch[2:4], atol=0.15)
    np.testing.assert_allclose(between[1][:2], 0, atol=0.15)
    np.testing.assert_allclose(between[0][2:4], 0, atol=0.15)
    # Neither the constant nor a number has an effect.
    assert not effects[[0, 3]].any()


def test_label_effects_are_none_where_there_is_only_noise():
    x, inputs = _crossed(300, np.zeros(500), np.zeros(500), batch_of_type=[0.5, 0.5])
    moments = _moments_of(x, inputs)
    rho = moments.x / moments.library.sum()
    effects = label_effects(moments, rho, [slice(1, 3), slice(4, 6)])
    unshrunken = (moments.inputs_x[1] + 0.5) / (rho * (inputs[:, 1] @ moments.library.float()))
    assert unshrunken.log().std() > 0.03
    assert (effects != 0).double().mean() < 0.1
    assert effects.abs().max() < 0.3
    assert not label_effects(moments, rho, []).any()


def test_effects_and_wide_matrices_pay_their_priors_once():
    space = _space(ConditionLayout(n_categories=(3,)))
    decoder, encoder = space.decoder, space.encoder
    torch.nn.init.normal_(decoder.offset.weight)
    first, last = encoder.hidden[0], decoder.output
    laws = {
        decoder.offset: stats.cauchy(scale=0.25),
        first: stats.norm(scale=first.in_features**-0.5),
        last: stats.norm(scale=last.in_features**-0.5),
    }
    expected = sum(
        (law.logpdf(0) - law.logpdf(layer.weight.detach().numpy())).sum()
        for layer, law in laws.items()
    )
    assert space.prior_cost(1.0).item() == pytest.approx(expected, rel=1e-5)
