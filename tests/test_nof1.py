"""One sample against what is expected of a new donor: the law, its tails, and the findings."""

from __future__ import annotations

from itertools import pairwise

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import integrate, stats

import exprgen
from exprgen import likelihoods, tl
from exprgen._errors import CovariateError, DataQualityWarning, ReproducibilityWarning
from exprgen.models._tails import tails_of_mean
from exprgen.spaces import AdditiveDonorEffect, Decoded, DonorEffect

N_GENES, N_DONORS = 6, 5


def _donors(sd: float, kind=DonorEffect):
    """Effects whose new-donor law has centre 0 (up to its mean factor) and a known scale."""
    donors = kind(N_DONORS, N_GENES)
    with torch.no_grad():
        donors.posterior_mean.zero_()
        donors.posterior_log_sd.fill_(np.log(sd))
    return donors


def _decoded(mean: float, n: int = 3) -> Decoded:
    """The same for every draw: cells differ by counting alone."""
    return Decoded(torch.full((n, N_GENES), float(np.log(mean))), None)


def _tails(likelihood, donors, decoded, total, n_cells):
    return tails_of_mean(likelihood, donors, decoded, total, n_cells)


@pytest.mark.parametrize("mean", [0.02, 1.5])
def test_without_donor_variance_the_tails_are_those_of_a_negative_binomial(mean):
    likelihood = likelihoods.NegativeBinomial(N_GENES)
    theta, n_cells = 0.7, 40
    with torch.no_grad():
        likelihood.log_dispersion.fill_(np.log(theta))
    total = np.array([0, 1, 3, 30, 100, 300.0])
    tails = _tails(likelihood, _donors(1e-6), _decoded(mean), total, n_cells)
    law = stats.nbinom(n_cells * theta, theta / (theta + mean))
    np.testing.assert_allclose(tails.expected, mean, rtol=1e-5)
    np.testing.assert_allclose(tails.at_most, law.cdf(total), rtol=1e-4)
    np.testing.assert_allclose(tails.at_least, law.sf(total - 1), rtol=1e-4)


def test_far_tails_are_those_of_the_integral_over_donors():
    """Poisson sums whose rate has a t law on the log scale, by adaptive quadrature."""
    donors, n_cells = _donors(0.3), 50
    total = np.array([100, 160, 300, 1000, 10, 0.0])
    tails = _tails(likelihoods.Poisson(N_GENES), donors, _decoded(2.0), total, n_cells)
    centre, scale = (float(part[0]) for part in donors.heavy_law())
    law = stats.t(donors.dof, centre, scale)
    for i, s in enumerate(total):
        for value, of in ((tails.at_least[i], stats.poisson.sf), (tails.at_most[i], None)):

            def at(u, s=s, of=of):
                rate = n_cells * 2 * np.exp(u)
                p = stats.poisson.cdf(s, rate) if of is None else of(s - 1, rate)
                return law.pdf(u) * p

            edge = np.log(max(s, 0.5) / n_cells / 2)
            points = sorted({-20.0, edge - 1, edge, edge + 1, centre, 20.0})
            exact = sum(
                integrate.quad(at, a, b, epsabs=0, epsrel=1e-8, limit=400)[0]
                for a, b in pairwise(points)
            )
            assert value == pytest.approx(exact, rel=0.05), (s, of)
    assert tails.at_least[3] < 1e-4  # far beyond what a thousand draws could say


def test_without_donor_variance_the_interval_is_that_of_a_negative_binomial():
    likelihood, n_cells = likelihoods.NegativeBinomial(N_GENES), 40
    mean = torch.tensor([0.001, 0.03, 0.4, 3.0, 50.0, 4000.0])
    with torch.no_grad():
        likelihood.log_dispersion.fill_(np.log(0.7))
    decoded = Decoded(mean.log().expand(3, -1), None)
    tails = _tails(likelihood, _donors(1e-6), decoded, np.zeros(N_GENES), n_cells)
    law = stats.nbinom(n_cells * 0.7, 0.7 / (0.7 + mean.numpy()))
    for beyond in (0.05, 1e-9):
        lower, upper = tails.interval(beyond)
        # The least sum that is exceeded often enough, and the largest reached often enough.
        np.testing.assert_allclose(lower * n_cells, law.ppf(beyond), rtol=1e-3)
        np.testing.assert_allclose(upper * n_cells, law.isf(beyond), rtol=1e-3)


