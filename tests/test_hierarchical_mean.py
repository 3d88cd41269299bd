"""The hierarchical mean: closed forms by dense algebra, variances by what was planted."""

from __future__ import annotations

import io
import logging
import random

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import special, stats

from exprgen._errors import CovariateError
from exprgen._files import from_plain, to_plain
from exprgen.means import HierarchicalMean, RidgeMean, from_state
from exprgen.means._hierarchical_rows import Training, read
from exprgen.means._mixed import Hyperparameters, Posterior
from exprgen.means._mixed_out import without_rows, without_units
from exprgen.means._svi import _PRIORS

N, N_VARS = 40, 4
HYPER = Hyperparameters(
    prior_variance=torch.tensor([0.7, 0.7, 0.7, 0.2], dtype=torch.float64),
    ratios=torch.tensor([0.02, 0.3, 2.0], dtype=torch.float64),
    log_weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log(),
    noise_dof=torch.tensor(6.0, dtype=torch.float64),
    noise_scale=torch.tensor(0.4, dtype=torch.float64),
)


def training(weighted: bool) -> Training:
    """Rows of five donors of unequal size; a type and a dose; donors act."""
    rng = np.random.default_rng(0)
    donor = np.repeat(list("edcba"), [2, 14, 8, 8, 8])
    table = pd.DataFrame({"type": rng.choice(["T", "B", "NK"], N), "dose": rng.exponential(2, N)})
    y = 50 + rng.normal(size=(5, N_VARS))[pd.factorize(donor)[0]] + rng.normal(size=(N, N_VARS))
    y = y + np.outer(table["type"] == "T", [0, 1, 2, 3])
    weights = rng.exponential(size=N) if weighted else None
    if weights is not None:
        weights[[3, 20]] = 0
    return read(table, y, weights, donor, donor_key=None, categorical_keys=None)


