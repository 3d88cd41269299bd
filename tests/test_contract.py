"""What every model promises, in one body over models and over the roles that conditions can have.

A model is added to MODELS, a variant with the roles it is tested in to VARIANTS. Statistical
quality is tested elsewhere (test_statistics.py); here answers must be complete, of the right law,
repeatable and harmless.
"""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats

from exprgen import (
    NBVAE,
    ZINBVAE,
    CondVAE,
    ExprDiffusion,
    ExprFlow,
    HybridResidualModel,
    datasets,
)
from exprgen._errors import CovariateError, SetupError
from exprgen.train import DensityTrainingPlan, EncodedDataset

ROLES = {
    "no condition": {},
    "label": {"categorical_condition_keys": ["cell_type"]},
    "label, quantity, embedding": {
        "categorical_condition_keys": ["cell_type"],
        "continuous_condition_keys": ["dose"],
        "condition_embedding_key": "drug",
    },
    "label, batch, donor": {
        "categorical_condition_keys": ["cell_type"],
        "batch_key": "batch",
        "donor_key": "donor",
    },
    "label, size factor": {
        "categorical_condition_keys": ["cell_type"],
        "size_factor_key": "depth",
    },
}
ALONE = {
    "label, donor": {"categorical_condition_keys": ["cell_type"], "donor_key": "donor"},
}
MODELS = {"NBVAE": (NBVAE, {}), "CondVAE": (CondVAE, {})}
EVERYTHING, DONOR, SIZE = list(ROLES)[2:]
SMALL = {"density_hidden": 48, "density_layers": 1}
VARIANTS = {
    "ZINBVAE": (ZINBVAE, {}, [DONOR]),
    "ZINBVAE per cell, Gaussian": (
        ZINBVAE,
        {"dispersion": "gene-cell", "density": "gaussian"},
        [SIZE],
    ),
    "NBVAE per cell, flow": (NBVAE, {"dispersion": "gene-cell", "density": "flow"}, [DONOR]),
    "NBVAE Poisson": (NBVAE, {"likelihood": "poisson"}, ["label"]),
    "CondVAE Gaussian, flow": (
        CondVAE,
        {"likelihood": "gaussian", "dispersion": "gene-cell", "density": "flow"},
        [DONOR],
    ),
    "ExprFlow": (ExprFlow, SMALL, [EVERYTHING, DONOR]),
    "ExprDiffusion": (ExprDiffusion, SMALL, ["no condition", SIZE]),
    "ExprFlow, genes": (ExprFlow, {**SMALL, "in_genes": True}, [EVERYTHING]),
    "ExprDiffusion, genes": (ExprDiffusion, {**SMALL, "in_genes": True}, ["no condition"]),
    "Hybrid": (HybridResidualModel, {}, ["no condition", EVERYTHING, DONOR, SIZE]),
    "Hybrid, path": (
        HybridResidualModel,
        {**SMALL, "density": "path", "mean": "group"},
        ["label"],
    ),
    "Hybrid, residuals": (
        HybridResidualModel,
        {**SMALL, "in_genes": True},
        ["no condition", EVERYTHING, *ALONE],
    ),
    "Hybrid, Gaussian residuals": (
        HybridResidualModel,
        {"in_genes": True, "density": "gaussian"},
        ["label"],
    ),
}
CASES = [
    pytest.param((model, options, role), id=f"{name}, {role}")
    for name, (model, options) in MODELS.items()
    for role in ROLES
    if model.needs_counts or role != SIZE
] + [
    pytest.param((model, options, role), id=f"{name}, {role}")
    for name, (model, options, roles) in VARIANTS.items()
    for role in roles
]
TINY = {"n_latent": 3, "n_hidden": 32, "n_components": 4}
QUIET = {"progress_bar": False}
DRUG = np.array([[0.5, -1.0], [2.0, 0.3]])


def _cells(n=500):
    """Two doses change expression, through the drug's embedding as well; X is not modelled."""
    adata = datasets.simulate_latent(
        n,
        n_vars=30,
        n_types=3,
        n_batches=2,
        n_donors=5,
        doses=(0.0, 5.0),
        log_depth=(6.0, 0.3),
        donor_sd=0.2,
        seed=3,
    )
    adata = adata[:, adata.X.sum(0).A1 > 5].copy()
    adata.obsm["drug"] = DRUG[(adata.obs["dose"] > 0).to_numpy().astype(int)]
    counts = adata.layers["counts"].toarray()
    depth = counts.sum(1, keepdims=True)
    adata.layers["log"] = np.log1p(counts * np.float32(np.median(depth)) / np.maximum(depth, 1))
    adata.X = adata.X.copy() * 0
    return adata


