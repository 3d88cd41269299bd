"""Conformal intervals: brute force, exact ranks over repeated simulations, donors, faults."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from exprgen import _slots, tl
from exprgen._errors import CovariateError, DataQualityWarning
from exprgen._levels import Law
from exprgen.metrics import conformal_rank, conformal_threshold, coverage
from exprgen.tl._predicted import observed, read_predicted

LEVELS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99)
MEAN, THETA = np.array([0.03, 0.3, 1.0, 4.0, 20.0]), 2.0
GENES = [f"g{i}" for i in range(len(MEAN))]
SET = itertools.count()  # cells and donors of different sets have different names


def counts(n, rng):
    """Negative binomial genes that a shared factor of the cell ties together."""
    return rng.poisson(rng.gamma(THETA, 1 / THETA, (n, 1)) * MEAN).astype(float)


def write_predictions(
    adata, quantiles, std, *, levels=LEVELS, of="cell", n_cells=0, layer="counts", **more
):
    """What predict would write; ``quantiles`` are ``(n_levels, n_vars)``, alike for all cells."""
    n = adata.n_obs
    layers = {
        _slots.quantile_name(level): np.repeat(row[None].astype(np.float32), n, axis=0)
        for level, row in zip(levels, quantiles, strict=True)
    }
    layers |= {
        name: np.repeat(std[None].astype(np.float32), n, axis=0) for name in ("mean", "std")
    }
    info = {"of": of, "n_cells": n_cells, "quantiles": list(levels), "layer": layer, **more}
    split = pd.Categorical(["new"] * n, categories=["train", "validation", "new"])
    _slots.write(
        adata,
        "exprgen",
        "predict",
        model="NBVAE",
        layers=layers,
        obs={"split": split},
        info=info,
        replaces=("conformalize",),
    )
    return adata


def predicted(values, *, narrow=1.0, levels=LEVELS, **options):
    """An AnnData of counts, with the quantiles of a law of ``narrow`` times the overdispersion."""
    name = next(SET)
    obs = pd.DataFrame({"cell_type": "a"}, index=[f"c{i}_{name}" for i in range(len(values))])
    adata = ad.AnnData(obs=obs, var=pd.DataFrame(index=GENES))
    adata.layers["counts"] = values.astype(np.float32)
    theta = THETA / narrow
    law = stats.nbinom(theta, theta / (theta + MEAN))
    quantiles = np.stack([law.ppf(level) for level in levels])
    return write_predictions(adata, quantiles, law.std(), levels=levels, **options)


def tails(adata, rng):
    known = read_predicted(adata, "exprgen", name="adata")
    rows = np.arange(adata.n_obs)
    x = observed(adata, "counts", known, rows)
    return known.law(rows).tail(x, rng.random(x.shape))


def random_law(rng, n_vars=40, *, whole=True, n_levels=5):
    shape = n_levels, 1, n_vars
    steps = rng.poisson(0.8, shape) if whole else rng.gamma(0.3, size=shape)
    steps = np.where(rng.random(steps.shape) < 0.3, 0, steps)
    levels = np.sort(rng.choice(np.arange(1, 40), n_levels, replace=False)) / 40
    return Law(np.cumsum(steps, 0), levels, rng.gamma(1.0, size=(1, n_vars)), whole)


def test_transform_is_uniform_under_the_law_itself():
    """To the accuracy of the interpolation, for rare and for abundant counts."""
    rng = np.random.default_rng(0)
    adata = predicted(counts(20_000, rng), levels=tuple(np.arange(1, 100) / 100))
    known = read_predicted(adata, "exprgen", name="adata")
    x = adata.layers["counts"]
    u, above = known.law(np.arange(len(x))).transform(x, rng.random(x.shape))
    np.testing.assert_allclose(u + above, 1, atol=1e-12)
    for gene in u.T:
        assert stats.kstest(gene, "uniform").statistic < 0.02


@pytest.mark.parametrize("whole", [True, False])
def test_intervals_are_the_values_whose_tail_may_reach_the_threshold(whole):
    """Brute force over candidate values, the randomisation v maximised."""
    rng = np.random.default_rng(1)
    for _ in range(8):
        law = random_law(rng, whole=whole)
        for threshold in (0.004, 0.1, 0.37, 1.0):
            lower, upper = law.interval(np.array(threshold))
            assert (lower <= upper).all()
            grid = np.arange(0, 80.0) if whole else np.linspace(-30, 40, 351)
            for x in grid:
                value = np.full(law.std.shape, x)
                ends = [np.stack(law.transform(value, np.full(law.std.shape, v))) for v in (0, 1)]
                reach = np.maximum(*(2 * np.minimum(*end) for end in ends))
                # u crosses one half within a value: its tail reaches 1 there.
                crosses = (np.minimum(ends[0][0], ends[1][0]) <= 0.5) & (
                    np.maximum(ends[0][0], ends[1][0]) >= 0.5
                )
                reach = np.where(crosses, 1.0, reach)
                inside = (lower <= x) & (x <= upper)
                clear = np.abs(reach - threshold) > 1e-4
                np.testing.assert_array_equal(inside[clear], (reach >= threshold)[clear])


def test_threshold_is_the_largest_that_keeps_the_bound():
    rng = np.random.default_rng(2)
    for trial in range(200):
        n, n_vars, alpha = rng.integers(9, 30), rng.integers(1, 6), rng.choice([0.1, 0.2, 0.5])
        units = np.arange(n) if trial % 2 else np.r_[np.arange(n), rng.integers(0, n, 7)]
        p = rng.integers(1, 12, (len(units), n_vars)) / 12
        risks = {}
        for t in np.unique(p):
            losses = pd.Series((p < t).mean(1)).groupby(units).mean()
            risks[t] = (losses.sum() + 1) / (n + 1)
        best = max(t for t, risk in risks.items() if risk <= alpha + 1e-9)
        assert conformal_threshold(p, alpha, units=units) == best


def test_threshold_of_one_gene_is_the_textbooks_order_statistic():
    """Split conformal: the rank floor(alpha (n + 1)) from below."""
    rng = np.random.default_rng(3)
    for n in (9, 10, 19, 57, 200):
        p = rng.random(n)
        assert conformal_threshold(p, 0.1) == np.sort(p)[int(np.floor(0.1 * (n + 1) + 1e-9)) - 1]
    with pytest.raises(ValueError, match=r"needs at least 1/alpha - 1 = 9 .* got 8"):
        conformal_threshold(rng.random(8), 0.1)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.5])
def test_randomised_ranks_are_exactly_uniform(alpha):
    """A random gene of one new cell, over independent sets; cells tie their genes, counts tie."""
    rng = np.random.default_rng(4)
    n_sets, n = 4000, 12
    rejected = 0
    for _ in range(n_sets):
        # Scores of a model that is badly wrong, and wrong differently in every gene.
        p = 1 / (1 + np.floor(counts(n + 1, rng) / 3))
        rank = conformal_rank(p[:n], p[n:], seed=int(rng.integers(2**31)))
        rejected += rank[0, rng.integers(p.shape[1])] <= alpha
    low, high = stats.binom(n_sets, alpha).ppf([0.0005, 0.9995])
    assert low <= rejected <= high


def test_ranks_of_other_cells_are_not_uniform():
    rng = np.random.default_rng(5)
    calibration, new = rng.random((200, 5)), rng.random((400, 5)) ** 2
    rejected = (conformal_rank(calibration, new) <= 0.1).mean()
    assert rejected > 0.25


@pytest.mark.filterwarnings("ignore:12 calibration cells")
@pytest.mark.parametrize(("narrow", "n"), [(0.2, 12), (0.2, 60), (4.0, 60)])
def test_bounds_hold_their_level_over_repeated_sets(narrow, n):
    """The promise at few cells and with a wrong model: at most alpha outside, in expectation."""
    rng = np.random.default_rng(6)
    before, after, exact = [], [], []
    for seed in range(100):
        calibration = predicted(counts(n, rng), narrow=narrow)
        adata = predicted(counts(40, rng), narrow=narrow)
        tl.conformalize(adata, calibration, alpha=0.2, seed=seed)
        x = adata.layers["counts"]
        before.append((tails(adata, rng) >= 0.2).mean())
        after.append(coverage(adata.layers["exprgen_lower"], adata.layers["exprgen_upper"], x))
        ranks = conformal_rank(tails(calibration, rng), tails(adata, rng), seed=seed)
        exact.append((ranks > 0.2).mean())
    error = np.std(exact) / np.sqrt(len(exact))
    assert abs(np.mean(exact) - 0.8) < 4 * error
    assert error < 0.01
    assert np.mean(after) > 0.8
    # The control: the model's own intervals do not.
    assert abs(np.mean(before) - 0.8) > 0.03


def test_continuous_bounds_cover_their_level_and_little_more():
    rng = np.random.default_rng(7)
    inside, known = [], stats.norm(0, 0.5)
    for seed in range(100):
        sets = []
        for n in (39, 50):
            adata = ad.AnnData(
                var=pd.DataFrame(index=GENES), obs=pd.DataFrame(index=map(str, range(n)))
            )
            adata.layers["log"] = rng.standard_normal((n, 5)) + 0.5 * rng.standard_normal((n, 1))
            quantiles = np.repeat(known.ppf([0.05, 0.95])[:, None], 5, axis=1)
            options = {"levels": (0.05, 0.95), "layer": "log"}
            sets.append(write_predictions(adata, quantiles, np.full(5, 0.5), **options))
        calibration, adata = sets
        tl.conformalize(adata, calibration, seed=seed)  # of the layer that was modelled
        x = adata.layers["log"]
        inside.append(coverage(adata.layers["exprgen_lower"], adata.layers["exprgen_upper"], x))
    error = np.std(inside) / np.sqrt(len(inside))
    assert 0.9 - 3 * error < np.mean(inside) < 0.9 + 1 / 40 + 3 * error


def test_groups_and_genes_have_thresholds_of_their_own():
    rng = np.random.default_rng(8)
    sets = []
    for n in (900, 40):
        adata = predicted(counts(n, rng))
        adata.obs["cell_type"] = rng.permutation(np.repeat(["a", "b"], n // 2))
        sets.append(adata)
    calibration, adata = sets
    tl.conformalize(adata, calibration, groupby="cell_type", per_gene=True, seed=1)
    record = adata.uns["exprgen"]["conformalize"]
    assert record["threshold"].shape == (2, 5)
    assert sorted(record["groups"]) == ["a", "b"]
    assert record["n_units"].tolist() == [450, 450]
    # The model is right: its own level is kept, within the noise of an order statistic.
    assert (np.abs(record["threshold"] - 0.1) < 0.06).all()
    tl.conformalize(adata, calibration, seed=1)
    record = adata.uns["exprgen"]["conformalize"]
    assert record["threshold"].shape == (1,)
    assert "groups" not in record


def test_order_of_genes_and_views_do_not_matter():
    rng = np.random.default_rng(9)
    calibration, adata = predicted(counts(60, rng)), predicted(counts(30, rng))
    one = tl.conformalize(adata, calibration, copy=True, seed=0)
    other = tl.conformalize(adata[:], calibration[:, ::-1].copy(), seed=0)
    assert "exprgen_lower" not in adata.layers
    for name in ("exprgen_lower", "exprgen_upper"):
        np.testing.assert_array_equal(one.layers[name], other.layers[name])
    again = tl.conformalize(adata, calibration, copy=True, seed=0)
    np.testing.assert_array_equal(one.layers["exprgen_upper"], again.layers["exprgen_upper"])


# Donors ------------------------------------------------------------------------------------

SPREAD = 0.4  # sd of donors' log factors


def donors(n_donors, n_cells, rng, *, known=0.1):
    """Cells of donors, and predicted quantiles of a donor's mean that know too small a spread."""
    effect = np.exp(SPREAD * rng.standard_normal((n_donors, 5)))
    values = counts(n_donors * n_cells, rng) * 0
    for d in range(n_donors):
        cells = slice(d * n_cells, (d + 1) * n_cells)
        values[cells] = rng.poisson(rng.gamma(THETA, 1 / THETA, (n_cells, 1)) * 10 * effect[d])
    name = next(SET)
    labels = np.repeat([f"d{d}_{name}" for d in range(n_donors)], n_cells)
    obs = pd.DataFrame({"donor": labels}, index=[f"c{i}_{name}" for i in range(len(labels))])
    adata = ad.AnnData(obs=obs, var=pd.DataFrame(index=GENES))
    adata.layers["counts"] = values.astype(np.float32)
    law = stats.lognorm(known, scale=10)
    quantiles = np.repeat(law.ppf([0.05, 0.95])[:, None], 5, axis=1)
    return write_predictions(
        adata, quantiles, np.full(5, law.std()), levels=(0.05, 0.95), of="mean", n_cells=n_cells
    )