class Dense:
    """The posterior by the covariance of all rows, without Woodbury and without sums."""

    def __init__(self, data: Training, keep: np.ndarray, hyper: Hyperparameters = HYPER) -> None:
        keep = keep & (data.rows.mass.numpy() > 0)
        x, y, mass, donor = (part.numpy()[keep] for part in data.rows)
        self.x, self.y, n = x[:, 1:], y, keep.sum()
        self.prior = np.diag(hyper.prior_variance.numpy())
        dof, scale = hyper.noise_dof.item(), hyper.noise_scale.item()
        self.dof = dof + n - 1
        self.same = donor[:, None] == donor[None, :]
        evidence, self.parts = [], []
        for ratio in hyper.ratios.numpy():
            covariance = np.diag(1 / mass) + ratio * self.same + self.x @ self.prior @ self.x.T
            inverse = np.linalg.inv(covariance)
            column = inverse.sum(1)
            intercept = column @ y / column.sum()
            error = dof * scale + np.einsum("ig,ij,jg->g", y - intercept, inverse, y - intercept)
            evidence.append(
                -0.5 * np.linalg.slogdet(covariance)[1]
                - 0.5 * np.log(column.sum())
                + special.gammaln(self.dof / 2)
                - special.gammaln(dof / 2)
                + dof / 2 * np.log(dof * scale)
                - self.dof / 2 * np.log(error)
            )
            self.parts.append((inverse, intercept, error / (self.dof - 2)))
        log_weights = hyper.log_weights.numpy()[:, None] + np.array(evidence)
        self.log_evidence = special.logsumexp(log_weights, axis=0)
        self.weights = np.exp(log_weights - self.log_evidence)

    def law(self, x: np.ndarray, own: np.ndarray, own_variance: float) -> tuple:
        """Mean and variance of a sum of effects that has covariance ``own`` with the rows."""
        means, variances = [], []
        for (inverse, intercept, noise), share in zip(self.parts, own, strict=True):
            means.append(x[0] * intercept + share @ inverse @ (self.y - intercept))
            column = inverse.sum(1)
            left = own_variance[len(variances)] - share @ inverse @ share
            left += (x[0] - column @ share) ** 2 / column.sum()
            variances.append(noise * left)
        mean = (self.weights * np.array(means)).sum(0)
        between = (self.weights * np.square(means - mean)).sum(0)
        return mean, (self.weights * np.array(variances)).sum(0) + between

    def population(self, z: np.ndarray) -> tuple:
        """Mean and variance at the conditions of one row."""
        share = self.x @ self.prior @ z[1:]
        return self.law(z, [share] * len(self.parts), [z[1:] @ self.prior @ z[1:]] * 3)

    def donor(self, first_row: int) -> tuple:
        """Mean and variance of the effect of a row's donor."""
        ratios = HYPER.ratios.numpy()
        return self.law(np.zeros(1), [r * self.same[first_row] for r in ratios], ratios)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_posterior_is_that_of_dense_algebra(weighted):
    data = training(weighted)
    posterior = Posterior.of(data.sums, HYPER)
    dense = Dense(data, np.ones(N, bool))
    np.testing.assert_allclose(posterior.weights, dense.weights, atol=1e-10)
    z = data.rows.z[:6]
    mean, variance = (z @ posterior.mean()).numpy(), posterior.variance(z).numpy()
    expected = [dense.population(row.numpy()) for row in z]
    np.testing.assert_allclose(mean, [part[0] for part in expected], atol=1e-10)
    np.testing.assert_allclose(variance, [part[1] for part in expected], atol=1e-10)
    effects, spread = posterior.donors(data.sums, HYPER.ratios)
    kept = data.rows.donor.numpy()[data.rows.mass.numpy() > 0]
    for donor in range(5):
        expected = dense.donor(int(np.argmax(kept == donor)))
        np.testing.assert_allclose(effects[donor], expected[0], atol=1e-10)
        np.testing.assert_allclose(spread[donor], expected[1], atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_donors_and_other_groups_are_left_out_exactly(weighted):
    data = training(weighted)
    donor = data.rows.donor.numpy()
    across = np.arange(N) % 3  # groups that cut through donors
    ways = {
        "rows": (np.arange(N), without_rows(data.rows, data.sums, HYPER)),
        "donors": (donor, without_units(data.rows, donor, data.sums, HYPER)),
        "across": (across, without_units(data.rows, across, data.sums, HYPER)),
    }
    for name, (units, found) in ways.items():
        for unit in range(units.max() + 1):
            dense = Dense(data, units != unit)
            for row in np.flatnonzero(units == unit):
                expected = dense.population(data.rows.z[row].numpy())[0]
                np.testing.assert_allclose(found[row], expected, atol=1e-9, err_msg=name)


def test_what_genes_share_is_the_mode_by_the_dense_evidence():
    rng = np.random.default_rng(1)
    donor = np.repeat(np.arange(6), 5)
    table = pd.DataFrame({"type": rng.choice(["T", "B"], 30)})
    y = rng.normal(size=(6, 12))[donor] + rng.normal(size=(30, 12)) * rng.gamma(4, 0.3, 12)
    y = y + np.outer(table["type"] == "T", rng.normal(size=12))
    mean = HierarchicalMean(n_steps=400).fit(table, y, groups=donor)
    found = mean._fitted.hyper
    data = read(table, y, None, donor, donor_key=None, categorical_keys=None)
    away = found.ratios.log().numpy()

    def log_posterior(logs: dict[str, float]) -> float:
        weights = -0.5 * ((away - logs["ratio_median"]) / np.exp(logs["ratio_sd"])) ** 2
        hyper = Hyperparameters(
            prior_variance=torch.full((2,), np.exp(logs["prior_variance"]), dtype=torch.float64),
            ratios=found.ratios,
            log_weights=torch.from_numpy(weights - special.logsumexp(weights)),
            noise_dof=torch.tensor(1 + np.exp(logs["noise_dof"])),
            noise_scale=torch.tensor(np.exp(logs["noise_scale"])),
        )
        prior = sum(stats.norm.logpdf(logs[name], *law) for name, law in _PRIORS.items())
        return prior + Dense(data, np.ones(30, bool), hyper).log_evidence.sum()

    # The law of the ratios is read off its log weights, a parabola in log λ.
    second, first, _ = np.polyfit(away, found.log_weights.numpy(), 2)
    at = {
        "prior_variance": found.prior_variance[0].log().item(),
        "noise_dof": (found.noise_dof - 1).log().item(),
        "noise_scale": found.noise_scale.log().item(),
        "ratio_median": -first / (2 * second),
        "ratio_sd": 0.5 * np.log(-0.5 / second),
    }
    best = log_posterior(at)
    for name in at:
        step = 0.05
        up, down = (log_posterior(at | {name: at[name] + sign * step}) for sign in (1, -1))
        # The vertex of the parabola through the three: a Newton step, as a part of one.
        curvature = up + down - 2 * best
        assert curvature < 0, name
        assert abs(0.5 * step * (up - down) / curvature) < 0.02, name


# ---------------------------------------------------------------------- planted variances


def planted(n_donors: int, per_donor: int, n_vars: int, seed: int) -> dict[str, np.ndarray]:
    """Three types in every donor; τ² varies over genes, a third of σ² in the middle."""
    rng = np.random.default_rng(seed)
    noise = 20 / rng.chisquare(20, n_vars)
    tau = noise * np.exp(rng.normal(np.log(0.33), 0.8, n_vars))
    donor = np.repeat(np.arange(n_donors), per_donor)
    kind = np.arange(len(donor)) % 3
    mu = rng.normal(size=(3, n_vars)) * np.sqrt(noise)
    u = rng.normal(size=(n_donors, n_vars)) * np.sqrt(tau)
    y = mu[kind] + u[donor] + rng.normal(size=(len(donor), n_vars)) * np.sqrt(noise)
    new = mu + rng.normal(size=(n_vars,)) * np.sqrt(tau)
    return {"donor": donor, "kind": kind, "y": y, "mu": mu, "tau": tau, "noise": noise, "new": new}


def fitted(data: dict[str, np.ndarray]) -> HierarchicalMean:
    table = pd.DataFrame({"kind": data["kind"].astype(str)})
    return HierarchicalMean().fit(table, data["y"], groups=data["donor"])


KINDS = pd.DataFrame({"kind": ["0", "1", "2"]})


def test_with_many_donors_the_variances_are_those_of_reml():
    data = planted(60, 12, 40, seed=0)
    mean = fitted(data)
    # Balanced, so that REML is the analysis of variance; types are in every donor alike.
    cells = data["y"].reshape(60, 4, 3, 40)
    within = cells - cells.mean((0, 1), keepdims=True)
    by_donor = within.mean((1, 2))
    within = within - by_donor[:, None, None]
    noise = np.square(within).sum((0, 1, 2)) / (720 - 60 - 2)
    tau = np.square(by_donor).sum(0) / 59 - noise / 12
    np.testing.assert_allclose(mean.noise_variance, noise, rtol=0.05)
    assert np.abs(np.log(mean.donor_variance / tau.clip(0.01))).mean() < 0.08
    # Fewer cells of a donor, less of its own mean: n/(n + σ²/τ²).
    share = 12 / (12 + mean.noise_variance / mean.donor_variance)
    slope = (mean.donor_effects.mean * by_donor).sum(0) / np.square(by_donor).sum(0)
    np.testing.assert_allclose(slope, share, atol=0.03)


@pytest.fixture(scope="module")
def three_donors() -> tuple[dict[str, np.ndarray], HierarchicalMean]:
    data = planted(3, 9, 600, seed=1)
    return data, fitted(data)


def test_few_donors_borrow_from_other_genes(three_donors):
    data, mean = three_donors
    assert 0.85 < mean.donor_variance.mean() / data["tau"].mean() < 1.15
    assert 0.95 < mean.noise_variance.mean() / data["noise"].mean() < 1.05
    # Each gene for itself: REML, floored at the variance of a hundredth of the noise.
    cells = data["y"].reshape(3, 3, 3, 600)
    by_donor = cells.mean((1, 2))
    alone = (by_donor.var(0, ddof=1) - data["noise"] / 9).clip(0.01 * data["noise"])

    def error(found: np.ndarray) -> float:
        return float(np.square(np.log(found / data["tau"])).mean())

    assert error(mean.donor_variance) < 0.5 * error(alone)


def test_parameters_and_new_donors_are_covered(three_donors):
    data, mean = three_donors
    predicted, doubt = mean.predict(KINDS), mean.parameter_variance(KINDS)
    z = (data["mu"] - predicted) / np.sqrt(doubt)
    assert 0.87 < (np.abs(z) < stats.norm.ppf(0.95)).mean() < 0.93
    assert 0.85 < np.square(z).mean() < 1.15
    z = (data["new"] - predicted) / np.sqrt(doubt + mean.donor_variance)
    assert 0.86 < (np.abs(z) < stats.norm.ppf(0.95)).mean() < 0.94
    # The control has neither donors nor their part of the doubt, and is sure of itself in vain.
    pooled = HierarchicalMean().fit(pd.DataFrame({"kind": data["kind"].astype(str)}), data["y"])
    z = (data["mu"] - pooled.predict(KINDS)) / np.sqrt(pooled.parameter_variance(KINDS))
    assert (np.abs(z) < stats.norm.ppf(0.95)).mean() < 0.8
    assert not pooled.donor_variance.any()
    assert pooled.donor_effects.mean.shape == (0, 600)


def test_draws_have_the_mean_and_variance_of_the_posterior(three_donors):
    _, mean = three_donors
    drawn = mean.draw(KINDS, 2000, seed=0)
    doubt = mean.parameter_variance(KINDS)
    z = (drawn.mean(0) - mean.predict(KINDS)) / np.sqrt(doubt / 2000)
    assert 0.9 < np.square(z).mean() < 1.1
    np.testing.assert_allclose((drawn.var(0) / doubt).mean(1), 1, atol=0.02)
    # One draw of the coefficients for all rows: equal rows get equal means.
    twice = mean.draw(pd.concat([KINDS, KINDS]), 5, seed=3)
    np.testing.assert_array_equal(twice[:, :3], twice[:, 3:])
    np.testing.assert_allclose(twice[:, :3], mean.draw(KINDS, 5, seed=3), atol=1e-12)
    with pytest.raises(ValueError, match="n_samples"):
        mean.draw(KINDS, 0)


# ---------------------------------------------------------------------- the contract


@pytest.fixture
def rows() -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    data = planted(5, 9, 8, seed=2)
    return pd.DataFrame({"kind": data["kind"].astype(str)}), data["y"] + 100, data["donor"]


def test_nothing_global_is_touched_and_nothing_said(rows, capfd):
    table, y, donor = rows
    with pyro.get_param_store().scope():
        pyro.param("own", torch.ones(2))
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        first, second = (HierarchicalMean().fit(table, y, groups=donor) for _ in range(2))
        assert list(pyro.get_param_store().keys()) == ["own"]
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())
    np.testing.assert_array_equal(first.predict(KINDS), second.predict(KINDS))
    assert capfd.readouterr() == ("", "")


