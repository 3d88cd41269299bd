"""ConditionSchema: every fault of a condition is named, and nothing that is given gets lost."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from exprgen._conditions import ConditionLayout, ConditionSchema
from exprgen._errors import (
    CovariateError,
    DataQualityWarning,
    ExtrapolationWarning,
    SetupError,
    UnseenCategoryError,
    closest,
    name_some,
)

N = 40


@pytest.fixture
def obs() -> pd.DataFrame:
    """Two cell types x two doses, in two batches from four donors, ten cells each."""
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical(["T cell", "B cell"] * (N // 2)),
            "dose": np.repeat([0.0, 10.0], N // 2),
            "batch": np.tile(["b1", "b1", "b2", "b2"], N // 4),
            "donor": np.tile([1, 1, 2, 2, 3, 3, 4, 4], N // 8),
        },
        index=[f"cell{i}" for i in range(N)],
    )


@pytest.fixture
def schema(obs: pd.DataFrame) -> ConditionSchema:
    return fit(obs)


def fit(obs: pd.DataFrame, **kwargs) -> ConditionSchema:
    roles = {
        "categorical": ["cell_type"],
        "continuous": ["dose"],
        "batch": "batch",
        "donor": "donor",
    }
    return ConditionSchema.fit(obs, **(roles | kwargs))


def encode(schema: ConditionSchema, conditions, **kwargs) -> np.ndarray:
    return schema.encode(*schema.parse(conditions), **kwargs)


def with_value(obs: pd.DataFrame, key: str, value: object, row: int = 3) -> pd.DataFrame:
    changed = obs.assign(**{key: obs[key].astype(object)})
    changed.iloc[row, changed.columns.get_loc(key)] = value
    return changed


# ---------------------------------------------------------------------- messages


def test_names_are_counted_and_the_closest_is_found():
    assert name_some(np.array(["a", "b", "c", "d"])) == "'a', 'b', 'c' and 1 more"
    assert name_some([1, np.float64(2.5)]) == "1, 2.5"
    assert closest("T-cell", ["B cell", "T cell"]) == " Did you mean 'T cell'?"
    assert closest(7, ["B cell"]) == ""


# ---------------------------------------------------------------------- setup: errors


@pytest.mark.parametrize(
    ("roles", "error", "message"),
    [
        ({"batch": "Batch"}, KeyError, "batch_key.*'Batch'.*Did you mean 'batch'"),
        ({"categorical": ["celltype"]}, KeyError, "categorical_condition_keys.*'cell_type'"),
        ({"continuous": ["doses"]}, KeyError, "continuous_condition_keys.*'dose'"),
        ({"categorical": "cell_type"}, TypeError, r"categorical_condition_keys.*\['cell_type'\]"),
        ({"continuous": [1]}, TypeError, "continuous_condition_keys.*1"),
        ({"batch": ["batch"]}, TypeError, "batch_key must be a str; got list"),
        ({"donor": 3}, TypeError, "donor_key must be a str; got int"),
        ({"batch": "donor"}, SetupError, "'donor'.*batch_key.*donor_key"),
        ({"categorical": ["n_train"]}, SetupError, "'n_train'.*Rename"),
    ],
)
def test_a02_a03_wrong_keys(obs, roles, error, message):
    before = obs.copy()
    with pytest.raises(error, match=message):
        fit(obs, **roles)
    pd.testing.assert_frame_equal(obs, before)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
@pytest.mark.parametrize("dtype", ["object", "category", "string"])
@pytest.mark.parametrize("key", ["cell_type", "batch"])
def test_a04_missing_label(obs, key, missing, dtype):
    faulty = with_value(obs, key, missing).astype({key: dtype})
    with pytest.raises(CovariateError, match=rf"{key}.*1 missing value \(cells 'cell3'.*unknown"):
        fit(faulty)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"obs\['dose'\].*1 missing value \(cells 'cell3'\)"),  # A05
        (np.inf, r"obs\['dose'\].*1 infinite value \(cells 'cell3'\).*log1p"),  # A06
        (-np.inf, "1 infinite value.*pseudo-dose"),
        (1e300, "1 infinite value"),  # is infinite in float32
        ("high", r"'dose'.*numeric.*'high' \(cells 'cell3'\)"),  # A07
        (pd.Timestamp("2020-01-01"), "numeric.*Timestamp"),
    ],
)
def test_a05_a06_a07_bad_quantity(obs, value, message):
    with pytest.raises(CovariateError, match=message):
        fit(with_value(obs, "dose", value))


def test_dates_are_not_numbers(obs):
    obs["dose"] = pd.Timestamp("2020-01-01")
    with pytest.raises(CovariateError, match=r"'dose'.*datetime64"):
        fit(obs)


def test_a29_mixed_labels(obs):
    with pytest.raises(CovariateError, match=r"'batch'.*mixes.*number \(1\).*str|str.*number"):
        fit(with_value(obs, "batch", 1))
    with pytest.raises(CovariateError, match=r"'batch'.*bool \(True\)"):
        fit(with_value(obs, "batch", True))
    obs["batch"] = pd.cut(np.arange(N), 3)
    with pytest.raises(CovariateError, match=r"'batch'.*Interval.*astype\(str\)"):
        fit(obs)


def test_faulty_embedding(obs):
    good = np.arange(2.0 * N).reshape(N, 2)
    bad = good.copy()
    bad[5, 1] = np.nan
    with pytest.raises(CovariateError, match=r"obsm\['X_drug'\].*cell5.*finite"):
        fit(obs, embedding=("X_drug", bad))
    with pytest.raises(CovariateError, match=r"40 rows.*\(39, 2\)"):
        fit(obs, embedding=("X_drug", good[1:]))
    schema = fit(obs, embedding=("X_drug", good))
    with pytest.raises(CovariateError, match="3 dimensions; training had 2"):
        encode(schema, {"cell_type": "T cell", "dose": 0, "X_drug": [0, 0, 0]})
    with pytest.raises(CovariateError, match="lack 'X_drug'"):
        encode(schema, {"cell_type": "T cell", "dose": 0})


# ---------------------------------------------------------------------- setup: warnings


def declared(obs):
    return obs["cell_type"].cat.add_categories("ghost")


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("dose", lambda obs: obs["dose"].astype(str), "'dose'.*text"),  # A08
        ("dose", lambda obs: obs["dose"].astype(str).astype("category"), "'dose'.*text"),
        ("dose", lambda obs: 3.0, "'dose'.*no effect.*3"),  # A09
        ("batch", lambda obs: "b1", r"'batch'.*\(batch_key\) has no effect.*'b1'"),  # A25
        ("batch", lambda obs: ["lone", *["b1", "b2"] * 19, "b1"], "1 cell.*'lone'"),  # A26
        ("cell_type", lambda obs: obs.index, "continuous.*40 labels.*continuous_condition"),  # A27
        ("batch", lambda obs: obs["donor"].astype(float), "'batch'.*continuous.*float"),  # A27
        ("cell_type", declared, "dropped: 'ghost'"),  # A28
    ],
)
def test_a08_a09_a25_to_a28_doubtful_column(obs, key, values, message):
    obs[key] = values(obs)
    before = obs.copy()
    with pytest.warns(DataQualityWarning, match=message) as caught:
        schema = fit(obs)
    assert len(caught) == 1
    pd.testing.assert_frame_equal(obs, before)
    assert np.isfinite(encode(schema, {"cell_type": obs["cell_type"].iloc[0], "dose": 3.0})).all()


def test_condition_constant_within_few_donors_warns():
    donor = np.repeat(np.arange(24), 5)
    obs = pd.DataFrame({"donor": donor, "disease": np.where(donor < 4, "flu", "healthy")})
    with pytest.warns(DataQualityWarning, match=r"'disease'.*within donors.*flu: 4'"):
        ConditionSchema.fit(obs, categorical=["disease"], donor="donor")
    obs["disease"] = np.where(donor < 12, "flu", "healthy")
    ConditionSchema.fit(obs, categorical=["disease"], donor="donor")


# ---------------------------------------------------------------------- encoding


def test_layout_and_order(obs):
    embedding = np.random.default_rng(0).normal(5, 3, (N, 3))
    schema = fit(obs, embedding=("X_drug", embedding))
    layout = ConditionLayout((2,), 1, 3, 2, 4)
    assert schema.layout == layout
    assert ConditionLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert schema.condition_keys == ["cell_type", "dose", "X_drug"]
    matrix = encode(schema, AnnData(np.ones((N, 1)), obs, obsm={"X_drug": embedding}))
    assert matrix.shape == (N, layout.width)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix[:, 0], obs["cell_type"].cat.codes)
    np.testing.assert_allclose(matrix[:, 1:5].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(matrix[:, 1:5].std(0), 1, rtol=1e-6)
    np.testing.assert_array_equal(matrix[:, 5], obs["batch"] == "b2")
    np.testing.assert_array_equal(matrix[:, 6], obs["donor"] - 1)


def test_absent_nuisance_is_unknown(schema):
    matrix = encode(schema, {"cell_type": ["B cell", "T cell"], "dose": 10})
    np.testing.assert_array_equal(matrix, np.float32([[0, 1, -1, -1], [1, 1, -1, -1]]))
    new_donor = encode(schema, {"cell_type": "B cell", "dose": 10, "donor": 77})
    assert new_donor[0, -1] == -1


def test_no_condition_at_all(obs):
    schema = ConditionSchema.fit(obs)
    assert schema.layout.width == 0
    assert encode(schema, {}).shape == (1, 0)
    assert encode(schema, AnnData(np.ones((N, 1)), obs)).shape == (N, 0)
    assert ConditionSchema.from_dict(schema.to_dict()) == schema


def test_a09_a10_scale(obs):
    with pytest.warns(DataQualityWarning, match="no effect"):
        constant = fit(obs.assign(dose=0.1))
    assert constant.quantities[0].std == 1
    assert encode(constant, {"cell_type": "B cell", "dose": 0.1})[0, 1] == 0
    large = fit(obs.assign(dose=1e6 + obs["dose"]))
    assert (large.quantities[0].minimum, large.quantities[0].maximum) == (1e6, 1e6 + 10)
    np.testing.assert_allclose(encode(large, {"cell_type": "B cell", "dose": 1e6 + 5})[0, 1], 0)


@pytest.mark.parametrize("unseen", ["T-cell", "", 0, False])
def test_c01_c02_unseen_label(schema, unseen):
    with pytest.raises(
        UnseenCategoryError, match=r"cell_type.*Known: 'B cell', 'T cell'"
    ) as error:
        encode(schema, {"cell_type": ["B cell", unseen], "dose": 0})
    assert repr(unseen) in str(error.value)
    assert "marginalize=['cell_type']" in str(error.value)
    assert ("Did you mean 'T cell'" in str(error.value)) == (unseen == "T-cell")


def test_unseen_batch(schema):
    table = {"cell_type": "B cell", "dose": 0, "batch": ["b1", "b9"]}
    with pytest.raises(UnseenCategoryError, match=r"'batch'.*'b9'.*unseen='null'"):
        encode(schema, table)
    np.testing.assert_array_equal(encode(schema, table, unseen="null")[:, 2], [0, -1])


def test_c03_unknown_column(schema):
    with pytest.raises(
        KeyError, match=r"conditions.*'celltype'.*Did you mean 'cell_type'.*'donor'"
    ):
        schema.parse({"celltype": "B cell"})
    with pytest.raises(KeyError, match=r"to.*'when'"):
        schema.parse(pd.DataFrame({"when": [1]}), argument="to")


def test_c04_missing_condition(schema):
    assert schema.missing(*schema.parse({"dose": 1})) == ["cell_type"]
    with pytest.raises(
        CovariateError, match=r"'cell_type'.*requires 'cell_type', 'dose'.*marginal"
    ):
        encode(schema, {"dose": 1})


def test_c05_types_differ(schema, obs):
    for unseen in ("error", "null"):
        with pytest.raises(UnseenCategoryError, match=r"'1' \(str\).*1 \(int\).*types differ"):
            encode(schema, {"cell_type": "B cell", "dose": 0, "donor": "1"}, unseen=unseen)
    truth = ConditionSchema.fit(obs.assign(treated=obs["dose"] > 0), categorical=["treated"])
    with pytest.raises(UnseenCategoryError, match="types differ"):
        encode(truth, {"treated": "True"})
    with pytest.raises(UnseenCategoryError, match="1"):
        encode(truth, {"treated": 1})
    donors = {"cell_type": "B cell", "dose": 0, "donor": [1, 1.0, np.int8(1)]}
    np.testing.assert_array_equal(encode(schema, donors)[:, -1], 0)


def test_c06_c07_extrapolation(schema):
    table = {"cell_type": "B cell", "dose": [5, -1, 1000]}
    with pytest.warns(ExtrapolationWarning, match=r"'dose' = -1.0, 1000.0.*0 to 10") as caught:
        encode(schema, table)
    assert len(caught) == 1
    np.testing.assert_array_equal(schema.extrapolated(schema.parse(table)[0]), [0, 1, 1])
    with pytest.raises(CovariateError, match=r"'dose'.*on_extrapolation"):
        encode(schema, table, on_extrapolation="raise")
    encode(schema, table, on_extrapolation="ignore")


def test_float32_does_not_extrapolate(obs):
    schema = fit(obs.assign(dose=np.repeat([0.1, 0.7], N // 2)))
    encode(schema, {"cell_type": "B cell", "dose": np.float32([0.1, 0.7])})


@pytest.mark.parametrize("value", [np.nan, np.inf, None])
@pytest.mark.parametrize("key", ["cell_type", "dose", "batch", "donor"])
def test_c08_missing_value(schema, key, value):
    table = {"cell_type": "B cell", "dose": 0, "batch": "b1", "donor": 1} | {key: value}
    if key == "donor" and value == np.inf:
        return  # a label like others
    with pytest.raises(CovariateError, match=f"'{key}'"):
        encode(schema, table)


def test_text_in_asked_quantity_warns(schema):
    with pytest.warns(DataQualityWarning, match=r"'dose'.*text"):
        matrix = encode(schema, {"cell_type": "B cell", "dose": "10"})
    assert matrix[0, 1] == 1


# ---------------------------------------------------------------------- parsing


def test_parse_forms_agree(schema, obs):
    rows = obs[["cell_type", "dose"]].iloc[:5]
    expected = encode(schema, rows)
    columns = {key: rows[key].tolist() for key in rows}
    shuffled = {key: pd.Series(rows[key].to_numpy(), index=range(5, 0, -1)) for key in rows}
    adata = AnnData(np.ones((5, 1)), rows.assign(irrelevant=1))
    for form in (columns, shuffled, adata):
        np.testing.assert_array_equal(encode(schema, form), expected)
    table, embedding = schema.parse(rows)
    pd.testing.assert_index_equal(table.index, rows.index)
    assert embedding is None


def test_parse_embedding_forms(obs):
    schema = fit(obs, embedding=("X_drug", np.arange(2.0 * N).reshape(N, 2)))
    table, embedding = schema.parse({"cell_type": ["B cell", "T cell"], "X_drug": [1, 2]})
    np.testing.assert_array_equal(embedding, [[1, 2], [1, 2]])
    table, embedding = schema.parse({"cell_type": "B cell", "X_drug": [[1, 2], [3, 4]]})
    np.testing.assert_array_equal(embedding, [[1, 2], [3, 4]])
    assert len(table) == 2
    frame = pd.DataFrame({"cell_type": ["B cell"] * 2, "X_drug": list(embedding)})
    np.testing.assert_array_equal(schema.parse(frame)[1], embedding)


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        ({"cell_type": ["B cell"] * 2, "dose": [0] * 3}, ValueError, "'cell_type': 2, 'dose': 3"),
        ({"cell_type": {"B cell", "T cell"}}, TypeError, "cell_type.*scalar or a list"),
        ([{"cell_type": "B cell"}], TypeError, "DataFrame, a mapping.*list"),
        (None, TypeError, "NoneType"),
    ],
)
def test_parse_refuses(schema, conditions, error, message):
    with pytest.raises(error, match=message):
        schema.parse(conditions)


def test_c10_no_rows(schema):
    assert encode(schema, {"cell_type": [], "dose": []}).shape == (0, 4)
    assert encode(schema, {"cell_type": [], "dose": 0.0}).shape == (0, 4)


# ---------------------------------------------------------------------- round trips (A30)


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b", "b", "a"],
        pd.Categorical(["low", "high", "low", "high"], ["low", "high"], ordered=True),
        pd.Categorical([3, 1, 3, 1]),
        pd.Categorical([True, False, True, False]),
        [True, False, False, True],
        np.array([3, 1, 1, 3], dtype=np.int8),
        pd.array([3, 1, 1, 3], dtype="Int64"),
        pd.array([True, False, False, True], dtype="boolean"),
        pd.array(["a", "b", "b", "a"], dtype="string"),
    ],
    ids=lambda values: str(pd.Series(values).dtype) + "-" + type(values[0]).__name__,
)
def test_a30_dtypes_come_back(values):
    obs = pd.DataFrame({"x": pd.Series(values)}).loc[np.repeat(range(4), 5)]
    schema = ConditionSchema.fit(obs, categorical=["x"])
    schema = ConditionSchema.from_dict(json.loads(json.dumps(schema.to_dict())))
    asked, _ = schema.parse({"x": obs["x"].tolist()})
    restored = schema.restore(asked.set_axis(obs.index))
    pd.testing.assert_frame_equal(restored, obs)
    np.testing.assert_array_equal(schema.encode(restored), schema.encode(asked))


def test_restore_keeps_values_that_no_longer_fit(obs):
    schema = fit(
        obs.assign(dose=obs["dose"].astype("uint8"), donor=obs["donor"].astype("category"))
    )
    table, _ = schema.parse({"cell_type": "B cell", "dose": [2, 2.5], "donor": [1, 9]})
    restored = schema.restore(table)
    assert restored["dose"].tolist() == [2, 2.5]
    assert schema.restore(table.head(1))["dose"].dtype == np.uint8
    assert restored["donor"].cat.categories.tolist() == [1, 2, 3, 4, 9]
    assert restored["cell_type"].cat.categories.tolist() == ["B cell", "T cell"]
    assert schema.restore(table.assign(dose=[0, 300]))["dose"].tolist() == [0, 300]


def test_restored_conditions_can_be_written(schema, tmp_path):
    table, _ = schema.parse({"cell_type": "B cell", "dose": 0.0, "donor": [1, "new"]})
    adata = AnnData(np.ones((2, 1)), schema.restore(table).set_axis(["x", "y"]))
    adata.write_h5ad(tmp_path / "x.h5ad")


LABELS = st.one_of(
    # pandas itself takes "" and "\0" for one label.
    st.lists(
        st.text(st.characters(min_codepoint=1, codec="utf-8"), max_size=5), min_size=2, max_size=30
    ),
    st.lists(st.integers(-5, 5), min_size=2, max_size=30),
    st.lists(st.booleans(), min_size=2, max_size=30),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(labels=LABELS, categorical=st.booleans(), data=st.data())
def test_labels_survive_encoding_json_and_decoding(labels, categorical, data):
    quantity = data.draw(
        st.lists(st.floats(-1e6, 1e6), min_size=len(labels), max_size=len(labels))
    )
    obs = pd.DataFrame({"x": pd.Categorical(labels) if categorical else labels, "q": quantity})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataQualityWarning)
        schema = ConditionSchema.fit(obs, categorical=["x"], continuous=["q"])
    again = ConditionSchema.from_dict(json.loads(json.dumps(schema.to_dict())))
    assert again == schema
    matrix = encode(again, obs, on_extrapolation="raise")
    part = again.labels[0]
    assert part.decode(matrix[:, 0].astype(int)).tolist() == labels
    assert [type(label) for label in part.labels] == [type(labels[0])] * len(part)
    quantity = again.quantities[0]
    np.testing.assert_allclose(
        matrix[:, 1] * quantity.std + quantity.mean,
        obs["q"],
        atol=1e-5 * (1 + abs(obs["q"]).max()),
    )