def means(adata):
    """Of the donors' cells, which come one donor after the other."""
    return adata.layers["counts"].reshape(-1, 10, 5).mean(1)


def test_intervals_of_means_are_calibrated_on_donors():
    rng = np.random.default_rng(10)
    before, after, uppers = [], [], []
    for seed in range(120):
        calibration, adata = donors(9, 10, rng), donors(4, 10, rng)
        tl.conformalize(adata, calibration, alpha=0.2, donor_key="donor", seed=seed)
        first = adata[::10]
        bounds = [first.layers[f"exprgen_{name}"] for name in ("lower", "upper")]
        after.append(coverage(*bounds, means(adata)))
        own = [first.layers[f"exprgen_{name}"] for name in ("q05", "q95")]
        before.append(coverage(*own, means(adata)))
        uppers.append(bounds[1])
    assert adata.uns["exprgen"]["conformalize"]["n_units"].tolist() == [9]
    assert (np.mod(uppers, 1) > 0).mean() > 0.5  # means are no counts: not rounded
    assert np.mean(before) < 0.5
    assert 0.8 - 0.02 < np.mean(after) < 0.8 + 0.02


def test_the_unit_is_the_donor_and_its_value_the_mean():
    rng = np.random.default_rng(11)
    calibration, adata = donors(9, 10, rng), donors(4, 10, rng)
    with pytest.warns(DataQualityWarning, match="9 calibration .* hold 100 % .* 39 donors"):
        tl.conformalize(adata, calibration, donor_key="donor", per_gene=False, seed=3)
    law = read_predicted(calibration[::10].copy(), "exprgen", name="x").law(np.arange(9))
    p = law.tail(means(calibration), np.zeros((9, 5)))  # no ties: the randomisation is idle
    found = adata.uns["exprgen"]["conformalize"]["threshold"]
    np.testing.assert_allclose(found, conformal_threshold(p, 0.1), rtol=1e-5)
    # By default every gene has its own: of nine donors for 90 %, the most extreme.
    tl.conformalize(adata, calibration, donor_key="donor", seed=3)
    found = adata.uns["exprgen"]["conformalize"]["threshold"]
    np.testing.assert_allclose(found[0], p.min(0), rtol=1e-5)