class Case:
    """A trained model, the cells it was trained on, and a question that it can answer."""

    def __init__(self, model_class, options, roles):
        self.model_class, self.adata = model_class, _cells()
        self.roles = (ROLES | ALONE)[roles]
        options = dict(options)
        self.in_genes = options.pop("in_genes", False)
        self.is_count = model_class.needs_counts and not self.in_genes
        self.layer = "counts" if self.is_count else "log"
        model_class.setup_anndata(self.adata, layer=self.layer, **self.roles)
        size = {"n_latent": TINY["n_latent"]} if self.in_genes else TINY
        self.model = model_class(self.adata, seed=0, **size, **options)
        length = {} if self.in_genes else {"max_epochs": 40, "batch_size": 64}
        if self.model.module.has_density_stage:
            length["density_kwargs"] = {"max_epochs": 40, "batch_size": 64}
        self.model.train(accelerator="cpu", early_stopping=False, **length, **QUIET)

    @property
    def is_path(self):
        """Whether draws can be guided, and their steps chosen."""
        return self.model_class in (ExprFlow, ExprDiffusion)

    @property
    def has_noise(self):
        return self.model.module.space.has_noise

    @property
    def values(self):
        """The cells as the model sees them, dense."""
        return _dense(self.adata.layers[self.layer])

    def profile(self, values):
        """Mean of cells on a scale on which differences are alike for all genes."""
        mean = _dense(values).mean(0)
        return np.log(mean + 0.1) if self.is_count else mean

    @property
    def has_label(self):
        return "categorical_condition_keys" in self.roles

    @property
    def has_donor(self):
        return "donor_key" in self.roles

    @property
    def has_embedding(self):
        return "condition_embedding_key" in self.roles

    def question(self, label="type_0", n=1, dose=0):
        """Conditions of ``n`` equal rows, as a mapping."""
        given = {"cell_type": [label] * n, "dose": [5.0 * dose] * n}
        keys = self.model.schema.condition_keys
        given = {key: given[key] for key in given if key in keys}
        if self.has_embedding:
            given["drug"] = np.tile(DRUG[dose], (n, 1))
        return given or pd.DataFrame(index=range(n))

    def verbs(self):
        """Every verb on given cells, by name, with few draws."""
        model = self.model
        verbs = {
            "sample": lambda a: model.sample(a, 2, seed=0, **QUIET),
            "predict": lambda a: model.predict(a, n_samples=20, copy=True, seed=0, **QUIET),
            "denoise": lambda a: model.denoise(a, n_samples=3, copy=True, seed=0, **QUIET),
            "log_likelihood": lambda a: model.log_likelihood(a, n_samples=2, seed=0, **QUIET),
            "latent": lambda a: _latent(model, a),
            "posterior_predictive_sample": lambda a: model.posterior_predictive_sample(a, seed=0),
        }
        if not self.has_noise:
            del verbs["denoise"], verbs["posterior_predictive_sample"]
            verbs["log_likelihood"] = (
                lambda a: model.log_likelihood(  # of 30 dimensions: slow
                    a[:20].copy(), n_samples=2, seed=0, **QUIET
                )
            )
        if self.has_label:
            verbs["counterfactual"] = lambda a: model.counterfactual(
                a, to={"cell_type": "type_1"}, n_samples=3, seed=0, **QUIET
            )
        return verbs


@pytest.fixture(scope="module")
def _trained():
    return {}


@pytest.fixture(params=CASES)
def case(request, _trained):
    key = request.param
    name = str(key)
    if name not in _trained:
        _trained[name] = Case(*key)
    return _trained[name]


