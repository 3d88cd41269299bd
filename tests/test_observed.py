"""ObservedConditions against counting the training rows directly."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from exprgen._conditions import ConditionSchema
from exprgen._errors import CovariateError, ExtrapolationWarning
from exprgen._observed import ObservedConditions

N = 6000


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    """Drug B only at doses up to 1 and only in batch 1; age depends on the drug."""
    rng = np.random.default_rng(0)
    drug = rng.choice(["A", "B"], N, p=[0.7, 0.3])
    dose = np.where(drug == "A", rng.choice([0.0, 1.0, 10.0], N), rng.choice([0.0, 1.0], N))
    return pd.DataFrame(
        {
            "drug": pd.Categorical(drug),
            "cell_type": np.where(drug == "B", "T", rng.choice(["T", "B", "NK"], N)),
            "dose": dose,
            "age": np.where(drug == "A", rng.uniform(20, 40, N), rng.uniform(60, 80, N)),
            "batch": np.where(drug == "B", 1, rng.choice([1, 2], N)),
        }
    )


@pytest.fixture(scope="module")
def schema(obs: pd.DataFrame) -> ConditionSchema:
    return ConditionSchema.fit(
        obs, categorical=["drug", "cell_type"], continuous=["dose", "age"], batch="batch"
    )


@pytest.fixture(scope="module")
def observed(schema: ConditionSchema, obs: pd.DataFrame) -> ObservedConditions:
    fitted = ObservedConditions.fit(schema, obs)
    return ObservedConditions.from_dict(json.loads(json.dumps(fitted.to_dict())), schema)


def test_frame_counts_the_training_rows(observed, obs, schema):
    keys = ["drug", "cell_type", "dose", "batch"]
    frame = observed.frame
    assert list(frame) == [*keys, "age_min", "age_median", "age_max", "n_train"]
    assert frame["n_train"].is_monotonic_decreasing
    by = obs.groupby(keys, observed=True)["age"]
    counted = by.agg(["min", "median", "max", "size"]).loc[
        list(frame[keys].itertuples(index=False, name=None))
    ]
    np.testing.assert_array_equal(frame["n_train"], counted["size"])
    np.testing.assert_allclose(frame[["age_min", "age_median", "age_max"]], counted.iloc[:, :3])
    assert frame["drug"].dtype == obs["drug"].dtype
    assert frame["batch"].dtype == obs["batch"].dtype
    # Its rows can be asked for as they are.
    assert list(schema.parse(frame)[0]) == keys


def test_draw_has_the_training_distribution(observed, obs):
    drawn = observed.draw(40_000, np.random.default_rng(1))
    keys = ["drug", "cell_type", "dose", "batch"]
    expected = obs.value_counts(keys, normalize=True)
    frequency = drawn.value_counts(keys, normalize=True).reindex(expected.index, fill_value=0)
    assert len(drawn.value_counts(keys)) == len(expected)
    assert np.abs(frequency - expected).max() < 5 * np.sqrt(0.25 / 40_000)
    for drug, ages in drawn.groupby("drug", observed=True)["age"]:
        real = obs.loc[obs["drug"] == drug, "age"]
        assert real.min() <= ages.min() <= ages.max() <= real.max()
        np.testing.assert_allclose(
            ages.quantile([0.1, 0.5, 0.9]), real.quantile([0.1, 0.5, 0.9]), atol=0.6
        )
    pd.testing.assert_frame_equal(drawn, observed.draw(40_000, np.random.default_rng(1)))


def test_complete_draws_from_missing_given_the_rest(observed, obs):
    table = pd.DataFrame({"drug": ["A", "B"] * 10_000}, index=np.arange(20_000)[::-1])
    before = table.copy()
    filled = observed.complete(table, ["dose", "batch", "age"], np.random.default_rng(2))
    pd.testing.assert_frame_equal(table, before)
    pd.testing.assert_index_equal(filled.index, table.index)
    assert "cell_type" not in filled
    expected = obs.groupby("drug", observed=True)["dose"].value_counts(normalize=True)
    frequency = filled.groupby("drug")["dose"].value_counts(normalize=True)
    assert set(frequency.index) == set(expected.index)
    np.testing.assert_allclose(frequency.loc[list(expected.index)], expected, atol=0.03)
    assert set(filled.loc[filled["drug"] == "B", "batch"]) == {1}
    assert filled.groupby("drug")["age"].max()["A"] <= 40 < 60 <= filled["age"].max()


def test_complete_an_unseen_combination_from_all(observed, obs):
    table = pd.DataFrame({"drug": ["B"] * 20_000, "cell_type": "NK"})
    filled = observed.complete(table, ["batch"], np.random.default_rng(3))
    np.testing.assert_allclose(
        (filled["batch"] == 2).mean(), (obs["batch"] == 2).mean(), atol=0.02
    )


def test_given_columns_are_not_replaced(observed):
    table = pd.DataFrame({"drug": ["A"], "dose": [10.0], "age": [33.0]})
    filled = observed.complete(table, ["drug", "dose", "cell_type"], np.random.default_rng(0))
    pd.testing.assert_frame_equal(filled[["drug", "dose", "age"]], table)


def test_n_train_sums_over_what_is_not_given(observed, obs):
    table = pd.DataFrame({"drug": ["A", "B", "B"], "dose": [1.0, 1.0, 10.0], "batch": [1, 2, 1]})
    counted = [
        ((obs["drug"] == drug) & (obs["dose"] == dose)).sum()
        for drug, dose in zip(table["drug"], table["dose"], strict=True)
    ]
    np.testing.assert_array_equal(observed.n_train(table), counted)
    assert observed.n_train(pd.DataFrame(index=range(2))).tolist() == [N, N]
    assert observed.n_train(table.head(0)).shape == (0,)


@pytest.mark.parametrize(
    ("row", "support"),
    [
        ({"drug": "A", "cell_type": "NK", "dose": 10, "age": 30}, "seen"),
        ({"drug": "A", "dose": np.float32(1)}, "seen"),
        ({"drug": "A", "cell_type": "NK", "dose": 5, "age": 30}, "between"),
        ({"drug": "B", "cell_type": "NK", "dose": 1, "age": 70}, "unseen combination"),
        ({"drug": "B", "cell_type": "T", "dose": 10, "age": 70}, "unseen combination"),
        ({"drug": "A", "cell_type": "T", "dose": 1, "age": 70}, "unseen combination"),
        ({"drug": "B", "cell_type": "T", "dose": 11, "age": 70}, "outside range"),
        ({"drug": "A", "age": 90}, "outside range"),
    ],
)
def test_support(observed, schema, row, support):
    table, _ = schema.parse(row)
    assert observed.support(table).tolist() == [support]


def test_c09_unseen_combination_is_named(observed, schema):
    table, _ = schema.parse({"drug": "B", "cell_type": ["NK", "T", "NK"]})
    with pytest.warns(ExtrapolationWarning, match=r"drug=B, cell_type=NK.*\(2 rows\)"):
        observed.report_unseen(table)
    with pytest.raises(CovariateError, match="drug=B, cell_type=NK"):
        observed.report_unseen(table, on_extrapolation="raise")
    observed.report_unseen(table, on_extrapolation="ignore")
    observed.report_unseen(table.iloc[[1]])


def test_drop_rare(observed):
    least = observed.counts.min()
    kept = observed.drop_rare(least + 1)
    assert kept.counts.min() > least
    assert len(kept.frame) == (observed.counts > least).sum()
    with pytest.raises(ValueError, match=r"min_cells=6001.*most frequent"):
        observed.drop_rare(N + 1)


def test_no_condition_at_all(obs):
    schema = ConditionSchema.fit(obs)
    observed = ObservedConditions.fit(schema, obs)
    observed = ObservedConditions.from_dict(json.loads(json.dumps(observed.to_dict())), schema)
    pd.testing.assert_frame_equal(observed.frame, pd.DataFrame({"n_train": [N]}))
    drawn = observed.draw(3, np.random.default_rng(0))
    assert drawn.shape == (3, 0)
    assert observed.support(drawn).tolist() == ["seen"] * 3
    assert observed.n_train(drawn).tolist() == [N] * 3


def test_only_a_spread_quantity(obs):
    schema = ConditionSchema.fit(obs, continuous=["age"])
    observed = ObservedConditions.fit(schema, obs)
    assert len(observed.frame) == 1
    drawn = observed.draw(20_000, np.random.default_rng(0))["age"]
    assert drawn.between(obs["age"].min(), obs["age"].max()).all()
    assert (drawn < 41).mean() == pytest.approx((obs["age"] < 41).mean(), abs=0.05)


def test_embedding_cannot_be_filled_in(obs):
    schema = ConditionSchema.fit(
        obs,
        categorical=["drug"],
        embedding=("X_drug", np.random.default_rng(0).normal(size=(N, 2))),
    )
    observed = ObservedConditions.fit(schema, obs)
    with pytest.raises(CovariateError, match=r"X_drug.*cannot be averaged"):
        observed.complete(pd.DataFrame({"drug": ["A"]}), ["X_drug"], np.random.default_rng(0))


@pytest.mark.parametrize("n", [1, 512, 1299])
def test_the_first_rows_do_not_depend_on_how_many_follow(observed, obs, schema, n):
    drawn, first = (observed.draw(k, np.random.default_rng(1)) for k in (1300, n))
    pd.testing.assert_frame_equal(drawn.iloc[:n], first)
    several = obs.assign(weight=np.random.default_rng(0).normal(size=N))
    schema = ConditionSchema.fit(several, categorical=["drug"], continuous=["age", "weight"])
    observed, given = ObservedConditions.fit(schema, several), several[["drug"]]
    drawn, first = (
        observed.complete(given.iloc[:k], ["age", "weight"], np.random.default_rng(1))
        for k in (1300, n)
    )
    pd.testing.assert_frame_equal(drawn.iloc[:n], first)
    # One stream for all quantities would tie them together.
    assert n < 99 or abs(drawn["age"].rank().corr(drawn["weight"].rank())) < 0.1