# Faults ------------------------------------------------------------------------------------


def sets():
    rng = np.random.default_rng(12)
    return predicted(counts(30, rng)), predicted(counts(40, rng))


def _train(adata, calibration):
    calibration.obs["exprgen_split"] = pd.Categorical(
        ["train"] * 3 + ["new"] * 37, categories=["train", "validation", "new"]
    )


def _odd_split(adata, calibration):
    calibration.obs["exprgen_split"] = ["new"] * 38 + ["test", None]


def _same_cells(adata, calibration):
    calibration.obs_names = [*calibration.obs_names[:35], *adata.obs_names[:5]]
    calibration.layers["counts"][35:38] = adata.layers["counts"][:3]  # two share but the name


def _repeated(adata, calibration):
    calibration.obs_names = [*calibration.obs_names[:38], *calibration.obs_names[:2]]
    calibration.layers["counts"][38:] = calibration.layers["counts"][:2]


def _numbers(adata, calibration):
    adata.obs["cell_type"], calibration.obs["cell_type"] = 1, 1.0


def _no_split(adata, calibration):
    del calibration.obs["exprgen_split"]


def _nan_quantile(adata, calibration):
    calibration.layers["exprgen_q95"][3, 2] = np.nan


def _nan_own(adata, calibration):
    adata.layers["exprgen_q05"][0, 0] = np.inf


