"""Gene space: normal scores, the network that tilts them, and the models on continuous layers.

What all models promise is in test_contract.py.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import scanpy as sc
import torch
from faults import make_cells, refused
from scipy import stats

from exprgen import CondVAE, ExprDiffusion, ExprFlow, metrics
from exprgen._conditions import ConditionLayout
from exprgen._errors import DataQualityWarning, ExtrapolationWarning, SetupError
from exprgen.densities import Path
from exprgen.module import ExpressionModule
from exprgen.nn import GeneDenoiser, NormalScores
from exprgen.nn._gene_denoiser import expected_noise
from exprgen.spaces import GeneSpace

both = pytest.mark.parametrize("model_class", [ExprFlow, ExprDiffusion])
LABEL = {"categorical_condition_keys": ["cell_type"]}
TINY = {"n_latent": 2, "density_hidden": 8, "density_layers": 1}
QUIET = {"progress_bar": False, "accelerator": "cpu"}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _values(n=3000):
    """Peaks of .9, .5 and none, a rare gene, one that repeats two values, and a constant one."""
    rng = np.random.default_rng(0)
    x = rng.gamma(2, [1.0, 0.1, 5.0, 1.0, 1.0, 1.0], (n, 6)) + 0.5
    x[rng.random((n, 6)) < [0.9, 0.5, 0, 0.999, 0.3, 1]] = 0
    x[:, 2] -= 30
    x[:, 4] = np.round(x[:, 4] > 0) * (1 + (rng.random(n) < 0.5))
    return torch.from_numpy(x.astype(np.float32))


def _scores(x, n_axes=2):
    scores = NormalScores(x.shape[1], n_axes)
    scores.fit(x, x.double().amin(0))
    return scores


# Normal scores ---------------------------------------------------------------------------


def test_values_come_back_from_their_scores():
    x = _values()
    scores = _scores(x)
    mean, sd = scores.moments(x)
    at_bound = x == x.amin(0)
    assert ((sd > 0) == at_bound).all()
    u = torch.where(at_bound, scores.draw_below(len(x), _generator()), mean)
    back = scores.value(u)
    assert torch.equal(back[at_bound], x[at_bound])
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


def test_the_map_is_monotone_and_has_the_slope_that_it_says():
    x = _values().double()
    scores = _scores(x).double()
    lowest, highest = scores.lower, x.amax(0)
    grid = lowest + (highest - lowest + 1) * 1.3 * torch.linspace(1e-3, 1, 4001)[:, None]
    u, _ = scores.moments(grid)
    assert (u.diff(dim=0) > 0).all()
    assert (u > scores.threshold).all()
    found = u.diff(dim=0) / grid.diff(dim=0)
    said = scores.log_slope((grid[1:] + grid[:-1]) / 2).exp()
    close = (found / said - 1).abs() < 1e-6
    assert close[:, :4].double().mean() > 0.98  # but for pieces that end in between
    assert (scores.log_slope(lowest[None]) == 0).all()


def test_scores_are_standard_normal_and_their_values_have_the_shares_of_the_data():
    x = _values()
    scores = _scores(x)
    mean, sd = scores.moments(x)
    u = torch.where(sd > 0, scores.draw_below(len(x), _generator()), mean)
    for g in range(3):
        assert stats.kstest(u[:, g].numpy(), "norm").pvalue > 1e-3
    fresh = scores.value(torch.randn(200_000, 6, generator=_generator(1)))
    share = (fresh == x.amin(0)).double().mean(0)
    real = (x == x.amin(0)).double().mean(0).clamp(max=1 - 0.5 / len(x))
    assert (share - real).abs().max() < 4 * 0.5 / math.sqrt(200_000)
    for g in range(3):
        above = [v[v[:, g] > x[:, g].min(), g].numpy() for v in (fresh, x)]
        np.testing.assert_allclose(*(np.quantile(a, [0.1, 0.5, 0.9]) for a in above), rtol=0.05)


def test_what_was_not_detected_is_drawn_from_a_truncated_normal():
    scores = _scores(_values())
    drawn = scores.draw_below(20_000, _generator())
    mean, sd = scores.moments(scores.lower[None])
    for g, threshold in enumerate(scores.threshold.tolist()):
        law = stats.truncnorm(-np.inf, threshold)
        assert drawn[:, g].max() <= threshold + 1e-6
        assert stats.kstest(drawn[:, g].numpy(), law.cdf).pvalue > 1e-3
        assert float(mean[0, g]) == pytest.approx(law.mean(), abs=1e-3)
        assert float(sd[0, g]) == pytest.approx(law.std(), rel=1e-2)


def test_units_do_not_matter_and_axes_are_the_principal_ones():
    x = _values()
    one, two = _scores(x), _scores(x * 1000 - 5)
    torch.testing.assert_close(one.moments(x)[0], two.moments(x * 1000 - 5)[0], atol=2e-2, rtol=0)
    mean, _ = one.moments(x)
    _, singular, axes = np.linalg.svd(mean.numpy(), full_matrices=False)
    agreement = np.abs((axes[:2] * one.axes.T.numpy()).sum(1))
    np.testing.assert_allclose(agreement, 1, atol=0.02)
    np.testing.assert_allclose(one.spread, singular[:2] / math.sqrt(len(x)), rtol=1e-2)


# The network -----------------------------------------------------------------------------


def test_what_is_expected_of_a_tilted_law_is_its_integral():
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    generator = _generator()
    for t in (-3.0, 0.0, 1.5):
        for angle in (0.1, 0.7, 1.3, 1.5):
            u_t, a, b, s = torch.randn(4, generator=generator, dtype=torch.float64)
            alpha, sigma, m = math.sin(angle), math.cos(angle), 0.3
            above = a + b * (grid - m) - 0.5 * torch.expm1(s.clamp(min=-1)) * (grid - m) ** 2
            tilt = torch.where(grid > t, above, 0.0)
            log_weight = tilt - grid**2 / 2 - (u_t - alpha * grid) ** 2 / (2 * sigma**2)
            weight = (log_weight - log_weight.max()).exp()
            exact = (weight * grid).sum() / weight.sum()
            mean, width = alpha * u_t, torch.tensor(sigma, dtype=torch.float64)
            of = torch.tensor(t), torch.tensor(m), (a, b, s)
            found = mean + width * expected_noise(mean, width, *of)
            assert float(found) == pytest.approx(float(exact), abs=2e-4)


def _network(scores, blocks=(3,), scale=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GeneDenoiser(scores, blocks, n_hidden=16, n_layers=1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
    return network.requires_grad_(False)


@pytest.mark.parametrize("place", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_it_starts_from_the_law_of_all_cells_and_is_bounded_at_both_ends(place):
    scores = _scores(_values())
    y = 5 * torch.randn(50, 6, generator=_generator())
    features = torch.cat([torch.ones(50, 1), torch.eye(3)[torch.arange(50) % 3]], 1)
    at = torch.tensor(place)
    assert _network(scores)(y, at, features).abs().max() < 1e-4
    changed = _network(scores, scale=0.5)(y, at, features)
    assert torch.isfinite(changed).all()
    assert changed.abs().max() > 1e-3
    distinct, row = torch.unique(features, dim=0, return_inverse=True)
    again = _network(scores, scale=0.5)(y, at, distinct, rows=row)
    torch.testing.assert_close(again, changed, rtol=1e-2, atol=1e-3)
    # Hidden, a condition changes nothing, whichever it is.
    hidden = torch.tensor([False])
    one, two = (
        _network(scores, scale=0.5)(y, at, f, hidden) for f in (features, features.roll(1, 0))
    )
    torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)


# The bound -------------------------------------------------------------------------------


def _module(x, *, scale=0.0, n_labels=0):
    layout = ConditionLayout(n_categories=(n_labels,) * bool(n_labels))
    space = GeneSpace(x.shape[1], layout, n_latent=1)
    space.scores.fit(x, x.double().amin(0))
    space.likelihood.lower.copy_(x.amin(0))
    blocks = space.features.blocks
    network = _network(space.scores, blocks, scale)
    path = Path(
        x.shape[1], 1 + sum(blocks), blocks=blocks, network=network, target="edm", solver="arc"
    )
    return ExpressionModule(space, path).eval()


def _bound(module, x, n_samples, seed=0):
    c = torch.zeros(len(x), 0)
    options = {"n_samples": n_samples, "generator": _generator(seed)}
    return module.log_likelihood(x, c, x.sum(1), **options)


def test_untrained_the_bound_is_the_log_likelihood_of_independent_genes():
    x = _values()[:, :4]
    module = _module(x)
    scores, some = module.space.scores, x[:20]
    u, sd = scores.moments(some)
    above = -0.5 * u.double() ** 2 - 0.5 * math.log(2 * math.pi) + scores.log_slope(some).double()
    exact = torch.where(sd > 0, scores.share.double().log(), above).sum(1)
    torch.testing.assert_close(_bound(module, some, 1), exact, atol=1e-3, rtol=1e-4)
    below = some.clone()
    below[3, 2] = x[:, 2].min() - 1
    assert _bound(module, below, 1)[3] == -math.inf


def test_the_bound_lies_below_the_integral_and_reaches_it():
    """The probability of detecting neither of two genes, by a sum over the plane."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal([-0.3, 0.3], 1, (2000, 2)), 0).astype(np.float32)
    module = _module(torch.from_numpy(x), scale=0.15)
    thresholds = module.space.scores.threshold
    step = 0.1
    axes = [torch.arange(float(t) - step / 2, -6, -step) for t in thresholds]
    plane = torch.cartesian_prod(*axes)
    density = module.density.log_prob(plane, torch.ones(len(plane), 1))
    exact = float(density.double().exp().sum() * step**2)
    weights = _bound(module, torch.zeros(1000, 2), 1)
    assert float(weights.std()) > 0.02
    assert float(weights.exp().mean()) == pytest.approx(exact, rel=0.02)
    bounds = [weights.mean(), _bound(module, torch.zeros(300, 2), 5).mean(), math.log(exact)]
    assert bounds[0] < bounds[1] < bounds[2] + 0.01


