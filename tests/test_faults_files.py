"""The fault catalogue, rows E01 to E16: files of a model, through its own ``save`` and ``load``.

A test per row, by its id; ``test_files.py`` has the same faults at every byte and step. Not here:
of E01 the checkpoints of training, which come later. E16 is emulated, where there is no GPU.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from faults import (
    MODELS,
    N_OBS,
    N_VARS,
    PATHS,
    ROLES,
    assert_same,
    digest,
    every_class,
    fit,
    latent_of,
    layer_of,
    make_cells,
    refused,
    set_up,
    trained_on_all_roles,
    untouched,
    warned,
)

from exprgen import NBVAE
from exprgen._errors import (
    CheckpointError,
    CovariateError,
    GeneMismatchError,
    ReproducibilityWarning,
    SetupError,
    UntrustedFileError,
)
from exprgen._manifest import checksum, describe
from exprgen.models import GenerativeModel

resource = pytest.importorskip("resource", reason="needs fork and limits, as Unix has them")
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
parametrize = pytest.mark.parametrize
of_nbvae = parametrize("model", [NBVAE], indirect=True, ids=["NBVAE"])
"""A row about what is written in a file of an autoencoder."""
T0 = {"cell_type": "type_0", "dose": 1.0}
FIXTURES = Path(__file__).parent / "data"


@pytest.fixture
def adata() -> AnnData:
    return make_cells()


@pytest.fixture(params=MODELS, ids=lambda model_class: model_class.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return trained_on_all_roles(request.param)


@pytest.fixture
def model_class(model) -> type[GenerativeModel]:
    return type(model)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """The model, saved; the test may spoil it."""
    model.save(tmp_path / "model", donor_labels=True)
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change the manifest, and make all its sums right."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["files"] = {name: describe(folder / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))


def load_is_refused(
    model_class: type[GenerativeModel],
    folder: Path,
    error: type[Exception],
    *names: Any,
    **kwargs: Any,
) -> None:
    before = contents(folder) if folder.is_dir() else None
    with refused(error, *names):
        model_class.load(folder, **kwargs)
    if before is not None:
        assert contents(folder) == before


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, (f"touch '{self.sentinel}'",)


@parametrize("form", ["torch", "pickle"])
def test_E01_malicious_weights(model_class, folder, tmp_path, form):
    evil = Evil(tmp_path / "sentinel")
    with (folder / "model.pt").open("wb") as file:
        (torch.save if form == "torch" else pickle.dump)({"model_state_dict": evil}, file)
    # Its checksum differs.
    load_is_refused(model_class, folder, CheckpointError, "model.pt", "corrupted")
    rewrite_manifest(folder)
    named = "system" if form == "torch" else "no archive of tensors"
    load_is_refused(model_class, folder, UntrustedFileError, "model.pt", named)
    assert not evil.sentinel.exists()
    with (folder / "model.pt").open("rb") as file:  # that it would have
        (lambda f: torch.load(f, weights_only=False) if form == "torch" else pickle.load(f))(file)
    assert evil.sentinel.exists()


def test_E01_malicious_manifest(model_class, folder, tmp_path):
    evil = Evil(tmp_path / "sentinel")
    (folder / "manifest.json").write_bytes(pickle.dumps(evil))
    load_is_refused(model_class, folder, UntrustedFileError, "manifest.json", "pickle")
    assert not evil.sentinel.exists()


def test_E01_files_hold_nothing_to_unpickle(folder):
    payload = torch.load(folder / "model.pt", weights_only=True)
    assert {"model_state_dict", "var_names", "attr_dict"} <= payload.keys()


def test_E02_wrong_class(model, folder):
    class OtherVAE(NBVAE):
        pass

    name = type(model).__name__
    for other in (OtherVAE, *MODELS):
        if other is not type(model):
            with refused(CheckpointError, folder, name, other.__name__, f"{name}.load"):
                other.load(folder)


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "random": lambda data: np.random.default_rng(0).bytes(len(data)),
    "longer": lambda data: data + b"\0",
}


@parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@parametrize("name", ["model.pt", "manifest.json"])
def test_E03_damaged_file(model_class, folder, name, damage):
    path = folder / name
    size = path.stat().st_size
    path.write_bytes(damage(path.read_bytes()))
    now = path.stat().st_size
    sizes = [f"{now} bytes", f"{size} were saved"] * (name == "model.pt" and now != size)
    load_is_refused(model_class, folder, CheckpointError, path, "corrupted", *sizes)


@parametrize("name", ["model.pt", "manifest.json"])
def test_E04_one_bit_flipped(model_class, folder, name):
    path = folder / name
    whole = path.read_bytes()
    for bit in np.random.default_rng(0).integers(8 * len(whole), size=20):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            if name == "manifest.json" and json.loads(data) == json.loads(whole):
                continue  # white space says nothing
        except ValueError:
            pass
        words = ["checksum"] if name == "model.pt" else []
        load_is_refused(model_class, folder, CheckpointError, path, *words)


@of_nbvae
@parametrize("value", [np.nan, np.inf, -np.inf])
def test_E03_weights_that_are_not_finite(model_class, folder, value):
    def spoil(payload: dict) -> None:
        payload["model_state_dict"]["space.decoder.output.bias"][3] = value

    rewrite_model(folder, spoil)
    load_is_refused(
        model_class, folder, CheckpointError, folder, "space.decoder.output.bias", "not finite"
    )


def rewrite_model(folder: Path, spoil: Callable[[dict], Any]) -> None:
    """Change what model.pt holds, and make all sums right."""
    payload = torch.load(folder / "model.pt", weights_only=True)
    payload = spoil(payload) or payload
    torch.save(payload, folder / "model.pt")
    rewrite_manifest(folder)


def of(*path: str, **changes: Any) -> Callable[[dict], None]:
    """Change items of a nested dict; an item ``...`` is removed."""

    def spoil(payload: dict) -> None:
        for name in path:
            is_marked = "__kind__" in payload
            payload = dict(payload["items"])[name] if is_marked else payload[name]
        for name, value in changes.items():
            if value is ...:
                del payload[name.replace("__", ".")]
            else:
                payload[name.replace("__", ".")] = value

    return spoil


WEIGHTS, ATTRIBUTES = ("model_state_dict",), ("attr_dict",)
BIAS = "space__decoder__output__bias"
ARGUMENTS = (*ATTRIBUTES, "init_params_", "non_kwargs")
REGISTRY = (*ATTRIBUTES, "registry_")
MADE_UP = {
    "no dict": lambda payload: [1, 2],
    "nothing": lambda payload: {"nothing": 1},
    "weights are text": of(model_state_dict="text"),
    "weight missing": of(*WEIGHTS, **{BIAS: ...}),
    "weight unknown": of(*WEIGHTS, extra=torch.zeros(3)),
    "weight of another shape": of(*WEIGHTS, **{BIAS: torch.zeros(3)}),
    "weight is text": of(*WEIGHTS, **{BIAS: "text"}),
    "weight is complex": of(*WEIGHTS, **{BIAS: torch.zeros(N_VARS, dtype=torch.complex64)}),
    "weight is whole": of(*WEIGHTS, **{BIAS: torch.zeros(N_VARS, dtype=torch.int32)}),
    "weight is sparse": of(*WEIGHTS, **{BIAS: torch.zeros(N_VARS).to_sparse()}),
    "no attributes": of(attr_dict=...),
    "attributes are a list": of(attr_dict=[1]),
    "no arguments": of(*ATTRIBUTES, init_params_=...),
    "argument unknown": of(*ARGUMENTS, evil=1),
    "argument of another type": of(*ARGUMENTS, n_latent="2"),
    "argument of another value": of(*ARGUMENTS, n_latent=3),
    "width beyond memory": of(*ARGUMENTS, n_hidden=10**9),
    "components beyond memory": of(*ARGUMENTS, n_components=10**9),
    "no registry": of(*ATTRIBUTES, registry_=...),
    "registry empty": of(*ATTRIBUTES, registry_={}),
    "registry is None": of(*ATTRIBUTES, registry_=None),
    "setup of nothing": of(*REGISTRY, setup_args={}),
    "setup unknown": of(*REGISTRY, "setup_args", evil="x"),
    "setup of another type": of(*REGISTRY, "setup_args", layer=3),
    "no genes": of(*REGISTRY, "field_registries", "X", state_registry={}),
    "no schema": of(*REGISTRY, "field_registries", "conditions", state_registry={}),
    "conditions of another schema": of(*ATTRIBUTES, "conditions_", codes=[[9] * 9]),
    "seed is text": of(*ATTRIBUTES, seed_="text"),
}


@of_nbvae
@parametrize("spoil", MADE_UP.values(), ids=MADE_UP)
@parametrize("data", [False, True], ids=["without data", "with data"])
def test_E03_a_model_that_no_model_has_written(model_class, folder, spoil, data):
    rewrite_model(folder, spoil)
    given = {"adata": make_cells()} if data else {}
    load_is_refused(model_class, folder, CheckpointError, folder, "corrupted", **given)


PATH_BIAS = "density__network__output__bias"
MADE_UP_PATHS = {
    "weight missing": of(*WEIGHTS, **{PATH_BIAS: ...}),
    "weight of another shape": of(*WEIGHTS, **{PATH_BIAS: torch.zeros(30)}),
    "weight is not finite": of(*WEIGHTS, **{PATH_BIAS: torch.full((2,), np.nan)}),
    "first stage missing": of(*WEIGHTS, prior__linear__weight=...),
    "solver unknown": of(*ARGUMENTS, solver="os.system"),
    "steps are text": of(*ARGUMENTS, n_steps="5"),
    "width of another value": of(*ARGUMENTS, density_hidden=9),
}


@parametrize("spoil", MADE_UP_PATHS.values(), ids=MADE_UP_PATHS)
@parametrize("model", PATHS, indirect=True, ids=lambda model: model.__name__)
def test_E03_a_path_that_no_model_has_written(folder, model, spoil):
    rewrite_model(folder, spoil)
    with refused(CheckpointError, folder):
        type(model).load(folder)


def test_E01_a_file_sets_nothing_but_what_is_saved(model_class, folder, model):
    evil = {"_observe": 1, "module": 1, "sample": 1, "evil_": 1, "__class__": 1, "_x_": 1}
    rewrite_model(folder, of("attr_dict", **{k: v for k, v in evil.items() if k != "__class__"}))
    rewrite_model(folder, lambda payload: payload["attr_dict"].update({"__class__": 1}))
    loaded = model_class.load(folder)
    assert not {"_observe", "sample", "evil_", "_x_"} & vars(loaded).keys()
    assert_same(loaded.sample(T0, 5, seed=0).X, model.sample(T0, 5, seed=0).X)


@of_nbvae
@parametrize("read", [NBVAE.load_registry, NBVAE.view_setup_args, NBVAE.convert_legacy_save])
def test_E01_no_other_way_in(folder, tmp_path, read):
    evil = Evil(tmp_path / "sentinel")
    with (folder / "model.pt").open("wb") as file:
        torch.save({"model_state_dict": evil, "attr_dict": {"registry_": {}}}, file)
    shutil.copy(folder / "model.pt", folder / "model_params.pt")
    for name in ("attr.pkl", "var_names.csv"):
        (folder / name).write_bytes(pickle.dumps(evil))
    rewrite_manifest(folder)
    if read == NBVAE.convert_legacy_save:
        with pytest.raises(NotImplementedError, match="could run code"):
            read(folder, tmp_path / "new")
    else:
        with pytest.raises(UntrustedFileError, match=r"model\.pt asks for"):
            read(folder)
    assert not evil.sentinel.exists()


@of_nbvae
def test_registry_of_a_saved_model(folder, capsys):
    registry = NBVAE.load_registry(folder)
    assert registry["setup_args"] == ROLES | {
        "condition_embedding_key": None, "size_factor_key": None, "allow_non_integer": False,
    }  # fmt: skip
    NBVAE.view_setup_args(folder)
    assert "'donor_key': 'donor'" in capsys.readouterr().out
    rewrite_model(folder, of(*REGISTRY, model_name="[/bold]"))
    with refused(CheckpointError, folder, "[/bold]"):
        NBVAE.view_setup_args(folder)


def test_E05_missing(model_class, folder, tmp_path):
    load_is_refused(model_class, tmp_path / "nowhere", FileNotFoundError, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    load_is_refused(
        model_class, tmp_path / "empty", FileNotFoundError, tmp_path / "empty", "manifest.json"
    )
    for name in ("model.pt", "manifest.json"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        load_is_refused(model_class, folder, FileNotFoundError, folder / name)
        (folder / name).write_bytes(data)
    model_class.load(folder)


def test_E06_genes_in_another_order(model_class, folder, model, adata):
    shuffled = adata[:, np.random.default_rng(0).permutation(N_VARS)].copy()
    with untouched(shuffled):
        loaded = model_class.load(folder, shuffled)
    assert list(loaded.adata.var_names) == list(model.var_names)
    np.testing.assert_array_equal(latent_of(loaded), latent_of(model))
    np.testing.assert_allclose(latent_of(loaded, shuffled), latent_of(model), rtol=1e-5, atol=1e-6)


def test_E06_data_that_do_not_fit(model_class, folder, adata):
    layer = layer_of(model_class)
    for cells, error, names in (
        (adata[:, :5].copy(), GeneMismatchError, ["7 of the model's 12", "'gene_5'"]),
        (with_obs(adata, drop="dose"), CovariateError, ["'dose'"]),
        (with_obs(adata, cell_type="new"), CovariateError, ["'cell_type'", "'new'", "'type_0'"]),
        (without_layer(adata, layer), KeyError, [repr(layer)]),
        (adata[:, ::1], SetupError, ["view", ".copy()"]),
        (adata.to_df(), TypeError, ["AnnData", "DataFrame"]),
    ):
        with untouched(cells):
            before = contents(folder)
            with pytest.raises(error) as caught:
                model_class.load(folder, cells)
            assert all(name in str(caught.value) for name in names), caught.value
            assert contents(folder) == before


def with_obs(adata: AnnData, drop: str | None = None, **columns: Any) -> AnnData:
    copy = adata.copy()
    copy.obs = copy.obs.drop(columns=drop or []).assign(**columns)
    return copy


def without_layer(adata: AnnData, layer: str) -> AnnData:
    copy = adata.copy()
    del copy.layers[layer]
    return copy


def test_E07_newer_format(model_class, folder):
    rewrite_manifest(folder, format_version="2.0")
    load_is_refused(model_class, folder, CheckpointError, "2.0", "1.0", "Upgrade exprgen")


def test_E07_newer_minor_version(model_class, folder, model):
    versions = json.loads((folder / "manifest.json").read_text())["versions"]
    rewrite_manifest(folder, versions=versions | {"exprgen": "99.1.0"})
    with warned(ReproducibilityWarning, "99.1.0", versions["exprgen"]):
        loaded = model_class.load(folder)
    assert_same(loaded.sample(T0, 5, seed=0).X, model.sample(T0, 5, seed=0).X)


def make_fixture(folder: Path) -> None:
    """The model of a format, and what it says of its own cells."""
    model = fit(make_cells(), max_epochs=3, **ROLES)
    model.save(folder, overwrite=True, donor_labels=True)
    said = latent_of(model)[:10].tolist()
    (folder / "latent.json").write_text(json.dumps(said))


@parametrize("name", ["nbvae-1.0"])
def test_E08_older_format(name, adata, tmp_path):
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    loaded = NBVAE.load(folder, adata)
    said = json.loads((folder / "latent.json").read_text())
    np.testing.assert_allclose(latent_of(loaded)[:10], said, atol=1e-4)
    assert loaded.sample(T0, 5).shape == (5, N_VARS)


# Death, full disks, other processes --------------------------------------------------------


def spawn(action: Callable[[], object]) -> int:
    """Run in a forked process, which ends with 0 or the number of the OSError it met."""
    child = os.fork()
    if child == 0:
        code = 255
        try:
            action()
            code = 0
        except FileExistsError:
            code = errno.EEXIST
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return child


def status_of(child: int) -> int:
    """How a process ended; negative if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def other(model_class) -> Any:
    """Another model of the class."""
    return fit(make_cells(), model_class=model_class, seed=1, **ROLES)