def _nan_value(adata, calibration):
    calibration.layers["counts"][3, 2] = np.nan


def _no_counts(adata, calibration):
    calibration.layers["counts"] = calibration.layers["counts"] + 0.5


def _crossed(adata, calibration):
    adata.layers["exprgen_q05"] = adata.layers["exprgen_q95"] + 1


def _gone(adata, calibration):
    del calibration.layers["exprgen_q50"]


def _no_layer(adata, calibration):
    del calibration.uns["exprgen"]["predict"]["layer"]
    del adata.uns["exprgen"]["predict"]["layer"]


def _no_group(adata, calibration):
    adata.obs["cell_type"] = ["a"] * 20 + ["b"] * 10


def _gap(adata, calibration):
    calibration.obs["cell_type"] = [None] * 2 + ["a"] * 38


def _own_layer(adata, calibration):
    adata.layers["exprgen_lower"] = np.zeros(adata.shape)


FAULTS = [
    (_train, {}, ValueError, r"3 of 40 calibration cells were trained on: 'c0_.*', 'c2_\d+'\."),
    (_odd_split, {}, ValueError, r"one of 'train', 'validation', 'new', got 'test', .* 2 cells"),
    (_same_cells, {}, ValueError, r"3 cells of adata are in calibration as well: 'c0_"),
    (_repeated, {}, ValueError, r"2 calibration cells are there more than once: 'c0_"),
    (_numbers, {"groupby": "cell_type"}, ValueError, r": '1' .* calibration has '1\.0'\."),
    (_no_split, {}, KeyError, "no 'exprgen_split'"),
    (_nan_quantile, {}, ValueError, "calibration's predictions .* not finite, in 'exprgen_q95'"),
    (_nan_own, {}, ValueError, "adata's predictions .* not finite, in 'exprgen_q05'"),
    (_nan_value, {}, ValueError, r"calibration\.layers\['counts'\] has values that are not fin"),
    (_no_counts, {}, ValueError, "does not hold counts"),
    (_crossed, {}, ValueError, "no quantiles: 'exprgen_q05' exceeds"),
    (_gone, {}, KeyError, "calibration has no layer 'exprgen_q50', which predict wrote"),
    (_no_layer, {}, KeyError, "calibration's predictions do not say which layer was modelled"),
    (_no_group, {"groupby": "cell_type"}, ValueError, "1 of the groups of adata .*: 'b'"),
    (_gap, {"groupby": "cell_type"}, CovariateError, "calibration.obs.* has 2 missing"),
    (_own_layer, {}, ValueError, "names are taken"),
    (None, {"groupby": "celltype"}, KeyError, "no column of adata.obs. Did you mean 'cell_type'"),
    (None, {"key": "other"}, KeyError, "adata has no predictions under key='other'.*'exprgen'"),
    (None, {"layer": "raw"}, ValueError, "layer='raw' is not .* predictions are of layer 'count"),
    (None, {"alpha": 0.01}, ValueError, r"at least 99 calibration cells .*all has 40"),
    (None, {"alpha": 1e-300}, ValueError, r"at least 1e\+300 calibration cells \(.*alpha\.$"),
    (None, {"alpha": 1.5}, ValueError, r"alpha must lie in \(0, 1\), got 1.5"),
    (None, {"per_gene": True}, ValueError, "at least 398 calibration cells .*all has 40"),
    (None, {"per_gene": 1}, TypeError, "per_gene must be True or False"),
    (None, {"donor_key": "cell_type"}, ValueError, "asks for intervals of donors' means"),
]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    FAULTS,
    ids=[f"{i}" for i in range(len(FAULTS))],
)
def test_faults_are_named_and_nothing_is_written(change, options, error, message):
    adata, calibration = sets()
    if change is not None:
        change(adata, calibration)
    before = set(adata.layers), sorted(adata.uns["exprgen"])
    with pytest.raises(error, match=message):
        tl.conformalize(adata, calibration, **options)
    assert (set(adata.layers), sorted(adata.uns["exprgen"])) == before