# The models ------------------------------------------------------------------------------


def _cells(n=120):
    adata = make_cells(n)
    adata.layers["log"] = np.log1p(adata.X.toarray() * 0.7)
    return adata


def _trained(model_class=ExprFlow, epochs=2, **options):
    adata = _cells()
    model_class.setup_anndata(adata, layer="log", **LABEL)
    model = model_class(adata, seed=0, **TINY, **options)
    model.train(density_kwargs={"max_epochs": epochs}, **QUIET)
    return model


@both
def test_fractions_decide_and_are_said(model_class, caplog):
    adata = _cells()
    with caplog.at_level(logging.INFO, "exprgen"):
        model_class.setup_anndata(adata, layer="log")
    assert "in gene space" in caplog.text
    model = model_class(adata, seed=0, **TINY)
    assert isinstance(model.module.space, GeneSpace)
    assert not model.needs_counts
    assert "space=genes" in repr(model)
    model_class.setup_anndata(adata, layer="counts")
    assert model_class(adata, seed=0).needs_counts
    # Counts with a few fractions are counts that are wrong, or meant so.
    adata.layers["counts"] = adata.layers["counts"].astype(np.float32)
    adata.layers["counts"].data[:3] += 0.5
    with refused(SetupError, "not an integer", "allow_non_integer=True"):
        model_class.setup_anndata(adata, layer="counts")
    with pytest.warns(UserWarning, match="allow_non_integer=True asks"):
        model_class.setup_anndata(adata, layer="log", allow_non_integer=True)
    assert model_class(adata, seed=0).needs_counts