@pytest.mark.parametrize("counts", [True, False])
def test_a_mean_is_outside_its_interval_if_and_only_if_its_p_value_says_so(counts):
    """Random genes, levels from nothing to 1e8 counts, whole sums and fractions."""
    n_genes, n_cells, rng = 450, 30, np.random.default_rng(0)
    likelihood = (likelihoods.NegativeBinomial if counts else likelihoods.Gaussian)(n_genes)
    donors = (DonorEffect if counts else AdditiveDonorEffect)(N_DONORS, n_genes)
    level = rng.uniform(-9, 15, n_genes) if counts else rng.normal(0, 5, n_genes)
    noise = torch.from_numpy(rng.normal(0, 0.3, (20, n_genes))).float()
    decoded = Decoded(torch.from_numpy(level).float() + noise, None)
    with torch.no_grad():
        donors.posterior_mean.copy_(torch.from_numpy(rng.normal(0, 0.5, (N_DONORS, n_genes))))
        if not counts:
            likelihood.lower.fill_(-1e3)
    at = level + 1.5 * rng.standard_normal(n_genes)
    total = rng.poisson(n_cells * np.exp(at)).astype(float) if counts else n_cells * at
    total[::3] += rng.random(n_genes // 3)
    tails = _tails(likelihood, donors, decoded, total, n_cells)
    for beyond in (0.4, 0.05, 1e-4, 1e-30):
        lower, upper = tails.interval(beyond)
        outside = (total / n_cells < lower) | (total / n_cells > upper)
        np.testing.assert_array_equal(outside, tails.p_value < 2 * beyond)
        assert outside.any() or beyond < 1e-4


def test_what_parameters_leave_open_does_not_average_out():
    """Normal sums of cells that share a part of their variance, in closed form."""
    likelihood, donors = likelihoods.Gaussian(N_GENES), _donors(1e-6, AdditiveDonorEffect)
    with torch.no_grad():
        likelihood.lower.fill_(-1e3)
    decoded, n_cells, share = _decoded(np.e), 25, torch.linspace(0, 1, N_GENES)
    variance = likelihood.variance(*decoded)[0].detach().double().numpy()
    sd = np.sqrt(variance * (share.numpy() + (1 - share.numpy()) / n_cells))
    observed = 1 + 1.7 * sd
    tails = tails_of_mean(likelihood, donors, decoded, n_cells * observed, n_cells, share)
    np.testing.assert_allclose(tails.at_least, stats.norm.sf(1.7), rtol=1e-3)
    lower, upper = tails.interval(0.05)
    np.testing.assert_allclose(lower, 1 + stats.norm.ppf(0.05) * sd, rtol=1e-3)
    np.testing.assert_allclose(upper, 1 - stats.norm.ppf(0.05) * sd, rtol=1e-3)


@pytest.mark.parametrize(
    "kind", ["NegativeBinomial", "Poisson", "ContaminatedNegativeBinomial", "ZINB"]
)
def test_moments_at_a_donors_effect_are_those_of_the_moved_location(kind):
    kind = {"ZINB": "ZeroInflatedNegativeBinomial"}.get(kind, kind)
    likelihood = getattr(likelihoods, kind)(N_GENES)
    torch.manual_seed(0)
    location = torch.randn(7, N_GENES)
    extra = torch.randn(7, likelihood.n_heads - 1, N_GENES) if likelihood.n_heads > 1 else None
    decoded, effect = Decoded(location, extra), torch.randn(4, N_GENES)
    mean, variance = _donors(0.5).moments_at(likelihood, decoded, effect)
    for row in range(4):
        moved = decoded._replace(location=location + effect[row]).double()
        expected = likelihood.mean(*moved).double()
        within = likelihood.variance(*moved).double().mean(0)
        np.testing.assert_allclose(mean[row], expected.mean(0).detach(), rtol=1e-5)
        total = within + expected.var(0, unbiased=False)
        np.testing.assert_allclose(variance[row], total.detach(), rtol=1e-4)


def test_moments_of_continuous_values_are_interpolated_closely():
    likelihood, donors = likelihoods.Gaussian(N_GENES), _donors(0.4, AdditiveDonorEffect)
    with torch.no_grad():
        likelihood.lower.fill_(0.0)
    decoded = Decoded(torch.randn(50, N_GENES, generator=torch.Generator().manual_seed(1)), None)
    effect = torch.linspace(-4, 4, 401)[:, None] * torch.ones(N_GENES)
    mean, variance = donors.moments_at(likelihood, decoded, effect)
    for row in (3, 77, 200, 399):
        one = donors.moments_at(likelihood, decoded, effect[[row]])
        np.testing.assert_allclose(mean[row], one[0][0], atol=3e-3)
        np.testing.assert_allclose(variance[row], one[1][0], atol=1e-2)


@pytest.fixture(scope="module")
def trained():
    """A model of eleven donors, and a twelfth that it has not seen."""
    adata = exprgen.datasets.simulate_latent(
        1500, n_vars=50, n_types=2, n_donors=12, donor_sd=0.4, seed=4
    )
    new = adata.obs["donor"] == "donor_11"
    train, test = adata[~new].copy(), adata[new].copy()
    exprgen.NBVAE.setup_anndata(
        train, layer="counts", categorical_condition_keys=["cell_type"], donor_key="donor"
    )
    model = exprgen.NBVAE(train, seed=0, n_hidden=32)
    model.train(20, accelerator="cpu", progress_bar=False)
    return model, train, test


def test_a_new_donor_is_not_found_and_spiked_genes_are(trained):
    model, _, test = trained
    found = tl.nof1_de(test, model, groupby="cell_type", key_added=None, seed=0)
    assert (found["pvals_adj"] < 0.05).mean() <= 0.02
    plain = tl.nof1_de(
        test, model, groupby="cell_type", key_added=None, seed=0, inflation=1.0, level=0.9
    )
    inside = plain["observed"].between(plain["lower"], plain["upper"])
    assert 0.8 < inside.mean() <= 1
    spiked = test.copy()
    values = spiked.to_df(layer="counts")
    # Of middling expression: they must not make up the sample's depth.
    of_type = values[(spiked.obs["cell_type"] == "type_1").to_numpy()]
    genes = of_type.mean().sort_values().index[[20, 28]].tolist()
    values[genes] *= 12
    spiked.layers["counts"] = values.to_numpy()
    again = tl.nof1_de(spiked, model, groupby="cell_type", key_added=None, seed=0)
    top = again[again["group"] == "type_1"].nsmallest(2, "pvals")
    assert set(top["names"]) == set(genes)
    assert (top["pvals_adj"] < 0.01).all()
    assert (top["scores"] > 0).all()
    assert (top["observed"] > top["upper"]).all()


def test_deeper_sequencing_is_no_finding(trained):
    model, _, test = trained
    rng = np.random.default_rng(0)
    deep = test.copy()
    counts = deep.layers["counts"].toarray()
    deep.layers["counts"] = counts + rng.poisson(counts)  # twice as deep
    found = tl.nof1_de(deep, model, groupby="cell_type", key_added=None, seed=0)
    assert (found["pvals_adj"] < 0.05).mean() <= 0.02
    usual = tl.nof1_de(test, model, groupby="cell_type", key_added=None, seed=0)
    both = usual.merge(found, on=["group", "names"])
    assert np.corrcoef(both["logfoldchanges_x"], both["logfoldchanges_y"])[0, 1] > 0.9


def test_scanpy_reads_the_result_also_from_a_file(trained, tmp_path):
    model, _, test = trained
    test = test.copy()
    table = tl.nof1_de(test, model, groupby="cell_type", seed=0)
    tl.nof1_de(test, model, groupby="cell_type", seed=0)  # its own key may be written again
    test.write_h5ad(tmp_path / "sample.h5ad")
    for adata in (test, anndata.read_h5ad(tmp_path / "sample.h5ad")):
        read = sc.get.rank_genes_groups_df(adata, None, key="nof1_de")
        for column in read.columns.drop("group"):
            np.testing.assert_array_equal(read[column], table[column])
        assert adata.uns["nof1_de"]["observed"]["type_1"].shape == (50,)
    assert table.groupby("group")["scores"].is_monotonic_decreasing.all()


def test_half_a_count_keeps_fold_changes_finite(trained):
    model, _, test = trained
    empty = test[:7].copy()
    empty.layers["counts"] = empty.layers["counts"].toarray()
    empty.layers["counts"][:, 0] = 0
    found = tl.nof1_de(empty, model, groupby="cell_type", inflation=1.0, key_added=None, seed=0)
    assert np.isfinite(found.drop(columns=["group", "names"]).to_numpy()).all()


def test_the_range_and_the_p_value_agree_also_where_scores_are_inflated(trained):
    model, _, test = trained
    rng, shifted = np.random.default_rng(0), test.copy()
    counts = shifted.layers["counts"].toarray()
    shifted.layers["counts"] = rng.poisson(counts * rng.lognormal(0, 2, counts.shape[1]))
    for level in (0.5, 0.9, 0.99):
        found = tl.nof1_de(shifted, model, groupby="cell_type", level=level, seed=0)
        outside = ~found["observed"].between(found["lower"], found["upper"])
        np.testing.assert_array_equal(outside, found["pvals"] < 1 - level)
        assert outside.any() or level > 0.5
    assert (found["inflation"] > 1.5).all()


def test_inflation_is_not_estimated_from_few_genes(trained):
    model, _, test = trained
    few = test[np.flatnonzero(test.obs["cell_type"] == "type_0")[:2]].copy()
    with pytest.warns(DataQualityWarning, match=r"Inflation of cell_type='type_0' is taken as 1"):
        found = tl.nof1_de(few, model, groupby="cell_type", key_added=None, seed=0)
    assert (found["inflation"] == 1).all()


def test_a_model_without_donors_labels_says_what_it_cannot_tell(trained, tmp_path):
    model, train, test = trained
    options = {"groupby": "cell_type", "key_added": None, "seed": 0}
    model.save(tmp_path / "coded")
    coded = exprgen.NBVAE.load(tmp_path / "coded", adata=False)
    with pytest.raises(ValueError, match=r"\d+ of its cells were in its training"):
        tl.nof1_de(train[train.obs["donor"] == "donor_3"].copy(), coded, **options)
    with pytest.warns(ReproducibilityWarning, match="others of the same donors"):
        found = tl.nof1_de(test, coded, **options)
    pd.testing.assert_frame_equal(found, tl.nof1_de(test, model, **options))
    model.save(tmp_path / "named", donor_labels=True)
    named = exprgen.NBVAE.load(tmp_path / "named", adata=False)
    pd.testing.assert_frame_equal(found, tl.nof1_de(test, named, **options))


def test_what_cannot_be_compared_is_refused(trained):
    model, train, test = trained
    with pytest.raises(ValueError, match=r"donor 'donor_3' was in its training"):
        tl.nof1_de(train[train.obs["donor"] == "donor_3"].copy(), model, groupby="cell_type")
    unnamed = train[:30].copy()
    del unnamed.obs["donor"]
    with pytest.raises(ValueError, match=r"30 of its cells were in its training"):
        tl.nof1_de(unnamed, model, groupby="cell_type")
    two = test.copy()
    two.obs["donor"] = np.where(np.arange(two.n_obs) % 2, "x", "y")
    with pytest.raises(ValueError, match="2 donors in obs"):
        tl.nof1_de(two, model, groupby="cell_type")
    with pytest.raises(CovariateError, match=r"'cell_type' varies within batch='batch_0'"):
        tl.nof1_de(test.copy(), model, groupby="batch")
    with pytest.raises(KeyError, match="Did you mean 'cell_type'"):
        tl.nof1_de(test.copy(), model, groupby="celltype")
    with pytest.raises(ValueError, match="view"):
        tl.nof1_de(test[:5], model, groupby="cell_type")
    taken = test.copy()
    taken.uns["nof1_de"] = pd.DataFrame()
    with pytest.raises(ValueError, match="is taken"):
        tl.nof1_de(taken, model, groupby="cell_type")
    with pytest.raises(ValueError, match="inflation must be one of"):
        tl.nof1_de(test.copy(), model, groupby="cell_type", inflation="cells")
    silent = test.copy()
    silent.layers["counts"] = silent.layers["counts"].toarray()
    silent.layers["counts"][(silent.obs["cell_type"] == "type_1").to_numpy()] = 0
    with pytest.raises(ValueError, match=r"cell_type='type_1' have no counts"):
        tl.nof1_de(silent, model, groupby="cell_type")
    unnamed = test.copy()
    unnamed.obs["part"] = np.where(unnamed.obs["cell_type"] == "type_1", "", "x")
    with pytest.raises(ValueError, match=r"obs\['part'\] \(groupby\) is '' in \d+ cells"):
        tl.nof1_de(unnamed, model, groupby="part")
    assert "nof1_de" not in test.uns


def test_a_model_without_donors_is_refused(trained):
    _, train, test = trained
    train = train.copy()
    exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=["cell_type"])
    model = exprgen.NBVAE(train, seed=0, n_hidden=8)
    model.train(1, accelerator="cpu", progress_bar=False)
    with pytest.raises(ValueError, match="donor_key"):
        tl.nof1_de(test.copy(), model, groupby="cell_type")
    with pytest.raises(TypeError, match="trained model of exprgen"):
        tl.nof1_de(test.copy(), "model", groupby="cell_type")