def test_predictions_that_differ_are_refused():
    rng = np.random.default_rng(13)
    adata, values = predicted(counts(30, rng)), counts(40, rng)
    with pytest.raises(
        ValueError, match=r"quantiles=\[0\.01, .* calibration with \[0\.05, 0\.95\]"
    ):
        tl.conformalize(adata, predicted(values, levels=(0.05, 0.95)))
    with pytest.raises(ValueError, match="of='cell', calibration with 'mean'"):
        tl.conformalize(adata, predicted(values, of="mean"))
    with pytest.raises(ValueError, match="Genes differ"):
        tl.conformalize(adata, predicted(values)[:, :4].copy())
    with pytest.raises(ValueError, match="some on either side of the median"):
        tl.conformalize(predicted(values, levels=(0.9, 0.95)), predicted(values))
    with pytest.raises(ValueError, match="calibration has no cells"):
        tl.conformalize(adata, predicted(values)[:0].copy())
    few, many = donors(8, 10, rng), donors(9, 10, rng)
    with pytest.raises(ValueError, match="at least 9 calibration donors .*all has 8"):
        tl.conformalize(many, few, donor_key="donor")
    with pytest.raises(ValueError, match="are of means .* give donor_key"):
        tl.conformalize(many, many.copy())
    with pytest.raises(ValueError, match="n_cells=10, calibration with 12"):
        tl.conformalize(many, donors(9, 12, rng), donor_key="donor")


