"""The fault catalogue, rows F01 to F07 and L01 to L05: evaluation, concurrency, limits.

A test per row, by its id; M01 to M05 are in ``test_mudata.py``, L03 is in ``test_imports.py``. Not
here: of L04 what only another system can tell.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from faults import (
    MODELS,
    OF_COUNTS,
    PATHS,
    ROLES,
    TINY,
    TINY_PATH,
    assert_same,
    fit,
    layer_of,
    make_cells,
    refused,
    set_up,
    trained_on_all_roles,
    untouched,
)
from planted import GROUP, thirds
from scipy import sparse
from scvi.train import SaveCheckpoint

from exprgen import CondVAE, metrics, tl
from exprgen._errors import GeneMismatchError
from exprgen._manifest import is_name
from exprgen._stores import new_store
from exprgen.datasets import open_zarr, simulate_latent

parametrize = pytest.mark.parametrize
T0 = {"cell_type": "type_0", "dose": 1.0}
QUICK = ["variation", "genes", "memorisation", "MMD", "LR-gene"]


@pytest.fixture(params=MODELS, ids=lambda model_class: model_class.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return trained_on_all_roles(request.param)


# F. Evaluation ---------------------------------------------------------------------------------


@cache
def real() -> list[AnnData]:
    """Training cells, held-out cells, others."""
    return thirds(simulate_latent(450, n_vars=12, n_types=3, seed=4))


@cache
def synthetic_of(model_class: Any) -> AnnData:
    """Cells of each type from a model, as its user would draw them."""
    layer = layer_of(model_class)
    train = real()[0].copy()
    train.layers["log"] = train.layers["counts"].log1p()
    model = fit(
        train, model_class=model_class, max_epochs=3, layer=layer,
        categorical_condition_keys=[GROUP],
    )  # fmt: skip
    return model.sample({GROUP: sorted(train.obs[GROUP].unique())}, 50, seed=0)


def evaluate(*cells: AnnData, **options: Any) -> pd.DataFrame:
    options = {"groupby": GROUP, "baselines": False, "n_repeats": 1, "n_jobs": 1} | options
    return tl.evaluate(*cells, **{"metrics": QUICK, "progress_bar": False} | options)


def rows(report: pd.DataFrame) -> pd.DataFrame:
    return report.set_index("metric")


of_counts = parametrize("model_class", OF_COUNTS, ids=lambda c: c.__name__)


@of_counts
def test_F01_genes_in_another_order(model_class):
    train, test, _ = real()
    cells = synthetic_of(model_class)
    order = np.random.default_rng(0).permutation(cells.n_vars)
    shuffled = cells[:, order].copy()
    with untouched(train, test, shuffled):
        found = evaluate(train, test, shuffled)
    pd.testing.assert_frame_equal(found, evaluate(train, test, cells))


@parametrize("side", ["train", "test", "synthetic"])
def test_F01_other_genes(side):
    cells = dict(zip(("train", "test", "synthetic"), real(), strict=True))
    fewer = cells | {side: cells[side][:, 1:].copy()}
    named = "train" if side == "test" else side
    with refused(GeneMismatchError, named, "'gene_0'", of=tuple(fewer.values())):
        evaluate(*fewer.values())
    renamed = cells[side].copy()
    renamed.var_names = ["other", *renamed.var_names[1:]]
    other = cells | {side: renamed}
    with refused(GeneMismatchError, named, "'gene_0'", "'other'", of=tuple(other.values())):
        evaluate(*other.values())


def with_counts(adata: AnnData, change: Any) -> AnnData:
    adata = adata.copy()
    values = adata.layers["counts"].toarray()
    adata.layers["counts"] = sparse.csr_matrix(change(values))
    return adata


def one(value: float) -> Any:
    def change(values: np.ndarray) -> np.ndarray:
        values[3, 2] = value
        return values

    return change


@parametrize("value", [np.nan, np.inf, -1.0, 0.5])
@parametrize("side", ["train", "test", "synthetic"])
def test_F02_values_that_are_no_counts(side, value):
    cells = dict(zip(("train", "test", "synthetic"), real(), strict=True))
    cells[side] = with_counts(cells[side], one(value))
    names = side, ".layers['counts']", "1 values", f"(first: {value:g})"
    with refused(ValueError, *names, of=tuple(cells.values())):
        evaluate(*cells.values())


@parametrize("side", [0, 1], ids=["synthetic", "real"])
def test_F02_metrics_name_the_side(side):
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(30, 4)), rng.normal(size=(30, 4))]
    samples[side][5, 1] = np.nan
    for metric in (metrics.variance_ratio, metrics.mean_correlation, metrics.energy_distance):
        name = list(metric.__annotations__)[side]
        with refused(ValueError, name, "1 values that are not finite"):
            metric(*samples)


def test_F03_too_few_cells():
    train, test, other = real()
    few = other[other.obs.groupby(GROUP, observed=True).head(3).index].copy()
    with refused(
        ValueError, "synthetic 'synthetic'", "too few cells in 3 groups", "type_0: 25 (has 3)"
    ):
        evaluate(train, test, few)
    with refused(ValueError, "Hold out more"):
        evaluate(train, test[:6].copy(), other)
    with refused(ValueError, "max_cells", "at least 10", "3"):
        evaluate(train, test, other, max_cells=3)
    with refused(ValueError, "train", "no cells"):
        evaluate(train[:0].copy(), test, other)


def test_F03_an_empty_group_has_a_row_of_its_own():
    """Rather than an error: a model that forgot a type is judged by the others, and by that."""
    train, test, other = real()
    report = rows(evaluate(train, test, other[other.obs[GROUP] != "type_1"].copy()))
    assert report["flag"]["missing groups"]
    assert "type_1" in report["note"]["missing groups"]
    assert report["value"]["missing groups"] == pytest.approx(
        (test.obs[GROUP] == "type_1").mean(), abs=0.02
    )


@parametrize("where", ["both", "synthetic"])
def test_F04_constant_genes_are_left_out(where):
    """Of what needs variance: the number is that of the other genes, never NaN."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    real_, synthetic = rng.normal(size=(80, 6)) @ mix, rng.normal(size=(80, 6)) @ mix
    flat = np.full((80, 1), 2.0)
    beside = flat if where == "both" else rng.normal(size=(80, 1))
    a, b = np.hstack([synthetic, flat]), np.hstack([real_, beside])
    plain = metrics.gene_correlation_agreement(synthetic, real_)
    assert metrics.gene_correlation_agreement(a, b) == pytest.approx(plain)
    if where == "both":
        ratio = metrics.variance_ratio(synthetic, real_)
        assert metrics.variance_ratio(a, b) == pytest.approx(ratio)


