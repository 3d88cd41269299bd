"""The fault catalogue, rows B01 to B20: what stops training, and how it is taken up again.

A test per row, by its id, over the models it applies to; ``test_train.py`` has what training
does. There is no B20: cells are read in the process that trains, so that no worker can die.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from faults import (
    MODELS,
    PATHS,
    ROLES,
    TINY,
    assert_same,
    make_cells,
    refused,
    trained_on_all_roles,
    untouched,
    warned,
    write_zarr,
)
from lightning.pytorch import Callback
from scipy import sparse
from scvi import settings

from exprgen import NBVAE, ZINBVAE, CondVAE, ExprFlow, HybridResidualModel
from exprgen._errors import (
    CheckpointError,
    ReproducibilityWarning,
    TrainingDivergedError,
    TrainingStoppedWarning,
    UntrustedFileError,
)
from exprgen._manifest import checksum, describe
from exprgen.datasets import open_zarr
from exprgen.train import TrainingCheckpoint, _checkpoint

parametrize = pytest.mark.parametrize
every_model = parametrize("model", MODELS, indirect=True, ids=lambda model: model.__name__)
forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, as Unix has it"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
N_EPOCHS, N_BATCHES = 3, 3
T0 = {"cell_type": "type_0", "dose": 1.0}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    return untrained(getattr(request, "param", NBVAE))


@pytest.fixture(autouse=True)
def every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints whatever they cost, to have one of the epoch before."""
    monkeypatch.setattr(_checkpoint, "_MOST_OF_TIME", 1e9)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell has what it runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def untrained(model_class: type[NBVAE], cells: AnnData | None = None) -> Any:
    """Set up and built as the trained model that other tests have, with seed 0."""
    like = trained_on_all_roles(model_class)
    cells = like.adata.copy() if cells is None else cells
    model_class.setup_anndata(cells, **like.registry_["setup_args"])
    return model_class(cells, **like.init_params_["non_kwargs"] | {"seed": 0})


def train(model: Any, *callbacks: Callback, **kwargs: Any) -> None:
    """Three epochs of three batches, in every stage."""
    if model.module.has_density_stage:
        sizes = {"max_epochs": N_EPOCHS, "batch_size": 30}
        kwargs["density_kwargs"] = sizes | kwargs.get("density_kwargs", {})
    kwargs = {"max_epochs": N_EPOCHS, "batch_size": 30, "progress_bar": False} | kwargs
    trainer_kwargs = {"callbacks": list(callbacks), **kwargs.pop("trainer_kwargs", {})}
    model.train(trainer_kwargs=trainer_kwargs, **kwargs)


@cache
def uninterrupted(model_class: type[NBVAE]) -> Any:
    model = untrained(model_class)
    train(model)
    return model


def assert_as_uninterrupted(model: Any) -> None:
    """Weights, history and cells, bit by bit."""
    expected = uninterrupted(type(model))
    assert model._fingerprint() == expected._fingerprint()
    assert list(model.history) == list(expected.history)
    for name, values in expected.history.items():
        assert_same(model.history[name], values)
    np.testing.assert_array_equal(model.train_indices, expected.train_indices)
    assert_same(model.sample(T0, 20, seed=0).X, expected.sample(T0, 20, seed=0).X)
    assert not model.module.training


class At(Callback):
    """Does something after a batch of an epoch of a stage, by default the last."""

    def __init__(
        self, epoch: int, action: Callable[..., object], *, batch: int = 1, stage: str = ""
    ) -> None:
        self.epoch, self.batch, self.stage, self.action = epoch, batch, stage, action

    def on_train_batch_end(self, trainer: Any, plan: Any, *args: Any) -> None:
        last = "density" if plan.module.has_density_stage else "autoencoder"
        place = trainer.current_epoch, args[-1], plan.stage
        if place == (self.epoch, self.batch, self.stage or last):
            self.action()


def spoil(model: Any) -> Callable[[], None]:
    def action() -> None:
        for parameter in model.module.parameters():
            parameter.data.fill_(float("nan"))

    return action


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_children(*actions: Callable[[], object]) -> list[int]:
    """How forked processes end: 0, 1 if one raises, or minus the signal that killed it."""
    children = []
    for action in actions:
        children.append(os.fork())
        if children[-1] == 0:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    action()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def in_child(action: Callable[[], object]) -> int:
    return in_children(action)[0]


