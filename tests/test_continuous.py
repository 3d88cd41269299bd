"""The space of continuous values, and what its model refuses and warns of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exprgen import NBVAE, ZINBVAE, CondVAE, datasets
from exprgen._errors import DataQualityWarning, ExtrapolationWarning, SetupError
from exprgen._layout import ConditionLayout
from exprgen.likelihoods import Gaussian, MixtureOfGaussians
from exprgen.spaces import ContinuousLatentSpace, DataMoments

LAYOUT = ConditionLayout(n_categories=(3,), n_batch=2, n_donor=2)
QUIET = {"progress_bar": False}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _moments_of(x, c):
    wide = x.double()
    total = wide.sum(1)
    sums = wide.sum(0), wide.square().sum(0), total @ wide, wide.amin(0)
    # Neither labels nor donors are read.
    return DataMoments(total, c, c[:, 2].long(), c.double().T @ wide, *sums)


def _data(n=400):
    """Values of genes of very different scale, the last one constant; codes; moments."""
    rng = np.random.default_rng(0)
    x = rng.normal([0, 3, -50, 2], [1e-3, 1, 20, 0], (n, 4)).astype(np.float32)
    c = np.c_[rng.integers(0, 3, n), rng.integers(0, 2, n), rng.integers(0, 2, n)]
    x, c = torch.from_numpy(x), torch.from_numpy(c).float()
    return x, c, _moments_of(x, c)


def _space(likelihood=None, *, scale=0.3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        space = ContinuousLatentSpace(
            4,
            LAYOUT,
            MixtureOfGaussians(4) if likelihood is None else likelihood,
            n_latent=2,
            n_hidden=16,
            n_layers=1,
            dropout=0.0,
        )
        with torch.no_grad():
            for parameter in space.parameters():
                parameter.add_(scale * torch.randn_like(parameter))
    return space.eval().requires_grad_(False)


def test_it_starts_from_the_genes_mean_spread_and_least_value():
    x, c, moments = _data()
    space = _space()
    space.initialize(moments)
    torch.testing.assert_close(space.centre, x.mean(0))
    torch.testing.assert_close(space.scale[:3], x.std(0, correction=0)[:3], rtol=1e-3, atol=0)
    # The constant gene: as wide as others are, and at its value all the same.
    assert torch.equal(space.scale[3], space.scale[:3].median())
    drawn = space.likelihood.draw(*space.decode(torch.zeros(len(x), 2), c)[:1], _generator())
    assert (drawn[:, 3] == 2).float().mean() > 0.9
    assert torch.equal(space.likelihood.lower, x.amin(0))
    assert torch.equal(space.likelihood.scale, space.scale)
    assert torch.equal(space.donors.scale, space.scale)
    assert (space.decoder.output.bias[:3] == 0).all()
    mean, sd = space.encode(x, c, x.sum(1))
    assert torch.isfinite(mean).all()
    assert (sd > 0).all()


def test_units_do_not_matter():
    """The same data in other units: the same latent state, and expression in those units."""
    x, c, moments = _data()
    factor, shift = torch.tensor([1000.0, 2, 0.1, 1]), torch.tensor([5.0, 0, -3, 0])
    other = x * factor + shift
    total, there = other.double().sum(1), _moments_of(other, c)
    spaces = []
    for given in (moments, there):
        space = _space()
        space.initialize(given)
        spaces.append(space)
    one, two = spaces
    z, again = one.encode(x, c, total)[0], two.encode(other, c, total)[0]
    torch.testing.assert_close(z, again, atol=1e-2, rtol=1e-2)
    effect = torch.randn(len(x), 4, generator=_generator())
    (a, heads), (b, _) = one.decode(z, c, effect), two.decode(z, c, effect)
    torch.testing.assert_close(b[:, :3], (a * factor + shift)[:, :3], rtol=1e-2, atol=0.05)
    assert heads.shape == (len(x), 1, 4)
    moved = a - one.decode(z, c).location
    torch.testing.assert_close(moved, one.scale * effect, rtol=1e-3, atol=1e-4)


def test_the_encoder_sees_neither_batch_nor_depth_and_there_is_none_to_fix():
    x, c, moments = _data()
    space = _space()
    space.initialize(moments)
    mean, _ = space.encode(x, c, x.sum(1))
    assert mean.shape == (len(x), 2)
    other = c.clone()
    other[:, 1:] = -1
    assert torch.equal(space.encode(x, other, torch.ones(len(x)))[0], mean)
    assert space.depth is None
    assert space.log_depth(mean, c) is None
    with pytest.raises(ValueError, match="normalised for depth"):
        space.standardised_depth(torch.zeros(len(x)), c)


def test_further_heads_start_at_nothing():
    space = _space(Gaussian(4, dispersion="gene-cell"), scale=0)
    _, c, _ = _data()
    assert (space.decode(torch.randn(len(c), 2), c).extra == 0).all()


# The models ------------------------------------------------------------------------------


def _adata(layer_of=np.log1p, n=300):
    adata = datasets.simulate_latent(n, n_vars=25, n_types=2, seed=1, log_depth=(6.0, 0.3))
    adata = adata[:, adata.X.sum(0).A1 > 5][:, :20].copy()
    adata.layers["x"] = layer_of(adata.layers["counts"].toarray().astype(np.float32))
    return adata


def test_counts_are_modelled_with_a_warning_and_negative_values_without():
    with pytest.warns(DataQualityWarning, match="looks like counts"):
        CondVAE.setup_anndata(_adata(lambda x: x), layer="x")
    CondVAE.setup_anndata(_adata(lambda x: np.log1p(x) - 2), layer="x")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_missing_and_infinite_values_are_refused(value):
    adata = _adata()
    adata.layers["x"][7, 3] = value
    with pytest.raises(SetupError, match=f"{adata.obs_names[7]}.*{adata.var_names[3]}"):
        CondVAE.setup_anndata(adata, layer="x")


def test_scaled_values_without_a_peak_come_back_with_their_moments():
    """Negative values, a bound that few cells are at: the Gaussian it was before."""
    rng = np.random.default_rng(0)
    adata = _adata()
    scale, label = np.geomspace(0.1, 10, 20), (adata.obs["cell_type"] == "type_0").to_numpy()
    values = rng.normal(0, 1, adata.shape) + 1.5 * label[:, None] * rng.normal(size=20)
    adata.layers["x"] = (values * scale - 3).astype(np.float32)
    CondVAE.setup_anndata(adata, layer="x", categorical_condition_keys=["cell_type"])
    model = CondVAE(adata, seed=0, n_hidden=32, n_latent=2, likelihood="gaussian")
    model.train(40, batch_size=32, accelerator="cpu", early_stopping=False, **QUIET)
    cells = model.sample(adata, 5, seed=0, **QUIET)
    drawn, real = cells.X, adata.layers["x"]
    np.testing.assert_allclose((drawn.mean(0) - real.mean(0)) / real.std(0), 0, atol=0.15)
    np.testing.assert_allclose(drawn.std(0) / real.std(0), 1, atol=0.12)
    assert (drawn.min(0) >= real.min(0)).all()
    assert "library" not in cells.obs


@pytest.mark.parametrize(
    ("model", "wrong", "message"),
    [
        (NBVAE, {"likelihood": "zinb"}, "likelihood must be one of"),
        (NBVAE, {"likelihood": "gaussian"}, "likelihood must be one of"),
        (NBVAE, {"likelihood": "poisson", "dispersion": "gene-cell"}, "dispersion='gene-cell'"),
        (NBVAE, {"dispersion": "cell"}, "dispersion must be one of"),
        (NBVAE, {"density": "flows"}, "density must be one of.*flow"),
        (ZINBVAE, {"dispersion": "cell"}, "dispersion must be one of"),
        (CondVAE, {"likelihood": "nb"}, "likelihood must be one of"),
        (
            CondVAE,
            {"likelihood": "mixture_of_gaussians", "dispersion": "gene-cell"},
            "dispersion='gene-cell'",
        ),
        (CondVAE, {"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        (NBVAE, {"dropout": "a"}, r"dropout must be a number in \[0, 1\), got 'a'"),
        (NBVAE, {"dropout": True}, "dropout must be a number"),
    ],
)
def test_wrong_arguments_are_named(model, wrong, message):
    adata = _adata()
    model.setup_anndata(adata, layer="counts" if model.needs_counts else "x")
    with pytest.raises((TypeError, ValueError), match=message):
        model(adata, seed=0, **wrong)


def test_beta_weighs_the_divergence_and_leaves_the_elbo_as_it_is():
    """A heavy weight makes the state hold less; what is logged is the bound itself."""
    adata = _adata()
    NBVAE.setup_anndata(adata, layer="counts")
    divergence = {}
    for beta in (1.0, 20.0):
        model = NBVAE(adata, seed=0, n_hidden=16, n_latent=2, n_components=2)
        plan = {"beta": beta, "kl_warmup": 0.0}
        model.train(15, accelerator="cpu", early_stopping=False, plan_kwargs=plan, **QUIET)
        last = {key: float(value.iloc[-1, 0]) for key, value in model.history.items()}
        divergence[beta] = last["kl_local_train"]
        total = last["reconstruction_loss_train"] + last["kl_local_train"]
        assert last["elbo_train"] == pytest.approx(total, rel=1e-5)
        excess = last["train_loss"] - last["elbo_train"]
        prior = model.module.space.prior_cost(1.0).item() / len(model.train_indices_)
        expected = (beta - 1) * last["kl_local_train"] + prior
        assert excess == pytest.approx(expected, rel=1e-3, abs=1e-2)
    assert divergence[20.0] < 0.85 * divergence[1.0]  # the rest is what depth needs
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match="beta"):
            model.train(1, plan_kwargs={"beta": wrong}, **QUIET)


@pytest.mark.parametrize("likelihood", ["gaussian", "mixture_of_gaussians"])
def test_values_below_all_of_training_have_no_probability_and_validation_survives_them(likelihood):
    adata = _adata()
    adata.obs["part"] = ["train"] * 250 + ["validation"] * 50
    adata.layers["x"][290:, 4] = -1  # validation cells
    CondVAE.setup_anndata(adata, layer="x", categorical_condition_keys=["cell_type"])
    model = CondVAE(adata, seed=0, n_hidden=16, n_latent=2, likelihood=likelihood)
    model.train(2, split_key="part", accelerator="cpu", **QUIET)
    assert np.isfinite(model.history["elbo_validation"].to_numpy(float)).all()

    cells = adata[:200].copy()
    expected = model.log_likelihood(cells, n_samples=2, seed=0, **QUIET)
    assert np.isfinite(expected).all()
    cells.layers["x"] = cells.layers["x"] - np.float32(1e-7)  # rounding
    np.testing.assert_allclose(
        model.log_likelihood(cells, n_samples=2, seed=0, **QUIET), expected, rtol=1e-3
    )
    low = cells.layers["x"].min(0) == cells.layers["x"].min()
    cells.layers["x"][3, [0, 2]] = -1e-2
    assert low[[0, 2]].all()
    said = f"2 values in 1 of 200 cells .*'{adata.var_names[0]}', '{adata.var_names[2]}'.*-inf"
    for verb in (
        lambda: model.log_likelihood(cells, n_samples=2, seed=0, **QUIET),
        lambda: model.denoise(cells, n_samples=2, copy=True, **QUIET),
        lambda: model.counterfactual(cells, to={"cell_type": "type_0"}, n_samples=2, **QUIET),
        lambda: model.posterior_predictive_sample(cells),
    ):
        with pytest.warns(ExtrapolationWarning, match=said):
            got = verb()
        if isinstance(got, np.ndarray):
            assert got[3] == -np.inf
            np.testing.assert_allclose(np.delete(got, 3), np.delete(expected, 3), rtol=1e-3)