@both
@pytest.mark.parametrize("key", ["batch_key", "donor_key", "size_factor_key"])
def test_roles_that_need_a_decoder_or_counts_are_refused(model_class, key):
    adata = _cells()
    adata.obs["depth"] = 1.0
    column = {"batch_key": "batch", "donor_key": "donor", "size_factor_key": "depth"}[key]
    with refused(SetupError, f"{key}='{column}'", of=adata):
        model_class.setup_anndata(adata, layer="log", **{key: column})


@both
@pytest.mark.parametrize(
    "option", [{"n_hidden": 64}, {"dropout": 0.2}, {"likelihood": "nb"}, {"n_components": 3}]
)
def test_arguments_without_use_are_refused(model_class, option):
    adata = _cells()
    model_class.setup_anndata(adata, layer="log")
    ((name, _),) = option.items()
    with pytest.raises(ValueError, match=f"{name}=.*no use.*gene space"):
        model_class(adata, **option)


def test_so_are_a_target_an_objective_and_what_trains_an_autoencoder():
    adata = _cells()
    ExprDiffusion.setup_anndata(adata, layer="log")
    with pytest.raises(ValueError, match="target='noise' has no use"):
        ExprDiffusion(adata, target="noise")
    ExprFlow.setup_anndata(adata, layer="log")
    with pytest.raises(ValueError, match="objective='mle' has no use"):
        ExprFlow(adata, objective="mle")
    model = ExprFlow(adata, **TINY)
    for given in ({"max_epochs": 3}, {"batch_size": 32}, {"plan_kwargs": {"lr": 1e-3}}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}: .*takes density_kwargs"):
            model.train(**given, **QUIET)
    assert not model.is_trained_


