"""Whatever table of conditions is given: a valid answer, or an error that names what is wrong.

Inputs are drawn by hypothesis, the same in every run. No other exception than the documented ones
is raised, and nothing that is given is changed.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from faults import MODELS, TINY, layer_of, make_cells, trained_on_all_roles, untouched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exprgen import NBVAE
from exprgen._errors import CovariateError, SetupError, UnseenCategoryError

DOCUMENTED = (SetupError, CovariateError, UnseenCategoryError, TypeError, ValueError, KeyError)
few = settings(max_examples=60, suppress_health_check=list(HealthCheck))

KEYS = ["cell_type", "dose", "batch", "donor"]
labels = st.sampled_from(["type_0", "type_1", "type_2", "batch_0", "donor_1", "Type 0", "", "x"])
numbers = st.one_of(
    st.sampled_from([0, 1, 10, -1, 1e6, np.nan, np.inf, -np.inf, True, 10**30]),
    st.floats(allow_nan=False, width=32),
)
odd = st.sampled_from([None, pd.NA, pd.NaT, b"x", (1,), object(), 1j, "1.0"])
values = st.one_of(labels, numbers, odd)
good = {
    "cell_type": st.sampled_from(["type_0", "type_1", "type_2"]),
    "dose": st.sampled_from([0, 1.0, 10, 3.5]),
    "batch": st.sampled_from(["batch_0", "batch_1"]),
    "donor": st.sampled_from(["donor_0", "new"]),
}


@st.composite
def tables(draw: st.DrawFn) -> Any:
    """Conditions, mostly almost right, as a mapping or a DataFrame."""
    keys = draw(st.sets(st.sampled_from([*KEYS, "cell_typ", "library"]), max_size=4))
    keys = sorted(keys | ({"cell_type", "dose"} if draw(st.booleans()) else set()))
    n = draw(st.integers(0, 4))
    wrong = draw(st.sampled_from([None, *keys]))
    columns: dict[str, Any] = {}
    for key in keys:
        of = values if key == wrong or key not in good else good[key]
        columns[key] = draw(st.lists(of, min_size=n, max_size=n))
    form = draw(st.sampled_from(["mapping", "scalars", "table", "categories"]))
    if form == "scalars" and n:
        return {key: column[0] for key, column in columns.items()}
    if form == "mapping":
        return columns
    table = pd.DataFrame({key: pd.Series(column, dtype=object) for key, column in columns.items()})
    if form == "categories" and "cell_type" in table:
        table["cell_type"] = table["cell_type"].map(str).astype("category")
    return table


def says_what(error: Exception) -> bool:
    """Names an argument or a column, in a sentence."""
    message = str(error.args[0]) if error.args else ""
    words = (*KEYS, "cell_typ", "n_obs", "marginalize", "library", "conditions", "seed", "key")
    return len(message) > 20 and any(word in message for word in words)


@pytest.mark.parametrize("model_class", MODELS, ids=lambda c: c.__name__)
@few
@given(
    conditions=tables(),
    n_obs=st.sampled_from([0, 1, 3, -1, 1.5, True, None, "3"]) | st.integers(0, 5),
    marginalize=st.lists(st.sampled_from([*KEYS, "cell_typ"]), max_size=2),
    library=st.sampled_from(["sampled"] * 5 + [50.0, 0, -1, np.nan, "x", None]),
)
def test_sample_answers_or_says_why_not(model_class, conditions, n_obs, marginalize, library):
    model = trained_on_all_roles(model_class)
    table = conditions if isinstance(conditions, pd.DataFrame) else None
    with untouched(table), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            cells = model.sample(
                conditions, n_obs, marginalize=marginalize, library=library, seed=0
            )
        except DOCUMENTED as error:
            assert says_what(error), repr(error)  # noqa: PT017
            return
    x = cells.to_df().to_numpy()
    assert cells.n_vars == 12
    assert np.isfinite(x).all()
    if model_class.needs_counts:
        assert ((x >= 0) & (x == np.rint(x))).all()
    assert set(cells.obs["cell_type"]) <= {"type_0", "type_1", "type_2"}
    assert layer_of(model_class) in cells.layers
    if table is not None and "cell_type" in table and "cell_type" not in marginalize:
        assert cells.n_obs == len(table) * n_obs
        assert list(cells.obs["cell_type"]) == list(np.repeat(table["cell_type"], n_obs))


@few
@given(
    column=st.lists(values, min_size=1, max_size=5),
    role=st.sampled_from(
        ["batch_key", "donor_key", "categorical_condition_keys", "continuous_condition_keys",
         "size_factor_key"]
    ),
    wrong=st.booleans(),
)  # fmt: skip
def test_setup_takes_a_column_or_says_why_not(column, role, wrong):
    adata = make_cells()
    adata.obs["column"] = pd.Series(
        [column[i % len(column)] for i in range(90)], dtype=object
    ).array
    many = role.endswith("keys")
    key = "column" if many == wrong else ["column"]
    before = adata.obs["column"].to_list()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            NBVAE.setup_anndata(adata, layer="counts", **{role: key})
        except DOCUMENTED as error:
            assert "column" in str(error), repr(error)  # noqa: PT017
            assert not adata.uns
        else:
            NBVAE(adata, **TINY)
    assert all(a is b for a, b in zip(adata.obs["column"], before, strict=True))