def test_continuous_values_are_compared_on_their_own_scale():
    adata = exprgen.datasets.simulate_latent(
        900, n_vars=40, n_types=2, n_donors=9, donor_sd=0.4, seed=4
    )
    sc.pp.normalize_total(adata, target_sum=1e3)
    sc.pp.log1p(adata)
    new = adata.obs["donor"] == "donor_8"
    train, test = adata[~new].copy(), adata[new].copy()
    test.X = test.X.toarray()
    roles = {"categorical_condition_keys": ["cell_type"], "donor_key": "donor"}
    exprgen.CondVAE.setup_anndata(train, **roles)
    model = exprgen.CondVAE(train, seed=0, n_hidden=32)
    model.train(12, accelerator="cpu", progress_bar=False)
    found = tl.nof1_de(test, model, groupby="cell_type", key_added=None, seed=0)
    assert (found["pvals_adj"] < 0.05).mean() <= 0.03
    assert found["observed"].between(found["lower"], found["upper"]).mean() > 0.75
    gene = test.var_names[3]
    test.X[:, 3] += 2
    again = tl.nof1_de(test, model, groupby="cell_type", key_added=None, seed=0)
    for _, of_group in again.groupby("group"):
        assert of_group.nsmallest(1, "pvals")["names"].item() == gene
    change = again.set_index(["group", "names"]) - found.set_index(["group", "names"])
    moved = change["logfoldchanges"].xs(gene, level="names")
    np.testing.assert_allclose(moved, 2 / np.log(2), rtol=1e-5)
    with pytest.raises(ValueError, match="library=10000.0 needs a model of counts"):
        tl.effect(model, {"cell_type": "type_0"}, {"cell_type": "type_1"}, level=None, library=1e4)
