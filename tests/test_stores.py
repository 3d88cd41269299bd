"""Cells on disk: sampled and predicted into a store, trained on from one, read in every form."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from faults import (
    N_OBS,
    N_VARS,
    OF_COUNTS,
    TINY,
    assert_same,
    fit,
    latent_of,
    make_cells,
    refused,
    trained_on_all_roles,
    write_zarr,
)
from scipy import sparse

from exprgen import NBVAE, CondVAE, ExprFlow, HybridResidualModel, tl
from exprgen._matrix import Reader, as_reader
from exprgen._stores import CellStore
from exprgen.datasets import open_zarr
from exprgen.train import BlockLoader, CellDataModule, CellDataset, SharedBatches, Shuffle

parametrize = pytest.mark.parametrize
every_model = parametrize("model", OF_COUNTS, indirect=True, ids=lambda model: model.__name__)
T0 = {"cell_type": "type_0", "dose": 1.0}
TYPE = {"categorical_condition_keys": ["cell_type"]}


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    return trained_on_all_roles(getattr(request, "param", NBVAE))


def stored(matrix: Any, path: Any, kind: str, obs: pd.DataFrame | None = None) -> AnnData:
    """Cells whose ``X`` lies in a file."""
    adata = AnnData(matrix, obs=obs)
    if kind == "h5ad":
        adata.write_h5ad(path / "cells.h5ad")
        return ad.read_h5ad(path / "cells.h5ad", backed="r")
    write_zarr(adata, path / "cells.zarr")
    return open_zarr(path / "cells.zarr")


# The order of cells in a file ------------------------------------------------------------------


def order_of(shuffle: Shuffle, epoch: int = 0) -> np.ndarray:
    shuffle.set_epoch(epoch)
    return np.concatenate(shuffle.windows())


def test_an_epoch_shows_every_row_once_in_an_order_of_seed_and_epoch_alone():
    rows = np.flatnonzero(np.arange(40_000) % 10 > 0)
    shuffle = Shuffle(rows, 128, seed=3)
    first, second = order_of(shuffle, 0), order_of(shuffle, 1)
    np.testing.assert_array_equal(np.sort(first), rows)
    np.testing.assert_array_equal(np.sort(second), rows)
    assert (first == second).mean() < 0.01
    np.testing.assert_array_equal(order_of(Shuffle(rows, 128, seed=3), 1), second)
    np.testing.assert_array_equal(order_of(shuffle, 0), first)
    assert (order_of(Shuffle(rows, 128, seed=4)) == first).mean() < 0.01


def test_batches_mix_cells_of_many_places():
    shuffle = Shuffle(np.arange(200 * 512), 128, seed=0)
    order = order_of(shuffle).reshape(-1, 128)
    # Of 32 blocks a batch misses 32 (31/32)^128 = .55 on average; in file order it would have 1.
    n_places = [len(np.unique(batch // 512)) for batch in order[: 6 * 128]]
    assert np.mean(n_places) == pytest.approx(31.45, abs=0.05)
    # Whether a cell comes before its neighbour is a coin.
    place = np.argsort(order_of(shuffle))
    assert np.mean(np.diff(place) > 0) == pytest.approx(0.5, abs=0.01)
    # Places in the file and in the epoch are unrelated beyond the 200 blocks.
    assert abs(np.corrcoef(np.arange(len(place)), place)[0, 1]) < 4 / np.sqrt(200)


@parametrize(("n_ranks", "n_rows"), [(2, 300), (3, 301), (4, 257), (2, 1)])
def test_ranks_share_every_batch_of_cells_in_memory(n_ranks, n_rows):
    rows = np.arange(5, 5 + n_rows)
    for seed in (None, 0):
        alone = SharedBatches(rows, 64, 0, 1, seed)
        ranks = [SharedBatches(rows, 64, rank, n_ranks, seed) for rank in range(n_ranks)]
        order = []
        for epoch in (0, 1):
            for sampler in (alone, *ranks):
                sampler.set_epoch(epoch)
            for batch, *parts in zip(alone, *ranks, strict=True):
                assert len({part.tobytes() for part in parts}) == min(n_ranks, len(batch))
                assert np.ptp([len(part) for part in parts]) <= 1
                np.testing.assert_array_equal(np.unique(np.concatenate(parts)), np.sort(batch))
            order.append(np.concatenate(list(alone)))
            np.testing.assert_array_equal(np.sort(order[-1]), rows)
        assert len(alone) == len(ranks[0]) == -(-n_rows // 64)
        # The order is a function of the seed and the epoch, or that of the rows.
        if n_rows > 1:
            assert (order[0] == order[1]).all() == (order[0] == rows).all() == (seed is None)


@parametrize("n_ranks", [2, 3])
def test_ranks_share_the_rows_and_have_as_many_steps(n_ranks):
    rows = np.arange(5, 20_006)
    ranks = [Shuffle(rows, 64, 0, rank, n_ranks) for rank in range(n_ranks)]
    parts = [order_of(rank, 2) for rank in ranks]
    assert {len(part) for part in parts} == {-(-len(rows) // n_ranks)}
    found, times = np.unique(np.concatenate(parts), return_counts=True)
    np.testing.assert_array_equal(found, rows)
    assert times.sum() - len(rows) == -len(rows) % n_ranks
    # Each reads its own blocks: at most one of them is also another's.
    blocks = [set(np.unique(part // 512)) for part in parts]
    assert len(blocks[0] & blocks[1]) <= 2


class Numbered:
    """A file whose rows hold their own number."""

    shape, in_memory = (1000, 2), False

    def held(self, index: np.ndarray) -> Reader:
        return as_reader(np.repeat(index[:, None], 2, 1).astype(np.float32))


def numbered(reader: Any = None) -> CellDataset:
    numbers = np.arange(1000)
    return CellDataset(reader or Numbered(), numbers[:, None], numbers + 0.5)


def test_batches_have_the_cells_asked_for():
    rows = np.setdiff1d(np.arange(1000), [0, 17, 512])
    shuffle = Shuffle(rows, 48, seed=1)
    loader = BlockLoader(numbered(), shuffle)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert {len(batch["x"]) for batch in batches[:-1]} == {48}
    x = np.concatenate([batch["x"][:, 1] for batch in batches])
    np.testing.assert_array_equal(x, order_of(shuffle))
    for key, shift in (("c", 0), ("library", 0.5)):
        found = np.concatenate([batch[key].reshape(-1) for batch in batches])
        np.testing.assert_array_equal(found, x + shift)


def test_an_epoch_that_is_left_leaves_no_thread():
    for _ in BlockLoader(numbered(), Shuffle(np.arange(1000), 8, 0)):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith("cells")]


def test_what_cannot_be_read_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr("exprgen.train._blocks.WINDOW", 100)
    monkeypatch.setattr("exprgen.train._blocks.BLOCK", 10)

    class Broken(Numbered):
        def held(self, index: np.ndarray) -> Reader:
            if 500 in index:
                raise OSError("disk gone")
            return super().held(index)

    with pytest.raises(OSError, match="disk gone"):
        list(BlockLoader(numbered(Broken()), Shuffle(np.arange(1000), 10, 0)))


def test_some_of_many_validation_cells_are_validated_on(monkeypatch):
    monkeypatch.setattr("exprgen.train._blocks.N_VALIDATED", 30)
    held_out = np.arange(0, 1000, 7)
    for seed in (0, 0, 1):
        data = CellDataModule(numbered(), np.arange(1, 1000, 7), held_out, 8, seed=seed)
        loader = data.val_dataloader()
        x = np.concatenate([batch["x"][:, 0] for batch in loader])
        np.testing.assert_array_equal(x, [batch for b in loader for batch in b["x"][:, 0]])
        assert len(x) == 30
        assert np.isin(x, held_out).all()
        assert (np.diff(x) > 0).all()


class Recorded:
    """A matrix that is not in memory, and how it was asked."""

    def __init__(self, matrix: Any) -> None:
        self.matrix, self.asked = matrix, []
        self.shape, self.dtype = matrix.shape, matrix.dtype

    def __getitem__(self, rows: Any) -> Any:
        self.asked.append(rows)
        return self.matrix[rows]


@parametrize("form", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_rows_close_together_are_read_as_slices(form):
    x = np.random.default_rng(0).poisson(0.5, (3000, 4))
    most = np.flatnonzero(np.random.default_rng(1).random(3000) < 0.9)
    few = np.array([3, 900, 2999])
    for rows, n_reads in ((np.arange(100, 2500), 1), (most, 3), (few, 2), (few[:0], 1)):
        file = Recorded(form(x))
        np.testing.assert_array_equal(
            as_reader(file).held(rows).rows(np.arange(len(rows))), x[rows]
        )
        assert len(file.asked) == n_reads
        np.testing.assert_array_equal(as_reader(file).rows(rows[::-1]), x[rows[::-1]])
        assert all(isinstance(asked, slice) for asked in file.asked) == (rows is not few)


# Training from a file --------------------------------------------------------------------------

STORES = [
    ("h5ad", sparse.csr_matrix),
    ("h5ad", np.asarray),
    ("zarr", sparse.csr_matrix),
    ("zarr", np.asarray),
]


@pytest.mark.usefixtures("small_windows")
def test_training_from_a_file_depends_on_the_seed_alone(tmp_path):
    cells = make_cells()
    found = []
    for i, (kind, form) in enumerate([*STORES, STORES[0]]):
        (tmp_path / str(i)).mkdir()
        adata = stored(form(cells.X.toarray()), tmp_path / str(i), kind, cells.obs)
        model = fit(adata, max_epochs=2, **TYPE)
        found.append(model._fingerprint())
    assert len(set(found)) == 1
    assert fit(adata, max_epochs=2, seed=1, **TYPE)._fingerprint() != found[0]
    # Another order than that of cells in memory, which is as it was.
    assert fit(AnnData(cells.X, obs=cells.obs), max_epochs=2, **TYPE)._fingerprint() != found[0]
    np.testing.assert_array_equal(model.train_indices_, trained_split(cells))


def trained_split(cells: AnnData) -> np.ndarray:
    return fit(AnnData(cells.X, obs=cells.obs), **TYPE).train_indices_


def test_training_from_a_file_learns_what_training_in_memory_does(tmp_path, monkeypatch):
    for name in ("train._blocks", "models._training_cells"):
        monkeypatch.setattr(f"exprgen.{name}.WINDOW", 128)
    monkeypatch.setattr("exprgen.train._blocks.BLOCK", 16)
    cells = make_cells(600)
    cells = cells[np.argsort(cells.obs["cell_type"].to_numpy(), kind="stable")].copy()
    on_disk = stored(cells.X, tmp_path, "zarr", cells.obs)
    loss = {}
    for where in ("memory", "file", "sorted"):
        adata = AnnData(cells.X, obs=cells.obs) if where == "memory" else on_disk
        if where == "sorted":  # the control: batches in the order of the file, a type at a time
            monkeypatch.setattr(Shuffle, "windows", lambda self: [self.rows])
        model = fit(adata, max_epochs=15)
        loss[where] = float(model.history["elbo_validation"].min().iloc[0])
    assert loss["file"] == pytest.approx(loss["memory"], abs=0.04)  # nats per cell
    assert loss["sorted"] > loss["file"] + 0.05


def test_a_file_that_fits_a_window_is_trained_on_as_if_in_memory(tmp_path):
    cells = make_cells()
    adata = stored(cells.X, tmp_path, "zarr", cells.obs)
    in_memory = fit(AnnData(cells.X, obs=cells.obs), max_epochs=2, **TYPE)
    assert fit(adata, max_epochs=2, **TYPE)._fingerprint() == in_memory._fingerprint()


@pytest.mark.usefixtures("small_windows")
def test_two_stages_from_a_file(tmp_path):
    cells = make_cells()
    model = fit(stored(cells.X, tmp_path, "zarr", cells.obs), model_class=ExprFlow, **TYPE)
    assert np.isfinite(model.log_likelihood(n_samples=2, seed=0)).all()


@pytest.mark.usefixtures("small_windows")
@parametrize("model_class", [HybridResidualModel, ExprFlow])
def test_models_that_need_all_genes_at_once_say_so(model_class, tmp_path):
    cells = make_cells()
    x = cells.X if model_class is HybridResidualModel else np.log1p(cells.X.toarray())
    adata = stored(x, tmp_path, "zarr", cells.obs)
    options = {"density_hidden": 8, "density_layers": 1} if model_class is ExprFlow else TINY

    def train(adata: AnnData) -> Any:
        model_class.setup_anndata(adata, **TYPE)
        model = model_class(adata, seed=0, **options)
        short = (
            {"density_kwargs": {"max_epochs": 1}} if model_class is ExprFlow else {"max_epochs": 1}
        )
        model.train(progress_bar=False, **short)
        return model

    with refused(ValueError, model_class.__name__, "90 cells", ".to_memory()"):
        train(adata)
    assert train(adata.to_memory()).is_trained_  # the advice works


# One model, every form -------------------------------------------------------------------------


def forms(x: np.ndarray, obs: pd.DataFrame, path: Any) -> dict[str, AnnData]:
    da = pytest.importorskip("dask.array")
    made = {
        "csc": sparse.csc_matrix(x),
        "csr_array": sparse.csr_array(x),
        "csc_array": sparse.csc_array(x),
        "dense": x,
        "Fortran": np.asfortranarray(x),
        "uint8": x.astype(np.uint8),
        "csr of int64": sparse.csr_matrix(x.astype(np.int64)),
        "csr of float64": sparse.csr_matrix(x.astype(np.float64)),
        "dask": da.from_array(x, chunks=(40, N_VARS)),
        "dask of csr": da.from_array(x, chunks=(40, N_VARS)).map_blocks(sparse.csr_matrix),
    }
    found = {name: AnnData(matrix, obs=obs) for name, matrix in made.items()}
    for kind in ("h5ad", "zarr"):
        for form in (np.asarray, sparse.csr_matrix, sparse.csc_matrix):
            folder = path / f"{kind}_{form.__name__}"
            folder.mkdir()
            found[folder.name] = stored(form(x), folder, kind, obs)
    twice = AnnData(sparse.csr_matrix(np.r_[x, x]))
    twice.obs = pd.concat([obs, obs.set_axis([f"{name}_again" for name in obs.index])])
    return found | {"view": twice[:N_OBS]}


def test_one_model_says_the_same_of_every_form(tmp_path):
    cells = make_cells()
    model = fit(AnnData(cells.X, obs=cells.obs), **TYPE)
    calibration = make_cells(400)
    calibration.var_names = model.var_names
    calibration.obs_names = [f"other_{i}" for i in range(400)]
    model.predict(calibration, n_samples=50, seed=0)

    def said(adata: AnnData) -> list[np.ndarray]:
        changed = model.counterfactual(adata, to={"cell_type": "type_1"}, n_samples=2, seed=0)
        predicted = model.predict(adata, n_samples=50, seed=0)
        tl.conformalize(predicted, calibration, seed=0)
        return [
            latent_of(model, adata),
            model.log_likelihood(adata, n_samples=2, seed=0),
            predicted.layers["exprgen_q95"],
            predicted.layers["exprgen_upper"],
            model.denoise(adata, n_samples=2, seed=0).layers["exprgen_denoised"],
            changed.X.toarray(),
        ]

    expected = said(AnnData(cells.X, obs=cells.obs))
    for name, adata in forms(cells.X.toarray(), cells.obs, tmp_path).items():
        for found, value in zip(said(adata), expected, strict=True):
            np.testing.assert_array_equal(found, value, err_msg=name)


# Sampling into a store -------------------------------------------------------------------------


def same_cells(found: AnnData, expected: AnnData) -> None:
    assert_same(found.obs, expected.obs)
    assert_same(found.var, expected.var)
    assert_same(dict(found.obsm), dict(expected.obsm))
    assert_same(dict(found.uns), dict(expected.uns))
    a, b = (m.toarray() if sparse.issparse(m) else m for m in (found.X, expected.X))
    np.testing.assert_array_equal(a, b)
    assert found.X.dtype == expected.X.dtype


@every_model
def test_cells_are_the_same_in_a_store(model, tmp_path):
    asked = pd.DataFrame({"cell_type": ["type_0", "type_2"], "dose": [0.0, 10.0]})
    expected = model.sample(asked, 700, seed=0)
    cells = model.sample(asked, 700, seed=0, backed=tmp_path / "cells.zarr")
    assert not sparse.issparse(cells.X)
    same_cells(ad.read_zarr(tmp_path / "cells.zarr"), expected)
    in_memory = cells.to_memory()
    same_cells(in_memory, expected)
    np.testing.assert_array_equal(
        in_memory.layers["counts"].toarray(), expected.layers["counts"].toarray()
    )
    # What scanpy's compiled functions take: both of one type.
    assert in_memory.X.indptr.dtype == in_memory.X.indices.dtype
    assert zarr.open_group(tmp_path / "cells.zarr").metadata.zarr_format == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.zarr"]
    # Stored once.
    assert list(zarr.open_group(tmp_path / "cells.zarr")["layers"]) == []
    np.testing.assert_array_equal(cells[[1000, 3]].X.toarray(), expected.X[[1000, 3]].toarray())


@parametrize("n_obs", [0, 1, 512, 1030])
@parametrize("append", [1, 2**20])
def test_any_number_of_cells(model, n_obs, append, tmp_path, monkeypatch):
    monkeypatch.setattr("exprgen._stores._APPENDED_VALUES", append)
    cells = model.sample(T0, n_obs, seed=0, backed=str(tmp_path / "new" / "cells.zarr"))
    same_cells(cells.to_memory(), model.sample(T0, n_obs, seed=0))


def test_continuous_values_and_an_embedding_in_a_store(tmp_path):
    cells = make_cells()
    cells.layers["log"] = np.log1p(cells.X.toarray())
    cells.obsm["X_e"] = np.random.default_rng(0).normal(size=(N_OBS, 3)).astype(np.float32)
    model = fit(cells, model_class=CondVAE, layer="log", condition_embedding_key="X_e")
    drawn = model.sample(cells, 7, seed=0, backed=tmp_path / "cells.zarr")
    expected = model.sample(cells, 7, seed=0)
    assert isinstance(drawn.X, zarr.Array)
    assert isinstance(drawn.layers["log"], zarr.Array)
    same_cells(drawn.to_memory(), expected)
    same_cells(ad.read_zarr(tmp_path / "cells.zarr"), expected)


def test_cells_of_a_store_can_be_trained_on(model, tmp_path):
    drawn = model.sample(n_obs=200, seed=0, backed=tmp_path / "cells.zarr")
    NBVAE.setup_anndata(drawn, layer="counts", **TYPE)
    again = NBVAE(drawn, seed=0, **TINY)
    again.train(1, progress_bar=False)
    assert np.isfinite(again.log_likelihood(n_samples=2)).all()


VERBS = {
    "sample": lambda model, path, **kw: model.sample(T0, 1100, seed=0, backed=path, **kw),
    "predict": lambda model, path, **kw: model.predict(
        pd.DataFrame([T0] * 600), n_samples=5, seed=0, backed=path, **kw
    ),
}
every_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


@every_verb
def test_what_is_at_the_path_stays_unless_it_may_go(model, verb, tmp_path, monkeypatch):
    path, file = tmp_path / "cells.zarr", tmp_path / "notes"
    first = verb(model, path).shape
    file.mkdir()
    (file / "mine.txt").write_text("mine")
    with monkeypatch.context() as context:
        context.setattr(CellStore, "__init__", lambda *_: pytest.fail("it has begun"))
        with refused(FileExistsError, "cells.zarr", "overwrite=True"):
            verb(model, path)
        for place in (file, file / "mine.txt"):
            with refused(FileExistsError, str(place), "no zarr store"):
                verb(model, place, overwrite=True)
        with refused(TypeError, "backed", "3"):
            verb(model, 3)
        with refused(TypeError, "overwrite", "'yes'"):
            verb(model, path, overwrite="yes")
    assert (file / "mine.txt").read_text() == "mine"
    assert verb(model, path, overwrite=True).shape == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.zarr", "notes"]


@every_verb
@parametrize("error", [OSError, KeyboardInterrupt])
@parametrize("when", ["half way", "at the end", "in place"])
def test_a_failure_leaves_nothing_or_what_was_there(
    model, verb, error, when, tmp_path, monkeypatch
):
    path = tmp_path / "cells.zarr"
    before = verb(model, path).to_memory()
    n_written = 0

    def fail(*_: Any, **__: Any) -> None:
        nonlocal n_written
        n_written += 1
        if n_written == (2 if when == "half way" else 1):
            raise error("no space left")

    name = {"half way": "append", "at the end": "write", "in place": "flush"}[when]
    if when == "half way" and verb is VERBS["predict"]:
        name = "dense"
        real = CellStore.dense
        monkeypatch.setattr(CellStore, name, lambda *a: [fail(), real(*a)][1])
    else:
        monkeypatch.setattr(CellStore, name, fail)
    for place, options in ((tmp_path / "new.zarr", {}), (path, {"overwrite": True})):
        n_written = 0
        with pytest.raises(error, match="no space left"):
            verb(model, place, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["cells.zarr"]
    assert_same(open_zarr(path).to_memory(), before)


@every_verb
def test_the_store_that_is_read_is_not_replaced(verb, tmp_path):
    path = tmp_path / "cells.zarr"
    drawn = trained_on_all_roles(NBVAE).sample(n_obs=80, seed=0, backed=path)
    before = drawn.to_memory()
    model = fit(drawn, layer="counts", **TYPE)
    (tmp_path / "link").symlink_to(tmp_path)
    for place in (path, tmp_path / "link" / "cells.zarr"):
        with refused(ValueError, place, "that this model reads"):
            verb(model, place, overwrite=True)
    other = trained_on_all_roles(NBVAE)
    with refused(ValueError, path, "that this model reads"):
        other.sample(drawn[:5], backed=path, overwrite=True)
    with refused(ValueError, path, "that this model reads"):
        other.predict(drawn, backed=path, overwrite=True)
    assert_same(open_zarr(path).to_memory(), before)


@parametrize("replaced", [False, True])
def test_a_store_that_is_gone_is_an_error_and_not_0(model, replaced, tmp_path):
    path = tmp_path / "cells.zarr"
    cells = model.sample(n_obs=80, seed=0, backed=path)
    other = fit(cells, layer="counts", **TYPE)
    if replaced:
        model.sample(n_obs=80, seed=1, backed=path, overwrite=True)
    else:
        path.rename(tmp_path / "elsewhere")
    for run in (
        lambda: other.log_likelihood(n_samples=2),
        lambda: other.train(1, progress_bar=False),
        cells.to_memory,
    ):
        with refused(OSError, path, "removed or replaced since it was opened"):
            run()


@every_verb
@parametrize("name", ["cells.h5ad", "s3://cells/drawn.zarr", "cells.zarr.zip"])
def test_what_is_no_store_by_its_name(model, verb, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(ValueError, "backed", name, "'cells.zarr'"):
        verb(model, name)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_cells_in_a_store_is_in_memory(model, tmp_path):
    cells = model.sample(T0, 5, seed=0, backed=tmp_path / "cells.zarr")
    found = model.predict(cells, n_samples=5, seed=0, copy=True)
    assert sparse.issparse(found.X)
    assert "exprgen_mean" in found.layers
    assert list(cells.layers) == ["counts"]


def test_open_zarr_of_something_else(tmp_path):
    with refused(FileNotFoundError, "nothing.zarr"):
        open_zarr(tmp_path / "nothing.zarr")
    with refused(TypeError, "path", "3"):
        open_zarr(3)
    zarr.create_array(tmp_path / "array.zarr", shape=(3,), dtype="float32")
    zarr.open_group(tmp_path / "group.zarr", mode="w")
    (tmp_path / "cells.h5ad").write_text("")
    for name in ("group.zarr", "array.zarr", "cells.h5ad"):
        with refused(ValueError, name, "no AnnData", "backed='r'"):
            open_zarr(tmp_path / name)


# Predicting into a store -----------------------------------------------------------------------


@every_model
@parametrize("laws", [3, 2**20])
def test_statistics_are_the_same_in_a_store(model, laws, tmp_path, monkeypatch):
    monkeypatch.setattr("exprgen.models._results._PENDING_VALUES", laws * N_VARS)
    for name in ("_stores", "models._results"):
        monkeypatch.setattr(f"exprgen.{name}.BLOCK_SIZE", 32)
    rows = make_cells(100).obs
    asked = {"n_samples": 10, "quantiles": (0.1, 0.5), "seed": 0, "library": None}
    expected = model.predict(rows, **asked)
    found = model.predict(rows, backed=tmp_path / "a.zarr", **asked).to_memory()
    assert set(found.layers) == set(expected.layers)
    assert_same(found, expected)
    assert_same(ad.read_zarr(tmp_path / "a.zarr"), expected)


def test_statistics_of_an_anndata_and_some_genes_in_a_store(model, tmp_path):
    cells = make_cells()[:, ::-1].copy()
    asked = {"n_samples": 10, "seed": 0, "of": "mean", "key_added": "mine"}
    found = model.predict(cells, backed=tmp_path / "a.zarr", **asked)
    assert list(cells.layers) == ["counts", "log"]
    model.predict(cells, **asked)
    assert list(found.var_names) == list(model.var_names)
    for name in ("mine_mean", "mine_q95", "mine_std_donor"):
        expected = cells[:, model.var_names].layers[name]
        np.testing.assert_array_equal(found.layers[name][:], expected)
    assert_same(found.obs, cells.obs)
    some = model.predict(cells, backed=tmp_path / "b.zarr", genes=["gene_7", "gene_2"], **asked)
    assert list(some.var_names) == ["gene_7", "gene_2"]
    np.testing.assert_array_equal(
        some.layers["mine_mean"][:], cells[:, ["gene_7", "gene_2"]].layers["mine_mean"]
    )
    with refused(ValueError, "copy", "backed"):
        model.predict(cells, backed=tmp_path / "c.zarr", copy=True)


# Memory ----------------------------------------------------------------------------------------


def peak_of(run: Any) -> int:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def wide(n_obs: int, n_times: int) -> AnnData:
    cells = make_cells(n_obs)
    return AnnData(sparse.csr_matrix(np.tile(cells.X.toarray(), n_times)), obs=cells.obs)


def test_memory_of_sampling_does_not_grow_with_genes_of_all_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("exprgen._stores._APPENDED_VALUES", 2**17)
    model = fit(wide(100, 60), **TYPE)

    def sampled(n: int, **kwargs: Any) -> None:
        model.sample({"cell_type": "type_0"}, n, seed=0, progress_bar=False, **kwargs)

    sampled(600, backed=tmp_path / "first.zarr")  # what is imported and cached at first
    peaks = [peak_of(lambda n=n: sampled(n, backed=tmp_path / f"{n}.zarr")) for n in (1500, 3000)]
    in_memory = peak_of(lambda: sampled(3000)) - peak_of(lambda: sampled(1500))
    # A name for each cell and a few columns, as against some 550 counts in 4.5 kB.
    assert peaks[1] - peaks[0] < 1500 * 1200 < 1500 * 4000 < in_memory


def test_memory_of_predicting_does_not_grow_with_genes_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("exprgen.models._results._PENDING_VALUES", 16 * 1200)
    for name in ("_stores", "models._results"):
        monkeypatch.setattr(f"exprgen.{name}.BLOCK_SIZE", 16)
    cells = wide(100, 100)
    cells.obs["dose"] = np.linspace(0, 10, 100)
    model = fit(cells, continuous_condition_keys=["dose"])

    def predicted(n: int, **kwargs: Any) -> None:
        rows = pd.DataFrame({"dose": np.linspace(0, 10, n)})
        model.predict(rows, n_samples=3, seed=0, progress_bar=False, **kwargs)

    predicted(20, backed=tmp_path / "first.zarr")
    peaks = [peak_of(lambda n=n: predicted(n, backed=tmp_path / f"{n}.zarr")) for n in (60, 120)]
    in_memory = peak_of(lambda: predicted(120)) - peak_of(lambda: predicted(60))
    # Five layers of float32 are 24 kB a row.
    assert peaks[1] - peaks[0] < 60 * 4_000 < 60 * 20_000 < in_memory


def test_memory_of_training_does_not_grow_with_genes_of_all_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("exprgen.train._blocks.WINDOW", 256)
    monkeypatch.setattr("exprgen.train._blocks.BLOCK", 64)
    monkeypatch.setattr("exprgen.train._blocks.N_VALIDATED", 50)
    monkeypatch.setattr("exprgen.train._moments._cells.__defaults__", (100,))
    for name in ("_matrix", "models._cells"):
        monkeypatch.setattr(f"exprgen.{name}.BLOCK_VALUES", 64 * 720)
    cells = {}
    for n in (1200, 2400):
        (tmp_path / str(n)).mkdir()
        cells[n] = stored(wide(n, 60).X, tmp_path / str(n), "zarr")

    def train(n: int) -> None:
        NBVAE.setup_anndata(cells[n])
        NBVAE(cells[n], seed=0, **TINY).train(1, batch_size=64, progress_bar=False)

    def growth() -> int:
        first, second = (peak_of(lambda n=n: train(n)) for n in cells)
        return second - first

    train(1200)  # what is imported and cached at first
    in_memory = growth()  # so many cells are few, and read into memory
    monkeypatch.setattr("exprgen.models._training_cells.WINDOW", 256)
    # The counts of a cell are 2.8 kB.
    assert growth() < 1200 * 500 < 1200 * 2500 < in_memory
