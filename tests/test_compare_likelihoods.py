"""Likelihoods ranked by held-out counts: proper probabilities, and the simulator's law first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import exprgen
from exprgen import likelihoods, tl


@pytest.mark.parametrize("kind", ["Gaussian", "MixtureOfGaussians"])
def test_probabilities_of_intervals_around_counts_add_up_to_one(kind):
    likelihood = getattr(likelihoods, kind)(1)
    torch.manual_seed(0)
    location = torch.randn(1, 1, dtype=torch.float64)
    extra = torch.randn(1, likelihood.n_heads - 1, 1) if likelihood.n_heads > 1 else None
    x = np.arange(3000.0)
    total = 900.0
    lower = np.where(x > 0, np.log1p(np.maximum(x - 0.5, 0) * 1e4 / total), -np.inf)
    upper = np.log1p((x + 0.5) * 1e4 / total)
    log_p = [
        likelihood.log_interval(
            torch.tensor([[a]]), torch.tensor([[b]]), location.repeat(1, 1), extra
        ).item()
        for a, b in zip(lower, upper, strict=True)
    ]
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-6)


def test_intervals_keep_their_digits_in_the_tails():
    likelihood = likelihoods.Gaussian(4).double()
    lower = torch.tensor([[-31.0, -1.0, 8.0, 30.0]], dtype=torch.float64)
    each = [
        likelihood._log_mass(lower[0, i], lower[0, i] + 1, torch.zeros(()), torch.ones(())).item()
        for i in range(4)
    ]
    # Of the mirrored interval, where the difference of cdfs has all digits.
    exact = [
        np.log(stats.norm.cdf(-a) - stats.norm.cdf(-a - 1))
        if a > 0
        else np.log(stats.norm.cdf(a + 1) - stats.norm.cdf(a))
        for a in lower[0].tolist()
    ]
    np.testing.assert_allclose(each, exact, rtol=1e-10)


def test_interval_bound_is_the_integral_over_a_one_dimensional_state():
    """The importance-weighted bound against quadrature, with a decoder that is known."""
    adata = exprgen.datasets.simulate_nb(200, n_vars=3, n_types=1, seed=0)
    counts = adata.layers["counts"].toarray()
    adata.X = np.log1p(counts)
    exprgen.CondVAE.setup_anndata(adata)
    model = exprgen.CondVAE(
        adata, seed=0, n_latent=1, n_hidden=8, density="gaussian", likelihood="gaussian"
    )
    model.train(5, accelerator="cpu", progress_bar=False)
    cells = model._cells(adata[:5])
    x, c, library = cells.tensors(slice(None), model._device)
    bounds = (
        torch.log1p((torch.tensor(counts[:5]) - 0.5).clamp(min=-0.9)).double(),
        torch.log1p(torch.tensor(counts[:5]) + 0.5).double(),
    )
    found = model.module.log_likelihood(
        x, c, library, n_samples=3000, generator=torch.Generator().manual_seed(0), interval=bounds
    )
    z = torch.linspace(-9, 9, 4001)[:, None]
    space, density = model.module.space, model.module.density
    with torch.no_grad():
        for i in range(5):
            row = c[[i]].expand(len(z), -1)
            decoded = space.decode(z, row).double()
            low, high = (b[[i]].expand(len(z), -1) for b in bounds)
            log_p = space.likelihood.log_interval(low, high, *decoded)
            log_p = log_p + density.log_prob(z, space.density_features(row)).double()
            exact = torch.logsumexp(log_p, 0) + np.log(18 / 4000)
            assert found[i].item() == pytest.approx(exact.item(), abs=0.05)


@pytest.fixture(scope="module")
def table():
    adata = exprgen.datasets.simulate_nb(900, n_vars=30, n_types=2, dispersion=(0.5, 1.0), seed=0)
    names = list(adata.obs.columns), list(adata.uns)
    found = tl.compare_likelihoods(
        adata,
        likelihoods=["gaussian", "poisson", "nb"],
        categorical_condition_keys=["cell_type"],
        max_epochs=12,
        n_samples=20,
        accelerator="cpu",
        progress_bar=False,
        seed=0,
    )
    assert (list(adata.obs.columns), list(adata.uns)) == names
    return found


def test_the_simulators_law_comes_first(table):
    assert table["likelihood"].tolist()[0] == "nb"
    assert table["likelihood"].tolist()[-1] == "poisson"
    assert table["difference"].iloc[0] == 0
    worse = table.iloc[1:]
    assert (worse["difference"] < -3 * worse["difference_se"]).all()
    assert (table["n_test"] == 180).all()
    assert (table["log_pmf"].diff().dropna() <= 0).all()


def test_faults():
    adata = exprgen.datasets.simulate_nb(60, n_vars=5, seed=0)
    with pytest.raises(ValueError, match="likelihoods must be one of"):
        tl.compare_likelihoods(adata, likelihoods="negative_binomial")
    with pytest.raises(ValueError, match="'path' needs"):
        tl.compare_likelihoods(adata, likelihoods="zinb", densities="path")
    with pytest.raises(KeyError, match="split_key='donor'"):
        tl.compare_likelihoods(adata, split_key="donor")
    with pytest.raises(ValueError, match="at least 10 of both"):
        tl.compare_likelihoods(adata, test_size=0.05)
    empty = adata.copy()
    empty.layers["counts"] = empty.layers["counts"].toarray()
    empty.layers["counts"][:40] = 0
    with pytest.raises(ValueError, match="have no counts"):
        tl.compare_likelihoods(empty)
