"""Mean predictors: what is said to be out of sample is, exactly; fitted ones stay as they are."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from exprgen._errors import (
    CheckpointError,
    CovariateError,
    DataQualityWarning,
    ExtrapolationWarning,
    UnseenCategoryError,
)
from exprgen._files import from_plain, to_plain
from exprgen.means import (
    CallableMean,
    Encoding,
    GroupMeans,
    HierarchicalMean,
    Mean,
    PrecomputedMean,
    RidgeMean,
    SklearnMean,
    TorchMean,
    as_mean,
    from_state,
)
from exprgen.means._checks import fold_numbers

N, N_VARS = 60, 5
Rows = tuple[pd.DataFrame, np.ndarray, np.ndarray]


@pytest.fixture
def rows() -> Rows:
    """Two columns of labels, two of numbers, six donors; labels and dose act, donors too."""
    rng = np.random.default_rng(0)
    donor = np.repeat([f"d{i}" for i in range(6)], [4, 16, 10, 10, 10, 10])
    table = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(["T", "B", "NK"], N)),
            "dose": rng.exponential(3.0, N),
            "stimulated": rng.random(N) < 0.5,
            "age": rng.integers(20, 80, N),
        },
        index=[f"cell{i}" for i in range(N)],
    )
    effects = rng.normal(size=(4, N_VARS))
    y = 100 + effects[table["cell_type"].cat.codes] + np.outer(table["dose"], effects[3])
    y = y + rng.normal(size=(6, N_VARS))[pd.factorize(donor)[0]] + rng.normal(size=(N, N_VARS))
    return table, y, donor


def labels_of(table: pd.DataFrame) -> pd.DataFrame:
    return table[["cell_type", "stimulated"]]


def weights_of(kind: str) -> np.ndarray | None:
    if kind == "none":
        return None
    weights = np.random.default_rng(3).exponential(size=N)
    weights[[5, 17]] = 0
    return weights


def left_out(groups: np.ndarray | None) -> list[np.ndarray]:
    """Masks of what is left out, one by one."""
    labels = np.arange(N) if groups is None else groups
    return [labels == label for label in np.unique(labels)]


# ---------------------------------------------------------------------- closed forms


def refit_ridge(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> Callable:
    """Ridge by least squares on stacked rows: no normal equations, no code of ours."""
    root = np.sqrt(w)[:, None]
    p = x.shape[1]
    design = np.column_stack([np.ones(len(x)), x]) * root
    stacked = np.vstack([design, np.column_stack([np.zeros(p), np.sqrt(penalty) * np.eye(p)])])
    coef = np.linalg.lstsq(stacked, np.vstack([y * root, np.zeros((p, y.shape[1]))]))[0]
    return lambda new: np.column_stack([np.ones(len(new)), new]) @ coef


@pytest.mark.parametrize("weighted", ["none", "some"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("penalty", [0.05, 7.0, None])
def test_ridge_leaves_out_rows_and_groups_exactly(rows, penalty, grouped, weighted):
    table, y, donor = rows
    groups, weights = donor if grouped else None, weights_of(weighted)
    ridge = RidgeMean(penalty)
    found = ridge.out_of_sample(table, y, groups, weights=weights)
    ridge.fit(table, y, weights, groups=groups)
    x, w = Encoding.fit(table)(table), np.ones(N) if weights is None else weights / weights.mean()
    for out in left_out(groups):
        refitted = refit_ridge(x[~out], y[~out], w[~out], ridge.chosen_penalty)
        np.testing.assert_allclose(found[out], refitted(x[out]), rtol=0, atol=1e-8)
    everything = refit_ridge(x, y, w, ridge.chosen_penalty)
    np.testing.assert_allclose(ridge.predict(table), everything(x), rtol=0, atol=1e-8)
    scaled = ridge.fit(table, y, w * 1e12, groups=groups).predict(table)
    np.testing.assert_allclose(scaled, everything(x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("weighted", ["none", "some"])
@pytest.mark.parametrize("grouped", [False, True])
def test_ridge_takes_the_penalty_of_the_least_error(rows, grouped, weighted):
    table, y, donor = rows
    groups, weights = donor if grouped else None, weights_of(weighted)
    chosen = RidgeMean().fit(table, y, weights, groups=groups).chosen_penalty
    w = np.ones(N) if weights is None else weights

    def error(penalty: float) -> float:
        predicted = RidgeMean(penalty).out_of_sample(table, y, groups, weights=weights)
        return float(w @ np.square(y - predicted).sum(axis=1))

    grid = [10.0 ** (k / 2) for k in range(-4, 9)]
    assert chosen == min(grid, key=error)


def test_ridge_of_noise_is_shrunk_to_the_mean_and_of_none_is_not(rows):
    table, _, _ = rows
    noise = np.random.default_rng(1).normal(size=(N, 200))
    assert RidgeMean().fit(table, noise).chosen_penalty >= 100
    exact = np.outer(table["dose"], [1.0, 2.0])
    ridge = RidgeMean().fit(table, exact)
    assert ridge.chosen_penalty < 0.02
    np.testing.assert_allclose(ridge.predict(table), exact, atol=0.01)


@pytest.mark.parametrize("weighted", ["none", "some"])
@pytest.mark.parametrize("grouped", [False, True])
def test_group_means_leave_out_rows_and_groups_exactly(rows, grouped, weighted):
    table, y, donor = rows
    table, weights = labels_of(table), weights_of(weighted)
    groups = donor if grouped else None
    found = GroupMeans().out_of_sample(table, y, groups, weights=weights)
    w = np.ones(N) if weights is None else weights
    for out in left_out(groups):
        refitted = GroupMeans().fit(table[~out], y[~out], w[~out])
        np.testing.assert_allclose(found[out], refitted.predict(table[out]), rtol=0, atol=1e-8)
    of_t = (table["cell_type"] == "T") & table["stimulated"]
    expected = np.average(y[of_t], axis=0, weights=w[of_t])
    everything = GroupMeans().fit(table, y, weights)
    np.testing.assert_allclose(everything.predict(table[of_t])[0], expected, atol=1e-10)


def test_group_without_others_has_the_mean_of_all_others(rows):
    table, y, donor = rows
    alone = pd.DataFrame({"kind": ["rare", *["common"] * (N - 1)]}, index=table.index)
    with pytest.warns(ExtrapolationWarning, match=r"1 of 60 rows .*'cell0'"):
        found = GroupMeans().out_of_sample(alone, y)
    np.testing.assert_allclose(found[0], y[1:].mean(axis=0), atol=1e-10)
    by_donor = pd.DataFrame({"kind": donor})
    with pytest.warns(ExtrapolationWarning, match="60 of 60 rows"):
        found = GroupMeans().out_of_sample(by_donor, y, donor)
    first = donor == "d0"
    np.testing.assert_allclose(found[first][0], y[~first].mean(axis=0), atol=1e-10)


def test_a_new_combination_has_the_grand_mean_and_is_flagged(rows):
    table, y, _ = rows
    table = labels_of(table)
    new = (table["cell_type"] == "NK") & table["stimulated"]
    mean = GroupMeans().fit(table[~new], y[~new])
    np.testing.assert_array_equal(mean.seen(table), ~new)
    with pytest.warns(ExtrapolationWarning, match=f"{new.sum()} of 60 rows.*mean of all cells"):
        found = mean.predict(table)
    np.testing.assert_allclose(found[new][0], y[~new].mean(axis=0), atol=1e-10)


def test_group_means_say_that_they_use_no_numbers(rows):
    table, y, _ = rows
    with pytest.warns(DataQualityWarning, match="'dose', 'age'.*ridge"):
        GroupMeans().fit(table, y)


@pytest.mark.parametrize("mean", [RidgeMean(), GroupMeans()])
def test_without_conditions_the_mean_is_the_mean(rows, mean):
    _, y, donor = rows
    nothing = pd.DataFrame(index=range(N))
    np.testing.assert_allclose(mean.fit(nothing, y).predict(nothing)[7], y.mean(0))
    assert mean.predict(nothing[:0]).shape == (0, N_VARS)
    found = mean.out_of_sample(nothing, y, donor)
    np.testing.assert_allclose(found[0], y[donor != donor[0]].mean(0))


@pytest.mark.parametrize(("key", "other"), [("T", "B"), (1, 3), (True, False), (2.5, 1.5)])
def test_labels_of_every_kind_are_encoded_by_value(key, other):
    table = pd.DataFrame({"k": [key, other, key, other]})
    encoding = Encoding.fit(table, categorical_keys=["k"])
    assert set(encoding.names) == {f"k={key}", f"k={other}"}
    at = encoding.names.index(f"k={key}")
    np.testing.assert_array_equal(encoding(table)[:, at], [1, 0, 1, 0])
    y = np.arange(8.0).reshape(4, 2)
    mean = GroupMeans(categorical_keys=["k"]).fit(table, y)
    np.testing.assert_array_equal(mean.predict(table.iloc[[1]]), [[4, 5]])
    sklearn = SklearnMean(LinearRegression(), categorical_keys=["k"]).fit(table, y, seed=0)
    np.testing.assert_allclose(sklearn.predict(table.iloc[[1]]), [[4, 5]])


# ---------------------------------------------------------------------- folds, scikit-learn


def test_folds_never_split_a_group_and_are_balanced():
    rng = np.random.default_rng(0)
    units = rng.choice(23, 400, p=rng.dirichlet(np.full(23, 0.7)))
    units = np.unique(units, return_inverse=True)[1]
    folds = fold_numbers(units, 5, seed=1)
    assert all(len(np.unique(folds[units == unit])) == 1 for unit in np.unique(units))
    sizes = np.bincount(folds)
    assert len(sizes) == 5
    assert sizes.max() <= max(np.bincount(units).max(), 400 / 5 * 1.3)
    assert np.array_equal(folds, fold_numbers(units, 5, seed=1))
    assert np.ptp(np.bincount(fold_numbers(np.arange(403), 4, seed=0))) <= 1
    assert not np.array_equal(*(fold_numbers(np.arange(40), 4, seed=s) for s in (0, 1)))


class Remembering(RegressorMixin, BaseEstimator):
    """Predicts the mean, and keeps what it was fitted to, over all clones."""

    fits: ClassVar[list[pd.DataFrame]] = []

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Remembering:
        self.fits.append(X)
        self.mean_ = np.average(y, axis=0, weights=sample_weight)
        return self

    def predict(self, X: Any) -> np.ndarray:
        return np.tile(self.mean_, (len(X), 1))


class Bare:
    """Has fit and predict, and nothing that a clone could be made from."""

    fit = predict = None


@pytest.fixture
def fits(monkeypatch) -> list[pd.DataFrame]:
    monkeypatch.setattr(Remembering, "fits", [])
    return Remembering.fits


def test_every_row_is_predicted_without_its_donor(rows, fits, caplog):
    table, y, donor = rows
    with caplog.at_level(logging.INFO, "exprgen"):
        mean = SklearnMean(Remembering(), inputs="raw")
        found = mean.out_of_sample(table, y, donor, n_folds=3, seed=0)
    assert "Cross-fitting Remembering: 3 fits to about 40 cells x 5 genes" in caplog.text
    assert len(fits) == 3
    donor_of = pd.Series(donor, table.index)
    for fitted_to in fits:
        out = ~table.index.isin(fitted_to.index)
        assert not set(donor[out]) & set(donor_of[fitted_to.index])
        np.testing.assert_allclose(found[out][0], y[~out].mean(axis=0))
    # More folds than donors are as many as donors.
    del fits[:]
    mean.out_of_sample(table, y, donor, n_folds=50, seed=0)
    assert len(fits) == 6


def test_cross_fitting_equals_refits_by_hand(rows):
    table, y, donor = rows
    x = Encoding.fit(table)(table)
    found = SklearnMean(Ridge(0.3)).out_of_sample(table, y, donor, n_folds=4, seed=2)
    folds = fold_numbers(pd.factorize(donor)[0], 4, seed=2)
    for fold in range(4):
        out = folds == fold
        # The numbers are standardised in each fit; here by its own rows, labels as they are.
        numbers = x[:, -2:]
        scaled = (numbers - numbers[~out].mean(0)) / numbers[~out].std(0)
        design = np.column_stack([x[:, :-2], scaled])
        by_hand = Ridge(0.3).fit(design[~out], y[~out]).predict(design[out])
        np.testing.assert_allclose(found[out], by_hand, atol=1e-8)


def test_weights_reach_the_regressor(rows, fits):
    table, y, _ = rows
    weights = weights_of("some")
    for inputs in ("raw", "encoded"):
        mean = SklearnMean(Remembering(), inputs=inputs).fit(table, y, weights, seed=0)
        expected = np.average(y, axis=0, weights=weights)
        np.testing.assert_allclose(mean.predict(table)[0], expected)
    from sklearn.neighbors import KNeighborsRegressor

    with pytest.raises(ValueError, match="weights: KNeighborsRegressor takes none"):
        SklearnMean(KNeighborsRegressor()).fit(table, y, weights, seed=0)


def test_pipelines_read_raw_columns_and_others_encoded_ones(rows):
    table, y, _ = rows
    encoder = make_column_transformer((OneHotEncoder(), ["cell_type"]), ("passthrough", ["dose"]))
    pipeline = SklearnMean(make_pipeline(encoder, Ridge()))
    assert pipeline.inputs == "raw"
    assert SklearnMean(Ridge()).inputs == "encoded"
    assert pipeline.fit(table, y, seed=0).predict(table).shape == y.shape
    # What was fitted reads raw tables by itself, and can come back as a fitted predictor.
    fitted = SklearnMean(Ridge()).fit(table, y, seed=0)
    again = as_mean(fitted.fitted)
    assert again.came_fitted
    np.testing.assert_array_equal(again.predict(table), fitted.predict(table))


def test_the_users_regressor_and_the_global_streams_stay_as_they_are(rows):
    table, y, _ = rows
    forest = RandomForestRegressor(n_estimators=3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first, second = (
        SklearnMean(forest).out_of_sample(table, y, n_folds=2, seed=4) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    SklearnMean(forest).fit(table, y[:, :1], seed=1)
    assert not hasattr(forest, "estimators_")
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())


def test_a_fitted_regressor_is_never_refitted(rows, fits):
    table, y, _ = rows
    fitted = Remembering().fit(table, y)
    assert len(fits) == 1
    mean = as_mean(fitted)
    with pytest.raises(ValueError, match=r"Remembering is fitted.*out_of_sample="):
        mean.out_of_sample(table, y)
    mean.fit(table, y)
    np.testing.assert_allclose(mean.predict(table)[0], y.mean(axis=0))
    given = as_mean(fitted, out_of_sample=y + 1)
    np.testing.assert_array_equal(given.fit(table, y).out_of_sample(table, y), y + 1)
    assert given.fitted is fitted
    assert len(fits) == 1
    with pytest.raises(ValueError, match=r"shape \(60, 5\).*\(59, 5\)"):
        as_mean(fitted, out_of_sample=y[1:]).out_of_sample(table, y)
    with pytest.raises(ValueError, match="inputs must be 'raw'"):
        SklearnMean(fitted, inputs="encoded")


def test_a_fitted_regressor_reads_the_columns_it_was_fitted_to(rows):
    table, y, _ = rows
    by_name = Ridge().fit(table[["age", "dose"]], y)
    expected = by_name.predict(table[["age", "dose"]])
    np.testing.assert_array_equal(as_mean(by_name).predict(table), expected)
    with pytest.raises(CovariateError, match="lack 'age'.*Ridge was fitted to"):
        as_mean(by_name).predict(table[["dose"]])
    numbers = table[["age", "dose"]]
    by_position = Ridge().fit(numbers.to_numpy(), y)
    np.testing.assert_allclose(as_mean(by_position).predict(numbers), expected)


def test_what_a_regressor_cannot_fit_is_explained(rows):
    table, y, _ = rows
    boosting = SklearnMean(HistGradientBoostingRegressor())
    with pytest.raises(ValueError, match="could not be fitted.*MultiOutputRegressor"):
        boosting.fit(table, y, seed=0)
    with pytest.raises(ValueError, match="inputs='encoded'"):
        SklearnMean(Ridge(), inputs="raw").fit(table, y, seed=0)


# ---------------------------------------------------------------------- fixed predictors


def linear_module(n_inputs: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(n_inputs, N_VARS), torch.nn.Dropout(0.5))


def test_a_module_is_evaluated_and_left_as_it_is(rows):
    table, y, _ = rows
    encoding = Encoding.fit(table)
    module = linear_module(encoding.n_inputs)
    module[1].eval()
    mean = TorchMean(module, inputs=encoding, batch_size=7, out_of_sample="predict")
    weight = module[0].weight.detach().clone()
    found = mean.fit(table, y).predict(table)
    expected = encoding(table) @ weight.numpy().T + module[0].bias.detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(mean.out_of_sample(table, y), found)
    assert torch.equal(weight, module[0].weight)
    assert [part.training for part in module] == [True, False]
    assert module[0].weight.grad is None
    with pytest.raises(TypeError, match=r"'cell_type' hold labels.*inputs="):
        as_mean(module).predict(table)
    numbers = as_mean(linear_module(2)).predict(table[["dose", "age"]])
    assert numbers.shape == (N, N_VARS)


def test_a_callable_gets_a_copy_and_may_return_any_array(rows):
    table, y, _ = rows
    before = table.copy()

    def greedy(given: pd.DataFrame) -> Any:
        dose = given.pop("dose").to_numpy()
        return pd.DataFrame(np.outer(dose, np.ones(N_VARS)), index=given.index)

    mean = as_mean(greedy, out_of_sample="predict")
    assert isinstance(mean, CallableMean)
    np.testing.assert_array_equal(mean.fit(table, y).predict(table)[:, 2], table["dose"])
    pd.testing.assert_frame_equal(table, before)
    np.testing.assert_array_equal(mean.out_of_sample(table, y), mean.predict(table))
    with pytest.raises(ValueError, match="greedy is fitted.*'predict' if it never saw"):
        as_mean(greedy).out_of_sample(table, y)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda t: np.zeros((len(t) + 1, N_VARS)), ValueError, r"shape \(60, 5\).*\(61, 5\)"),
        (lambda t: np.zeros(len(t)), ValueError, r"got \(60,\)"),
        (lambda t: np.full((len(t), N_VARS), np.nan), ValueError, "missing or infinite.*row 0"),
        (lambda t: torch.full((len(t), N_VARS), torch.inf), ValueError, "infinite"),
        (lambda t: None, TypeError, "array of numbers; got NoneType"),
        (lambda t: linear_module, TypeError, "got function"),
        (lambda t: np.full((len(t), N_VARS), "a"), TypeError, "numbers; got ndarray of <U1"),
        (
            lambda t: pd.DataFrame(np.zeros((len(t), N_VARS)), t.index[::-1]),
            ValueError,
            "order of the table's rows",
        ),
    ],
)
def test_what_a_predictor_returns_is_checked(rows, returned, error, message):
    table, y, _ = rows
    mean = CallableMean(lambda t: np.zeros((len(t), N_VARS))).fit(table, y)
    mean.function = returned
    with pytest.raises(error, match=message):
        mean.predict(table)
    with pytest.raises(error):
        CallableMean(returned, out_of_sample="predict").out_of_sample(table, y)


def test_a_predictor_of_other_genes_is_found_out_at_once(rows):
    table, y, _ = rows
    with pytest.raises(ValueError, match=r"shape \(1, 5\).*\(1, 4\)"):
        CallableMean(lambda t: np.zeros((len(t), 4))).fit(table, y)
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        SklearnMean(Remembering().fit(table, y[:, :4])).fit(table, y)
    one = CallableMean(lambda t: np.zeros(len(t))).fit(table, y[:, :1])
    assert one.predict(table).shape == (N, 1)


def test_a_layer_knows_its_own_cells_only(rows):
    table, y, _ = rows
    mean = as_mean("gem", layers={"gem": y + 1})
    assert isinstance(mean, PrecomputedMean)
    np.testing.assert_array_equal(mean.fit(table, y).out_of_sample(table, y), y + 1)
    with pytest.raises(ValueError, match=r"'gem'.*mean=array, of shape \(3, 5\)"):
        mean.predict(table[:3])
    np.testing.assert_array_equal(mean.predict(table[:3], mean=y[:3]), y[:3])
    with pytest.raises(ValueError, match=r"mean must be of shape \(3, 5\)"):
        mean.predict(table[:3], mean=y[:2])
    faulty = as_mean("gem", layers={"gem": np.where(y == y[4], np.nan, y)})
    with pytest.raises(ValueError, match="'gem'.*missing or infinite values in 1 rows.*row 4"):
        faulty.fit(table, y)


# ---------------------------------------------------------------------- conditions, arguments


@pytest.mark.parametrize(
    "mean", [RidgeMean(), SklearnMean(LinearRegression()), GroupMeans(), HierarchicalMean()]
)
def test_unseen_labels_and_missing_columns_are_errors(rows, mean):
    table, y, _ = rows
    table = labels_of(table)
    mean.fit(table, y, seed=0)
    with pytest.raises(UnseenCategoryError, match="'cell_type'.*'Treg'.*Known"):
        mean.predict(table.assign(cell_type="Treg"))
    with pytest.raises(CovariateError, match="lack 'stimulated'"):
        mean.predict(table[["cell_type"]])
    with pytest.raises(CovariateError, match="1 missing value.*'cell1'"):
        mean.predict(table.assign(stimulated=[True, None, *[False] * (N - 2)]))
    plain = table.assign(cell_type=table["cell_type"].astype(str), other=0)
    np.testing.assert_array_equal(mean.predict(plain[plain.columns[::-1]]), mean.predict(table))


@pytest.mark.parametrize(
    "mean", [RidgeMean(), GroupMeans(), SklearnMean(Ridge()), HierarchicalMean()]
)
def test_nothing_is_predicted_before_a_fit(rows, mean):
    with pytest.raises(RuntimeError, match=r"call fit\(table, y\) first"):
        mean.predict(rows[0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"table": {"cell_type": ["T"]}}, TypeError, "table must be a pandas DataFrame; got dict"),
        ({"y": np.zeros(N)}, ValueError, r"y must be of shape \(60, n_vars\).*got \(60,\)"),
        ({"y": np.zeros((3, 2))}, ValueError, r"\(60, n_vars\).*\(3, 2\)"),
        ({"y": np.full((N, 2), np.nan)}, ValueError, "y has missing or infinite values in 60"),
        ({"y": np.full((N, 2), "a")}, TypeError, "y must be an array of numbers"),
        ({"weights": np.ones(3)}, ValueError, "weights must be 60 numbers"),
        ({"weights": -np.ones(N)}, ValueError, "from 0 up"),
        ({"weights": np.zeros(N)}, ValueError, "not all 0"),
        ({"weights": np.eye(N)[0]}, ValueError, "nothing is left to fit"),
        ({"groups": ["a"] * N}, ValueError, "one label only, 'a'"),
        ({"groups": ["a", "b"]}, ValueError, "groups has 2 entries; table has 60 rows"),
        ({"groups": [None, *range(N - 1)]}, CovariateError, "groups has 1 missing.*row 0"),
    ],
)
@pytest.mark.parametrize("mean", ["ridge", "group", "hierarchical", Remembering()])
def test_faulty_arguments(rows, mean, changed, error, message):
    table, y, _ = rows
    arguments = {"table": labels_of(table), "y": y, "seed": 0} | changed
    with pytest.raises(error, match=message):
        as_mean(mean).out_of_sample(**arguments)


def test_faulty_folds_penalties_and_columns(rows):
    table, y, _ = rows
    for n_folds, error in ((1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="n_folds"):
            SklearnMean(Ridge()).out_of_sample(table, y, n_folds=n_folds, seed=0)
    with pytest.raises(ValueError, match="penalty must lie in"):
        RidgeMean(0.0)
    with pytest.raises(KeyError, match="categorical_keys.*'celltype'.*Did you mean 'cell_type'"):
        RidgeMean(categorical_keys=["celltype"]).fit(table, y)
    with pytest.raises(ValueError, match="several columns of one name: 'dose'"):
        RidgeMean().fit(pd.concat([table, table[["dose"]]], axis=1), y)
    with pytest.raises(ValueError, match="at least 2 rows"):
        RidgeMean().out_of_sample(table[:1], y[:1])


@pytest.mark.parametrize(
    ("mean", "kind"),
    [
        ("ridge", RidgeMean),
        ("group", GroupMeans),
        ("hierarchical", HierarchicalMean),
        ("gem", PrecomputedMean),
        (Ridge(), SklearnMean),
        (torch.nn.Linear(2, 2), TorchMean),
        (np.square, CallableMean),
        (RidgeMean(3.0), RidgeMean),
    ],
)
def test_what_may_stand_for_a_mean(mean, kind):
    found = as_mean(mean, layers={"gem": np.zeros((2, 2))})
    assert type(found) is kind
    assert isinstance(found, Mean)
    assert found.name


@pytest.mark.parametrize(
    ("mean", "options", "error", "message"),
    [
        (
            3,
            {},
            TypeError,
            "mean must be 'ridge', 'group', 'hierarchical', the name of a layer.*got int",
        ),
        (None, {}, TypeError, "got NoneType"),
        ("rigde", {}, KeyError, "mean='rigde'.*layers are: 'gem'.*Did you mean 'ridge'"),
        ("gm", {}, KeyError, "Did you mean 'gem'"),
        (Ridge, {}, TypeError, r"not a class. Did you mean Ridge\(\)"),
        (LogisticRegression(), {}, TypeError, "LogisticRegression is a classifier"),
        (Bare(), {}, TypeError, "Bare cannot be cloned.*BaseEstimator"),
        ("ridge", {"out_of_sample": "gem"}, ValueError, "mean='ridge' makes its own"),
        (Ridge(), {"out_of_sample": "gem"}, ValueError, "this one is not.*cross-fitted"),
        (RidgeMean(), {"out_of_sample": "gem"}, ValueError, "with the predictor itself"),
        (np.square, {"out_of_sample": "gen"}, KeyError, "'gen'.*Did you mean 'gem'"),
    ],
)
def test_what_may_not(mean, options, error, message):
    with pytest.raises(error, match=message):
        as_mean(mean, layers={"gem": np.zeros((2, 2))}, **options)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("mean", ["ridge", "group", "hierarchical"])
def test_states_go_through_files_without_pickle(rows, mean):
    table, y, donor = rows
    table = labels_of(table).assign(donor=donor)
    with pytest.raises(RuntimeError, match="has not been fitted"):
        as_mean(mean).state()
    fitted = as_mean(mean).fit(table, y)
    file = io.BytesIO()
    torch.save(to_plain(fitted.state()), file)
    file.seek(0)
    again = from_state(from_plain(torch.load(file, weights_only=True)))
    assert type(again) is type(fitted)
    np.testing.assert_array_equal(again.predict(table), fitted.predict(table))
    np.testing.assert_array_equal(again.fit(table, y).predict(table), fitted.predict(table))
    with pytest.raises(UnseenCategoryError, match="'Treg'"):
        again.predict(table.assign(cell_type="Treg"))
    with pytest.raises(CheckpointError, match="kind 'forest'"):
        from_state(fitted.state() | {"kind": "forest"})


@pytest.mark.parametrize("mean", [torch.nn.Linear(2, 2), np.square])
def test_code_is_passed_again(mean):
    with pytest.raises(TypeError, match=r"load\(path, mean=\.\.\.\)"):
        as_mean(mean).state()
