"""HybridResidualModel: the law of residuals, its fit in closed form, predictors of every kind.

What all models promise is in test_contract.py; predictors alone are in test_means.py.
"""

from __future__ import annotations

import logging
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from faults import make_cells, refused
from scipy import integrate, optimize, stats
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import Ridge

from exprgen import CondVAE, HybridResidualModel, tl
from exprgen._conditions import ConditionLayout
from exprgen._errors import (
    CheckpointError,
    DataQualityWarning,
    ExtrapolationWarning,
    SetupError,
    TrainingDivergedError,
)
from exprgen.densities import StandardNormal
from exprgen.likelihoods import ResidualLaw, Start
from exprgen.means import CallableMean, SklearnMean
from exprgen.module import ExpressionModule
from exprgen.spaces import KnownMean, ResidualSpace
from exprgen.spaces._factors import donor_effects, noise_of, shared_axes
from exprgen.spaces._scale import fit_log_scale, left_out_log_scale

QUIET = {"progress_bar": False}
CPU = {"accelerator": "cpu", **QUIET}
LABELS = {"categorical_condition_keys": ["tissue", "sex"]}
SMALL = {"density_hidden": 16, "density_layers": 1}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _law(n_obs=400, lower=None):
    """Three genes: normal, skewed and heavy-tailed residuals."""
    rng = np.random.default_rng(0)
    residuals = np.column_stack(
        [rng.normal(size=n_obs), rng.gamma(2, size=n_obs) - 2, rng.standard_t(4, n_obs)]
    )
    law = ResidualLaw(3)
    law.fit(residuals)
    law.sd.copy_(torch.tensor([1.0, 0.8, 0.6]))
    bound = torch.full((3,), -1e30 if lower is None else lower)
    zero = torch.ones(3)
    law.initialize(Start(1, zero, zero, zero, bound))
    return law, residuals


def _heads(mean, log_scale, n=1):
    return torch.tensor([mean, log_scale], dtype=torch.float32).expand(n, 2, 3)


