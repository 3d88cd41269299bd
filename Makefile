# Each target sets up what it needs, in one environment that all of them share.
#
#   make demo    real cells -> a trained model -> synthetic cells and figures in demo/
#   make test    the test suite
#   make lint    ruff (rules and format) and mypy
#   make reliability    the tests of the fault catalogue, and docs/reliability_table.md from them
#   make docs    the documentation, warnings as errors, no network
#   make build   wheel and source archive in dist/
#   make clean   remove what the targets above wrote, the environment included
#
# Variables, with an example each:
#   PYTHON  the interpreter the environment is made from      make test PYTHON=python3.12
#   VENV    where the environment lies                        make test VENV=.venv312
#   TORCH   the PyTorch to install, before everything else    make test TORCH=torch==2.8.0
#           (pip arguments are allowed: TORCH="torch --index-url ...")
#   WITH    further requirements to resolve together with     make test WITH=scvi-tools==1.5.*
#           the package
#   PIP     the installer                                     make test PIP="uv pip install --python .venv/bin/python"
#   ARGS    arguments for pytest                              make test ARGS="tests/test_imports.py -x"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WITH ?=
PIP ?= $(VENV)/bin/python -m pip install -qq --disable-pip-version-check
ARGS ?= --numprocesses 2 --dist loadfile

.DELETE_ON_ERROR:
.PHONY: demo test lint reliability docs build clean

# One thread per process: the test suite already fills the cores, and sums do not depend on the
# machine's number of them.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1

demo: $(VENV)/.ready
	$(VENV)/bin/python examples/demo.py --out demo

test: $(VENV)/.ready-test
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -r s $(ARGS)

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

reliability: $(VENV)/.ready-test
	$(ONE_THREAD) $(VENV)/bin/python -m pytest --reliability=docs/reliability_table.md $(ARGS)

docs: $(VENV)/.ready-dev
	@rm -rf docs/generated docs/tutorials
	$(ONE_THREAD) $(VENV)/bin/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

build: $(VENV)/.ready-dev
	$(VENV)/bin/python -m build

clean:
	rm -rf $(VENV) demo dist docs/_build docs/generated docs/tutorials

# The environment. A stamp is written only when its step has succeeded, so a broken set-up is
# taken up again by the next call. PyTorch comes first, by itself: whatever TORCH chose, the
# packages after it are content with it and do not bring another build.
$(VENV)/.ready: pyproject.toml
	@echo "Setting up $(VENV) (the first time: a few minutes, about 2 GB) ..."
	@$(PYTHON) -c 'import sys; sys.exit("exprgen needs Python 3.11 or newer, $(PYTHON) is %d.%d. Name another: make PYTHON=python3.11 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check "pip>=25.1"
	@$(PIP) $(TORCH)
	@$(PIP) --editable . $(WITH)
	@touch $@

# test and dev are dependency groups of pyproject.toml
$(VENV)/.ready-%: $(VENV)/.ready
	@echo "Installing what '$*' needs besides ..."
	@$(PIP) --editable . $(WITH) --group $*
	@touch $@
