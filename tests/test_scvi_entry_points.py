"""scvi-tools' own entry points on these models: each works, or is refused with a reason.

What its base class has in public is listed by introspection, so that a new version's methods are
noticed.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData
from faults import (
    MODELS,
    N_OBS,
    N_VARS,
    PATHS,
    ROLES,
    TINY,
    TINY_PATH,
    assert_same,
    every_class,
    fit,
    latent_of,
    layer_of,
    make_cells,
    refused,
    set_up,
    trained_on_all_roles,
    untouched,
)
from scvi.criticism import PosteriorPredictiveCheck
from scvi.model.base import BaseModelClass
from scvi.train import SaveCheckpoint

from exprgen import NBVAE
from exprgen._errors import CheckpointError
from exprgen.models import GenerativeModel

parametrize = pytest.mark.parametrize

WORKS = {
    "adata": AnnData,
    "adata_manager": scvi.data.AnnDataManager,
    "device": torch.device,
    "get_normalized_function_name": str,
    "history": dict,
    "is_trained": bool,
    "registry": dict,
    "run_id": str,
    "run_name": str,
    "summary_string": str,
    "test_indices": np.ndarray,
    "train_indices": np.ndarray,
    "validation_indices": np.ndarray,
}
"""Properties, and what they are of a trained model."""

VIEWS = ("view_anndata_setup", "view_registry", "view_setup_method_args")

REFUSED = {
    "transfer_fields": ["match genes by name", ".load(path, adata)"],
    "update_setup_method_args": ["setup_anndata", "new model"],
    "get_normalized_expression": ["denoise()", "predict()"],
    "differential_abundance": ["exprgen.tl.effect"],
}
"""Methods, and what their refusal names instead."""

TESTED_HERE = {
    "data_registry", "deregister_manager", "get_anndata_manager", "get_from_registry",
    "get_setup_arg", "get_state_registry", "get_var_names", "register_manager", "to_device",
}  # fmt: skip
OWN_VERBS = {
    "convert_legacy_save", "load", "load_registry", "save", "setup_anndata", "train",
    "view_setup_args",
}  # fmt: skip
"""Of scvi-tools' contract; the other tests are about them."""


@pytest.fixture(params=MODELS, ids=lambda model_class: model_class.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return trained_on_all_roles(request.param)


@pytest.fixture
def without_data(model, tmp_path) -> Any:
    model.save(tmp_path / "model")
    return type(model).load(tmp_path / "model")


def build(model_class: type[GenerativeModel]) -> Any:
    """Not yet trained."""
    adata = make_cells()
    set_up(adata, model_class, **ROLES)
    return model_class(adata, seed=0, **(TINY_PATH if model_class in PATHS else TINY))


def train(model: Any, max_epochs: int = 3, **kwargs: Any) -> None:
    second = {"density_kwargs": {"max_epochs": max_epochs}} if type(model) in PATHS else {}
    model.train(max_epochs, progress_bar=False, **second, **kwargs)


# ------------------------------------------------------------------------- what is inherited


def test_nothing_of_the_base_class_is_left_out():
    public = {name for name in dir(BaseModelClass) if not name.startswith("_")}
    assert public == {*WORKS, *VIEWS, *REFUSED, *TESTED_HERE, *OWN_VERBS}


def test_no_inherited_method_reads_files():
    """Whatever unpickles is overridden: of the base class' own code none is reached."""
    for name in ("load", "load_registry", "view_setup_args", "convert_legacy_save", "save"):
        assert inspect.unwrap(getattr(NBVAE, name)).__module__.startswith("exprgen.")


def test_properties(model):
    for name, kind in WORKS.items():
        assert isinstance(getattr(model, name), kind), name
    assert "Trained" in model.summary_string
    rows = model.train_indices, model.validation_indices, model.test_indices
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(N_OBS))


def test_methods_that_read(model):
    assert list(model.get_var_names()) == [f"gene_{i}" for i in range(N_VARS)]
    layer = layer_of(type(model))
    own = model.adata.layers[layer]
    assert_same(model.data_registry("X"), own)
    assert_same(model.get_from_registry(model.adata, "X"), own)
    assert model.get_setup_arg("layer") == layer
    assert list(model.get_state_registry("X")["column_names"]) == list(model.var_names)
    assert model.get_anndata_manager(model.adata) is model.adata_manager
    assert model.get_anndata_manager(make_cells()) is None
    with refused(KeyError, "'conditions'", "'X'", "adata.obs", of=model.adata):
        model.data_registry("conditions")
    other = make_cells()
    with refused(ValueError, "model.adata", "adata.layers", of=other):
        model.get_from_registry(other, "X")
    before = latent_of(model)
    model.to_device("cpu")
    np.testing.assert_array_equal(latent_of(model), before)