@parametrize("deadly", [True, False], ids=["killed", "disk full"])
def test_E09_old_model_survives(model_class, folder, model, other, deadly, tmp_path):
    before, latent = contents(folder), latent_of(model)
    other.save(tmp_path / "other")
    size = (tmp_path / "other" / "model.pt").stat().st_size

    def save(offset: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))
        other.save(folder, overwrite=True)

    for offset in np.linspace(0, size - 1, 20 if deadly else 5, dtype=int):
        ended = status_of(spawn(lambda offset=int(offset): save(offset)))
        assert ended == (-signal.SIGXFSZ if deadly else errno.EFBIG)
        assert {k: v for k, v in contents(folder).items() if not k.startswith(".")} == before
        loaded = model_class.load(folder, make_cells())
        np.testing.assert_array_equal(latent_of(loaded), latent)
    other.save(folder, overwrite=True)  # what is left behind is in nobody's way
    assert model_class.load(folder)._fingerprint() == other._fingerprint()
    assert sorted(contents(folder)) == sorted(contents(tmp_path / "other"))


def test_E09_overwrite_is_asked_for(folder, other):
    before = contents(folder)
    with refused(FileExistsError, folder, "overwrite=True"):
        other.save(folder)
    assert contents(folder) == before


def test_E10_two_processes_saving(model_class, model, other, tmp_path):
    for i in range(3):
        folder = tmp_path / str(i)
        children = [spawn(lambda m=m, f=folder: m.save(f)) for m in (model, other)]
        ended = [status_of(child) for child in children]
        assert sorted(ended) == [0, errno.EEXIST]
        winner = (model, other)[ended.index(0)]
        assert model_class.load(folder)._fingerprint() == winner._fingerprint()
        children = [spawn(lambda m=m, f=folder: m.save(f, overwrite=True)) for m in (model, other)]
        assert [status_of(child) for child in children] == [0, 0]
        loaded = model_class.load(folder, False)
        last = model if loaded._fingerprint() == model._fingerprint() else other
        assert_same(loaded.sample(T0, 5, seed=0).X, last.sample(T0, 5, seed=0).X)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that other users can reach; pytest's own are closed to them."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    yield base
    base.chmod(0o755)
    shutil.rmtree(base)


