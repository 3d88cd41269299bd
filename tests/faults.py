"""What the tests of the fault catalogue share: tiny models, and what "unchanged" means.

A row of the catalogue says which error or warning comes, what its message names, and that the
caller's objects and random states are as they were: :func:`refused` and :func:`warned` assert all
of it.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from exprgen import NBVAE, ZINBVAE, CondVAE, ExprDiffusion, ExprFlow, HybridResidualModel
from exprgen.datasets import simulate_latent
from exprgen.models import GenerativeModel

ROLES = {
    "layer": "counts",
    "batch_key": "batch",
    "donor_key": "donor",
    "categorical_condition_keys": ["cell_type"],
    "continuous_condition_keys": ["dose"],
}
TINY = {"n_hidden": 8, "n_latent": 2, "n_components": 2}
TINY_PATH = {**TINY, "density_hidden": 8, "density_layers": 1}
PATHS = (ExprFlow, ExprDiffusion)
"""Models of two stages."""
OF_COUNTS = (NBVAE, ZINBVAE, *PATHS, HybridResidualModel)
MODELS = (*OF_COUNTS, CondVAE)
every_class = pytest.mark.parametrize(
    "model_class", MODELS, ids=lambda model_class: model_class.__name__
)
"""A row about setup or training."""
N_OBS, N_VARS = 90, 12


def make_cells(n_obs: int = N_OBS) -> AnnData:
    """Counts of 3 cell types x 3 doses, in 2 batches from 3 donors."""
    simulated = simulate_latent(
        n_obs, n_vars=N_VARS, n_types=3, n_batches=2, n_donors=3, doses=(0, 1, 10),
        log_depth=(4.5, 0.5),
    )  # fmt: skip
    obs = simulated.obs[["cell_type", "batch", "donor", "dose"]]
    adata = AnnData(simulated.X, obs=obs, var=pd.DataFrame(index=simulated.var_names))
    adata.layers["counts"] = adata.X.copy()
    adata.layers["log"] = adata.X.log1p()
    return adata


def layer_of(model_class: type[GenerativeModel]) -> str:
    """The layer of values that a model takes."""
    return "counts" if model_class.needs_counts else "log"


def set_up(
    adata: AnnData, model_class: type[GenerativeModel] = NBVAE, **setup: Any
) -> type[GenerativeModel]:
    """Set up on the counts, or on their logarithms where a model takes these."""
    if not model_class.needs_counts and setup.get("layer") in (None, "counts"):
        setup["layer"] = "log"
    model_class.setup_anndata(adata, **setup)
    return model_class


def fit(
    adata: AnnData,
    *,
    model_class: type[GenerativeModel] = NBVAE,
    max_epochs: int = 1,
    seed: int = 0,
    **setup: Any,
) -> Any:
    set_up(adata, model_class, **setup)
    if model_class in PATHS:
        model = model_class(adata, seed=seed, **TINY_PATH)
        second = {"density_kwargs": {"max_epochs": max_epochs}}
    else:
        model, second = model_class(adata, seed=seed, **TINY), {}
    model.train(max_epochs, progress_bar=False, **second)
    return model


@cache
def trained_on_all_roles(model_class: type[GenerativeModel] = NBVAE) -> Any:
    """Tests give it copies to write to."""
    return fit(make_cells(), model_class=model_class, max_epochs=3, **ROLES)


@cache
def trained_on_counts() -> NBVAE:
    """Without conditions, batch or donor."""
    return fit(make_cells(), max_epochs=3)


def digest(value: Any) -> Any:
    """What tells two values apart: type, dtype, layout and every byte."""
    if isinstance(value, AnnData):
        parts = {k: digest(getattr(value, k)) for k in ("X", "obs", "var", "uns")}
        parts |= {k: digest(dict(getattr(value, k))) for k in ("layers", "obsm", "varm", "obsp")}
        return parts | {"is_view": value.is_view, "shape": value.shape}
    if isinstance(value, dict):
        return {key: digest(item) for key, item in value.items()}
    if sparse.issparse(value):
        return type(value), digest(value.data), digest(value.indices), digest(value.indptr)
    if isinstance(value, pd.DataFrame):
        columns = [(key, str(value[key].dtype), digest(_values(value[key]))) for key in value]
        return columns, digest(value.index.to_numpy()), str(value.index.dtype)
    if isinstance(value, pd.Categorical):
        return digest(value.codes), list(value.categories), value.ordered
    if isinstance(value, np.ndarray) and value.dtype != object:
        layout = value.flags.c_contiguous, value.flags.f_contiguous, value.dtype, value.shape
        return type(value), layout, hashlib.sha256(value.tobytes()).hexdigest()
    return type(value), repr(list(value) if isinstance(value, np.ndarray) else value)


def _values(column: pd.Series) -> Any:
    return column.array if column.dtype == "category" else column.to_numpy()


def assert_same(a: Any, b: Any) -> None:
    """Equal values, whether or not they are held in the same form."""
    if isinstance(a, AnnData):
        for name in ("X", "obs", "var", "uns", "layers", "obsm"):
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, Mapping):
        assert set(a) == set(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, pd.DataFrame):
        pd.testing.assert_frame_equal(a, b)
    else:
        dense = [x.toarray() if sparse.issparse(x) else np.asarray(x) for x in (a, b)]
        np.testing.assert_array_equal(*dense)


def write_zarr(adata: AnnData, path: Path) -> None:
    """In version 3 of the format, without what zarr and anndata say about its novelties."""
    version_3 = ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False)
    with version_3, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        adata.write_zarr(path)


def random_states() -> tuple[Any, ...]:
    _, keys, *place = np.random.get_state()
    return random.getstate(), digest(keys), place, digest(torch.get_rng_state().numpy())


@contextmanager
def untouched(*objects: Any) -> Iterator[None]:
    """Neither the objects nor the global random states change."""
    before = [digest(thing) for thing in objects], random_states()
    yield
    assert [digest(thing) for thing in objects] == before[0]
    assert random_states() == before[1]


@contextmanager
def refused(error: type[Exception], *names: Any, of: Any = ()) -> Iterator[None]:
    """This very error, whose message holds all ``names``, and ``of`` is as it was."""
    with untouched(*(of if isinstance(of, tuple) else (of,))):
        with pytest.raises(error) as caught:
            yield
        assert caught.type is error
        message = str(caught.value.args[0]) if error is KeyError else str(caught.value)
        assert [name for name in map(str, names) if name not in message] == [], message


@contextmanager
def warned(category: type[Warning], *names: Any) -> Iterator[None]:
    """One warning of the category, whose message holds all ``names``; others stay errors."""
    with pytest.warns(category) as record:
        yield
    messages = [str(w.message) for w in record if w.category is category]
    assert len(messages) == 1, messages
    assert [name for name in map(str, names) if name not in messages[0]] == [], messages[0]


def latent_of(model: NBVAE, *args: Any, **kwargs: Any) -> np.ndarray:
    """The latent representation, without what it says about conditions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.get_latent_representation(*args, **kwargs)


VERBS = {
    "predict": lambda model, cells: model.predict(cells, n_samples=20, seed=0),
    "denoise": lambda model, cells: model.denoise(cells, n_samples=2, seed=0),
    "sample": lambda model, cells: model.sample(cells, seed=0),
    "counterfactual": lambda model, cells: model.counterfactual(
        cells, to={"cell_type": "type_0"}, n_samples=2, seed=0
    ),
    "log_likelihood": lambda model, cells: model.log_likelihood(cells, n_samples=2, seed=0),
    "latent": latent_of,
    "posterior_predictive_sample": lambda model, cells: model.posterior_predictive_sample(
        cells, seed=0
    ),
}
WRITING = ("predict", "denoise")
"""Verbs that write to the cells they are given."""
