"""Recovered counts are the shipped ones; simulated cells follow the law they claim."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from scipy import integrate, sparse, stats

from exprgen import datasets
from exprgen.datasets import _download


def test_bundled_counts_reproduce_what_scanpy_ships(pbmc):
    import scanpy as sc

    shipped = sc.datasets.pbmc68k_reduced()
    counts = pbmc.layers["counts"]
    assert counts.shape == (700, 765)
    assert counts.format == "csr"
    assert counts.dtype == np.float32
    assert np.array_equal(counts.data, np.rint(counts.data))
    assert counts.data.min() >= 1

    depth = pbmc.obs["n_counts"].to_numpy()[:, None].astype(np.float64)
    again = np.log1p(counts.toarray() * 1e4 / depth)
    stored = shipped.raw.X.toarray().astype(np.float64)
    # Stored to three decimals; a handful lie on the edge of two.
    assert np.abs(again - stored).max() < 0.0005 + 1e-6
    assert (np.abs(np.round(again, 3) - stored) > 1e-6).sum() <= 4
    # Half a unit of the third decimal is less than half a count: each integer is the only one.
    exact = np.expm1(stored) * depth / 1e4
    assert np.abs(exact - counts.toarray()).max() < 0.13

    assert (pbmc.obs["n_counts"] > counts.sum(axis=1).A1).all()
    assert pbmc.obs["cell_type"].astype(str).tolist() == shipped.obs["bulk_labels"].tolist()
    assert not np.shares_memory(pbmc.X.data, counts.data)


def test_nb_likelihood_is_exact():
    adata = datasets.simulate_nb(6, n_vars=4, n_types=2, log_depth=(3.0, 0.5), seed=1)
    theta = adata.var["theta"].to_numpy()
    expected = []
    for x, label in zip(adata.X.toarray(), adata.obs["cell_type"], strict=True):
        rho = adata.varm["proportion"][label].to_numpy()

        def joint(log_depth, x=x, rho=rho):
            p = theta / (theta + np.exp(log_depth) * rho)
            return stats.nbinom.pmf(x, theta, p).prod() * stats.norm.pdf(log_depth, 3.0, 0.5)

        expected.append(np.log(integrate.quad(joint, 0, 6, epsabs=0, epsrel=1e-10)[0]))
    np.testing.assert_allclose(datasets.nb_log_likelihood(adata), expected, rtol=1e-7)


def test_nb_likelihood_sums_to_one():
    grid = np.stack(np.meshgrid(np.arange(60), np.arange(60)), axis=-1).reshape(-1, 2)
    support = datasets.simulate_nb(
        len(grid), n_vars=2, n_types=1, log_depth=(1.0, 0.3), dispersion=(2.0, 5.0)
    )
    support.layers["counts"] = sparse.csr_matrix(grid)
    assert np.exp(datasets.nb_log_likelihood(support)).sum() == pytest.approx(1, abs=1e-6)


def test_nb_moments_follow_the_law():
    n = 40_000
    adata = datasets.simulate_nb(n, n_vars=5, n_types=1, log_depth=(4.0, 0.3), seed=2)
    x = adata.X.toarray().astype(np.float64)
    rho, theta = adata.varm["proportion"]["type_0"].to_numpy(), adata.var["theta"].to_numpy()
    first = np.exp(4.0 + 0.3**2 / 2) * rho
    second = np.exp(2 * 4.0 + 2 * 0.3**2) * rho**2  # E[mean^2] over depth
    variance = first + second / theta + second - first**2
    z = (x.mean(axis=0) - first) / np.sqrt(variance / n)
    assert np.abs(z).max() < 4.5
    np.testing.assert_allclose(x.var(axis=0), variance, rtol=0.1)


def test_latent_simulator_follows_its_truth():
    adata = datasets.simulate_latent(
        4000, n_vars=60, n_batches=3, n_donors=40, donor_sd=0.4, doses=(0, 1, 10), seed=3
    )
    truth = adata.uns["truth"]
    types, batch, donor = (
        adata.obs[k].cat.codes.to_numpy() for k in ("cell_type", "batch", "donor")
    )
    shift = np.log1p(adata.obs["dose"].to_numpy())[:, None] * truth["dose_shift"]
    residual = adata.obsm["latent"] - truth["component_mean"][types, 0] - shift
    assert residual.std() == pytest.approx(truth["latent_sd"], rel=0.03)

    logits = adata.var["intercept"].to_numpy() + adata.obsm["latent"] @ adata.varm["loading"].T
    logits = logits + adata.varm["batch_effect"].T[batch] + adata.varm["donor_effect"].T[donor]
    mean = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mean *= adata.obs["depth"].to_numpy()[:, None]
    x = adata.X.toarray()
    variance = mean + mean**2 / adata.var["theta"].to_numpy()
    assert ((x - mean) / np.sqrt(variance)).mean() == pytest.approx(0, abs=0.01)
    assert ((x - mean) ** 2 / variance).mean() == pytest.approx(1, abs=0.1)
    assert adata.varm["donor_effect"].std() == pytest.approx(0.4, rel=0.05)


@pytest.mark.parametrize("simulate", [datasets.simulate_nb, datasets.simulate_latent])
def test_simulators_repeat_with_the_seed_and_store(simulate, tmp_path):
    import anndata

    first, again, other = simulate(50, seed=5), simulate(50, seed=5), simulate(50, seed=6)
    assert (first.X != again.X).nnz == 0
    assert (first.X != other.X).nnz > 0
    first.write_h5ad(tmp_path / "cells.h5ad")
    assert (anndata.read_h5ad(tmp_path / "cells.h5ad").X != first.X).nnz == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n_obs": 0}, "n_obs"),
        ({"n_vars": 2.5}, "n_vars"),
        ({"n_types": True}, "n_types"),
        ({"log_depth": (5, -1)}, "log_depth"),
        ({"dispersion": (0, 1)}, "dispersion"),
        ({"donor_sd": -1}, "donor_sd"),
        ({"doses": (1, -1)}, "doses"),
    ],
)
def test_simulator_names_the_bad_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        datasets.simulate_latent(**arguments)


def test_download_without_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPRGEN_DATA", str(tmp_path))
    source = _download._Source("http://127.0.0.1:9/kang.h5ad", "0" * 64)
    monkeypatch.setitem(_download._FILES, "kang_2018.h5ad", source)
    with pytest.raises(ConnectionError) as raised:
        datasets.kang2018()
    assert source.url in str(raised.value)
    assert str(tmp_path / "kang_2018.h5ad") in str(raised.value)


def _place(path, adata, monkeypatch):
    """Put a small stand-in into the cache, and make it the published file."""
    adata.write_h5ad(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = _download._FILES[path.name]._replace(sha256=digest)
    monkeypatch.setitem(_download._FILES, path.name, source)


def test_cached_files_are_read_checked_and_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPRGEN_DATA", str(tmp_path))
    raw = datasets.simulate_nb(30, n_vars=8)
    labels = raw[::-2, :3].copy()
    labels.obs = labels.obs.rename(columns={"cell_type": "louvain"})
    _place(tmp_path / "pbmc3k_raw.h5ad", raw, monkeypatch)
    _place(tmp_path / "pbmc3k_labels.h5ad", labels, monkeypatch)

    adata = datasets.pbmc3k()
    assert adata.shape == (15, 8)
    np.testing.assert_array_equal(adata.X.toarray(), raw.X.toarray()[::-2])
    assert adata.obs["cell_type"].tolist() == raw.obs["cell_type"].tolist()[::-2]

    (tmp_path / "pbmc3k_raw.h5ad").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not the published file"):
        datasets.pbmc3k()
    assert (tmp_path / "pbmc3k_raw.h5ad").read_bytes() == b"half a file"


def test_cached_kang_has_conditions_and_donors(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPRGEN_DATA", str(tmp_path))
    raw = datasets.simulate_latent(30, n_vars=8, n_batches=2, n_donors=3)
    raw.obs = raw.obs.rename(columns={"batch": "label", "donor": "replicate"})
    _place(tmp_path / "kang_2018.h5ad", raw, monkeypatch)
    adata = datasets.kang2018()
    assert list(adata.obs) == ["cell_type", "condition", "donor"]
    assert adata.obs["donor"].tolist() == raw.obs["replicate"].tolist()
