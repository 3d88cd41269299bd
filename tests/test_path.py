"""Paths: a network that is trained, guided, inverted and evaluated like any other density."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch.nn.functional import one_hot

from exprgen.densities import Path
from exprgen.densities._guidance import Term, terms_of
from exprgen.nn import Denoiser
from exprgen.schedules import SCHEDULES, TARGETS, WEIGHTINGS
from exprgen.solvers import ode


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _build(n_dims, blocks, **how):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Path(n_dims, 1 + sum(blocks), blocks=blocks, **{"n_hidden": 128, **how})


def _randomised(n_dims, blocks, **how):
    """A network whose weights are far from where training starts, in double precision."""
    path = _build(n_dims, blocks, **{"n_hidden": 16, **how})
    with torch.no_grad():
        for parameter in path.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=_generator(1)))
    return path.double().eval().requires_grad_(False)


def _features(labels, n_labels, *numbers):
    columns = [torch.ones(len(labels), 1), one_hot(labels, n_labels).float(), *numbers]
    return torch.cat(columns, 1)


def _train(path, y, features, n_steps, *, rate=3e-3, batch=256):
    path.standardise(y)
    optimiser = torch.optim.Adam(path.parameters(), lr=rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 1.0 - i / n_steps)
    generator = _generator(3)
    for _ in range(n_steps):
        rows = torch.randint(len(y), (batch,), generator=generator)
        optimiser.zero_grad()
        path.loss(y[rows], features[rows], generator).mean().backward()
        optimiser.step()
        decay.step()
    return path.eval().requires_grad_(False)


# A trained density in one dimension ------------------------------------------------------

MEANS = torch.tensor([[-1.5, 1.0], [0.5, 3.0]])
"""Of the two equally likely components of each of two labels; their sd is .4."""


def _draw_1d(n, seed, label=None):
    generator = _generator(seed)
    labels = torch.randint(2, (n,), generator=generator)
    if label is not None:
        labels[:] = label
    which = torch.randint(2, (n,), generator=generator)
    y = MEANS[labels, which] + 0.4 * torch.randn(n, generator=generator)
    return y[:, None], _features(labels, 2)


def _log_prob_1d(y, label):
    squares = ((y - MEANS[label]) / 0.4) ** 2
    return (-0.5 * squares).exp().mean(1).log() - math.log(0.4 * math.sqrt(2 * math.pi))


@pytest.fixture(scope="module")
def trained_1d():
    y, features = _draw_1d(6000, 0)
    return _train(_build(1, [2], condition_dropout=0.2), y, features, 500)


@pytest.mark.parametrize("label", [0, 1])
def test_a_trained_path_is_the_law_given_a_label(trained_1d, label):
    y, features = _draw_1d(2000, 7, label)
    draws = trained_1d.sample(features, _generator(1))
    assert abs(float(draws.mean() - y.mean())) < 0.1
    assert abs(float(draws.std() / y.std()) - 1) < 0.05
    wasserstein = (draws.sort(0)[0] - y.sort(0)[0]).abs().mean()
    assert wasserstein < 0.12
    lost = _log_prob_1d(y[:1000], label) - trained_1d.log_prob(y[:1000], features[:1000])
    assert abs(float(lost.mean())) < 0.06


def test_its_density_integrates_to_one(trained_1d):
    axis = torch.linspace(-6, 8, 701)[:, None]
    for label in (0, 1):
        labels = torch.full((len(axis),), label)
        total = trained_1d.log_prob(axis, _features(labels, 2)).exp().sum() * 0.02
        assert float(total) == pytest.approx(1, abs=0.01)


def test_hidden_conditions_give_the_law_of_all(trained_1d):
    y, features = _draw_1d(4000, 8)
    seen = trained_1d.sample(features[:1].expand(4000, -1), _generator(2))
    hidden = trained_1d.sample(features[:1].expand(4000, -1), _generator(2), guidance=[0.0])
    assert (hidden.sort(0)[0] - y.sort(0)[0]).abs().mean() < 0.15
    assert (seen.sort(0)[0] - y.sort(0)[0]).abs().mean() > 0.5


def test_guidance_moves_draws_steadily_away_from_the_unconditional_law(trained_1d):
    features = _draw_1d(2000, 9, label=1)[1]
    means = [
        float(trained_1d.sample(features, _generator(4), guidance=[w]).mean())
        for w in (0.0, 0.5, 1.0, 1.5, 2.0)
    ]
    assert all(later > earlier + 0.05 for earlier, later in pairwise(means))


def test_mean_is_that_of_draws_and_does_not_change(trained_1d):
    features = _features(torch.tensor([0, 1, 0]), 2)
    means = trained_1d.mean(features)
    assert torch.equal(means, trained_1d.mean(features.flip(0)).flip(0))
    torch.testing.assert_close(means[:2, 0], MEANS.mean(1), rtol=0, atol=0.12)
    assert trained_1d.mean(features[:0]).shape == (0, 1)


# Two dimensions: few steps of a flow against many of a diffusion -------------------------


def _moons(n, seed):
    generator = _generator(seed)
    labels = torch.randint(2, (n,), generator=generator)
    angle = math.pi * torch.rand(n, generator=generator)
    sign = 1.0 - 2 * labels
    y = torch.stack([labels + sign * angle.cos(), 0.5 * labels + sign * angle.sin()], 1)
    return y + 0.1 * torch.randn(n, 2, generator=generator), _features(labels, 2)


def _sliced_wasserstein(a, b):
    directions = torch.randn(2, 64, generator=_generator(5))
    directions = directions / directions.norm(dim=0)
    difference = (a @ directions).sort(0)[0] - (b @ directions).sort(0)[0]
    return float(difference.square().mean().sqrt())


def test_a_flow_in_nineteen_evaluations_is_no_worse_than_two_hundred_steps_of_diffusion():
    y, features = _moons(6000, 0)
    real, conditions = _moons(3000, 1)
    floor = _sliced_wasserstein(real, _moons(3000, 2)[0])
    flow = _train(_build(2, [2], coupling="optimal_transport"), y, features, 400)
    diffusion = _train(_build(2, [2], schedule="vp", target="noise"), y, features, 400)
    few = flow.sample(conditions, _generator(1), solver="heun", n_steps=10)
    many = diffusion.sample(conditions, _generator(1), solver="ddpm", n_steps=200)
    few, many = _sliced_wasserstein(few, real), _sliced_wasserstein(many, real)
    assert few < many + floor / 2
    assert few < 3 * floor


def test_maximum_likelihood_reaches_the_entropy():
    y, features = _draw_1d(3000, 0)
    path = _build(1, [2], objective="mle", n_hidden=32, condition_dropout=0.0)
    path.standardise(y)
    with torch.no_grad():
        before = float(-path.log_prob(y, features).mean())
    _train(path, y, features, 50, rate=2e-2, batch=128)
    y, features = _draw_1d(1000, 5)
    labels = features[:, 2].long()
    entropy = -torch.stack([_log_prob_1d(y, k) for k in (0, 1)], 1).gather(1, labels[:, None])
    after = float(-path.log_prob(y, features).mean())
    assert float(entropy.mean()) < before - 0.3
    assert after < float(entropy.mean()) + 0.1


# Guidance: exact at the corners, multilinear between -------------------------------------


class Additive(torch.nn.Module):
    """The velocity of y = a + b + noise with a, b ~ N(0, 1), noise of sd ½; a or b may be hidden.

    In place of a network on the linear path; features are the constant, a and b.
    """

    def forward(self, y, place, features, keep=None, given=None, *, rows=None):
        keep = torch.ones(2) if keep is None else keep.float()
        features = features if rows is None else features[rows]
        angle = torch.as_tensor(place) * math.pi / 2
        alpha = angle.sin() / (angle.sin() + angle.cos())
        sigma = 1 - alpha
        y_t = y * (alpha**2 + sigma**2).sqrt()
        mean = (features[:, 1:] * keep).sum(1, keepdim=True)
        variance = 0.25 + (1 - keep).sum()
        total = alpha**2 * variance + sigma**2
        deviation = y_t - alpha * mean
        return mean + (alpha * variance - sigma) / total * deviation


@pytest.fixture
def additive():
    path = _build(1, [1, 1], solver="ode").double()
    path.network = Additive()
    return path


@pytest.mark.parametrize("weights", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_corners_of_guidance_are_the_laws_given_a_subset(additive, weights):
    features = torch.tensor([[1.0, 2.0, -0.5]]).double().expand(4000, -1)
    draws = additive.sample(features, _generator(), guidance=weights)
    mean = 2.0 * weights[0] - 0.5 * weights[1]
    variance = 0.25 + 2 - sum(weights)
    assert float(draws.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 4000))
    assert float(draws.var()) == pytest.approx(variance, rel=0.1)


def test_weights_act_on_their_own_condition(additive):
    features = torch.tensor([[1.0, 2.0, -0.5]]).double().expand(1000, -1)

    def mean(*weights):
        return float(additive.sample(features, _generator(), guidance=weights).mean())

    first = [mean(w, 0) for w in (0, 0.5, 1, 1.5, 2)]
    second = [mean(1, w) for w in (0, 0.5, 1, 1.5, 2)]
    assert all(b > a + 0.3 for a, b in pairwise(first))
    assert all(b < a - 0.05 for a, b in pairwise(second))
    sharp = additive.sample(features, _generator(), guidance=(2.0, 1.0))
    assert sharp.var() < additive.sample(features, _generator()).var()


def test_composition_is_multilinear_and_costs_nothing_at_weights_of_zero_and_one():
    path = _randomised(3, [2, 1, 4])
    features = _features(
        torch.arange(6) % 2, 2, torch.randn(6, 5, generator=_generator())
    ).double()
    point = torch.randn(6, 3, generator=_generator(2)).double()
    t = torch.tensor(0.4).double()

    def data(terms):
        return path._field(features, None, terms).predict(point, t).data

    assert [len(terms_of(w, 3)) for w in ([1, 0, 1], [1, 0, 2], [0.5, 2, 2])] == [1, 2, 8]
    everything = data((Term(),))
    assert torch.equal(data(terms_of([1, 1, 1], 3)), everything)
    subsets = {
        (a, b): data((Term(torch.tensor([a, True, b])),))
        for a, b in product((False, True), repeat=2)
    }
    expected = sum(
        (0.3 if a else 0.7) * (1.6 if b else -0.6) * value for (a, b), value in subsets.items()
    )
    torch.testing.assert_close(data(terms_of([0.3, 1, 1.6], 3)), expected)
    assert (expected - everything).abs().max() > 0.01


def test_hidden_conditions_cannot_be_told_apart():
    path = _randomised(2, [2, 1])
    one, other = _features(torch.tensor([0, 1]), 2, torch.tensor([[0.3], [-2.0]])).double()
    draws = [
        path.sample(f.expand(20, -1), _generator(), guidance=w)
        for f in (one, other)
        for w in ([0, 0], [1, 0], [1, 1])
    ]
    torch.testing.assert_close(draws[0], draws[3])
    assert (draws[1] - draws[4]).abs().max() > 0.01
    assert (draws[2] - draws[1]).abs().max() > 0.01
    assert (draws[1] - draws[0]).abs().max() > 0.01


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [1.0, -0.5], [1.0, float("nan")]])
def test_wrong_weights_are_refused(weights):
    path = _randomised(2, [2, 1])
    features = _features(torch.tensor([0]), 2, torch.zeros(1, 1)).double()
    with pytest.raises(ValueError, match="guidance must"):
        path.sample(features, _generator(), guidance=weights)


# Depth first -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_depth():
    """y_1 = label + 2 y_2 + noise, with y_2 = depth: 3 + label + .5 noise."""
    generator = _generator(6)
    labels = torch.randint(2, (4000,), generator=generator)
    depth = 3 + labels + 0.5 * torch.randn(4000, generator=generator)
    first = labels + 2 * depth + 0.3 * torch.randn(4000, generator=generator)
    y = torch.stack([first, depth], 1)
    how = {"depth_first": True, "coupling": "optimal_transport", "n_hidden": 64}
    return _train(_build(2, [2], **how), y, _features(labels, 2), 350)


def test_depth_first_fixes_depth_exactly(trained_depth):
    features = _features(torch.ones(2000, dtype=torch.long), 2)
    last = torch.linspace(3.2, 4.8, 2000)
    y = trained_depth.sample(features, _generator(), last)
    assert torch.equal(y[:, 1], last)
    rest = y[:, 0] - 1 - 2 * last
    assert abs(float(rest.mean())) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([rest, last]))[0, 1])) < 0.3
    assert float(rest.std()) == pytest.approx(0.3, abs=0.06)


def test_depth_has_a_law_of_its_own_that_follows_the_label(trained_depth):
    for label in (0, 1):
        features = _features(torch.full((3000,), label), 2)
        y = trained_depth.sample(features, _generator())
        assert float(y[:, 1].mean()) == pytest.approx(3 + label, abs=0.06)
        assert float(y[:, 1].std()) == pytest.approx(0.5, abs=0.05)
        axis = torch.linspace(0, 8, 801)
        density = trained_depth.log_prob_last(axis, features[:801]).exp()
        assert float(density.sum() * 0.01) == pytest.approx(1, abs=1e-3)
        assert float((density * axis).sum() * 0.01) == pytest.approx(3 + label, abs=0.06)
    hidden = trained_depth.sample(features, _generator(), guidance=[0.0])[:, 1]
    assert float(hidden.mean()) == pytest.approx(3.5, abs=0.15)


def test_joint_density_is_that_of_depth_times_that_of_the_rest(trained_depth):
    label, depth = torch.zeros(400, dtype=torch.long), torch.full((400,), 2.7)
    axis = torch.linspace(2.4, 8.4, 400)
    features = _features(label, 2)
    joint = trained_depth.log_prob(torch.stack([axis, depth], 1), features).exp()
    marginal = float(joint.sum() * (axis[1] - axis[0]))
    expected = float(trained_depth.log_prob_last(depth[:1], features[:1]).exp())
    assert marginal == pytest.approx(expected, rel=0.01)


def test_without_depth_first_the_last_coordinate_cannot_be_fixed():
    path, features = _randomised(2, [2]), _features(torch.tensor([0, 1]), 2).double()
    with pytest.raises(ValueError, match="last needs .* no depth .*depth_first=True"):
        path.sample(features, _generator(), torch.zeros(2))
    with pytest.raises(ValueError, match="log_prob_last needs .* no depth"):
        path.log_prob_last(torch.zeros(2), features)


# Contracts -------------------------------------------------------------------------------


def test_shift_and_scale_change_units_and_nothing_else():
    path = _randomised(3, [2])
    features = _features(torch.arange(40) % 2, 2).double()
    u = torch.randn(40, 3, generator=_generator(2)).double()
    plain, draws = path.log_prob(u, features), path.sample(features, _generator(3))
    data = 5.0 + torch.tensor([2.0, 0.1, 30.0]) * torch.randn(500, 3, generator=_generator(4))
    path.standardise(data.double())
    shift, scale = data.double().mean(0), data.double().std(0)
    torch.testing.assert_close(path.sample(features, _generator(3)), shift + scale * draws)
    moved = path.log_prob(shift + scale * u, features)
    torch.testing.assert_close(moved, plain - scale.log().sum())
    path.standardise(torch.ones(5, 3).double())
    assert torch.equal(path.scale, torch.ones(3).double())


def test_log_prob_inverts_what_is_drawn():
    """Change of variables: log p at a draw is the noise's, less the log-determinant of the map."""
    path = _randomised(2, [2], solver="ode")
    features = _features(torch.ones(5, dtype=torch.long), 2).double()
    noise = torch.randn(1, 2, generator=_generator(9)).double()
    step = 1e-4
    field = path._field(features, None, (Term(),))
    points = torch.cat([noise, noise + step * torch.eye(2), noise - step * torch.eye(2)])
    y = ode(field, points, rtol=1e-9, atol=1e-9)
    jacobian = (y[1:3] - y[3:]) / (2 * step)
    expected = -0.5 * noise.square().sum() - math.log(2 * math.pi) - jacobian.det().abs().log()
    assert float(path.log_prob(y[:1], features[:1])) == pytest.approx(float(expected), abs=5e-3)


