"""The hybrid's law for a donor that training never saw."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from exprgen import HybridResidualModel
from exprgen.means import RidgeMean

N_DONORS, N_EACH, N_GENES = 4, 30, 150


@pytest.fixture(scope="module")
def samples() -> ad.AnnData:
    """Four donors whose shifts are as large as the noise; values far above their bound."""
    rng = np.random.default_rng(0)
    donor = np.repeat(np.arange(N_DONORS), N_EACH)
    label = np.tile(["a", "b"], N_DONORS * N_EACH // 2)
    shift = rng.normal(size=(N_DONORS, N_GENES))
    values = 10 + (label == "b")[:, None] + shift[donor] + rng.normal(size=(len(donor), N_GENES))
    obs = pd.DataFrame({"donor": [f"d{i}" for i in donor], "label": label})
    obs.index = [f"s{i}" for i in range(len(obs))]
    return ad.AnnData(values.astype(np.float32), obs=obs)


@pytest.mark.filterwarnings("ignore:obs")
@pytest.mark.parametrize("density", ["gaussian", "low_rank"])
def test_a_new_donors_variance_is_that_of_residuals_of_left_out_donors(samples, density):
    """What few donors leave open in the mean is in these residuals, and is not added again."""
    HybridResidualModel.setup_anndata(
        samples, categorical_condition_keys=["label"], donor_key="donor"
    )
    model = HybridResidualModel(samples, density=density, seed=0)
    model.train(train_size=1.0, early_stopping=False, accelerator="cpu", progress_bar=False)
    told = model.predict({"label": "a"}, n_samples=400, seed=0, progress_bar=False)

    table, y = samples.obs[["label"]], samples.X.astype(float)
    left_out = RidgeMean().out_of_sample(table, y, samples.obs["donor"].to_numpy())
    variance = told.layers["exprgen_std"][0] ** 2
    assert np.median(variance / np.square(y - left_out).mean(0)) == pytest.approx(1, abs=0.08)
    assert np.median(told.layers["exprgen_std_donor"][0]) > 0.5
