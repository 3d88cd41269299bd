"""Who may import what (docs/architecture.md), and what `import exprgen` may cost.

The package is read, not imported, for the first part: every file under src/exprgen belongs to one
layer, a layer imports only itself and those before it, and what is slow or heavy to import is
imported where it is used. Imports under `if TYPE_CHECKING:` do not run and are free.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "exprgen"
FILES = sorted(SOURCE.rglob("*.py"))

# From the bottom to the top; "_[!_]*" are the helper modules with a leading underscore.
LAYERS = (
    ("_[!_]*", "likelihoods", "schedules", "couplings", "solvers", "nn", "metrics"),
    ("densities", "spaces", "means", "module"),
    ("train",),
    ("models",),
    ("tl", "pl", "pp", "datasets"),
    ("__init__", "__main__", "cli"),
)
HELPERS, PARTS, TRAIN, MODELS, TOOLS, _ = range(len(LAYERS))

ANNDATA = {"anndata", "mudata", "muon"}
PLOTS = {"scanpy", "matplotlib", "seaborn"}
HOST = {"scvi", "lightning", "pytorch_lightning"}


class Import(NamedTuple):
    module: str  # dotted and absolute; `from a import b` reads "a.b"
    line: int
    at_load: bool  # runs when the file is imported, not when a function of it is called


def part(module: str) -> str:
    """'exprgen.nn._mlp' -> 'nn'; the package itself, and names it exports, -> '__init__'."""
    name = [*module.split("."), "__init__"][1]
    known = any((SOURCE / found).exists() for found in (name, f"{name}.py"))
    return name if known or layer(name) is not None else "__init__"


def layer(name: str) -> int | None:
    found = [i for i, names in enumerate(LAYERS) if any(fnmatchcase(name, n) for n in names)]
    return found[0] if len(found) == 1 else None


def statements(node: ast.AST) -> list[ast.stmt]:
    """What a block holds: its body, else, except and case branches."""
    found: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            found.append(child)
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            found.extend(statements(child))
    return found


def imports(module: str, source: str, *, package: bool = False) -> Iterator[Import]:
    """All imports of a file that can run, in functions too."""

    def walk(nodes: list[ast.stmt], at_load: bool) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.Import):
                for name in node.names:
                    yield Import(name.name, node.lineno, at_load)
            elif isinstance(node, ast.ImportFrom):
                home = module.split(".") if package else module.split(".")[:-1]
                above = home[: len(home) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                for name in node.names:
                    yield Import(f"{base}.{name.name}", node.lineno, at_load)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from walk(node.orelse, at_load)
            else:
                function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                yield from walk(statements(node), at_load and not function)

    yield from walk(ast.parse(source).body, True)


def violations(module: str, source: str, *, package: bool = False) -> list[str]:
    """What a file imports against the rules, one sentence each."""
    me = [*module.split("."), "__init__"][1]
    rank = layer(me)
    if rank is None:
        return [f"{me}: belongs to no layer, or to several"]
    lazy = {"ot"}  # POT is loaded by whoever couples or measures, not by everyone
    if rank <= TRAIN:
        lazy |= ANNDATA | PLOTS
    if rank == HELPERS or me in ("densities", "spaces", "means"):
        lazy |= HOST
    if rank >= MODELS:
        lazy |= PLOTS
    found = []
    for name, line, at_load in imports(module, source, package=package):
        top = name.partition(".")[0]
        if top == "exprgen":
            other = part(name)
            other_rank = layer(other)
            if other == me:
                continue
            if other_rank is None or other_rank > rank:
                found.append(f"line {line}: {me} imports {other}, which lies above it")
            elif me == "metrics":
                found.append(f"line {line}: metrics imports nothing of ours, but {other}")
            elif me == "pl" and other in ("models", "train", *LAYERS[PARTS]):
                found.append(f"line {line}: pl reads the AnnData, it does not import {other}")
        elif at_load and top in lazy:
            found.append(f"line {line}: {me} imports {top} at load; import it where it is used")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_file_imports_only_what_its_layer_may(path: Path) -> None:
    package = path.name == "__init__.py"
    inside = path.parent if package else path.with_suffix("")
    module = ".".join(("exprgen", *inside.relative_to(SOURCE).parts))
    assert violations(module, path.read_text(encoding="utf-8"), package=package) == []


def test_every_file_of_the_package_was_read() -> None:
    read = {path.relative_to(SOURCE).with_suffix("").parts[0] for path in FILES}
    assert {"_errors", "likelihoods", "metrics", "module", "train"} <= read


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("exprgen.nn._mlp", "from exprgen.densities import Mixture", "above"),
        ("exprgen.nn._mlp", "from exprgen import densities", "above"),
        ("exprgen._files", "def f():\n    import exprgen.models", "above"),
        ("exprgen._files", "from exprgen import __version__", "above"),
        ("exprgen.train", "from .models import NBVAE", "above"),
        ("exprgen.nn._mlp", "try:\n    1\nexcept OSError:\n    from ..tl import concat", "above"),
        ("exprgen.metrics._moments", "from exprgen._errors import closest", "nothing of ours"),
        ("exprgen.pl._moments", "def f():\n    from exprgen.models import NBVAE", "pl reads"),
        ("exprgen._slots", "import anndata as ad", "at load"),
        ("exprgen.train", "class A:\n    from scanpy import pp", "at load"),
        ("exprgen.pl._moments", "import matplotlib.pyplot as plt", "at load"),
        ("exprgen.likelihoods", "from scvi.distributions import NegativeBinomial", "at load"),
        ("exprgen.unknown", "import numpy", "no layer"),
    ],
)  # fmt: skip
def test_the_rules_catch(module: str, source: str, complaint: str) -> None:
    (found,) = violations(module, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("exprgen._slots", "if TYPE_CHECKING:\n    from anndata import AnnData"),
        ("exprgen._slots", "def f():\n    import anndata"),
        ("exprgen.metrics._moments", "from exprgen.metrics._features import dense"),
        ("exprgen.module", "from scvi.module.base import BaseModuleClass"),
        ("exprgen.models._base", "import anndata, scvi\nfrom exprgen import train, _files"),
        ("exprgen.tl._concat", "import anndata as ad\ndef f():\n    import scanpy"),
    ],
)
def test_the_rules_allow(module: str, source: str) -> None:
    assert violations(module, source) == []


def run(script: str) -> dict:
    """A fresh interpreter's answer: the script prints JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_L03_import_is_fast_and_loads_nothing_heavy() -> None:
    script = """
import json, sys, time
start = time.perf_counter()
import exprgen
seconds = time.perf_counter() - start
heavy = "torch scvi lightning scanpy anndata mudata muon matplotlib sklearn numba pyro".split()
print(json.dumps({"seconds": seconds, "loaded": [name for name in heavy if name in sys.modules]}))
"""
    runs = [run(script) for _ in range(3)]
    assert runs[0]["loaded"] == []
    assert min(answer["seconds"] for answer in runs) < 1


def test_L03_import_alters_nothing() -> None:
    script = """
import json, logging, os, random, warnings
import numpy as np, torch

def state():
    return {
        "random": repr(random.getstate()),
        "numpy.random": repr(np.random.get_state()),
        "torch.random": torch.get_rng_state().tolist(),
        "numpy errors": np.geterr(),
        "dtype": str(torch.get_default_dtype()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": torch.is_grad_enabled(),
        "warnings": repr(warnings.filters),
        "logging": [repr(logging.root.handlers), logging.root.level],
        "environment": dict(os.environ),
    }

before = state()
import exprgen
after = state()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]]}))
"""
    assert run(script) == {"changed": []}


def test_every_public_name_exists_and_is_listed() -> None:
    import exprgen

    missing = [name for name in exprgen.__all__ if not hasattr(exprgen, name)]
    assert missing == []
    assert set(exprgen.__all__) <= set(dir(exprgen))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = exprgen.no_such_name


def test_version_is_the_installed_one() -> None:
    import exprgen

    assert exprgen.__version__ == importlib.metadata.version("exprgen")