def test_F04_the_report_counts_constant_genes():
    cells = [with_counts(adata, lambda x: x * (np.arange(12) > 1)) for adata in real()]
    report = evaluate(*cells)
    assert report.attrs["n_genes_constant"] == 2
    assert np.isfinite(report["value"]).all()
    assert evaluate(*real()).attrs["n_genes_constant"] == 0


def test_F05_copies_are_flagged():
    train, test, other = real()
    copies = train.copy()
    copies.obs_names = [f"copy_{i}" for i in range(len(copies))]
    found = evaluate(train, test, {"copies": copies, "honest": other}, metrics="memorisation")
    flags = found.pivot(index="metric", columns="model", values="flag")
    of_copying = [name for name in flags.index if name != "missing groups"]
    assert flags.loc[of_copying, "copies"].any()
    assert flags.loc["nearest-neighbour ratio", "copies"]
    assert not flags["honest"].any()


@parametrize("side", ["train", "test", "synthetic"])
def test_F06_logarithms_among_counts(side):
    cells = dict(zip(("train", "test", "synthetic"), real(), strict=True))
    cells[side] = with_counts(cells[side], np.log1p)
    with refused(ValueError, side, "does not hold counts", "layer=", of=tuple(cells.values())):
        evaluate(*cells.values())


def test_F06_a_model_of_logarithms():
    train, test, _ = real()
    cells = synthetic_of(CondVAE)
    with refused(KeyError, "synthetic 'CondVAE'", "'counts'", "'log'", of=cells):
        evaluate(train, test, cells)
    with refused(ValueError, "synthetic 'CondVAE'.X", "does not hold counts", of=cells):
        evaluate(train, test, cells, layer=None)