def test_units_weights_and_where_donors_come_from_make_no_difference(rows):
    table, y, donor = rows
    weights = np.random.default_rng(0).exponential(size=len(y))
    mean = HierarchicalMean().fit(table, y, weights, groups=donor)
    labelled = table.assign(donor=[f"d{code}" for code in donor])
    other = HierarchicalMean(donor_key="donor").fit(labelled, 10 * y, 1e9 * weights)
    np.testing.assert_allclose(other.predict(KINDS), 10 * mean.predict(KINDS), rtol=1e-6)
    np.testing.assert_allclose(other.donor_variance, 100 * mean.donor_variance, rtol=1e-6)
    assert list(other.donor_effects.donors) == [f"d{i}" for i in range(5)]
    np.testing.assert_allclose(other.donor_effects.sd, 10 * mean.donor_effects.sd, rtol=1e-6)
    alike = (
        HierarchicalMean().out_of_sample(table, y, donor, weights=weights),
        HierarchicalMean(donor_key="donor").out_of_sample(labelled, y, donor, weights=weights),
    )
    np.testing.assert_allclose(*alike, rtol=1e-9)


def test_out_of_sample_is_that_of_the_same_prior(rows, monkeypatch):
    table, y, donor = rows
    hyper = HYPER._replace(prior_variance=HYPER.prior_variance[:3])
    monkeypatch.setattr(HierarchicalMean, "_learn", lambda self, data: hyper)
    data = read(table, y, None, donor, donor_key=None, categorical_keys=None)
    found = HierarchicalMean().out_of_sample(table, y, donor)
    dense = Dense(data, donor != 2, hyper)
    for row in np.flatnonzero(donor == 2):
        expected = data.centre + data.scale * dense.population(data.rows.z[row].numpy())[0]
        np.testing.assert_allclose(found[row], expected, atol=1e-9)
    # Rows by themselves, with donors from a column.
    found = HierarchicalMean(donor_key="d").out_of_sample(table.assign(d=donor.astype(str)), y)
    expected = Dense(data, np.arange(len(y)) != 7, hyper).population(data.rows.z[7].numpy())[0]
    np.testing.assert_allclose(found[7], data.centre + data.scale * expected, atol=1e-9)