def _latent(model, adata=None, **kwargs):
    """The representation, declaring the warning that models with conditions give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The latent representation is computed given")
        return model.get_latent_representation(adata, **QUIET, **kwargs)


def _dense(matrix):
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def _digest(adata):
    """Everything in an AnnData, so that any change shows."""
    parts = {"X": adata.X, **{("layer", k): v for k, v in adata.layers.items()}}
    parts |= {("obsm", k): v for k, v in adata.obsm.items()}
    digest = {key: _dense(value).tobytes() for key, value in parts.items()}
    digest["obs"] = pd.util.hash_pandas_object(adata.obs).tolist(), list(adata.obs.dtypes)
    digest["var"] = pd.util.hash_pandas_object(adata.var).tolist()
    return digest | {"uns": sorted(adata.uns)}


def _states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def _equal(a, b):
    """Whether two answers are the same, bit by bit."""
    if hasattr(a, "obs"):
        return _digest(a) == _digest(b)
    a, b = (x.todense() if hasattr(x, "todense") else x for x in (a, b))
    return np.array_equal(a, b)


# Complete ---------------------------------------------------------------------------------


def test_samples_are_cells_with_their_conditions(case):
    model, adata = case.model, case.adata
    question = case.question(n=2)
    cells = model.sample(question, n_obs=30, seed=0, **QUIET)
    assert cells.shape == (60, adata.n_vars)
    assert list(cells.var_names) == list(adata.var_names)
    assert cells.obs_names.is_unique
    assert cells.obs_names[1] == "synthetic_1"
    assert isinstance(cells.X, sparse.csr_matrix if case.is_count else np.ndarray)
    assert cells.X.dtype == np.float32
    counts = _dense(cells.X)
    assert np.isfinite(counts).all()
    assert (counts >= np.asarray(model.module.space.likelihood.lower)).all()
    assert (counts == np.round(counts)).all() == case.is_count
    np.testing.assert_array_equal(counts, _dense(cells.layers[case.layer]))
    for key in model.schema.column_keys:
        assert cells.obs[key].notna().all()
        if key != "donor":
            assert cells.obs[key].dtype == adata.obs[key].dtype
        if key in question:
            assert (cells.obs[key] == question[key][0]).all()
    if case.has_embedding:
        np.testing.assert_allclose(cells.obsm["drug"], DRUG[np.zeros(60, int)])
    assert cells.obs["synthetic"].all()
    assert (cells.obs["support"] == "seen").all()
    assert (cells.obs["n_train"] > 50).all()
    assert not cells.obs["extrapolated"].any()
    if not case.is_count:
        assert "library" not in cells.obs
    elif "size_factor_key" in case.roles:
        ratio = np.median(cells.obs["library"]) / np.median(adata.obs["depth"])
        assert ratio == pytest.approx(1, abs=0.3)
    else:
        np.testing.assert_array_equal(cells.obs["library"], counts.sum(1))
    provenance = cells.uns["exprgen"]
    assert provenance["model"] == case.model_class.__name__
    assert (provenance["seed"], provenance["layer"]) == (0, case.layer)
    assert provenance["size_factor_key"] == case.roles.get("size_factor_key", "")


def test_statistics_are_complete_and_consistent(case):
    adata = case.adata.copy()
    keys = set(adata.layers), set(adata.obs), set(adata.obsm)
    returned = case.model.predict(adata, n_samples=200, seed=0, **QUIET)
    assert returned is adata
    terms = ["std_latent"] + ["std_donor"] * case.has_donor
    expected = {f"exprgen_{name}" for name in ["mean", "std", "q05", "q95", *terms]}
    assert set(adata.layers) - keys[0] == expected
    assert set(adata.obs) - keys[1] == {"exprgen_split"}
    assert set(adata.obsm) == keys[2]
    layers = {name.removeprefix("exprgen_"): adata.layers[name] for name in expected}
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in layers.values())
    assert (layers["q05"] <= layers["q95"]).all()
    assert (layers["mean"] > 0).mean() > 0.99
    parts = sum(layers[term] ** 2 for term in terms)
    if not case.has_noise:
        np.testing.assert_allclose(parts, layers["std"] ** 2, rtol=1e-5)
    else:
        assert (layers["mean"] > 0).all()
        assert (parts < layers["std"] ** 2).all()
    assert (adata.obs["exprgen_split"] == "train").sum() == len(case.model.train_indices)
    if not case.has_noise:
        return
    case.model.denoise(adata, n_samples=3, seed=0, **QUIET)
    for name in ("denoised", "denoised_std"):
        layer = adata.layers[f"exprgen_{name}"]
        assert np.isfinite(layer).all()
        assert (layer >= 0).all()
    correlation = stats.spearmanr(adata.layers["exprgen_denoised"].ravel(), case.values.ravel())
    assert correlation.statistic > 0.68
    if case.is_count and not case.has_donor and "size_factor_key" not in case.roles:
        case.model.denoise(adata, library=1e4, n_samples=3, seed=0, **QUIET)
        np.testing.assert_allclose(adata.layers["exprgen_denoised"].sum(1), 1e4, rtol=1e-4)


def test_given_cells_are_answered_in_order(case):
    model, adata = case.model, case.adata
    n_samples = 2 if case.has_noise else 1
    likelihood = model.log_likelihood(n_samples=n_samples, seed=0, **QUIET)
    assert likelihood.shape == (adata.n_obs,)
    assert likelihood.dtype == np.float64
    assert np.isfinite(likelihood).all()
    assert (likelihood < 0).all() or not case.is_count
    mean, sd = _latent(model, return_dist=True)
    assert mean.shape == sd.shape == (adata.n_obs, 3)
    assert np.isfinite(mean).all()
    assert (sd > 0).all()
    some = np.array([7, 3, 3, -1])
    np.testing.assert_allclose(_latent(model, indices=some), mean[some], atol=1e-5)
    shuffled = adata[::-1].copy()
    np.testing.assert_allclose(_latent(model, shuffled), mean[::-1], atol=1e-5)
    if not case.has_noise:
        return
    draws = model.posterior_predictive_sample(indices=some, n_samples=6, seed=0)
    assert draws.shape == (4, adata.n_vars, 6)
    assert (draws.todense() == np.round(draws.todense())).all() == case.is_count


def test_the_latent_of_a_model_with_conditions_warns(case):
    if case.has_label and case.has_noise:
        with pytest.warns(UserWarning, match="computed given"):
            case.model.get_latent_representation(**QUIET)
    else:
        case.model.get_latent_representation(**QUIET)


# Of the right law -------------------------------------------------------------------------


def test_predictions_summarise_samples(case):
    """Means, spread and quantiles are those of cells drawn one by one, each of a new donor."""
    n = 4000
    sampled = _dense(case.model.sample(case.question(n=n), seed=1, **QUIET).X)
    law = case.model.predict(case.question(), n_samples=4000, seed=2, **QUIET)
    mean, std, low, high = (law.layers[f"exprgen_{k}"][0] for k in ("mean", "std", "q05", "q95"))
    error = np.abs(sampled.mean(0) - mean) / (std * np.sqrt(2 / n))
    assert error.max() < 4.5
    # The spread of rare genes is that of a handful of large counts, of outliers above all.
    ratio = (sampled.std(0) / std)[mean > 0.5]
    assert np.median(ratio) == pytest.approx(1, abs=0.1)
    assert ((ratio > 0.7) & (ratio < 1.4)).mean() > 0.9
    inside = ((low <= sampled) & (sampled <= high)).mean(0)
    assert (inside > 0.88).all()
    assert (((low < sampled) & (sampled < high)).mean(0) < 0.92).all()


def test_sampled_labels_differ_as_real_ones_do(case):
    """Strong differences of the truth come out with their sign and size."""
    counts, labels = case.values, case.adata.obs["cell_type"]
    if not case.has_label:
        sampled = _dense(case.model.sample(None, 1500, seed=0, **QUIET).X)
        ratio = sampled.mean(0) / counts.mean(0)
        assert 0.8 < np.median(ratio) < 1.25
        assert np.corrcoef(np.log1p(sampled.mean(0)), np.log1p(counts.mean(0)))[0, 1] > 0.98
        return
    real, drawn = [], []
    for label in labels.cat.categories:
        rows = (labels == label).to_numpy()
        if case.has_embedding:
            rows = rows & (case.adata.obs["dose"] == 0).to_numpy()
        cells = case.model.sample(case.question(label, n=300), seed=0, **QUIET)
        real.append(case.profile(counts[rows]))
        drawn.append(case.profile(cells.X))
    real, drawn = np.array(real) - np.mean(real, 0), np.array(drawn) - np.mean(drawn, 0)
    assert np.corrcoef(real.ravel(), drawn.ravel())[0, 1] > 0.9
    strong = np.abs(real) > 1
    assert strong.sum() >= 5
    assert (np.sign(real[strong]) == np.sign(drawn[strong])).all()


@pytest.mark.parametrize("case", [c for c in CASES if "embedding" in c.id], indirect=True)
def test_a_quantity_and_an_embedding_change_what_is_sampled(case):
    counts, dose = case.values, case.adata.obs["dose"].to_numpy()
    rows = (case.adata.obs["cell_type"] == "type_0").to_numpy()
    real = [case.profile(counts[rows & (dose == d)]) for d in (0, 5)]
    drawn = [
        case.profile(case.model.sample(case.question(n=500, dose=d), seed=0, **QUIET).X)
        for d in (0, 1)
    ]
    assert np.corrcoef(real[1] - real[0], drawn[1] - drawn[0])[0, 1] > 0.8


def test_batch_and_donor_are_marginalised_unless_given(case):
    model = case.model
    cells = model.sample(case.question(), n_obs=100, seed=0, **QUIET)
    assert cells.n_obs == 100
    if not case.has_donor:
        return
    trained = set(case.adata.obs["donor"])
    assert cells.obs["donor"].nunique() == 1
    assert not trained & set(cells.obs["donor"].astype(str))
    batches = {"batch_0", "batch_1"} if "batch_key" in case.roles else set()
    assert set(cells.obs.get("batch", ())) <= batches
    many = model.sample(case.question(n=200), seed=0, **QUIET)
    assert many.obs["donor"].nunique() == 200
    assert set(many.obs.get("batch", ())) == batches
    # Rows of one donor share its effect; a known donor's is its own.
    question = {**case.question(n=4), **({"batch": "batch_0"} if batches else {})}
    question["donor"] = ["donor_0", "new", "new", "newer"]
    cells = model.sample(question, 1000, seed=0, **QUIET)
    assert list(cells.obs["donor"][::1000]) == question["donor"]
    means = np.stack([case.profile(cells[1000 * i : 1000 * (i + 1)].X) for i in range(4)])
    means = means[:, means.min(0) > np.log(1.1) * case.is_count]
    same, apart = (np.square(means[i] - means[i + 1]).mean() for i in (1, 2))
    assert same < 0.3 * apart


def test_leaving_conditions_to_the_model_draws_them_as_trained(case):
    model = case.model
    if case.has_embedding:
        with pytest.raises(CovariateError, match="drug"):
            model.sample(None, 10, seed=0, **QUIET)
        question = {k: v for k, v in case.question(n=400).items() if k != "dose"}
        cells = model.sample(question, marginalize=["dose"], seed=0, **QUIET)
        assert set(cells.obs["dose"]) == {0.0, 5.0}
        return
    cells = model.sample(None, 2000, seed=0, **QUIET)
    assert cells.n_obs == 2000
    keys = [key for key in model.schema.column_keys if key != "donor"]
    if keys:
        frame = model.conditions.set_index(keys)["n_train"]
        drawn = cells.obs.groupby(keys, observed=True).size().reindex(frame.index).fillna(0)
        expected = frame / frame.sum() * 2000
        assert stats.chisquare(drawn, expected).pvalue > 1e-3
    if case.has_label:
        cells = model.sample(case.adata, marginalize=["cell_type"], seed=0, **QUIET)
        agreement = cells.obs["cell_type"].to_numpy() == case.adata.obs["cell_type"].to_numpy()
        assert agreement.mean() < 0.5


COUNTS = [c for c in CASES if c.values[0][0].needs_counts and "in_genes" not in c.values[0][1]]


@pytest.mark.parametrize("case", COUNTS, indirect=True)
def test_depth_can_be_fixed_and_effects_planted(case):
    gene, n = case.adata.var_names[np.argmax(case.adata.layers["counts"].mean(0).A1)], 1500
    row = list(case.adata.var_names).index(gene)
    args = {"library": 800.0, "seed": 0, **QUIET}
    question = case.question()
    plain = case.model.sample(question, n, **args).X.toarray()
    if "size_factor_key" not in case.roles and not case.has_donor:
        total = plain.sum(1)
        assert abs(total.mean() - 800) < 5 * total.std() / np.sqrt(n) + 5
    shifted = case.model.sample(question, n, log_fold_change={gene: 1.5}, **args).X.toarray()
    ratio = shifted.mean(0) / np.maximum(plain.mean(0), 1e-9)
    assert ratio[row] == pytest.approx(2**1.5, rel=0.15)
    common = plain.mean(0) > 0.5
    common[row] = False
    assert np.median(ratio[common]) == pytest.approx(1, abs=0.05)


def test_counterfactuals_take_the_other_labels_expression(case):
    if not case.has_label:
        with pytest.raises(KeyError):
            case.model.counterfactual(to={"cell_type": "type_1"}, **QUIET)
        return
    adata, model = case.adata, case.model
    rows = np.flatnonzero(adata.obs["cell_type"] == "type_0")
    cells = model.counterfactual(
        to={"cell_type": "type_1"}, indices=rows, n_samples=5, seed=0, **QUIET
    )
    assert list(cells.obs["source"]) == list(adata.obs_names[rows])
    assert (cells.obs["cell_type"] == "type_1").all()
    for key in {"dose", "batch", "donor"} & set(model.schema.column_keys):
        assert (cells.obs[key].astype(str).values == adata.obs[key].iloc[rows].astype(str)).all()
    counts = _dense(cells.X)
    assert (counts == np.round(counts)).all() == case.is_count
    np.testing.assert_array_equal(counts, _dense(cells.layers[case.layer]))
    assert (cells.layers["exprgen_mean"] >= 0).all()
    own, other = (
        np.log1p(case.values[(adata.obs["cell_type"] == f"type_{k}").to_numpy()].mean(0))
        for k in (0, 1)
    )
    got = np.log1p(counts.mean(0))
    assert np.abs(got - other).mean() < 0.5 * np.abs(own - other).mean()
    # Nothing changes where nothing is asked to change, but for noise.
    same = model.counterfactual(
        to={"cell_type": "type_0"}, indices=rows, n_samples=5, seed=0, **QUIET
    )
    assert np.abs(np.log1p(_dense(same.X).mean(0)) - own).mean() < 0.15


# Residuals are held gene by gene, see test_hybrid.py.
WITH_STATE = [c for c in CASES if "donor" in c.id and "residuals" not in c.id]


@pytest.mark.parametrize("case", WITH_STATE, indirect=True)
def test_counterfactuals_keep_a_cells_place_relative_to_its_conditions_mean(case, monkeypatch):
    space, prior, seen = case.model.module.space, case.model.module.autoencoder_prior, []
    decode_at = space.decode_at

    def spy(z, log_depth, c, effect=None):
        seen.append((z, log_depth, c))
        return decode_at(z, log_depth, c, effect)

    monkeypatch.setattr(space, "decode_at", spy)
    rows = np.flatnonzero(case.adata.obs["cell_type"] == "type_0")
    case.model.counterfactual(
        to={"cell_type": "type_2"}, indices=rows, n_samples=50, seed=0, **QUIET
    )
    x, c, library = case.model._cells(None, rows).tensors(slice(None), torch.device("cpu"))
    with torch.no_grad():
        mean, sd = space.encode(x, c, library)
        new_c = seen[0][2]
        shift = prior.mean(space.density_features(new_c))
        shift -= prior.mean(space.density_features(c))
    width = space.features.layout.width
    assert (new_c[:, 0] == 2).all()
    assert torch.equal(new_c[:, 1:width], c[:, 1:width])
    assert shift[:, :3].abs().max() > 0.1
    error = torch.stack([z for z, *_ in seen]).mean(0) - (mean + shift)[:, :3]
    assert (error.abs() < 5 * sd[:, :3] / np.sqrt(50)).all()
    if not case.is_count:
        return
    with torch.no_grad():
        depth = space.log_depth(mean, c)
    kept = torch.stack([log_depth for _, log_depth, _ in seen]).mean(0) - depth
    assert (kept.abs() < 5 * sd[:, -1] * space.depth.scale / np.sqrt(50)).all()


def test_more_samples_tighten_the_bound(case):
    cells = np.arange(150 if case.has_noise else 40)
    values = [
        case.model.log_likelihood(indices=cells, n_samples=k, seed=0, **QUIET).mean()
        for k in (1, 10)
    ]
    # Genes that hardly depend on each other leave nothing to tighten.
    assert values[0] - 0.2 * case.in_genes <= values[1] < values[0] + 10


@pytest.mark.parametrize("case", [c for c in CASES if c.id == "CondVAE, label"], indirect=True)
def test_a_model_of_continuous_values_refuses_what_is_about_counts(case):
    model, gene = case.model, case.adata.var_names[0]
    for verb, wrong in [
        (model.sample, {"library": 800.0}),
        (model.sample, {"log_fold_change": {gene: 1.0}}),
        (model.predict, {"library": 800.0}),
        (model.denoise, {"library": 1e4}),
        (model.log_likelihood, {"given": "depth"}),
    ]:
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"{name}=.*CondVAE.*normalised for depth"):
            verb(case.adata.copy(), **wrong)
    with pytest.raises(SetupError, match="size_factor_key='depth'"):
        CondVAE.setup_anndata(_cells(), layer="log", size_factor_key="depth")


# Repeatable -------------------------------------------------------------------------------


def test_a_seed_fixes_the_answer_and_touches_nothing_else(case):
    question = case.question(n=3)
    before = _states()
    first, again, other = (case.model.sample(question, 20, seed=s, **QUIET) for s in (1, 1, 2))
    assert _equal(first, again)
    assert not np.array_equal(_dense(first.X), _dense(other.X))
    for verb in case.verbs().values():
        assert _equal(verb(case.adata), verb(case.adata))
    assert _states() == before


def test_cells_of_a_block_do_not_depend_on_how_many_follow(case):
    """Blocks have 512 cells, and noise of their own."""
    question = case.question()
    args = {"seed": 3, **QUIET}
    few, many = (_dense(case.model.sample(question, n, **args).X) for n in (512, 1100))
    np.testing.assert_array_equal(few, many[:512])
    assert not np.array_equal(many[:512], many[512:1024])


def test_a_loaded_model_answers_the_same(case, tmp_path):
    case.model.save(tmp_path / "model", donor_labels=True)
    alone = case.model_class.load(tmp_path / "model", adata=False, accelerator="cpu")
    question = case.question(n=2)
    expected = case.model.sample(question, 40, seed=0, **QUIET)
    assert _equal(alone.sample(question, 40, seed=0, **QUIET), expected)
    pd.testing.assert_frame_equal(alone.conditions, case.model.conditions)
    fresh = _cells()
    attached = case.model_class.load(tmp_path / "model", fresh, accelerator="cpu")
    for ours, theirs in zip(
        case.verbs().values(), _verbs_of(case, attached).values(), strict=True
    ):
        assert _equal(ours(case.adata), theirs(case.adata))
    np.testing.assert_array_equal(
        attached.log_likelihood(indices=[7, 3], n_samples=3, seed=0, **QUIET),
        case.model.log_likelihood(indices=[7, 3], n_samples=3, seed=0, **QUIET),
    )


def _verbs_of(case, model):
    other = copy.copy(case)
    other.model = model
    return other.verbs()


# Harmless ---------------------------------------------------------------------------------


def test_verbs_leave_what_they_are_given_alone(case):
    adata = case.adata.copy()
    before = _digest(adata)
    weights = {k: v.clone() for k, v in case.model.module.state_dict().items()}
    for name, verb in case.verbs().items():
        verb(adata)
        assert _digest(adata) == before, name
    assert all(torch.equal(v, weights[k]) for k, v in case.model.module.state_dict().items())
    assert not case.model.module.training


def test_the_gradient_reaches_every_parameter(case):
    module = copy.deepcopy(case.model.module).train()
    dataset, _ = case.model._training_cells()
    dataset = case.model._with_training_means(dataset, np.arange(400), np.arange(400, 500))
    if not case.in_genes:
        _, _, output = module(dataset[np.arange(100)], loss_kwargs={"n_obs_training": 100})
        output.loss.backward()
        assert torch.isfinite(output.loss.detach())
    if module.has_density_stage:
        # The second stage's own; the first left these alone.
        assert all(p.grad is None for p in module.density.parameters())
        encoded = EncodedDataset(dataset, module.space, torch.device("cpu"))
        plan = DensityTrainingPlan(module)
        loss, _ = plan.step(encoded[np.arange(100)], torch.Generator().manual_seed(0))
        loss.backward()
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.numel()]
    assert len(trained) > 10 or not (module.has_density_stage or module.space.is_learned)
    for name, parameter in trained:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
