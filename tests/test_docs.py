"""The Python blocks of every page of the docs run, top to bottom, page by page.

Training is cut to two epochs: what is tested is that a reader can type it, not what comes out.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import exprgen

PROJECT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and source of each block."""
    text = page.read_text("utf-8")
    return [(text[: m.start(1)].count("\n"), m[1]) for m in BLOCK.finditer(text)]


def _pages() -> list[Path]:
    pages = sorted((PROJECT / "docs").rglob("*.md"))
    built = PROJECT / "docs" / "_build"
    return [page for page in pages if built not in page.parents and _blocks(page)]


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(PROJECT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("exprgen.models._train.default_max_epochs", lambda n_train: 2)
    monkeypatch.setattr("exprgen.models._stages.default_density_epochs", lambda *sizes: 2)
    names = {"__name__": "__main__"}
    try:
        with warnings.catch_warnings():
            # What a page shows a reader may warn; that it does is not this test's matter.
            warnings.simplefilter("ignore", UserWarning)
            for line, source in _blocks(page):
                # As many empty lines before it as in the page, for tracebacks to point there.
                exec(compile("\n" * line + source, str(page), "exec"), names)
    finally:
        plt.close("all")


def test_every_page_of_the_guide_has_code():
    """The pattern above finds the blocks: an empty test would pass for ever."""
    guide = set((PROJECT / "docs" / "user_guide").glob("*.md"))
    assert guide <= set(_pages())


def test_api_lists_every_public_name():
    api = "\n".join(
        (PROJECT / "docs" / page).read_text("utf-8") for page in ("api.md", "models.md")
    )
    for name in exprgen.__all__:
        assert re.search(rf"\bexprgen\.{name}\b|autoclass:: {name}\b", api), name