def test_verbs_about_a_cells_noise_are_refused_and_depth_is():
    model = _trained()
    for verb, run in {
        "denoise": lambda: model.denoise(n_samples=2),
        "posterior_predictive_sample": lambda: model.posterior_predictive_sample(),
    }.items():
        with refused(ValueError, verb, "gene space", "CondVAE"):
            run()
    with refused(ValueError, "library=", "normalised for depth"):
        model.sample(n_obs=2, library=100.0)


def test_one_stage_on_the_asked_split_whose_best_weights_are_kept():
    adata = _cells()
    adata.obs["part"] = ["train"] * 90 + ["validation"] * 30
    ExprFlow.setup_anndata(adata, layer="log", **LABEL)
    model = ExprFlow(adata, seed=0, **TINY)
    model.train(split_key="part", density_kwargs={"max_epochs": 4, "batch_size": 32}, **QUIET)
    assert list(model.train_indices) == list(range(90))
    assert set(model.history) == {"density_loss_train", "density_loss_validation"}
    assert len(model.history["density_loss_train"]) == 4
    before = {name: value.clone() for name, value in model.module.space.state_dict().items()}
    model.train(split_key="part", density_kwargs={"max_epochs": 1}, **QUIET)
    after = model.module.space.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_values_below_all_of_training_have_no_probability():
    model = _trained()
    cells = _cells()[:20].copy()
    cells.layers["log"][3, [0, 2]] = -1
    with pytest.warns(ExtrapolationWarning, match="2 values in 1 of 20 cells"):
        found = model.log_likelihood(cells, n_samples=1, seed=0)
    assert found[3] == -np.inf
    assert np.isfinite(np.delete(found, 3)).all()


def test_a_counterfactual_of_the_same_condition_is_the_cell_itself():
    model = _trained(epochs=10, n_steps=20)
    adata = model.adata
    rows = np.flatnonzero(adata.obs["cell_type"] == "type_1")
    same = model.counterfactual(
        to={"cell_type": "type_1"}, indices=rows, n_samples=3, seed=0, progress_bar=False
    )
    np.testing.assert_allclose(same.X, adata.layers["log"][rows], atol=1e-5)


def test_the_way_to_another_condition_can_be_gone_back():
    model = _trained(epochs=10)
    space, path = model.module.space, model.module.density
    own, other = (torch.full((40, 1), float(label)) for label in (0, 1))
    own, other = space.features.conditions(own), space.features.conditions(other)
    y = torch.randn(40, space.n_dims, generator=_generator())
    there = path.transport(y, own, other, 80)
    assert (there - y).abs().max() > 0.1
    torch.testing.assert_close(path.transport(there, other, own, 80), y, atol=0.05, rtol=0)
    assert torch.equal(path.transport(y, own, own), y)