def test_without_conditions_the_mean_is_that_of_donors_alike(rows):
    _, y, donor = rows
    nothing = pd.DataFrame(index=range(len(y)))
    mean = HierarchicalMean().fit(nothing, y, groups=donor)
    np.testing.assert_allclose(mean.predict(nothing)[7], y.mean(0))
    assert mean.predict(nothing[:0]).shape == mean.parameter_variance(nothing[:0]).shape == (0, 8)
    found = mean.out_of_sample(nothing, y, donor)
    np.testing.assert_allclose(found[0], y[donor != donor[0]].mean(0))


def test_constant_genes_are_known_for_sure(rows):
    table, y, donor = rows
    y[:, 2] = 0.1
    mean = HierarchicalMean().fit(table, y, groups=donor)
    np.testing.assert_allclose(mean.predict(KINDS)[:, 2], 0.1)
    assert mean.donor_variance[2] == mean.noise_variance[2] == 0
    assert not mean.parameter_variance(KINDS)[:, 2].any()
    assert mean.parameter_variance(KINDS)[:, [1, 3]].all()
    mean = HierarchicalMean(n_steps=100).fit(table, np.ones_like(y), groups=donor)
    np.testing.assert_array_equal(mean.predict(KINDS), np.ones((3, 8)))


def test_states_keep_all_but_the_donors_names(rows):
    table, y, donor = rows
    mean = HierarchicalMean(donor_key="donor").fit(table.assign(donor=donor.astype(str)), y)
    file = io.BytesIO()
    torch.save(to_plain(mean.state()), file)
    file.seek(0)
    again = from_state(from_plain(torch.load(file, weights_only=True)))
    for name in ("predict", "parameter_variance"):
        np.testing.assert_array_equal(getattr(again, name)(KINDS), getattr(mean, name)(KINDS))
    np.testing.assert_array_equal(again.draw(KINDS, 2, seed=1), mean.draw(KINDS, 2, seed=1))
    np.testing.assert_array_equal(again.donor_variance, mean.donor_variance)
    np.testing.assert_array_equal(again.donor_effects.mean, mean.donor_effects.mean)
    assert list(again.donor_effects.donors) == list(range(5))
    assert again.donor_key == "donor"