def test_E11_read_only_folder(model, open_to_all):
    model.save(open_to_all / "model")
    before = contents(open_to_all)
    open_to_all.chmod(0o555)
    (open_to_all / "model").chmod(0o555)
    told = []

    def as_ordinary_user(path: Path, **kwargs: Any) -> int:
        def action() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                model.save(path, **kwargs)
            except PermissionError as error:
                os._exit(77 if str(path) in str(error) else 78)

        return status_of(spawn(action))

    told.append(as_ordinary_user(open_to_all / "model", overwrite=True))
    told.append(as_ordinary_user(open_to_all / "new"))
    (open_to_all / "model").chmod(0o755)
    assert told == [77, 77]
    assert contents(open_to_all) == before
    assert os.listdir(open_to_all) == ["model"]


def test_E12_path_is_a_file(model_class, model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for action in (lambda: model.save(tmp_path / "file", overwrite=True),
                   lambda: model_class.load(tmp_path / "file")):  # fmt: skip
        with refused(NotADirectoryError, tmp_path / "file"):
            action()
    assert (tmp_path / "file").read_text() == "mine"


@parametrize("name", ["with spaces", "Zellmodell_β_细胞", "~/model", "a/b/c"])
@parametrize("form", [str, Path])
def test_E12_odd_paths(model_class, model, tmp_path, name, form, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model.save(form(name))
    place = tmp_path / "home" / "model" if name.startswith("~") else tmp_path / name
    assert sorted(os.listdir(place)) == ["manifest.json", "model.pt"]
    assert_same(
        model_class.load(form(name)).sample(T0, 3, seed=0).X, model.sample(T0, 3, seed=0).X
    )


def test_E13_without_data(folder, model):
    loaded = type(model).load(folder)
    assert loaded.adata is None
    assert loaded.is_trained_
    assert_same(loaded.sample(T0, 20, seed=0), model.sample(T0, 20, seed=0))
    assert_same(loaded.sample(None, 20, seed=0), model.sample(None, 20, seed=0))
    found, expected = (m.predict(T0, n_samples=20, seed=0) for m in (loaded, model))
    assert_same(found, expected)
    assert_same(loaded.conditions, model.conditions)
    cells = make_cells()
    with untouched(cells):
        np.testing.assert_array_equal(latent_of(loaded, cells), latent_of(model, cells))
    assert loaded.adata is None
    for verb in (
        loaded.predict,
        loaded.denoise,
        loaded.log_likelihood,
        loaded.posterior_predictive_sample,
        loaded.train,
    ):
        with refused(ValueError, "loaded without data"):
            verb()


def test_E13_files_hold_no_cells(model, tmp_path):
    for labels in (False, True):
        model.save(tmp_path / str(labels), donor_labels=labels)
        data = b"".join(contents(tmp_path / str(labels)).values())
        assert b"cell_17" not in data
        assert (b"donor_1" in data.replace(b"coded_donor_1", b"")) == labels


def test_E14_round_trip(folder, model):
    loaded = type(model).load(folder, make_cells())
    np.testing.assert_array_equal(latent_of(loaded), latent_of(model))
    for verb in (
        lambda m: m.sample(T0, 700, seed=0),
        lambda m: m.log_likelihood(n_samples=3, seed=0),
        lambda m: m.denoise(n_samples=3, seed=0, copy=True).layers["exprgen_denoised"],
        lambda m: m.predict(n_samples=20, seed=0, copy=True).layers["exprgen_mean"],
        lambda m: m.predict(n_samples=20, seed=0, copy=True).obs["exprgen_split"].to_frame(),
    ):
        assert_same(verb(loaded), verb(model))
    assert loaded.history.keys() == model.history.keys()
    for key, values in model.history.items():
        assert_same(loaded.history[key], values)
    for name in ("train_indices_", "validation_indices_", "seed_", "init_params_"):
        assert digest(getattr(loaded, name)) == digest(getattr(model, name)), name
    assert loaded.module.training == model.module.training


def test_E14_saved_again(model_class, folder, tmp_path):
    model_class.load(folder).save(tmp_path / "again", donor_labels=True)
    first, second = (
        torch.load(path / "model.pt", weights_only=True) for path in (folder, tmp_path / "again")
    )
    assert str(first) == str(second)


def test_E14_with_its_data(model_class, model, tmp_path):
    model.save(tmp_path / "model", save_anndata=True, donor_labels=True)
    loaded = model_class.load(tmp_path / "model")
    assert loaded.adata.n_obs == N_OBS
    np.testing.assert_array_equal(latent_of(loaded), latent_of(model))
    assert model_class.load(tmp_path / "model", False).adata is None
    cells = tmp_path / "model" / "adata.h5ad"
    cells.write_bytes(cells.read_bytes()[:-1])
    load_is_refused(model_class, tmp_path / "model", CheckpointError, cells, "corrupted")


def test_E14_data_that_were_not_saved_with_it_are_not_read(model_class, folder, model, tmp_path):
    (folder / "adata.h5ad").write_bytes(b"of someone")
    assert model_class.load(folder).adata is None
    rewrite_manifest(folder, files={"model.pt": None, "adata.h5ad": None})
    load_is_refused(model_class, folder, CheckpointError, folder, "adata.h5ad")
    for prefix in (None, "a_"):
        options = {"prefix": prefix, "overwrite": True}
        model.save(tmp_path / "m", save_anndata=True, donor_labels=True, **options)
        assert model_class.load(tmp_path / "m", prefix=prefix).adata.n_obs == N_OBS
        model.save(tmp_path / "m", **options)
        assert model_class.load(tmp_path / "m", prefix=prefix).adata is None
    assert not list((tmp_path / "m").glob("*.h5ad"))


@every_class
def test_E14_untrained(adata, tmp_path, model_class):
    set_up(adata, model_class, **ROLES)
    model_class(adata).save(tmp_path / "model")
    with refused(RuntimeError, "not trained"):
        model_class.load(tmp_path / "model").sample(T0)


@parametrize("form", ["zip", "tar"])
def test_E15_archives_are_not_unpacked(model_class, folder, tmp_path, form):
    archive = shutil.make_archive(str(tmp_path / "packed"), form, folder)
    with refused(NotADirectoryError, archive):
        model_class.load(archive)


@parametrize("name", ["../evil", "/tmp/evil", "../../evil", "a/../../evil"])
def test_E15_paths_that_lead_out_of_the_folder(model_class, folder, tmp_path, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.pt"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    load_is_refused(model_class, folder, UntrustedFileError, "manifest.json", name)
    with zipfile.ZipFile(
        folder / "model.pt", "a"
    ) as archive:  # a member that unpacking would put elsewhere
        archive.writestr(name, b"evil")
    manifest["files"] = {"model.pt": describe(folder / "model.pt")}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    before = sorted(path.name for path in tmp_path.iterdir())
    with suppress(CheckpointError):  # what nobody reads does no harm
        model_class.load(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_E16_saved_from_a_gpu(model_class, folder, model, monkeypatch):
    """Tensors that say they lie on a GPU, as a file of one does."""
    payload = torch.load(folder / "model.pt", weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        torch.save(payload, folder / "model.pt")
    rewrite_manifest(folder)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):  # that the file says so
            torch.load(folder / "model.pt", weights_only=True)
    loaded = model_class.load(folder, accelerator="cpu")
    assert loaded.device == torch.device("cpu")
    assert loaded._fingerprint() == model._fingerprint()


if __name__ == "__main__":  # once for each new format, never for an old one
    make_fixture(FIXTURES / "nbvae-1.0")