def _bulk(n=120, n_vars=40, seed=0, noise=1.0):
    """Three tissues and two sexes; in one tissue residuals are three times as large."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {"tissue": rng.choice(list("abc"), n), "sex": rng.choice(["f", "m"], n)},
        index=[f"sample_{i}" for i in range(n)],
    )
    truth = np.random.default_rng(99)
    effects = {label: truth.normal(0, 1, n_vars) for label in "abcfm"}
    loadings = truth.normal(0, 0.6, n_vars)
    mean = 20 + np.array([effects[a] + effects[b] for a, b in obs.to_numpy()])
    scale = noise * np.where(obs["tissue"] == "c", 3.0, 1.0)[:, None]
    factor = rng.normal(size=(n, 1)) * loadings
    adata = AnnData((mean + scale * (factor + rng.normal(size=mean.shape))).astype("f4"), obs)
    adata.obs["donor"] = [f"d{i % 6}" for i in range(n)]
    return adata, mean


def _trained(adata, *, setup=None, **options):
    HybridResidualModel.setup_anndata(adata, **(LABELS if setup is None else setup))
    model = HybridResidualModel(adata, seed=0, **{"density": "low_rank", **options})
    model.train(**CPU)
    return model


# The law of residuals ---------------------------------------------------------------------


@pytest.mark.parametrize("lower", [None, 1.0])
def test_the_law_adds_up_to_one_and_draws_follow_it(lower):
    law, _ = _law(lower=lower)
    extra, location = _heads([2.0] * 3, [0.5] * 3), torch.tensor([[0.3, -0.5, 0.8]])
    n = 20_000
    drawn = law.draw(location.expand(n, -1), _generator(), extra.expand(n, -1, -1)).numpy()
    grid = np.linspace(-30.0 if lower is None else lower + 1e-6, 60, 60_001)
    values = torch.full((len(grid), 3), 2.0, dtype=torch.float64)
    heads = extra.double().expand(len(grid), -1, -1)
    # The law of one gene: of a cell in which the others stay where they are.
    others = law.log_prob(values[:1], location.double(), heads[:1])
    at_two = _log_density_at_two(law, location.double(), heads[:1])
    for gene in range(3):
        cells = values.clone()
        cells[:, gene] = torch.from_numpy(grid)
        log_density = law.log_prob(cells, location.double(), heads) - others + at_two[gene]
        mass = integrate.cumulative_trapezoid(log_density.exp().numpy(), grid, initial=0)
        peak = 0.0
        if lower is not None:
            cells[0, gene] = lower
            log_peak = law.log_prob(cells[:1], location.double(), heads[:1]) - others
            peak = float((log_peak + at_two[gene]).exp())
            assert (drawn[:, gene] == lower).mean() == pytest.approx(peak, abs=0.012)
        assert mass[-1] + peak == pytest.approx(1, abs=2e-3)
        for q in (0.6, 0.8, 0.95):
            below = np.interp(np.quantile(drawn[:, gene], q), grid, mass) + peak
            assert below == pytest.approx(q, abs=0.012)
    below_all = law.log_prob(values[:1] - 5, location, extra)
    assert torch.isinf(below_all).item() == (lower is not None)


def _log_density_at_two(law, location, extra):
    """By the change of variables, for each gene alone, ``(3,)``."""
    score, slope, _ = law.standardised(torch.full((1, 3), 2.0), extra)
    log_normal = stats.norm.logpdf(score, location, law.sd)
    return torch.from_numpy(log_normal[0]) - slope[0].log() - extra[0, 1]


@pytest.mark.parametrize("lower", [None, 1.0])
def test_moments_are_those_of_draws(lower):
    law, _ = _law(lower=lower)
    n = 100_000
    location, extra = torch.tensor([[0.3, -0.5, 0.8]]), _heads([2.0] * 3, [0.5] * 3)
    drawn = law.draw(location.expand(n, -1), _generator(), extra.expand(n, -1, -1))
    mean, sd = law.mean(location, extra)[0], law.variance(location, extra)[0].sqrt()
    assert ((drawn.mean(0) - mean).abs() < 5 * sd / math.sqrt(n) + 0.01 * sd).all()
    np.testing.assert_allclose(drawn.std(0), sd, rtol=0.02)
    # Draws of one condition are read off a grid.
    many = torch.linspace(-2, 2, 200)[:, None].expand(-1, 3)
    heads = extra.expand(200, -1, -1)
    exact = law._quadrature(many, heads)
    for on_grid, plain in zip(
        (law.mean(many, heads), law.variance(many, heads)), exact, strict=True
    ):
        np.testing.assert_allclose(on_grid, plain, rtol=0.05, atol=0.03)


def test_residuals_come_back_from_their_scores_and_follow_the_normal_law():
    law, residuals = _law(2000)
    r = torch.from_numpy(residuals).float()
    score, slope = law.score(r)
    np.testing.assert_allclose(law.value(score), r, atol=1e-3)
    assert (slope > 0).all()
    for gene in range(3):
        assert stats.kstest(score[:, gene], "norm").pvalue > 0.01
    # The mean is the predictor's, whatever the law's shape.
    grid = torch.from_numpy(stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)).float()
    assert law.value(grid[:, None].expand(-1, 3)).mean(0).abs().max() < 5e-3


def test_of_few_cells_genes_share_the_law_of_their_residuals():
    rng = np.random.default_rng(0)
    law = ResidualLaw(300)
    law.fit(rng.standard_t(4, (12, 300)) / math.sqrt(2))
    tails = law.value(torch.full((1, 300), 1.645))[0]
    truth = stats.t.ppf(0.95, 4) / math.sqrt(2)
    own = np.quantile(rng.standard_t(4, (12, 300)) / math.sqrt(2), 0.95, axis=0)
    assert tails.mean() == pytest.approx(truth, abs=0.15)
    assert tails.std() < 0.3 * own.std()


# Scales, factors, donors ------------------------------------------------------------------


def test_scales_are_the_penalised_likelihoods_own():
    rng = np.random.default_rng(0)
    n = 300
    features = np.column_stack([np.ones(n), rng.integers(0, 2, n), rng.normal(size=n)])
    truth = np.array([[0.2, -1.0], [1.0, 0.0], [0.0, 0.4]])
    residuals = rng.normal(size=(n, 2)) * np.exp(features @ truth)
    parts = np.random.default_rng(1)
    coefficients, precision = fit_log_scale(features, residuals, parts)
    left_out = left_out_log_scale(features, residuals, coefficients, precision, parts)
    np.testing.assert_allclose(coefficients, truth, atol=0.2)
    np.testing.assert_allclose(left_out, features @ coefficients, atol=0.25)
    # Each cell's scale comes of a fit without it: closer to the truth than to its own residual.
    assert np.corrcoef((left_out - features @ truth)[:, 0], np.abs(residuals[:, 0]))[0, 1] < 0.1
    floor = (1e-3 * np.median(np.sqrt((residuals**2).mean(0)))) ** 2

    def cost(w, precision):
        log_scale = features @ w
        fit = (log_scale + 0.5 * (residuals[:, 0] ** 2 + floor) * np.exp(-2 * log_scale)).sum()
        return fit + 0.5 * precision * (w[1:] ** 2).sum()

    from exprgen.spaces._scale import PRECISIONS

    best = [optimize.minimize(cost, np.zeros(3), args=(p,)).x for p in PRECISIONS]
    assert min(np.abs(b - coefficients[:, 0]).max() for b in best) < 0.02


def test_scales_that_do_not_differ_are_not_told_apart():
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(60), np.repeat(np.eye(6), 10, axis=0)])
    residuals = rng.normal(size=(60, 200)) * rng.uniform(0.5, 2, 200)
    coefficients, _ = fit_log_scale(features, residuals, rng)
    assert np.abs(coefficients[1:]).max() < 0.05


def test_factors_are_found_where_there_are_some_and_only_there():
    torch.manual_seed(0)
    n, n_vars = 80, 400
    noise = torch.randn(n, n_vars)
    parts = torch.arange(n) % 5
    assert shared_axes(noise, 5, parts).square().sum(1).mean() < 0.01
    true = torch.randn(n_vars, 2) * 0.5
    true[:, 1] *= 0.6
    scores = torch.randn(n, 2) @ true.T + noise * noise_of(true).sqrt()
    found = shared_axes(scores, 5, parts)
    assert (found.abs().sum(0) > 0).sum() == 2
    ours, truth = found @ found.T, true @ true.T
    alike = (ours * truth).sum() / (ours.norm() * truth.norm())
    assert alike > 0.85
    assert ours.norm() / truth.norm() == pytest.approx(1, abs=0.35)


def test_donors_effects_are_those_of_a_random_effects_model():
    rng = np.random.default_rng(0)
    n_donors, per_donor, n_vars = 40, 8, 300
    effect = rng.normal(0, 0.7, (n_donors, n_vars))
    donors = np.repeat(np.arange(n_donors), per_donor)
    x = effect[donors] + rng.normal(0, 0.7, (len(donors), n_vars))
    mean, sd = donor_effects(torch.from_numpy(x), torch.from_numpy(donors), n_donors)
    ratio = 1 / (0.49 / per_donor + 0.49)
    expected = 0.49 * ratio * x.reshape(n_donors, per_donor, n_vars).mean(1)
    np.testing.assert_allclose(mean, expected, atol=0.12)
    assert float(sd.mean()) == pytest.approx(math.sqrt(0.49 * 0.49 / per_donor * ratio), rel=0.1)


# The space --------------------------------------------------------------------------------


def test_the_bound_is_exact_where_all_is_normal():
    """Factors are normal given a cell: any number of draws gives the multivariate density."""
    torch.manual_seed(0)
    n_vars = 6
    space = ResidualSpace(n_vars, ConditionLayout(), n_latent=2)
    space.loadings.copy_(torch.linalg.qr(torch.randn(n_vars, 2))[0] * torch.tensor([0.9, 0.6]))
    space.likelihood.sd.copy_(noise_of(space.loadings).sqrt())
    weighted = space.loadings / space.likelihood.sd[:, None]
    _, rotation = torch.linalg.eigh(weighted.T @ weighted)
    space.loadings.copy_(space.loadings @ rotation)
    space.log_scale.copy_(torch.full((1, n_vars), math.log(2.0)))
    module = ExpressionModule(space, StandardNormal(2, 1))
    c = torch.full((5, n_vars), 3.0)
    x = 3 + 2 * torch.randn(5, n_vars)
    value = module.log_likelihood(x, c, x[:, 0], n_samples=2, generator=_generator())
    covariance = space.loadings @ space.loadings.T + space.likelihood.sd.square().diag()
    truth = stats.multivariate_normal(np.full(n_vars, 3.0), 4 * covariance.numpy()).logpdf(x)
    np.testing.assert_allclose(value, truth, rtol=1e-4)


def test_left_out_means_do_not_reach_what_a_density_reads():
    known = KnownMean(ConditionLayout(n_categories=(2,)), 30)
    rng = np.random.default_rng(0)
    means = np.repeat(rng.normal(size=(2, 30)), 20, axis=0)
    known.fit(means)
    left_out = means + 1e-2 * rng.normal(size=means.shape)
    c = torch.from_numpy(np.c_[np.zeros(40), known.columns(means, left_out=left_out)]).float()
    assert len(known(c).unique(dim=0)) == 2
    assert (known(c)[:, 1:] == 0).all()  # two means span one axis
    np.testing.assert_allclose(known.value(c), left_out, rtol=1e-5)
    assert known.variance(c) is None


# The model of continuous values -----------------------------------------------------------


def test_values_are_bounded_where_cells_pile_up_and_only_there():
    adata, _ = _bulk(60)
    adata.X = np.maximum(adata.X - 19.5, 0)
    adata.X[:, 0] += 5
    bounded = _trained(adata, density="gaussian")
    np.testing.assert_array_equal(bounded.module.space.likelihood.lower, [5] + [0] * 39)
    law = bounded.predict(adata, seed=0, copy=True, **QUIET).layers
    assert (law["exprgen_q05"] >= 0).all()
    assert (law["exprgen_q05"][:, 1:] == 0).mean() > 0.1
    free, _ = _bulk(60)
    cells = _trained(free, density="gaussian").sample({"tissue": "c", "sex": "f"}, 2000, **QUIET)
    assert (cells.X.min(0) < free.X.min(0)).mean() > 0.5


@pytest.mark.parametrize("density", ["path", "low_rank", "gaussian"])
def test_the_mean_is_the_predictors_and_the_scale_the_tissues(density):
    adata, _ = _bulk(300)
    model = _trained(adata, density=density, **SMALL)
    table = adata.obs[["tissue", "sex"]].drop_duplicates()
    law = model.predict(table, n_samples=4000, seed=0, **QUIET)
    std = law.layers["exprgen_std"]
    error = np.abs(law.layers["exprgen_mean"] - model.mean.predict(table)) / std
    assert error.mean() < 0.03
    wide = (table["tissue"] == "c").to_numpy()
    assert np.median(std[wide].mean(0) / std[~wide].mean(0)) == pytest.approx(3, rel=0.2)
    again = model.sample(table, 2000, seed=1, **QUIET).X.reshape(len(table), 2000, -1)
    np.testing.assert_allclose(again.std(1).mean(0), std.mean(0), rtol=0.06)


def test_factors_give_genes_the_correlation_of_their_residuals():
    adata, mean = _bulk(300)
    real = np.corrcoef((adata.X - mean).T)
    upper = np.triu_indices(len(real), 1)
    alike = {}
    for density in ("low_rank", "path", "gaussian"):
        model = _trained(adata.copy(), density=density, **SMALL)
        cells = model.sample(adata.obs[["tissue", "sex"]], 5, seed=0, **QUIET)
        drawn = cells.X - model.mean.predict(cells.obs)
        alike[density] = np.corrcoef(np.corrcoef(drawn.T)[upper], real[upper])[0, 1]
    assert alike["low_rank"] > 0.8
    assert alike["path"] > 0.8
    assert alike["gaussian"] < 0.2


def test_intervals_cover_because_residuals_are_out_of_sample():
    """The same predictor, said to never have seen its training samples, is too sure of itself."""
    covered = {"out of sample": [], "in sample": []}
    for seed in range(4):
        adata, _ = _bulk(40, n_vars=200, seed=seed)
        held_out, _ = _bulk(400, n_vars=200, seed=100 + seed)
        honest = _trained(adata, density="gaussian", mean=Ridge(alpha=1e-3))
        predictor = CallableMean(honest.mean.predict, out_of_sample="predict")
        lying = _trained(adata.copy(), density="gaussian", mean=predictor)
        for name, model in zip(covered, (honest, lying), strict=True):
            model.predict(held_out, key_added=name, n_samples=1000, seed=0, **QUIET)
            low, high = (held_out.layers[f"{name}_{q}"] for q in ("q05", "q95"))
            covered[name].append(((low <= held_out.X) & (high >= held_out.X)).mean())
    assert np.mean(covered["out of sample"]) == pytest.approx(0.90, abs=0.015)
    assert np.mean(covered["in sample"]) < 0.88


def test_terms_of_the_variance_add_up_to_that_of_cells():
    adata, _ = _bulk(60)
    rng = np.random.default_rng(0)
    shift = rng.normal(0, 0.8, (6, adata.n_vars))
    adata.X += shift[adata.obs["donor"].str[1:].astype(int)].astype("f4")
    model = _trained(adata, setup=LABELS | {"donor_key": "donor"}, mean="hierarchical")
    question = {"tissue": "a", "sex": "f"}
    law = model.predict(question, n_samples=4000, seed=0, **QUIET).layers
    terms = {t: law[f"exprgen_std_{t}"][0] ** 2 for t in ("latent", "donor", "parameter")}
    total = law["exprgen_std"][0] ** 2
    assert all((term > 0).all() for term in terms.values())
    assert (sum(terms.values()) < total).all()
    variance = model.mean.parameter_variance(pd.DataFrame(question, index=[0]))[0]
    ratio = terms["parameter"] / variance
    assert np.median(ratio) == pytest.approx(1, abs=0.25)
    cells = model.sample({"tissue": ["a"] * 3000, "sex": ["f"] * 3000}, seed=0, **QUIET)
    np.testing.assert_allclose(np.median(cells.X.std(0) / np.sqrt(total)), 1, atol=0.05)
    # The mean of many cells of a new donor is as unsure as donors and parameters leave it.
    mean = model.predict(question, of="mean", n_samples=2000, seed=0, **QUIET).layers
    expected = terms["donor"] + terms["parameter"]
    np.testing.assert_allclose(mean["exprgen_std"][0] ** 2, expected, rtol=0.01)


def test_the_expected_range_of_one_sample_is_that_of_predicted_means():
    """With donors and what parameters leave open: both, by draws and by integration."""
    adata, _ = _bulk(60)
    rng = np.random.default_rng(0)
    shift = rng.normal(0, 0.4, (6, adata.n_vars))
    adata.X += shift[adata.obs["donor"].str[1:].astype(int)].astype("f4")
    model = _trained(adata, setup=LABELS | {"donor_key": "donor"}, mean="hierarchical")
    question = {"tissue": ["a"] * 40, "sex": ["f"] * 40, "donor": ["x"] * 40}
    cells = model.sample(question, seed=0, **QUIET)
    found = tl.nof1_de(
        cells, model, groupby="tissue", inflation=1.0, n_samples=4000, key_added=None, seed=0
    )
    found = found.set_index("names").loc[model.var_names]
    options = {"of": "mean", "n_cells": 40, "n_samples": 8000, "seed": 1, **QUIET}
    law = model.predict(cells[:1].copy(), **options).layers
    width = law["exprgen_q95"][0] - law["exprgen_q05"][0]
    ratio = (found["upper"] - found["lower"]) / width
    assert np.median(ratio) == pytest.approx(1, abs=0.03)
    # Parameters are a good part of it, which forty cells would average out.
    share = law["exprgen_std_parameter"][0] ** 2 / law["exprgen_std"][0] ** 2
    assert np.median(share) > 0.1


def test_a_wider_scale_where_there_were_few_samples_to_learn_from():
    adata, _ = _bulk(80)
    keep = (adata.obs["tissue"] != "b") | (np.arange(80) < 6)
    model = _trained(adata[keep].copy(), mean="hierarchical", density="gaussian")
    table = pd.DataFrame({"tissue": ["a", "b"], "sex": ["f", "f"]})
    parameter = model.predict(table, seed=0, **QUIET).layers["exprgen_std_parameter"]
    assert np.median(parameter[1] / parameter[0]) > 1.5


@pytest.mark.parametrize("density", ["low_rank", "gaussian"])
def test_counterfactuals_keep_every_genes_place_in_the_law_of_its_residuals(density):
    adata, _ = _bulk(300)
    adata.X = np.maximum(adata.X, np.quantile(adata.X, 0.2, axis=0))
    model = _trained(adata, density=density)
    table = adata.obs[["tissue", "sex"]]
    same = model.counterfactual(to={"sex": table["sex"].to_numpy()}, n_samples=2, **QUIET)
    np.testing.assert_allclose(same.X, adata.X, atol=2e-3)
    cells = model.counterfactual(to={"sex": "m"}, n_samples=2, seed=0, **QUIET)
    least = adata.X.min(0)
    free = np.minimum(adata.X, cells.X) > least
    moved = model.mean.predict(table.assign(sex="m")) - model.mean.predict(table)
    gained = cells.X - adata.X
    assert np.corrcoef(gained[free], moved[free])[0, 1] > 0.9


# Predictors of every kind -----------------------------------------------------------------


def _of_kind(kind, adata):
    """A predictor and the arguments that go with it."""
    table = adata.obs[["tissue", "sex"]]
    fitted = SklearnMean(Ridge()).fit(table, np.asarray(adata.X, float))
    if kind == "torch":
        network = torch.nn.Linear(1, adata.n_vars)
        torch.nn.init.zeros_(network.weight)
        network.bias.data = torch.from_numpy(np.asarray(adata.X.mean(0)))
        return network, {"out_of_sample": "predict"}
    if kind == "callable":
        return fitted.predict, {"out_of_sample": np.asarray(adata.X, float) * 0 + adata.X.mean(0)}
    forest = RandomForestRegressor(5, random_state=0)
    return {"ridge": "ridge", "group": "group", "linear": Ridge(), "forest": forest}[kind], {}


@pytest.mark.parametrize("kind", ["ridge", "group", "linear", "forest", "torch", "callable"])
def test_every_kind_of_predictor_trains_samples_and_is_saved(kind, tmp_path, caplog):
    adata, _ = _bulk(60)
    setup = LABELS
    if kind == "torch":
        adata.obs["age"] = np.linspace(20, 80, 60)
        setup = {"continuous_condition_keys": ["age"]}
    mean, options = _of_kind(kind, adata)
    with caplog.at_level(logging.INFO, "exprgen"):
        model = _trained(adata, setup=setup, mean=mean, n_folds=3, **options)
    cross_fitted = [m for m in caplog.messages if m.startswith("Cross-fitting")]
    assert len(cross_fitted) == (kind in ("linear", "forest"))
    assert all("3 fits" in message for message in cross_fitted)
    question = {"age": 50.0} if kind == "torch" else {"tissue": "a", "sex": "f"}
    cells = model.sample(question, 30, seed=0, **QUIET)
    model.save(tmp_path / "model")
    load = HybridResidualModel.load
    if kind in ("ridge", "group", "linear"):
        again = load(tmp_path / "model", False, **{"accelerator": "cpu"})
        with pytest.raises(ValueError, match="mean is in the model's file"):
            load(tmp_path / "model", False, mean=mean)
    else:
        with pytest.raises(ValueError, match=r"is .*, code, .* load\(path, mean=\.\.\.\)"):
            load(tmp_path / "model", False)
        table = adata.obs[model.schema.condition_keys]
        other = SklearnMean(Ridge()).fit(table, np.asarray(adata.X, float) + 5)
        with pytest.raises(ValueError, match="mean is another predictor"):
            load(tmp_path / "model", False, mean=other)
        given = model.mean.fitted if kind == "forest" else mean
        again = load(tmp_path / "model", False, accelerator="cpu", mean=given)
    np.testing.assert_array_equal(again.sample(question, 30, seed=0, **QUIET).X, cells.X)


def test_a_service_predicts_through_a_layer_and_an_array(tmp_path):
    adata, mean = _bulk(60)
    adata.layers["service"] = mean + 0.5
    model = _trained(adata, mean="service")
    assert model.mean.name == "service"
    question = {"tissue": ["a", "b"], "sex": ["f", "m"]}
    with refused(ValueError, "mean=array", "(2, 40)", "'service'"):
        model.sample(question, **QUIET)
    new = mean[:2] + np.array([[1.0], [-1.0]])
    cells = model.sample(question, 200, mean=new, seed=0, **QUIET)
    assert (cells.X[:200] - new[0]).mean() == pytest.approx(0, abs=0.2)
    assert (cells.X[200:] - new[1]).mean() == pytest.approx(0, abs=0.2)
    law = model.predict(question, mean=new, seed=0, **QUIET)
    assert (law.layers["exprgen_mean"] - new).mean() == pytest.approx(0, abs=0.2)
    for wrong in (new[:1], new[:, :3], new * np.nan):
        with refused(ValueError, "mean"):
            model.predict(question, mean=wrong, **QUIET)
    query = adata[:7, ::-1].copy()
    np.testing.assert_allclose(
        model.log_likelihood(query, **QUIET), model.log_likelihood(**QUIET)[:7], rtol=1e-5
    )
    del query.layers["service"]
    with refused(KeyError, "no layer 'service'", of=query):
        model.log_likelihood(query, **QUIET)
    model.save(tmp_path / "model")
    again = HybridResidualModel.load(tmp_path / "model", False, accelerator="cpu")
    np.testing.assert_array_equal(
        again.sample(question, 200, mean=new, seed=0, **QUIET).X, cells.X
    )
    ridge = _trained(adata.copy())
    with refused(ValueError, "mean=array", "ridge"):
        ridge.sample(question, mean=new, **QUIET)


def test_donors_are_left_out_whole():
    adata, _ = _bulk(60)
    asked = []

    class Spy(SklearnMean):
        def out_of_sample(self, table, y, groups=None, **kwargs):
            asked.append(groups)
            return super().out_of_sample(table, y, groups, **kwargs)

    _trained(adata, mean=Spy(Ridge()))
    _trained(adata.copy(), mean=Spy(Ridge()), setup=LABELS | {"donor_key": "donor"})
    assert asked[0] is None
    assert set(asked[1]) == {f"d{i}" for i in range(6)}
    adata.obs["donor"] = "only"
    with pytest.warns(DataQualityWarning) as record:
        _trained(adata.copy(), setup=LABELS | {"donor_key": "donor"})
    assert any("'donor' has one donor" in str(w.message) for w in record)


def test_a_label_that_only_validation_has_does_not_stop_training():
    adata, _ = _bulk(60)
    adata.obs["split"] = ["validation"] * 6 + ["train"] * 54
    adata.obs["tissue"] = adata.obs["tissue"].astype(object)
    adata.obs.iloc[0, 0] = "rare"
    for mean in ("ridge", "group", Ridge()):
        with pytest.warns(DataQualityWarning, match="'rare'"):
            HybridResidualModel.setup_anndata(adata, **LABELS)
        model = HybridResidualModel(adata, mean=mean, seed=0, density="gaussian")
        with warnings.catch_warnings():  # group means know nothing of a cell of its own kind
            warnings.simplefilter("ignore", ExtrapolationWarning)
            model.train(split_key="split", **CPU)
            assert np.isfinite(model.log_likelihood(**QUIET)).all()


def test_a_predictor_of_counts_sees_log_counts_per_ten_thousand():
    adata = make_cells(200)
    seen = []

    class Spy(SklearnMean):
        def fit(self, table, y, *args, **kwargs):
            seen.append((table, y))
            return super().fit(table, y, *args, **kwargs)

    HybridResidualModel.setup_anndata(adata, categorical_condition_keys=["cell_type"])
    model = HybridResidualModel(adata, mean=Spy(Ridge()), seed=0, n_latent=2, n_hidden=8)
    model.train(1, **CPU)
    counts = adata.X.toarray()
    expected = np.log1p(1e4 * counts / counts.sum(1, keepdims=True).clip(0.5))
    table, y = seen[0]
    np.testing.assert_allclose(y, expected[: len(y)], rtol=1e-5)
    assert list(table.columns) == ["cell_type"]
    assert set(table["cell_type"]) <= set(adata.obs["cell_type"])


# Faults -----------------------------------------------------------------------------------


def test_what_has_no_use_or_no_place_is_refused():
    adata, _ = _bulk(30)
    adata.obs["batch"] = "x"
    with refused(SetupError, "batch_key='batch'", "HybridResidualModel", of=adata):
        HybridResidualModel.setup_anndata(adata, **LABELS, batch_key="batch")
    HybridResidualModel.setup_anndata(adata, **LABELS)
    for wrong, names in [
        ({"density": "mixture"}, ["density", "path"]),
        ({"n_hidden": 3}, ["n_hidden=3", "without an autoencoder"]),
        ({"likelihood": "nb"}, ["likelihood='nb'"]),
        ({"n_folds": 1}, ["n_folds"]),
        ({"n_latent": 0}, ["n_latent"]),
        ({"out_of_sample": "predict"}, ["out_of_sample", "makes its own"]),
    ]:
        with refused(ValueError, *names, of=adata):
            HybridResidualModel(adata, **wrong)
    with refused(KeyError, "mean='rigde'", "ridge", of=adata):
        HybridResidualModel(adata, mean="rigde")
    with refused(TypeError, "mean", "int", of=adata):
        HybridResidualModel(adata, mean=3)
    model = HybridResidualModel(adata, mean=SklearnMean(Ridge()).fit(adata.obs, adata.X).fitted)
    with refused(ValueError, "Pipeline is fitted", "out_of_sample", of=adata):
        model.train(**CPU)
    assert not model.is_trained_


def test_a_files_mean_is_checked_and_runs_no_code(tmp_path):
    from skops import io

    adata, _ = _bulk(30)
    model = _trained(adata, mean=Ridge())
    state = dict(model.mean_state_)

    def load_with(changed):
        model.mean_state_ = state | changed
        model.save(tmp_path / "model", overwrite=True)
        HybridResidualModel.load(tmp_path / "model", False, accelerator="cpu")

    forest = RandomForestRegressor(2).fit(np.zeros((4, 1)), np.arange(4.0))
    untrusted = np.frombuffer(io.dumps(forest), np.uint8)
    for changed in (
        {"skops": untrusted},
        {"skops": state["skops"][:-40]},
        {"kind": "forest"},
        {"predicted": np.asarray(state["predicted"]) + 1},
        {"predicted": np.zeros((1, 3))},
        {"n_vars": "many"},
    ):
        with pytest.raises(CheckpointError):
            load_with(changed)
    load_with({})


def test_continuous_values_of_condvae_are_read_alike():
    """One line changes the model, on the same layer and conditions."""
    adata, _ = _bulk(60)
    for model_class in (CondVAE, HybridResidualModel):
        model_class.setup_anndata(adata, **LABELS)
        model = model_class(adata, seed=0)
        model.train(**CPU)
        cells = model.sample({"tissue": "a", "sex": "f"}, 5, seed=0, **QUIET)
        assert cells.shape == (5, 40)


def test_a_predictor_that_is_given_stays_as_it_was():
    """Two models may be given one; neither learns the other's."""
    mean = SklearnMean(Ridge())
    first, _ = _bulk(40)
    second, _ = _bulk(40, seed=5)
    second.X += 3
    a = _trained(first, mean=mean, density="gaussian")
    before = a.mean.predict(first.obs)
    b = _trained(second, mean=mean, density="gaussian")
    assert mean.fitted is None
    np.testing.assert_array_equal(a.mean.predict(first.obs), before)
    assert (b.mean.predict(first.obs) - before).mean() == pytest.approx(3, abs=0.5)