# What is trained, and what is refused ----------------------------------------------------------


@every_model
def test_B01_a_last_batch_of_one_cell(model):
    second = {"density_kwargs": {"max_epochs": 1, "batch_size": 80}}
    train(model, max_epochs=1, batch_size=80, **second if type(model) in PATHS else {})
    assert len(model.train_indices) % 80 == 1
    assert all(torch.isfinite(p).all() for p in model.module.parameters())


@every_model
@parametrize("batch_size", [0, -1, 2.5, True])
def test_B02_batch_size(model, batch_size):
    error = ValueError if type(batch_size) is int else TypeError
    with refused(error, "batch_size", batch_size, of=model.adata):
        model.train(batch_size=batch_size)
    if model.module.has_density_stage:
        with refused(error, "density_kwargs['batch_size']", batch_size, of=model.adata):
            model.train(density_kwargs={"batch_size": batch_size})


@every_model
def test_B03_no_epochs(model, tmp_path):
    with refused(ValueError, "max_epochs", "-1"):
        model.train(max_epochs=-1)
    train(model, max_epochs=0, checkpoint_dir=tmp_path / "c")
    assert not model.is_trained_
    assert not (tmp_path / "c").exists()
    with refused(RuntimeError, "not trained"):
        model.sample(T0)


@every_model
def test_B04_divergence_leaves_the_best_weights(model):
    with refused(TrainingDivergedError, "epoch 2", "step 7", "last finite", "learning rate"):
        train(model, At(2, spoil(model), batch=0))
    assert model.is_trained_
    assert all(torch.isfinite(p).all() for p in model.module.parameters())
    assert np.isfinite(model.sample(T0, 5, seed=0).X.sum())


def test_B04_a_rate_of_ten_thousand(model):
    with refused(TrainingDivergedError, "epoch 0", 'plan_kwargs={"lr"'):
        train(model, plan_kwargs={"lr": 1e4, "weight_decay": 1e4})
    assert all(torch.isfinite(p).all() for p in model.module.parameters())


@every_model
def test_B11_the_same_seed_twice(model):
    torch.manual_seed(5)
    np.random.seed(5)
    with untouched():
        train(model)
    assert_as_uninterrupted(model)


def test_B12_two_threads(model):
    torch.set_num_threads(2)
    try:
        train(model)
    finally:
        torch.set_num_threads(1)
    for name, values in uninterrupted(NBVAE).history.items():
        found, expected = (table.to_numpy(float) for table in (model.history[name], values))
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_B13_no_seed():
    cells = make_cells()
    NBVAE.setup_anndata(cells, **ROLES)
    first, second = NBVAE(cells, **TINY), NBVAE(cells, **TINY)
    for model in (first, second):
        train(model, max_epochs=1)
    assert first.seed_ != second.seed_
    assert first._fingerprint() != second._fingerprint()
    again = NBVAE(cells, **TINY, seed=first.seed_)
    train(again, max_epochs=1)
    assert again._fingerprint() == first._fingerprint()


@every_model
def test_B14_early_stopping_without_validation(model):
    with refused(ValueError, "early_stopping", "train_size=1", of=model.adata):
        train(model, train_size=1.0)


@every_model
@parametrize("size", [0, -0.1, 1.1, np.nan])
def test_B15_train_size(model, size):
    with refused(ValueError, "train_size", size, of=model.adata):
        train(model, train_size=size)


@every_model
@parametrize(
    ("kwargs", "names"),
    [
        ({"max_epoch": 3}, ["train()", "'max_epoch'", "Did you mean 'max_epochs'?"]),
        ({"lr": 1e-3}, ["train()", "'lr'", "plan_kwargs"]),
        ({"ema_decay": 0.9}, ["'ema_decay'", "density_kwargs={'ema_decay'"]),
        ({"precision": 16}, ["'precision'", "trainer_kwargs={'precision'"]),
        ({"plan_kwargs": {"learning_rate": 1}}, ["plan_kwargs", "'learning_rate'"]),
        ({"trainer_kwargs": {"preccision": 1}}, ["trainer_kwargs", "Did you mean 'precision'?"]),
    ],
)
def test_B16_unknown_keywords(model, kwargs, names):
    with refused(TypeError, *names, of=model.adata):
        model.train(**kwargs)