def test_beyond_32_dimensions_the_trace_is_an_estimate_that_does_not_change():
    small, large = _randomised(32, [2]), _randomised(33, [2])
    assert small.estimator.startswith("exact")
    assert large.estimator == "estimate"
    features = _features(torch.arange(3) % 2, 2).double()
    y = torch.randn(3, 33, generator=_generator()).double()
    assert torch.equal(large.log_prob(y, features), large.log_prob(y, features))


@pytest.mark.parametrize("depth_first", [False, True])
@pytest.mark.parametrize("coupling", ["independent", "optimal_transport"])
def test_loss_and_draws_depend_on_the_generator_alone(coupling, depth_first):
    path = _randomised(3, [2, 1], coupling=coupling, depth_first=depth_first)
    features = _features(
        torch.arange(60) % 2, 2, torch.randn(60, 1, generator=_generator())
    ).double()
    y = torch.randn(60, 3, generator=_generator(1)).double()
    before = torch.get_rng_state()
    for call in (
        lambda g: path.loss(y, features, g),
        lambda g: path.sample(features, g),
    ):
        first, again, other = (call(_generator(seed)) for seed in (1, 1, 2))
        assert first.dtype == torch.float64
        assert len(first) == 60
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    path.log_prob(y, features)
    path.mean(features[:2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_combination_trains_on_finite_gradients(schedule, target):
    y, features = _moons(64, 0)
    for weighting in WEIGHTINGS:
        path = _build(2, [2], schedule=schedule, target=target, weighting=weighting, n_hidden=8)
        value = path.loss(y, features, _generator())
        assert value.shape == (64,)
        assert (value >= 0).all()
        value.mean().backward()
        gradients = [p.grad for p in path.network.output.parameters()]
        assert all(torch.isfinite(g).all() and (g != 0).any() for g in gradients)


def test_gradients_reach_every_parameter():
    y, features = _moons(64, 0)
    path = _randomised(2, [2], depth_first=True, condition_dropout=0.5).requires_grad_(True)
    path.loss(y.double(), features.double(), _generator()).sum().backward()
    for name, parameter in path.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("depth_first", [False, True])
def test_weights_and_units_are_restored(tmp_path, depth_first):
    path = _randomised(3, [2], depth_first=depth_first)
    path.standardise(torch.randn(50, 3, generator=_generator()).double() * 4 + 1)
    torch.save(path.state_dict(), tmp_path / "path.pt")
    other = _build(3, [2], n_hidden=16, depth_first=depth_first).double().eval()
    features = _features(torch.arange(10) % 2, 2).double()
    draws = path.sample(features, _generator())
    assert not torch.allclose(other.sample(features, _generator()), draws)
    other.load_state_dict(torch.load(tmp_path / "path.pt", weights_only=True))
    assert torch.equal(other.sample(features, _generator()), draws)
    torch.testing.assert_close(other.log_prob(draws, features), path.log_prob(draws, features))


def test_a_network_starts_silent_and_reads_shared_rows_once():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Denoiser(3, [2, 1], n_given=1, n_hidden=16).double()
    features = _features(torch.arange(2), 2, torch.tensor([[0.1], [0.2]])).double()
    y, given = torch.randn(7, 3).double(), torch.randn(7, 1).double()
    rows = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    place = torch.tensor(0.3)
    assert torch.equal(network(y, place, features, given=given, rows=rows), torch.zeros_like(y))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=_generator()))
    shared = network(y, place, features, given=given, rows=rows)
    torch.testing.assert_close(shared, network(y, place.expand(7), features[rows], given=given))
    keep = torch.tensor([True, False])
    one = network(y, place, features, keep, given, rows=rows)
    each = network(y, place, features[rows], keep.expand(7, -1), given)
    torch.testing.assert_close(one, each)
    assert (one - shared).abs().max() > 0.01