def test_laws_of_genes_are_those_of_the_cells_of_the_last_training():
    model = _trained()
    other = _cells()
    other.layers["log"] = 0.1 * other.layers["log"] - 5
    model.adata.layers["log"] = other.layers["log"]
    model.train(density_kwargs={"max_epochs": 2}, **QUIET)
    drawn = model.sample({"cell_type": "type_0"}, 50, seed=0).X
    assert drawn.min() >= other.layers["log"].min()
    assert drawn.max() < -4


def test_counts_are_not_taken_for_logarithms_later():
    model, others = _trained(), _cells()
    others.layers["log"] = others.layers["counts"]
    with pytest.warns(DataQualityWarning, match="looks like counts"):
        model.get_latent_representation(others)


def test_guidance_weighs_conditions():
    model = _trained(epochs=15)
    args = {"n_obs": 200, "seed": 0, "progress_bar": False}
    hidden = [model.sample({"cell_type": f"type_{k}"}, guidance=0, **args).X for k in range(2)]
    np.testing.assert_array_equal(*hidden)
    plain = [model.sample({"cell_type": f"type_{k}"}, **args).X for k in range(2)]
    assert np.abs(plain[0].mean(0) - plain[1].mean(0)).max() > 0.1


def test_scaled_values_without_a_peak_come_back_with_their_moments():
    """Genes of scales from .1 to 10, negative values, a bound that one cell is at."""
    rng = np.random.default_rng(0)
    adata = _cells(300)
    scale = np.geomspace(0.1, 10, adata.n_vars)
    label = (adata.obs["cell_type"] == "type_0").to_numpy()[:, None]
    values = rng.normal(size=adata.shape) + 1.5 * label * rng.normal(size=adata.n_vars)
    adata.layers["x"] = (values * scale - 3).astype(np.float32)
    ExprFlow.setup_anndata(adata, layer="x", **LABEL)
    model = ExprFlow(adata, seed=0, n_latent=2, density_hidden=32)
    how = {"max_epochs": 40, "batch_size": 32}
    model.train(density_kwargs=how, early_stopping=False, **QUIET)
    drawn = model.sample(adata, 5, seed=0, progress_bar=False).X
    real = adata.layers["x"]
    np.testing.assert_allclose((drawn.mean(0) - real.mean(0)) / real.std(0), 0, atol=0.15)
    np.testing.assert_allclose(drawn.std(0) / real.std(0), 1, atol=0.15)
    assert (drawn.min(0) >= real.min(0)).all()
    for k in (0, 1):
        rows = label[:, 0] == (k == 0)
        error = drawn.reshape(300, 5, -1)[rows].mean((0, 1)) - real[rows].mean(0)
        np.testing.assert_allclose(error / real.std(0), 0, atol=0.3)


def test_blood_cells_are_like_held_out_ones(pbmc):
    """A forest tells real cells from real ones at .5, from those of a plain network at .9."""
    pbmc.X = pbmc.layers["counts"].copy()
    sc.pp.normalize_total(pbmc, target_sum=1e4)
    sc.pp.log1p(pbmc)
    sc.pp.highly_variable_genes(pbmc, n_top_genes=250)
    pbmc = pbmc[:, pbmc.var["highly_variable"]].copy()
    pbmc.X = pbmc.X.toarray()
    held_out = np.arange(pbmc.n_obs) % 3 == 0
    train, test = pbmc[~held_out].copy(), pbmc[held_out].copy()
    ExprFlow.setup_anndata(train, **LABEL)
    model = ExprFlow(train, seed=0, density_hidden=64, density_layers=1)
    model.train(density_kwargs={"max_epochs": 120}, **QUIET)
    drawn = model.sample(test, seed=0, progress_bar=False).X
    auc = metrics.c2st_auc(*metrics.pooled_pcs(drawn, test.X, seed=0), seed=0)
    assert auc < 0.65
    assert (drawn == 0).mean() == pytest.approx((test.X == 0).mean(), abs=0.02)
    CondVAE.setup_anndata(train, **LABEL)  # the same setup serves