@of_counts
def test_F07_the_same_seed_gives_the_same_numbers(model_class):
    train, test, _ = real()
    cells = synthetic_of(model_class)
    with untouched(train, test, cells):
        first, again, other = (evaluate(train, test, cells, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(rows(first)["control"], rows(other)["control"])


# L. Concurrency and limits ---------------------------------------------------------------------


TRAIN_ALL = """
import sys, warnings
from pathlib import Path
from faults import MODELS
from test_faults_elsewhere import train_once

warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
seed, folder = int(sys.argv[1]), Path(sys.argv[2])
for model_class in MODELS:
    name = model_class.__name__
    train_once(model_class, seed, folder / "shared" / name).save(folder / f"{name}_{seed}")
"""


def train_once(model_class: Any, seed: int, folder: Path) -> Any:
    """Train with checkpoints in a folder that may be another's too."""
    adata = make_cells()
    set_up(adata, model_class, **ROLES)
    model = model_class(adata, seed=seed, **(TINY_PATH if model_class in PATHS else TINY))
    monitor = "density_loss_validation" if model_class in PATHS else "elbo_validation"
    second = {"density_kwargs": {"max_epochs": 2}} if model_class in PATHS else {}
    saving = SaveCheckpoint(dirpath=str(folder), monitor=monitor, save_top_k=-1)
    model.train(2, progress_bar=False, trainer_kwargs={"callbacks": [saving]}, **second)
    return model


def test_L01_two_trainings_share_a_folder(tmp_path):
    """Of every model at the same time; each process is what it would have been alone."""
    here = Path(__file__).parent
    children = [
        subprocess.Popen([sys.executable, "-c", TRAIN_ALL, str(seed), str(tmp_path)], cwd=here)
        for seed in (0, 1)
    ]
    assert [child.wait(timeout=300) for child in children] == [0, 0]
    for model_class in MODELS:
        name = model_class.__name__
        for seed in (0, 1):
            alone = train_once(model_class, seed, tmp_path / f"{name}_alone_{seed}")
            found = model_class.load(tmp_path / f"{name}_{seed}")
            assert found._fingerprint() == alone._fingerprint()
        saved = {path.name for path in (tmp_path / "shared" / name).iterdir()}
        apart = [tmp_path / f"{name}_alone_{seed}" for seed in (0, 1)]
        assert saved == {path.name for folder in apart for path in folder.iterdir()}
        for path in (tmp_path / "shared" / name).iterdir():
            model_class.load(path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.slow
def test_L02_training_on_more_cells_than_memory(tmp_path):
    resource = pytest.importorskip("resource")
    n_obs, n_vars, spare = 139_264, 1000, 400 * 2**20
    block = np.random.default_rng(0).poisson(0.2, (512, n_vars)).astype(np.float32)
    with new_store(tmp_path / "cells.zarr", overwrite=False) as store:
        for _ in range(n_obs // len(block)):
            store.append(block)
        index = pd.RangeIndex(n_obs).astype(str)
        store.write(AnnData(shape=(n_obs, n_vars), obs=pd.DataFrame(index=index)))
    assert 4 * n_obs * n_vars > 1.3 * spare

    def held_to_little(action: Any) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                # Of what is written to: address space that threads reserve is no memory.
                data = int(Path("/proc/self/statm").read_text().split()[5])
                limit = data * resource.getpagesize() + spare
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
                action(open_zarr(tmp_path / "cells.zarr"))
                code = 0
            except MemoryError:
                code = 2
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def train(cells: AnnData) -> None:
        model = fit(cells)
        assert np.isfinite(model.sample(n_obs=10, seed=0).X.data).all()

    assert held_to_little(lambda cells: cells.to_memory()) == 2
    assert held_to_little(train) == 0


IN_ANOTHER_PROCESS = """
import json, multiprocessing, sys

def draw(name, folder, conditions, queue):
    import exprgen
    model = getattr(exprgen, name).load(folder)
    queue.put(model.sample(conditions, 5, seed=0).to_df().to_numpy().tolist())

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    said = json.loads(sys.argv[1])
    children = [context.Process(target=draw, args=(*one, queue)) for one in said]
    for child in children:
        child.start()
        print(json.dumps(queue.get(timeout=120)))
        child.join()
"""


def test_L04_a_process_that_was_spawned(tmp_path):
    """As Windows and macOS start them, with nothing of the parent but what it is told."""
    of = (OF_COUNTS[0], PATHS[0])
    for model_class in of:
        trained_on_all_roles(model_class).save(tmp_path / model_class.__name__)
    (tmp_path / "work.py").write_text(IN_ANOTHER_PROCESS, encoding="utf-8")
    said = [[c.__name__, str(tmp_path / c.__name__), T0] for c in of]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "work.py"), json.dumps(said)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line, model_class in zip(done.stdout.splitlines(), of, strict=True):
        here = model_class.load(tmp_path / model_class.__name__).sample(T0, 5, seed=0)
        np.testing.assert_array_equal(np.array(json.loads(line)), here.to_df().to_numpy())


def test_L04_what_a_spawned_process_is_given_can_be_pickled(model):
    """A worker of a pool gets its model so; these bytes are no file, and of one's own process."""
    assert "spawn" in multiprocessing.get_all_start_methods()
    again = pickle.loads(pickle.dumps(model))
    assert again._fingerprint() == model._fingerprint()
    assert_same(again.sample(T0, 5, seed=0).X, model.sample(T0, 5, seed=0).X)


@parametrize("name", ["..\\evil", "C:evil", "C:\\evil", "/evil", "../evil", "a\0b", ".hidden", ""])
def test_L04_names_that_lead_elsewhere_on_any_system(name):
    assert not is_name(name)


def test_L05_two_threads_sample_from_one_model(model):
    """Each as it would alone, whatever the other asks."""
    asked = [
        {"conditions": T0, "n_obs": 600, "seed": 1},
        {"conditions": {"cell_type": "type_1", "dose": 10.0}, "n_obs": 600, "seed": 2},
    ]
    if type(model) in PATHS:
        asked[0] |= {"guidance": 2.0, "n_steps": 3}
        asked[1] |= {"guidance": 0.5, "n_steps": 4}
    options = {"progress_bar": False}
    alone = [model.sample(**said, **options) for said in asked]
    found: dict[int, list[AnnData]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def work(i: int) -> None:
        try:
            for _ in range(4):
                start.wait(timeout=60)
                found[i].append(model.sample(**asked[i], **options))
        except BaseException:
            start.abort()  # or the other would wait for it
            raise

    # Python's warning filters are of the process, and two threads may restore them crosswise.
    with untouched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    for i in (0, 1):
        assert len(found[i]) == 4
        for cells in found[i]:
            assert_same(cells.X, alone[i].X)
            assert_same(cells.obs, alone[i].obs)