@parametrize("name", VIEWS)
def test_views_print_what_setup_was_told(model, without_data, name, capsys):
    for of in (model, without_data):
        getattr(of, name)()
        said = capsys.readouterr().out
        for word in (type(model).__name__, "setup_anndata", "'donor_key': 'donor'", "'dose'"):
            assert word in said
    if name == "view_anndata_setup":
        other = make_cells()
        with refused(ValueError, "model.adata", of=other):
            model.view_anndata_setup(other)


@parametrize("name", REFUSED)
def test_refusals_say_what_to_use_instead(model, name):
    other = make_cells()
    with refused(NotImplementedError, type(model).__name__, name, *REFUSED[name], of=other):
        getattr(model, name)(other)


def test_data_cannot_be_exchanged(model, tmp_path):
    """The base class lets them: then a model with permuted genes answered, off by nats."""
    other = make_cells()[:, ::-1].copy()
    own, before = model.adata, model.log_likelihood(n_samples=2, seed=0)
    with refused(AttributeError, "adata cannot be replaced", "load(path, cells)", of=other):
        model.adata = other
    assert model.adata is own
    np.testing.assert_array_equal(model.log_likelihood(n_samples=2, seed=0), before)
    model.save(tmp_path / "model", donor_labels=True)
    attached = type(model).load(tmp_path / "model", other)  # the advice works
    # Up to Monte Carlo: totals differ in their last digits.
    np.testing.assert_allclose(attached.log_likelihood(n_samples=2, seed=0), before, rtol=1e-4)


def test_managers_can_be_forgotten(without_data):
    adata = make_cells()
    model = fit(adata, model_class=type(without_data), **ROLES)
    before = latent_of(model)
    other = make_cells()
    set_up(other, type(model), **ROLES)
    model.deregister_manager()
    with pytest.raises(ValueError, match="setup_anndata first"):
        type(model)(other)
    model.deregister_manager(adata)
    np.testing.assert_array_equal(latent_of(model), before)
    with pytest.raises(ValueError, match="loaded without data"):
        without_data.deregister_manager()


# ------------------------------------------------------------------------------- checkpoints

WATCHED = {True: "density_loss_validation", False: "elbo_validation"}
"""What a model of two stages, or of one, logs in the stage that ends with a whole model."""


@every_class
def test_save_checkpoint(tmp_path, model_class):
    model, plain = build(model_class), build(model_class)
    monitor = WATCHED[model_class in PATHS]
    saving = SaveCheckpoint(dirpath=str(tmp_path), monitor=monitor, save_top_k=-1)
    train(model, trainer_kwargs={"callbacks": [saving]})
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3
    assert all(sorted(os.listdir(f)) == ["manifest.json", "model.pt"] for f in folders)
    # Watching changes nothing, and what is saved as best is what train() keeps.
    train(plain)
    assert plain._fingerprint() == model._fingerprint()
    best = model_class.load(saving.best_model_path)
    values = model.history[monitor].to_numpy(dtype=float).ravel()
    assert float(saving.best_model_score) == pytest.approx(values.min())
    if model_class not in PATHS:  # in the second stage, train() keeps averaged weights
        assert best._fingerprint() == model._fingerprint()
        assert best.train_indices is None  # as the guide says
    assert np.isfinite(best.sample(n_obs=5, seed=0).to_df().to_numpy()).all()


@parametrize("model_class", PATHS)
@parametrize(
    "trainer_kwargs",
    [{"callbacks": "elbo_validation"}, {"callbacks": "validation_loss"},
     {"enable_checkpointing": True}],
)  # fmt: skip
def test_no_checkpoints_of_half_a_model(tmp_path, model_class, trainer_kwargs):
    """In the first stage the density is not trained, and a checkpoint would say that it is."""
    model = build(model_class)
    if "callbacks" in trainer_kwargs:
        saving = SaveCheckpoint(dirpath=str(tmp_path), monitor=trainer_kwargs["callbacks"])
        trainer_kwargs = {"callbacks": [saving]}
    before = model._fingerprint()
    with refused(ValueError, "whole models", "density_loss_validation", of=model.adata):
        train(model, trainer_kwargs=trainer_kwargs)
    assert model._fingerprint() == before
    assert not model.is_trained
    assert not list(tmp_path.iterdir())


@every_class
def test_the_best_checkpoint_can_be_taken_at_the_end(tmp_path, model_class, capsys):
    model = build(model_class)
    monitor = WATCHED[model_class in PATHS]
    saving = SaveCheckpoint(dirpath=str(tmp_path), monitor=monitor, load_best_on_end=True)
    train(model, trainer_kwargs={"callbacks": [saving]})
    assert model.is_trained
    assert np.isfinite(model.sample(n_obs=5, seed=0).to_df().to_numpy()).all()


# --------------------------------------------------------------- posterior predictive checks