@every_model
def test_B16_unknown_keywords_of_a_model(model):
    with refused(TypeError, type(model).__name__, "'n_hiden'", "Did you mean 'n_hidden'?"):
        type(model)(model.adata, n_hiden=3)


@every_model
def test_B17_no_such_accelerator(model):
    with refused(ValueError, "accelerator", "'cpuu'", "Did you mean 'cpu'?", of=model.adata):
        model.train(accelerator="cpuu")
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        with refused(RuntimeError, "accelerator='gpu'", "Available: 'cpu'", of=model.adata):
            model.train(accelerator="gpu")


# Stopped, and taken up -------------------------------------------------------------------------


@every_model
def test_B05_B06_ctrl_c(model, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with warned(TrainingStoppedWarning, "stopped at epoch 2 of 3", "best weights", "resume=True"):
        train(model, At(2, interrupt), checkpoint_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert model.is_trained_
    assert not model.module.training
    assert len(model.sample(T0, 5, seed=0)) == 5
    last = list(model.history)[-1]
    assert len(model.history[last]) == 2
    assert list(model.history) == list(uninterrupted(type(model)).history)
    train(model, checkpoint_dir=tmp_path, resume=True)
    assert_as_uninterrupted(model)


@every_model
def test_B05_ctrl_c_before_an_epoch_was_finished(model):
    for stage, name in (("autoencoder", "of the autoencoder"), ("density", "of the density")):
        if stage == "density" and not model.module.has_density_stage:
            continue
        where = f"at epoch 0 of 3{f' {name}' * model.module.has_density_stage}"
        with warned(TrainingStoppedWarning, where, "The model is not trained"):
            train(model, At(0, interrupt, stage=stage))
        with refused(RuntimeError, "not trained"):
            model.sample(T0)


@parametrize("model", PATHS, indirect=True, ids=lambda model: model.__name__)
def test_B05_B06_ctrl_c_in_the_first_of_two_stages(model, tmp_path):
    stop = At(2, interrupt, stage="autoencoder")
    with warned(TrainingStoppedWarning, "at epoch 2 of 3 of the autoencoder", "is not trained"):
        train(model, stop, checkpoint_dir=tmp_path)
    with refused(RuntimeError, "not trained"):
        model.sample(T0)
    train(model, checkpoint_dir=tmp_path, resume=True)
    assert_as_uninterrupted(model)


def test_B05_a_trained_model_is_what_it_was(model):
    train(model)
    before, history = model._fingerprint(), model.history
    with warned(TrainingStoppedWarning, "at epoch 0 of 3", "is what it was before"):
        train(model, At(0, interrupt))
    assert model._fingerprint() == before
    assert model.history == history
    with (
        pytest.MonkeyPatch.context() as patch,
        warned(TrainingStoppedWarning, "outside its epochs"),
    ):
        patch.setattr(NBVAE, "_fitted_rows", lambda *args: interrupt())
        train(model)
    assert model.is_trained_


STAGES = [
    *((model_class, "autoencoder") for model_class in (NBVAE, ZINBVAE, HybridResidualModel)),
    *((model_class, stage) for model_class in PATHS for stage in ("autoencoder", "density")),
]
POINTS = [  # ten: one at random in every stage, and the first and last there are
    *(
        (*stage, *np.random.default_rng(i).integers(3, size=2).tolist())
        for i, stage in enumerate(STAGES)
    ),
    (NBVAE, "autoencoder", 0, 0),
    (ExprFlow, "density", 0, 0),
    (ExprFlow, "density", 2, 2),
]


@pytest.mark.usefixtures("every_epoch")
class TestKilled:
    pytestmark = forks

    @parametrize(("model_class", "stage", "epoch", "batch"), POINTS)
    def test_B07_kill_9_at_a_step(self, tmp_path, model_class, stage, epoch, batch):
        at = At(epoch, die, batch=batch, stage=stage)
        killed = untrained(model_class)
        ended = in_child(lambda: train(killed, at, checkpoint_dir=tmp_path))
        assert ended == -signal.SIGKILL
        model = untrained(model_class)
        train(model, checkpoint_dir=tmp_path, resume=True)
        assert_as_uninterrupted(model)

    @parametrize(("epoch", "batch"), [(0, 2), (1, 0), (2, 1)])
    @pytest.mark.usefixtures("small_windows")
    def test_B07_kill_9_while_reading_a_store(self, tmp_path, epoch, batch):
        write_zarr(make_cells(), tmp_path / "cells.zarr")
        killed, model, expected = (
            untrained(NBVAE, open_zarr(tmp_path / "cells.zarr")) for _ in range(3)
        )
        train(expected)
        assert expected._fingerprint() != uninterrupted(NBVAE)._fingerprint()  # read in windows
        folder = tmp_path / "checkpoint"
        at = At(epoch, die, batch=batch)
        assert in_child(lambda: train(killed, at, checkpoint_dir=folder)) == -signal.SIGKILL
        train(model, checkpoint_dir=folder, resume=True)
        assert model._fingerprint() == expected._fingerprint()
        for name, values in expected.history.items():
            assert_same(model.history[name], values)

    @parametrize("share", [0.0, 0.5, 0.99])
    def test_B08_kill_9_inside_the_write(self, tmp_path, share):
        resource = pytest.importorskip("resource")
        killed = untrained(NBVAE)

        def limit() -> None:
            size = int(share * (tmp_path / "checkpoint_model.pt").stat().st_size)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        ended = in_child(lambda: train(killed, At(1, limit), checkpoint_dir=tmp_path))
        assert ended == -signal.SIGXFSZ
        model = untrained(NBVAE)
        train(model, checkpoint_dir=tmp_path, resume=True)
        assert_as_uninterrupted(model)

    def test_B10_read_only_folder(self, model):
        with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to other users
            folder = Path(name)
            folder.chmod(0o555)

            def as_ordinary_user() -> None:
                if os.geteuid() == 0:
                    os.setuid(65534)
                named = []
                for place in (folder, folder / "new"):
                    try:
                        train(model, At(0, die, batch=0), checkpoint_dir=place)
                    except PermissionError as error:
                        named.append(str(folder) in str(error))
                if named != [True, True]:
                    raise RuntimeError

            assert in_child(as_ordinary_user) == 0
            folder.chmod(0o755)

    def test_B19_out_of_memory(self):
        """What is free is not known everywhere; what was asked for is named, and nothing dies."""
        resource = pytest.importorskip("resource")
        pages = Path("/proc/self/statm")
        if not pages.exists():
            pytest.skip("needs /proc")
        cells = AnnData(sparse.random(3000, 10_000, 1e-3, format="csr", dtype="float32", rng=0))
        cells.X.data[:] = 1
        cells.obs["cell_type"] = np.repeat(["a", "b"], 1500)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            HybridResidualModel.setup_anndata(cells, categorical_condition_keys=["cell_type"])
        model = HybridResidualModel(cells, **TINY)

        def capped() -> None:
            most = int(pages.read_text().split()[0]) * resource.getpagesize() + 10**8
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            with pytest.raises(MemoryError, match=r"Unable to allocate .* \(3000, 10000\)"):
                train(model)
            if model.is_trained_ or model.module.initialized:
                raise RuntimeError

        assert in_child(capped) == 0

    def test_L01_two_processes_that_share_a_logging_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(settings, "_logging_dir", tmp_path)
        uninterrupted(NBVAE)

        def action() -> None:
            model = untrained(NBVAE)
            train(model)
            assert_as_uninterrupted(model)

        assert in_children(action, action) == [0, 0]
        assert not list(tmp_path.rglob("*.*"))


@parametrize("fails", [range(1, 99), range(2, 5)], ids=["from the first", "for a while"])
def test_B09_disk_full(model, tmp_path, monkeypatch, fails):
    write, count = _checkpoint.write_folder, iter(range(1, 99))

    def full(*args: Any, **kwargs: Any) -> Path:
        if next(count) in fails:
            raise OSError(28, "No space left on device; nothing was saved, 0 MB free", "/there")
        return write(*args, **kwargs)

    monkeypatch.setattr(_checkpoint, "write_folder", full)
    with warned(UserWarning, "No checkpoint could be written", "/there", "0 MB free", "goes on"):
        train(model, checkpoint_dir=tmp_path)
    assert_as_uninterrupted(model)
    monkeypatch.undo()
    again = untrained(NBVAE)
    train(again, checkpoint_dir=tmp_path, resume=True)
    assert_as_uninterrupted(again)


@every_model
def test_a_finished_run_is_taken_over_as_it_is(model, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="exprgen"):
        train(model, checkpoint_dir=tmp_path / "a" / "b", resume=True)
    assert "training begins" in caplog.text
    assert_as_uninterrupted(model)
    model = untrained(type(model))
    train(model, At(0, die, batch=0), checkpoint_dir=tmp_path / "a" / "b", resume=True)
    assert_as_uninterrupted(model)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "checkpoint_manifest.json", "checkpoint_model.pt",
    ]  # fmt: skip
    with refused(FileExistsError, tmp_path, "resume=True", of=model.adata):
        train(model, checkpoint_dir=tmp_path / "a" / "b")
    with refused(ValueError, "resume=True needs checkpoint_dir"):
        train(model, resume=True)


@parametrize(
    ("model_class", "arguments"),
    [
        (CondVAE, TINY),
        (ExprFlow, {"density_hidden": 8, "density_layers": 1}),
        (HybridResidualModel, {"density_hidden": 8, "density_layers": 1}),
        (HybridResidualModel, {"density": "low_rank"}),
    ],
)
def test_B06_continuous_values(tmp_path, model_class, arguments):
    def build() -> Any:
        cells = make_cells()
        cells.X = np.log1p(cells.X.toarray())
        roles = {k: v for k, v in ROLES.items() if k.endswith("condition_keys")}
        model_class.setup_anndata(cells, **roles)
        return model_class(cells, seed=0, **arguments)

    def run(model: Any, *callbacks: Callback, **kwargs: Any) -> None:
        in_genes = not model.module.space.is_learned
        sizes = {"max_epochs": None, "batch_size": None} if in_genes else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*are their gene's least")
            train(model, *callbacks, **sizes, **kwargs)

    whole, stopped, taken_up = build(), build(), build()
    run(whole)
    stages = whole.module.space.is_learned or whole.module.has_density_stage
    with warned(TrainingStoppedWarning, "at epoch 1 of 3") if stages else nullcontext():
        run(stopped, At(1, interrupt, batch=0), checkpoint_dir=tmp_path)
    run(taken_up, checkpoint_dir=tmp_path, resume=True)
    assert taken_up._fingerprint() == whole._fingerprint()
    assert_same(taken_up.history, whole.history)
    assert_same(taken_up.sample(T0, 20, seed=0).X, whole.sample(T0, 20, seed=0).X)


def test_early_stopping_goes_on_counting(tmp_path):
    options = {"max_epochs": 60, "early_stopping_patience": 4, "plan_kwargs": {"lr": 0.05}}
    whole, stopped, taken_up = (untrained(NBVAE) for _ in range(3))
    train(whole, **options)
    n = len(whole.history["elbo_validation"])
    assert 8 < n < 60
    with warned(TrainingStoppedWarning, f"at epoch {n - 2} of 60"):
        train(stopped, At(n - 2, interrupt), checkpoint_dir=tmp_path, **options)
    train(taken_up, checkpoint_dir=tmp_path, resume=True, **options)
    assert len(taken_up.history["elbo_validation"]) == n
    assert taken_up._fingerprint() == whole._fingerprint()


def test_the_folder_is_one(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with refused(NotADirectoryError, "checkpoint_dir", tmp_path / "file"):
        train(model, checkpoint_dir=tmp_path / "file", resume=True)
    with refused(TypeError, "checkpoint_dir", "5"):
        train(model, checkpoint_dir=5)
    with refused(ValueError, "checkpoint_dir", "''"):
        train(model, checkpoint_dir="")
    with refused(TypeError, "resume", "'yes'"):
        train(model, checkpoint_dir=tmp_path, resume="yes")
    (tmp_path / "of others").write_text("theirs")
    train(
        model,
        checkpoint_dir=tmp_path,
        max_epochs=np.int64(1),
        plan_kwargs={"lr": np.float32(0.25)},
    )
    assert (tmp_path / "of others").read_text() == "theirs"


def test_a_second_run_is_taken_up(tmp_path):
    """It starts from the weights of the first, and its history goes on."""
    models = untrained(NBVAE), untrained(NBVAE)
    for model in models:
        train(model)
    train(models[0])
    with warned(TrainingStoppedWarning, "at epoch 1"):
        train(models[1], At(1, interrupt), checkpoint_dir=tmp_path)
    new = untrained(NBVAE)
    train(new, checkpoint_dir=tmp_path, resume=True)
    assert new._fingerprint() == models[0]._fingerprint() != uninterrupted(NBVAE)._fingerprint()
    for name, values in models[0].history.items():
        assert_same(new.history[name], values)
    assert len(new.history["elbo_validation"]) == 2 * N_EPOCHS


@cache
def finished() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        train(untrained(NBVAE), checkpoint_dir=folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The checkpoint of a finished run; the test may spoil it."""
    for name, data in finished().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@parametrize(
    ("kwargs", "names"),
    [
        ({"max_epochs": 4}, ["max_epochs (3, now 4)"]),
        ({"batch_size": 31}, ["batch_size (30, now 31)"]),
        ({"train_size": 0.8}, ["split"]),
        ({"plan_kwargs": {"lr": 1e-3}}, ["plan_kwargs ({}, now {'lr': 0.001})"]),
        ({"early_stopping": False}, ["early_stopping (True, now False)"]),
        ({"trainer_kwargs": {"early_stopping_min_delta": 0.1}}, ["trainer_kwargs"]),
        ({"trainer_kwargs": {"val_check_interval": 0.5}}, ["trainer_kwargs"]),
    ],
)
def test_another_run_is_not_taken_up(model, folder, kwargs, names):
    with refused(CheckpointError, folder, "another run", *names, of=model.adata):
        train(model, checkpoint_dir=folder, resume=True, **kwargs)
    assert not model.module.initialized


def test_the_run_of_another_model_is_not_taken_up(folder):
    others, moved = make_cells(), make_cells()
    others.layers["counts"].data[0] += 1
    moved.obs["dose"] = moved.obs["dose"].to_numpy()[::-1].copy()
    for other, name in (
        (untrained(ZINBVAE), "model ('NBVAE', now 'ZINBVAE')"),
        (_built(make_cells(), seed=1), "seed (0, now 1)"),
        (_built(make_cells(), n_hidden=9), "n_hidden (8, now 9)"),
        (_built(others), "cells"),
        (_built(moved), "conditions"),
    ):
        with refused(CheckpointError, folder, "another run", name):
            train(other, checkpoint_dir=folder, resume=True)


def _built(cells: Any, **arguments: Any) -> NBVAE:
    NBVAE.setup_anndata(cells, **ROLES)
    return NBVAE(cells, **{"seed": 0} | TINY | arguments)


def test_E01_a_checkpoint_runs_no_code(model, folder):
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "sentinel"),)

    for data in (pickle.dumps(Evil()), None):
        file = folder / "checkpoint_model.pt"
        if data is None:
            torch.save({"stage": Evil()}, file)
        else:
            file.write_bytes(data)
        _mend(folder)
        with refused(UntrustedFileError, file):
            train(model, checkpoint_dir=folder, resume=True)
        assert not (folder / "sentinel").exists()


def test_E04_a_flipped_bit(model, folder):
    file = folder / "checkpoint_model.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with refused(CheckpointError, file, "checksum", of=model.adata):
        train(model, checkpoint_dir=folder, resume=True)


def test_a_checkpoint_is_no_model(folder, tmp_path):
    with refused(FileNotFoundError, "manifest.json is missing"):
        NBVAE.load(folder)


def _mend(folder: Path) -> None:
    """Let the manifest say what the file is."""
    place = folder / "checkpoint_manifest.json"
    manifest = json.loads(place.read_text())
    manifest["files"]["checkpoint_model.pt"] = describe(folder / "checkpoint_model.pt")
    manifest["checksum"] = checksum(manifest)
    place.write_text(json.dumps(manifest))


def test_a_mean_that_is_not_deterministic_is_noticed(tmp_path):
    rng = np.random.default_rng(0)

    def predictor(table: Any) -> np.ndarray:
        return rng.random((len(table), 12)) * 1e-3 + 1

    def build() -> HybridResidualModel:
        cells = make_cells()
        HybridResidualModel.setup_anndata(cells, **ROLES)
        mean = {"mean": predictor, "out_of_sample": "predict"}
        return HybridResidualModel(cells, seed=0, **TINY, **mean)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is off by")
        with warned(TrainingStoppedWarning, "at epoch 1"):
            train(build(), At(1, interrupt), checkpoint_dir=tmp_path)
        model = build()
        with warned(ReproducibilityWarning, "fitted again", "deterministic"):
            train(model, checkpoint_dir=tmp_path, resume=True)
    assert model.is_trained_


def test_checkpoints_take_a_fiftieth_of_the_time(tmp_path, monkeypatch):
    monkeypatch.undo()
    now = [0.0]
    monkeypatch.setattr(_checkpoint.time, "monotonic", lambda: now[0])

    def slow(*args: Any, **kwargs: Any) -> None:
        now[0] += 2

    monkeypatch.setattr(_checkpoint, "write_folder", slow)
    checkpoint = TrainingCheckpoint(tmp_path, {"model": "NBVAE"}, resume=False)
    n_written = 0
    while now[0] < 1000:
        now[0] += 1
        if checkpoint.is_due:
            checkpoint.save_checkpoint({})
            n_written += 1
    assert n_written == 10


# Several processes as one ----------------------------------------------------------------------

DDP = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}


def in_processes(action: Callable[[int], object]) -> list[int]:
    """How two processes end, forked with what those of one run know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}

    def process(rank: int) -> Callable[[], None]:
        def run() -> None:
            signal.alarm(100)  # rather than wait for one another for ever
            os.environ.update(place, LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE="2")
            action(rank)

        return run

    return in_children(process(0), process(1))


class Seen(Callback):
    """The depths of the cells that the first epoch shows, and how many each step does."""

    def __init__(self) -> None:
        self.depths, self.sizes = [], []

    def on_train_batch_end(self, trainer: Any, plan: Any, output: Any, batch: Any, i: int) -> None:
        self.sizes.append(len(next(iter(batch.values()))))
        if trainer.current_epoch == 0 and "library" in batch:
            self.depths += batch["library"].tolist()


def said_of(model: Any) -> dict[str, Any]:
    """What two processes must agree on, for JSON."""
    return {
        "weights": model._fingerprint(),
        "history": {name: table.iloc[:, 0].tolist() for name, table in model.history.items()},
        "steps": model.trainer.global_step if hasattr(model, "trainer") else 0,
        "cells": [model.train_indices.tolist(), model.validation_indices.tolist()],
        "drawn": float(model.sample(T0, 20, seed=0).X.sum()),
        "training": model.module.training,
    }


def trained_by_two(
    model_class: type[NBVAE], folder: Path, cells: AnnData | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    """What each of two processes says after training, and what it has seen."""

    def action(rank: int) -> None:
        model, seen = untrained(model_class, cells), Seen()
        train(model, seen, **DDP, **kwargs)
        found = said_of(model) | {"depths": seen.depths, "sizes": seen.sizes}
        (folder / f"{rank}.json").write_text(json.dumps(found))

    assert in_processes(action) == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_alike(first: dict[str, Any], second: dict[str, Any]) -> None:
    """In all but the cells that each has seen."""
    own = {"depths", "sizes"}
    assert {k: v for k, v in first.items() if k not in own} == {
        k: v for k, v in second.items() if k not in own
    }


class TestProcesses:
    pytestmark = forks

    @every_model
    def test_B18_two_processes(self, model, tmp_path):
        folder, alone = tmp_path / "checkpoint", uninterrupted(type(model))
        first, second = trained_by_two(type(model), tmp_path, checkpoint_dir=folder)
        assert_alike(first, second)
        assert {path.name for path in folder.iterdir()} == {
            "checkpoint_manifest.json",
            "checkpoint_model.pt",
        }
        # As many steps of as many cells as one process takes, and every cell once.
        assert first["steps"] == alone.trainer.global_step == N_EPOCHS * N_BATCHES
        sizes = np.add(first["sizes"], second["sizes"])
        assert set(sizes.reshape(-1, N_BATCHES).sum(1)) == {len(alone.train_indices)}
        assert set(sizes) == {30, len(alone.train_indices) % 30}
        depths = alone._cells(None).library[alone.train_indices]
        np.testing.assert_allclose(
            np.sort(first["depths"] + second["depths"]), np.sort(depths), rtol=1e-6
        )
        np.testing.assert_array_equal(first["cells"][0], alone.train_indices)
        assert list(first["history"]) == list(alone.history)
        # Another order and other noise, of the same cells and weights at the start.
        found, expected = first["history"]["elbo_validation"], alone.history["elbo_validation"]
        np.testing.assert_allclose(found, expected.iloc[:, 0].to_numpy(float), rtol=0.1)

    @parametrize(
        ("model_class", "stage", "rank"),
        [(NBVAE, "autoencoder", 0), (ExprFlow, "autoencoder", 1), (ExprFlow, "density", 0)],
    )
    def test_B18_killed_and_taken_up(self, tmp_path, model_class, stage, rank):
        expected = trained_by_two(model_class, tmp_path)[0]
        folder = tmp_path / "checkpoint"

        def killed(own: int) -> None:
            at = [At(1, die, stage=stage)] if own == rank else []
            train(untrained(model_class), *at, **DDP, checkpoint_dir=folder)

        ended = in_processes(killed)
        assert ended.pop(rank) == -signal.SIGKILL
        assert ended == [1]  # the other does not wait
        again = trained_by_two(model_class, tmp_path, checkpoint_dir=folder, resume=True)
        assert_alike(again[0], expected)
        assert_alike(*again)
        # Finished: nothing is left to do.
        seen = trained_by_two(model_class, tmp_path, checkpoint_dir=folder, resume=True)[1]
        assert seen["sizes"] == []

    @pytest.mark.usefixtures("small_windows")
    def test_B18_from_a_file(self, tmp_path):
        write_zarr(make_cells(), tmp_path / "cells.zarr")
        first, second = trained_by_two(NBVAE, tmp_path, open_zarr(tmp_path / "cells.zarr"))
        assert_alike(first, second)
        assert first["steps"] == N_EPOCHS * N_BATCHES
        depths = untrained(NBVAE)._cells(None).library[first["cells"][0]]
        np.testing.assert_allclose(  # of an odd number one comes twice
            np.unique(first["depths"] + second["depths"]), np.unique(depths), rtol=1e-6
        )

    def test_B18_processes_that_differ(self, tmp_path):
        models = [_built(make_cells(), seed=seed) for seed in (3, 4)]

        def action(rank: int) -> None:
            with refused(ValueError, "2 processes", "seed (3 and 4)", "split", "NBVAE(adata, "):
                train(models[rank], **DDP, checkpoint_dir=tmp_path)

        assert in_processes(action) == [0, 0]
        assert not list(tmp_path.iterdir())

    def test_B18_one_of_two_diverges(self):
        def action(rank: int) -> None:
            model = untrained(NBVAE)
            at = [At(1, spoil(model), batch=0)] if rank else []
            with refused(TrainingDivergedError, "epoch 1, step 4", "last finite"):
                train(model, *at, **DDP)
            if not all(torch.isfinite(p).all() for p in model.module.parameters()):
                raise RuntimeError

        assert in_processes(action) == [0, 0]


SCRIPT = """
import json, os, sys, warnings
from pathlib import Path

warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
import faults, test_faults_train as tests

folder = Path(sys.argv[1])
model = tests.untrained(tests.NBVAE)
tests.train(model, **tests.DDP, checkpoint_dir=folder / "run")
(folder / f"{model.trainer.global_rank}.json").write_text(json.dumps(tests.said_of(model)))
"""


def test_B18_a_script(tmp_path):
    """It is run again for the second process, by training."""
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, timeout=240,
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert_alike(first, second)
    assert first["steps"] == N_EPOCHS * N_BATCHES
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "0.json", "1.json", "run"}


@every_model
def test_B18_ddp_of_one_process(model):
    train(model, **DDP | {"devices": 1})
    assert_as_uninterrupted(model)


@parametrize("strategy", ["ddpp", "ddp_spawn", "fsdp", None, 2])
def test_B18_no_such_strategy(model, strategy):
    with refused(ValueError, "strategy must be 'auto' or 'ddp'", strategy, of=model.adata):
        model.train(strategy=strategy)
    with refused(TypeError, "strategy=", "trainer_kwargs['strategy']", of=model.adata):
        model.train(trainer_kwargs={"strategy": strategy})


@parametrize("strategy", ["auto", "ddp"])
def test_B18_not_in_a_notebook(model, strategy, monkeypatch):
    connector = "lightning.pytorch.trainer.connectors.accelerator_connector"
    monkeypatch.setattr(f"{connector}._IS_INTERACTIVE", True)
    with refused(ValueError, "devices", "file", of=model.adata):
        train(model, **DDP | {"strategy": strategy})
    assert not model.is_trained_
