"""The recipe of the guide: a study planned with new donors has the power that it will have."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import exprgen

N_SIDE, N_CELLS, CHANGE = 5, 50, -1.0


@pytest.fixture(scope="module")
def world():
    """Forty donors; a model of the first twelve."""
    adata = exprgen.datasets.simulate_latent(
        3000, n_vars=60, n_types=1, n_donors=40, donor_sd=0.5, log_depth=(8.0, 0.3), seed=5
    )
    number = adata.obs["donor"].str.removeprefix("donor_").astype(int).to_numpy()
    train = adata[number < 12].copy()
    exprgen.NBVAE.setup_anndata(train, layer="counts", donor_key="donor")
    model = exprgen.NBVAE(train, seed=0, n_hidden=32)
    model.train(20, accelerator="cpu", progress_bar=False)
    return model, adata, number


def _tested(bulk: np.ndarray, changed: np.ndarray) -> float:
    """Power of a t-test of log counts per million between the two halves."""
    log_cpm = np.log2((bulk + 0.5) / (bulk.sum(1, keepdims=True) + 1) * 1e6)
    p = stats.ttest_ind(log_cpm[:N_SIDE], log_cpm[N_SIDE:]).pvalue
    return float((p[changed] < 0.05).mean())


def _planned(model, changed: np.ndarray, seed: int, *, per_cell: bool) -> np.ndarray:
    bulk = []
    change = dict.fromkeys(model.var_names[changed], CHANGE)
    for i in range(2 * N_SIDE):
        labels = [f"new {i}, {cell}" if per_cell else f"new {i}" for cell in range(N_CELLS)]
        cells = model.sample(
            {"donor": labels},
            log_fold_change=change if i >= N_SIDE else None,
            progress_bar=False,
            seed=1000 * seed + i,
        )
        bulk.append(np.asarray(cells.X.sum(0)).ravel())
    return np.stack(bulk)


def _real(adata, number, changed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Donors that the model has not seen, molecules thinned in the second group."""
    counts, bulk = adata.layers["counts"], []
    for i, donor in enumerate(rng.permutation(np.arange(12, 40))[: 2 * N_SIDE]):
        rows = rng.choice(np.flatnonzero(number == donor), N_CELLS)
        total = np.asarray(counts[rows].sum(0)).ravel().astype(int)
        if i >= N_SIDE:
            total[changed] = rng.binomial(total[changed], 2.0**CHANGE)
        bulk.append(total)
    return np.stack(bulk)


def test_one_effect_per_donor_has_the_power_of_real_donors(world):
    model, adata, number = world
    power = {"real": [], "per donor": [], "per cell": []}
    for study in range(12):
        rng = np.random.default_rng(study)
        changed = np.zeros(adata.n_vars, bool)
        changed[rng.permutation(adata.n_vars)[:15]] = True
        changed &= np.asarray(adata.layers["counts"].mean(0)).ravel() > 0.2
        power["real"].append(_tested(_real(adata, number, changed, rng), changed))
        for name, per_cell in (("per donor", False), ("per cell", True)):
            bulk = _planned(model, changed, study, per_cell=per_cell)
            power[name].append(_tested(bulk, changed))
    mean = {name: np.mean(values) for name, values in power.items()}
    assert mean["per donor"] == pytest.approx(mean["real"], abs=0.12), mean
    assert mean["per cell"] > mean["real"] + 0.2, mean