@pytest.mark.parametrize(
    ("item", "values"),
    [
        ("library", ("sampled", 2000.0)),
        ("unseen", ("error", "null")),
        ("n_samples", (5, 300)),
        ("weights", ("5f2c", "9a01")),
        ("guidance", ([2.0], None)),
    ],
)
def test_predictions_made_in_another_way_are_refused(item, values):
    rng = np.random.default_rng(14)
    ours, theirs = ({} if value is None else {item: value} for value in values)
    adata, calibration = predicted(counts(30, rng), **ours), predicted(counts(40, rng), **theirs)
    message = rf"with {item}={re.escape(repr(values[0]))}, calibration with .*{values[1]}"
    with pytest.raises(ValueError, match=message):
        tl.conformalize(adata, calibration)
    alike = predicted(counts(40, rng), seed=7, **ours)
    assert "exprgen_lower" in tl.conformalize(adata, alike).layers


@pytest.mark.parametrize("wrong", ["cells.h5ad", None, 3])
def test_what_is_no_anndata_is_refused(wrong):
    adata, calibration = sets()
    with pytest.raises(TypeError, match="adata= wants an AnnData, got"):
        tl.conformalize(wrong, calibration)
    with pytest.raises(TypeError, match="calibration= wants an AnnData, got"):
        tl.conformalize(adata, wrong)
    with pytest.raises(TypeError, match=r"adata is a MuData, .* mdata\['rna'\]"):
        tl.conformalize(SimpleNamespace(mod={"atac": ad.AnnData(), "rna": adata}), calibration)


def test_few_cells_are_warned_of_and_39_of_a_group_are_enough_for_90_percent():
    rng = np.random.default_rng(15)
    calibration, adata = predicted(counts(59, rng)), predicted(counts(20, rng))
    calibration.obs["cell_type"] = ["a"] * 39 + ["b"] * 20
    tl.conformalize(adata, calibration, groupby="cell_type")
    adata.obs["cell_type"] = ["a"] * 10 + ["b"] * 10
    with pytest.warns(DataQualityWarning, match=r"20 .* of group 'b' .* hold 94.5 % .* 39 cells"):
        tl.conformalize(adata, calibration, groupby="cell_type")


def test_donors_are_new_to_the_model_and_on_one_side():
    rng = np.random.default_rng(16)
    adata, calibration = donors(4, 10, rng), donors(9, 10, rng)
    labels = calibration.obs["donor"].astype(str)
    calibration.obs["donor"] = labels.where(labels != labels.iloc[0], adata.obs["donor"].iloc[0])
    with pytest.raises(ValueError, match=r"1 donors of adata are in calibration as well: 'd0_"):
        tl.conformalize(adata, calibration, donor_key="donor")
    calibration.obs["donor"] = labels
    calibration.uns["exprgen"]["predict"]["known_donors"] = np.array([labels.iloc[-1]], object)
    with pytest.raises(ValueError, match=r"1 calibration donors were trained on: 'd8_"):
        tl.conformalize(adata, calibration, donor_key="donor")