def test_predictions_that_cannot_be_out_of_sample_or_on_the_scale_are_noticed():
    adata, _ = _bulk(60)
    adata.layers["same"] = adata.X.copy()
    with pytest.raises(ValueError, match="mean='same' predicts the data themselves"):
        _trained(adata, mean="same")
    adata.layers["log2"] = adata.X * 1.44
    with pytest.warns(DataQualityWarning, match="mean='log2' is off by .* scale of the layer"):
        _trained(adata, mean="log2")
    cells = make_cells(60)
    cells.layers["cp10k"] = cells.X.toarray() * 100.0
    HybridResidualModel.setup_anndata(cells)
    with pytest.raises(ValueError, match="mean='cp10k' predicts values up to .* normalize_total"):
        HybridResidualModel(cells, mean="cp10k").train(1, **CPU)


def test_a_broken_second_training_leaves_the_first():
    adata, _ = _bulk(60)
    model = _trained(adata, density="path", **SMALL)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    question, mean = {"tissue": "a", "sex": "f"}, model.mean
    first = model.sample(question, 5, seed=0, **QUIET).X
    adata.X += 100
    with pytest.raises(TrainingDivergedError):
        model.train(density_kwargs={"max_epochs": 2, "lr": 1e30}, **CPU)
    assert model.is_trained_
    assert model.mean is mean
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    np.testing.assert_array_equal(model.sample(question, 5, seed=0, **QUIET).X, first)


