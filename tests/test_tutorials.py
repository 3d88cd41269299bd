"""The tutorials run, top to bottom, as they are committed: executed, with pictures."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
@pytest.mark.filterwarnings("ignore:Proactor event loop:RuntimeWarning")
def test_tutorial_runs(path, tmp_path, monkeypatch):
    for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
        monkeypatch.setenv(f"{name}_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    # Ten times what it takes: a machine may be busy, but a tutorial must not hang.
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert os.listdir(tmp_path) == []  # what it writes it removes, or keeps in a temporary folder


@each
def test_tutorial_is_committed_executed(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 1_000_000


@each
def test_tutorial_says_what_it_teaches(path):
    first = nbformat.read(path, as_version=4).cells[0].source
    assert first.startswith("# ")
    assert "**You will learn**" in first
    listed = (TUTORIALS / "README.md").read_text("utf-8")
    assert f"({path.name})" in listed
