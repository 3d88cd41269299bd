"""How the documentation is built: `make docs`, warnings as errors, nothing fetched."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "exprgen"
author = "exprgen contributors"
copyright = f"2026, {author}"
version = release = installed_version("exprgen")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinxcontrib.bibtex",
]
exclude_patterns = [
    "_build", "_templates", "**.ipynb_checkpoints", "jupyter_execute", "reliability_table.md",
]  # fmt: skip
templates_path = ["_templates"]
default_role = "literal"

# Links into other packages' documentation need their inventories, hence a network: only where
# the documentation is published.
if os.environ.get("READTHEDOCS") == "True":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }

autosummary_generate = True
autosummary_ignore_module_all = False  # a module's page lists its __all__, imported or not
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

html_theme = "sphinx_book_theme"
html_title = f"exprgen {version}"
html_theme_options = {"navbar_persistent": []}  # one search box, the one above the contents

html_static_path = ["_static"]
html_css_files = ["exprgen.css"]


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _with_tutorials)
    app.connect("autodoc-process-docstring", _as_sentences, priority=400)


def _with_tutorials(app: Sphinx) -> None:
    """Bring the notebooks to where Sphinx looks for pages; they are committed executed."""
    docs = Path(app.srcdir)
    shutil.copytree(docs.parent / "tutorials", docs / "tutorials", dirs_exist_ok=True)


def _as_sentences(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep napoleon, which comes after this, from taking words for types.

    It would read a type in every line of a Returns section that is not indented, and in what
    stands before the colon in the first line of an attribute.
    """
    if what in {"attribute", "data", "property"} and lines:
        lines[0] = lines[0].replace(": ", " – ", 1)
    for start in range(len(lines) - 1):
        if lines[start] == "Returns" and set(lines[start + 1]) == {"-"}:
            end = start + 2
            while end < len(lines) and lines[end] and not lines[end].startswith(" "):
                end += 1
            if end == len(lines) or not lines[end]:
                said = " ".join(lines[start + 2 : end])
                lines[start:end] = ["", "", f":returns: {said}", ""]
            return