def test_means_of_other_numbers_of_cells_are_warned_of():
    rng = np.random.default_rng(17)
    adata, calibration = donors(4, 10, rng), donors(9, 10, rng)
    tl.conformalize(adata, calibration, donor_key="donor")
    assert adata.uns["exprgen"]["conformalize"]["cells_per_mean"].tolist() == [10] * 9
    few = calibration[np.arange(90) % 10 < 4].copy()
    with pytest.warns(DataQualityWarning, match=r"are of 4 cells .* n_cells=10: .*n_cells=4"):
        tl.conformalize(adata, few, donor_key="donor")


# With a model ------------------------------------------------------------------------------


def test_with_a_model_from_layers_and_obsm_through_a_file(tmp_path):
    from exprgen import NBVAE, datasets

    adata = datasets.simulate_latent(n_obs=300, n_vars=20, seed=0)
    train, calibration, test = adata[:150].copy(), adata[150:250].copy(), adata[250:].copy()
    NBVAE.setup_anndata(train, layer="counts", categorical_condition_keys=["cell_type"])
    model = NBVAE(train, seed=0)
    model.train(max_epochs=2, accelerator="cpu", progress_bar=False)
    for cells in (calibration, test):
        model.predict(cells, n_samples=50, seed=1, progress_bar=False)
    tl.conformalize(test, calibration, seed=0)
    lower, upper = test.layers["exprgen_lower"], test.layers["exprgen_upper"]
    assert (lower == np.rint(lower)).all()
    assert (lower >= 0).all()
    assert coverage(lower, upper, test.layers["counts"]) > 0.85
    test.write_h5ad(tmp_path / "test.h5ad")
    again = ad.read_h5ad(tmp_path / "test.h5ad")
    tl.conformalize(again, calibration, alpha=0.2, seed=0)
    assert (again.layers["exprgen_upper"] <= upper).all()
    # Predictions are made anew: what rested on the old ones is gone.
    model.predict(test, n_samples=50, seed=2, progress_bar=False)
    assert "exprgen_lower" not in test.layers
    assert "conformalize" not in test.uns["exprgen"]
    table = model.predict({"cell_type": ["type_1", "type_0"]}, n_samples=50, progress_bar=False)
    tl.conformalize(table, calibration, groupby="cell_type", alpha=0.25, seed=0)
    assert (table.layers["exprgen_lower"] <= table.layers["exprgen_upper"]).all()
    genes = list(test.var_names[[3, 1]])
    for cells in (calibration, test):
        model.predict(cells, genes=genes, n_samples=50, seed=1, progress_bar=False)
    tl.conformalize(test, calibration, seed=0)
    assert test.obsm["exprgen_lower"].shape == (50, 2)
    own = model.predict(train, n_samples=50, seed=1, progress_bar=False)
    for cells in (calibration, test):
        model.predict(cells, n_samples=50, seed=1, progress_bar=False)
    with pytest.raises(ValueError, match="calibration cells were trained on"):
        tl.conformalize(test, own)
    # The same weights are the same model, wherever they are; others are not.
    model.save(tmp_path / "model")
    loaded = NBVAE.load(tmp_path / "model", adata=train)
    loaded.predict(calibration, n_samples=50, seed=1, progress_bar=False)
    tl.conformalize(test, calibration, seed=0)
    model.train(max_epochs=1, accelerator="cpu", progress_bar=False)
    model.predict(calibration, n_samples=50, seed=1, progress_bar=False)
    with pytest.raises(ValueError, match="predicted with weights='"):
        tl.conformalize(test, calibration, seed=0)


def test_predict_records_the_donors_it_has_learned():
    from exprgen import NBVAE, datasets

    adata = datasets.simulate_latent(n_obs=200, n_vars=10, n_donors=12, seed=0)
    known = adata.obs["donor"].isin(["donor_0", "donor_1", "donor_2"])
    train, others = adata[known].copy(), adata[~known].copy()
    NBVAE.setup_anndata(train, layer="counts", donor_key="donor")
    model = NBVAE(train, seed=0, n_latent=2, n_hidden=8)
    model.train(max_epochs=1, accelerator="cpu", progress_bar=False)
    options = {"of": "mean", "n_cells": 16, "n_samples": 20, "seed": 0, "progress_bar": False}
    records = [model.predict(cells, **options).uns["exprgen"] for cells in (adata, others)]
    assert list(records[0]["predict"]["known_donors"]) == ["donor_0", "donor_1", "donor_2"]
    assert "known_donors" not in records[1]["predict"]