def test_a_path_without_conditions():
    path = _randomised(2, [])
    features = torch.ones(5, 1).double()
    y = path.sample(features, _generator(), guidance=[])
    assert torch.isfinite(path.log_prob(y, features)).all()
    assert torch.isfinite(path.loss(y, features, _generator())).all()
    assert path.sample(features[:0], _generator()).shape == (0, 2)
    assert path.log_prob(y[:0], features[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"schedule": "linaer"}, "schedule must be one of .*'linear'.*got 'linaer'. Did you mean"),
        ({"target": "x0"}, "target must be one of 'velocity', 'noise', 'data'.*got 'x0'"),
        ({"weighting": "snr"}, "weighting must be one of"),
        ({"times": "normal"}, "times must be one of"),
        ({"coupling": "ot"}, "coupling must be one of 'independent', 'optimal_transport'"),
        ({"solver": "rk4"}, "solver must be one of 'euler', 'heun'"),
        ({"objective": "nll"}, "objective must be one of 'matching', 'mle'"),
        ({"condition_dropout": 1.0}, r"condition_dropout must lie in \[0, 1\)"),
        ({"n_steps": 0}, "n_steps must be at least 1"),
        ({"blocks": [3]}, r"blocks must add up to n_features - 1 = 2, got \[3\]"),
        ({"n_dims": 1, "depth_first": True}, "depth_first needs n_dims of at least 2, got 1"),
        (
            {"coupling": "optimal_transport", "solver": "ddpm"},
            "solver must be one of 'euler', 'heun', 'ddim', 'ode', 'arc' .*stochastic solvers",
        ),
    ],
)
def test_what_cannot_be_is_said(how, message):
    with pytest.raises(ValueError, match=message):
        Path(**{"n_dims": 2, "n_features": 3, "blocks": [2], "n_hidden": 4, **how})


def test_stochastic_solvers_are_refused_when_sampling_with_coupled_noise():
    path = _randomised(2, [2], coupling="optimal_transport")
    with pytest.raises(ValueError, match="got 'ddpm': stochastic solvers need independent noise"):
        path.sample(torch.ones(1, 3).double(), _generator(), solver="ddpm")
