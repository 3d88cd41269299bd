"""The README's Python code runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


TEN_LINES, QUALITY = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict:
    names: dict = {}
    exec(compile(TEN_LINES, "README.md", "exec"), names)
    return names


def test_code_does_what_its_comments_say(names: dict) -> None:
    adata, b_cells, both = names["adata"], names["b_cells"], names["both"]
    assert b_cells.n_obs == 100
    assert set(b_cells.obs["cell_type"]) == {"CD19+ B"}
    assert (b_cells.X.data == b_cells.X.data.astype(int)).all()
    assert {f"exprgen_{name}" for name in ("mean", "std", "q05", "q95")} <= set(adata.layers)
    assert names["surprise"].shape == (adata.n_obs,)
    assert both.obs["synthetic"].sum() == 100
    # B cells are B cells: CD79A is far above the other types' level.
    cd79a = both.X[:, both.var_names.get_loc("CD79A")].toarray().ravel()
    others = ~both.obs["synthetic"] & (both.obs["cell_type"] != "CD19+ B")
    assert cd79a[both.obs["synthetic"]].mean() > 5 * cd79a[others].mean()


def test_it_is_about_ten_lines() -> None:
    assert sum(bool(line.strip()) for line in TEN_LINES.splitlines()) <= 12


def test_quality_is_told_beside_that_of_baselines(names: dict) -> None:
    exec(compile(QUALITY, "README.md", "exec"), names)
    report = names["report"]
    assert set(report["kind"]) == {"model", "baseline"}
    value = report.set_index(["model", "metric"])["value"]
    assert value["NBVAE", "RF-PC"] < value["group mean", "RF-PC"] - 0.1


def test_commands_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command


def test_pictures_are_there() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
