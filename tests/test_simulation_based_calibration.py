"""Ranks of the truth in what a trained model infers and predicts, where the truth is known.

Of a calibrated posterior the rank of the true value among its draws is uniform
(simulation-based calibration); of a calibrated prediction, the rank of the held-out count.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import exprgen


@pytest.fixture(scope="module")
def held_out():
    """A model of the simulator's own family, and cells that it has not seen."""
    adata = exprgen.datasets.simulate_nb(2200, n_vars=60, n_types=2, log_depth=(5.5, 0.5), seed=6)
    train, test = adata[:1400].copy(), adata[1400:].copy()
    exprgen.NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=["cell_type"])
    model = exprgen.NBVAE(train, seed=0, n_hidden=32, n_latent=2, likelihood="nb")
    model.train(25, accelerator="cpu", progress_bar=False)
    return model, test


def _far_from_uniform(ranks: np.ndarray) -> float:
    """Distance of Kolmogorov and Smirnov, in units of its 99 % point for that many ranks."""
    return float(stats.kstest(ranks, "uniform").statistic * np.sqrt(len(ranks)) / 1.63)


def test_ranks_of_the_true_depth_in_its_posterior(held_out):
    model, test = held_out
    cells = model._cells(test)
    x, c, library = cells.tensors(slice(None), model._device)
    space = model.module.space
    with torch.no_grad():
        mean, sd = space.encode(x, c, library)
        centre = space.log_depth(mean, c).numpy()
        above = mean.clone()
        above[:, -1] += sd[:, -1]
        spread = space.log_depth(above, c).numpy() - centre
    truth = np.log(test.obs["depth"].to_numpy())
    exact, exact_sd = _exact_posterior(test)
    # The control: of the simulator's own posterior, by quadrature, ranks are uniform.
    assert _far_from_uniform(stats.norm.cdf((truth - exact) / exact_sd)) < 1
    # The encoder's is as wide, and off by half as much again: no more than that.
    score = (truth - centre) / spread
    assert spread.mean() == pytest.approx(exact_sd.mean(), rel=0.2)
    assert 0.9 < score.std() < 1.7
    assert abs(score.mean()) < 0.3
    assert np.corrcoef(exact, centre)[0, 1] > 0.95


def _exact_posterior(cells) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each cell's log depth given its counts and its type."""
    unit, law = np.linspace(-6, 6, 1201), cells.uns["truth"]
    grid = law["log_depth_mean"] + law["log_depth_sd"] * unit
    theta, x = cells.var["theta"].to_numpy(), cells.layers["counts"].toarray()
    mean, square = np.zeros((2, cells.n_obs))
    for label, proportion in cells.varm["proportion"].items():
        rows = np.flatnonzero(cells.obs["cell_type"] == label)
        mu = np.exp(grid)[:, None] * proportion.to_numpy()
        log_p = x[rows] @ (np.log(mu) - np.log(mu + theta)).T
        log_p += -(theta * np.log1p(mu / theta)).sum(1) - 0.5 * unit**2
        weight = np.exp(log_p - log_p.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        mean[rows], square[rows] = weight @ grid, weight @ grid**2
    return mean, np.sqrt(square - mean**2)


def test_ranks_of_held_out_counts_in_their_predictions(held_out):
    model, test = held_out
    rng = np.random.default_rng(0)
    counts = test.layers["counts"].toarray()
    ranks = []
    for label in test.obs["cell_type"].cat.categories:
        rows = (test.obs["cell_type"] == label).to_numpy()
        drawn = model.sample({"cell_type": label}, n_obs=2000, seed=0, progress_bar=False)
        drawn = drawn.X.toarray()
        for gene in range(counts.shape[1]):
            below = np.searchsorted(np.sort(drawn[:, gene]), counts[rows, gene], "left")
            up_to = np.searchsorted(np.sort(drawn[:, gene]), counts[rows, gene], "right")
            ranks.append((below + rng.random(rows.sum()) * (up_to - below)) / len(drawn))
    distance = [_far_from_uniform(of_gene) for of_gene in ranks]
    assert np.median(distance) < 0.75  # of exact laws .5
    assert np.mean(np.array(distance) > 1) < 0.2