def test_scales_are_never_narrower_than_in_training():
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 80, 100)
    x = 20 + rng.normal(size=(100, 30)) * np.exp((age - 50) / 40)[:, None]
    adata = AnnData(x.astype("f4"), pd.DataFrame({"age": age}, index=map(str, range(100))))
    model = _trained(adata, setup={"continuous_condition_keys": ["age"]}, mean="hierarchical")
    table = {"age": [21.0, 79.0, -500.0, 9000.0]}
    law = model.predict(table, seed=0, on_extrapolation="ignore", **QUIET)
    young, old, before, after = np.median(law.layers["exprgen_std"], axis=1)
    assert young < 0.6 * old
    assert before > 0.9 * young
    assert after > 0.9 * old
    assert np.isfinite(law.layers["exprgen_std_latent"]).all()


def test_a_predictor_reads_the_same_types_and_names_the_genes_it_means():
    adata, _ = _bulk(60)
    names = list(adata.var_names)
    codes = []

    def predict(table):
        codes.append(table["tissue"].cat.categories.tolist())
        frame = pd.DataFrame(np.tile(adata.X.mean(0), (len(table), 1)), columns=names)
        return frame[names[::-1]]

    model = _trained(adata, mean=predict, out_of_sample="predict")
    law = model.predict({"tissue": "a", "sex": "f"}, seed=0, **QUIET)
    np.testing.assert_allclose(law.layers["exprgen_mean"][0], adata.X.mean(0), atol=1)
    assert set(map(tuple, codes)) == {("a", "b", "c")}

    def broken(table):
        return table["dose"]

    with pytest.raises(KeyError, match="dose") as caught:
        _trained(adata, mean=broken, out_of_sample="predict")
    assert "mean='broken' was given the columns ['tissue', 'sex']" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="columns are not the genes of the model"):
        _trained(
            adata,
            mean=lambda t: pd.DataFrame(
                np.zeros((len(t), 40)), columns=[f"x{i}" for i in range(40)]
            ),
            out_of_sample="predict",
        )


def test_residuals_of_all_samples_are_used_and_none_is_said_to_be_new():
    adata, _ = _bulk(60)
    model = _trained(adata, density="path", **SMALL)
    assert len(model.train_indices) == 60
    model.predict(adata, seed=0, **QUIET)
    assert (adata.obs["exprgen_split"] == "train").all()
    counts = make_cells(60)
    HybridResidualModel.setup_anndata(counts, categorical_condition_keys=["cell_type"])
    of_counts = HybridResidualModel(counts, seed=0, n_latent=2, n_hidden=8)
    of_counts.train(1, **CPU)
    assert len(of_counts.train_indices) == 54