def test_posterior_predictive_check(model):
    """Of dense values; scvi-tools cannot tell whether sparse floats are whole numbers."""
    cells = model.adata.copy()
    cells.layers["dense"] = cells.layers[layer_of(type(model))].toarray()
    check = PosteriorPredictiveCheck(cells, {"ours": model}, count_layer_key="dense", n_samples=20)
    check.zero_fraction()
    zeros = check.metrics["zero_fraction"]
    assert set(zeros) == {"ours", "Raw"}
    # By hand: scvi-tools' "fraction" is that of what is not 0.
    np.testing.assert_allclose(zeros["Raw"], (cells.layers["dense"] != 0).mean(0), atol=1e-6)
    drawn = model.posterior_predictive_sample(n_samples=20).todense() != 0
    np.testing.assert_allclose(zeros["ours"], drawn.mean((0, 2)), atol=0.08)


# ------------------------------------------------------------------------------------ autotune


def test_autotune_names_what_is_missing():
    pytest.importorskip("scvi.autotune")
    try:
        import ray.tune  # noqa: F401
    except ImportError:
        with pytest.raises(ModuleNotFoundError, match="ray"):
            scvi.autotune.run_autotune(NBVAE, make_cells(), "elbo_validation", "min", {}, 1)
    else:
        pytest.skip("Ray is installed")


@every_class
def test_what_autotune_gives_to_train_is_refused_at_once(model_class):
    """Words of scvi-tools' trainer, which train() takes in trainer_kwargs or by other names."""
    model = build(model_class)
    given = {"check_val_every_n_epoch": 1, "enable_progress_bar": False, "callbacks": []}
    for word, value in given.items():
        with refused(TypeError, word, of=model.adata):
            model.train(accelerator="auto", devices="auto", **{word: value})
    assert not model.is_trained


@every_class
def test_a_search_by_hand(model_class):
    """The recipe of the user guide: a new model per trial, compared by its history."""
    best = {}
    for n_latent in (2, 3):
        adata = make_cells()
        setup = {name: value for name, value in ROLES.items() if name != "layer"}
        model_class.setup_anndata(adata, layer=layer_of(model_class), **setup)
        sizes = TINY_PATH if model_class in PATHS else TINY
        model = model_class(adata, seed=0, **{**sizes, "n_latent": n_latent})
        train(model)
        best[n_latent] = float(model.history["elbo_validation"].min().iloc[0])
    assert np.isfinite(list(best.values())).all()
    assert len(set(best.values())) == 2


# ----------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub() -> Any:
    pytest.importorskip("huggingface_hub")
    import scvi.hub

    return scvi.hub


def card(folder: Path) -> str:
    path = folder / "README.md"
    path.write_text("---\nlicense: mit\n---\nA model.\n")
    return str(path)


def test_hub_model_of_a_folder(hub, model, tmp_path):
    folder, adata = tmp_path / "model", make_cells()
    model.save(folder, donor_labels=True)
    about = hub.HubMetadata.from_dir(str(folder), "0.12", model_parent_module="exprgen")
    assert about.model_cls_name == type(model).__name__
    kept = hub.HubModel(str(folder), metadata=about, model_card=card(tmp_path))
    kept.save()
    found = hub.HubModel(str(folder))
    found.load_model(adata=adata)
    np.testing.assert_array_equal(latent_of(found.model), latent_of(model))
    # What it pulls is model.pt alone, and not what verifies it.
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        hub.HubModel(str(folder)).load_model(adata=adata)


def test_hub_cards_are_for_its_own_classes(hub, model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="not recognized"):
        hub.HubModelCardHelper.from_dir(str(tmp_path / "model"), "mit", "0.12")


def test_a_folder_as_hubs_cache_it(model, tmp_path):
    """Files of a snapshot are links to a store beside it; they are read, and verified."""
    model.save(tmp_path / "model", donor_labels=True)
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    (tmp_path / "model").rename(store)
    snapshot.mkdir()
    for name in os.listdir(store):
        (snapshot / name).symlink_to(store / name)
    loaded = type(model).load(snapshot)
    assert loaded._fingerprint() == model._fingerprint()


def test_metadata_of_a_stranger_are_read_without_pickle(model, tmp_path):
    """As the guide says: HubMetadata.from_dir unpickles, load_registry and the manifest do not."""

    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch '{tmp_path / 'sentinel'}'",)

    model.save(tmp_path / "model")
    assert (
        json.loads((tmp_path / "model/manifest.json").read_text())["class"] == type(model).__name__
    )
    (tmp_path / "model" / "model.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        type(model).load_registry(tmp_path / "model")
    assert not (tmp_path / "sentinel").exists()


def test_predict_on_other_cells_registers_nothing(model):
    other = make_cells()
    with untouched(other):
        latent_of(model, other)
    assert model.get_anndata_manager(other) is None
