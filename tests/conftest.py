"""What the tests share: one thread, no display, small real data.

The tests prove the essential claims on data that every installation has: scanpy's bundled cells
and simulations whose distribution is known. Larger real data sets are used where they lie in
the folder that EXPRGEN_TEST_DATA names (by default ../shared/data, beside the project).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# Before NumPy, Numba and Matplotlib are imported: they read these once.
for variable in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
    os.environ.setdefault(f"{variable}_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from anndata import AnnData

torch.set_num_threads(1)

# The same examples in every run, however slow the machine: a red run is a fault, not a draw.
hypothesis.settings.register_profile("exprgen", derandomize=True, deadline=None)
hypothesis.settings.load_profile("exprgen")

PROJECT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("EXPRGEN_TEST_DATA", PROJECT.parent / "shared" / "data"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reliability", type=Path, help="run the fault catalogue; write its table to this file"
    )


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--reliability")) is not None:
        from reliability import Reliability

        plugin = Reliability(path, is_worker=hasattr(config, "workerinput"))
        config.pluginmanager.register(plugin)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """The path of a file of the data folder; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.is_file():
            pytest.skip(f"{name} is not in {DATA} (EXPRGEN_TEST_DATA names another folder)")
        return path

    return find


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 90 cells is then read in blocks of 8, 4 of which are shuffled together."""
    monkeypatch.setattr("exprgen.train._blocks.BLOCK", 8)
    monkeypatch.setattr("exprgen.train._blocks.WINDOW", 32)
    monkeypatch.setattr("exprgen.models._training_cells.WINDOW", 32)


@pytest.fixture(scope="session")
def _pbmc_once() -> AnnData:
    from exprgen.datasets import pbmc68k_reduced

    return pbmc68k_reduced()


@pytest.fixture
def pbmc(_pbmc_once: AnnData) -> AnnData:
    """700 real blood cells x 765 genes, integer counts: a copy that the test may change."""
    return _pbmc_once.copy()