def test_faults_are_named(rows, caplog, monkeypatch):
    table, y, donor = rows
    with pytest.raises(CovariateError, match="lacks donor_key='doner'.*Did you mean 'donor'"):
        HierarchicalMean(donor_key="doner").fit(table.assign(donor=donor), y)
    with pytest.raises(ValueError, match=r"table\['donor'\] has one label only"):
        HierarchicalMean(donor_key="donor").fit(table.assign(donor="a"), y)
    with pytest.raises(TypeError, match="donor_key must be the name"):
        HierarchicalMean(donor_key=["donor"])
    with pytest.raises(ValueError, match="n_steps"):
        HierarchicalMean(n_steps=10)
    with pytest.raises(TypeError, match="progress_bar"):
        HierarchicalMean(progress_bar=1)
    for ask in ("donor_variance", "noise_variance", "donor_effects"):
        with pytest.raises(RuntimeError, match="has not been fitted"):
            getattr(HierarchicalMean(), ask)
    monkeypatch.setattr("exprgen.means._svi._SETTLED", -1.0)
    with caplog.at_level(logging.WARNING, "exprgen"):
        HierarchicalMean(n_steps=100).fit(table, y, groups=donor)
    assert "not settled after n_steps=100" in caplog.text
    assert RidgeMean().fit(table, y).parameter_variance(table) is None
