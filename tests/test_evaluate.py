"""Evaluation tells good cells from bad by the row made for it, and real from real not at all."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from planted import GROUP, all_faults, shuffled_genes, thirds, without_type
from scipy import sparse, stats

from exprgen import datasets, tl
from exprgen._errors import CovariateError, GeneMismatchError
from exprgen.tl._baselines import independent_nb, nb_copula
from exprgen.tl._report import COLUMNS, METRICS

QUICK = [
    "LR-gene", "distance", "neighbours", "variation", "genes", "fold changes", "calibration",
    "memorisation", "downstream",
]  # fmt: skip
"""Everything but forests."""

METRICS_OF = {
    family: [name for name, metric in METRICS.items() if metric.family == family]
    for family in {metric.family for metric in METRICS.values()}
}

# The rows that each fault must be seen in. Forests are tested on the first alone, to save time.
MADE_FOR = {
    "shuffled genes": ["gene correlation"],
    "means": ["variance ratio", "recall", "coverage", "interval coverage", "CRPS"],
    "half the variance": ["variance ratio", "sd agreement", "interval width"],
    "a type missing": ["missing groups"],
    "copies": ["nearest-neighbour ratio", "membership AUC", "membership z of worst group"],
}


def _run(train, test, synthetic, **options):
    options = {"groupby": GROUP, "baselines": False, "progress_bar": False} | options
    return tl.evaluate(train, test, synthetic, **options)


@pytest.fixture(scope="module")
def cells():
    """Train, test, and other cells of the same law."""
    adata = datasets.simulate_latent(900, n_vars=60, n_types=3, latent_sd=1.0, seed=4)
    return thirds(adata)


@pytest.fixture(scope="module")
def report(cells):
    """With forests, and kept in ``test.uns``."""
    train, test, same = cells
    test = test.copy()
    shuffled = shuffled_genes(same)
    models = {"same": same, "shuffled": shuffled}
    return _run(train, test, models, n_repeats=2, key_added="evaluation"), test


def _rows(report, model):
    return report[report["model"] == model].set_index("metric")


def test_cells_of_the_same_law_match_the_control(report):
    rows = _rows(report[0], "same")
    assert not rows["flag"].any()
    assert rows["excess"][["RF-PC", "RF-gene", "LR-gene", "QC"]].abs().max() < 0.13
    assert rows["value"]["variance ratio"] == pytest.approx(1, abs=0.1)
    assert rows["control"]["variance ratio"] == pytest.approx(1, abs=0.1)
    assert rows["excess"]["gene correlation"] == pytest.approx(0, abs=0.06)
    assert rows["value"]["interval coverage"] == pytest.approx(0.9, abs=0.02)
    assert rows["n"].nunique() == 1


def test_destroyed_structure_shows_and_guards_do_not(report):
    rows = _rows(report[0], "shuffled")
    assert rows["flag"][["RF-PC", "gene correlation"]].all()
    assert rows["excess"]["RF-PC"] > 0.1
    assert rows["excess"]["gene correlation"] < -0.4
    assert rows["value"]["mean correlation"] > 0.98
    assert not rows["flag"]["mean correlation"]


def test_baselines_are_known_by_their_faults(cells):
    train, test, same = cells
    table = _run(train, test, same, n_repeats=2, baselines=True, metrics=QUICK)
    baselines = table[table["kind"] == "baseline"]
    flags = baselines.pivot(index="metric", columns="model", values="flag")
    assert flags["independent NB"][["precision", "gene correlation"]].all()
    assert flags["group mean"][["variance ratio", "gene correlation", "recall"]].all()
    copies = flags.index[flags["training cells"]]
    assert set(copies) <= set(METRICS_OF["memorisation"])
    assert "nearest-neighbour ratio" in copies
    values = baselines.pivot(index="metric", columns="model", values="value")
    correlation = values.loc["gene correlation"]
    assert correlation["NB + copula"] > correlation["independent NB"] + 0.2
    notes = baselines[baselines["model"] == "training cells"]["note"]
    assert notes.str.contains("no upper bound").any()
    # Real cells have their control, whoever is compared.
    per_model = [_rows(table, model)["control"] for model in table["model"].unique()]
    for control in per_model[1:]:
        pd.testing.assert_series_equal(per_model[0], control)


def test_the_report_is_one_row_per_model_and_metric(report):
    table, _ = report
    assert list(table.columns) == COLUMNS
    assert not table.duplicated(["model", "metric"]).any()
    assert list(_rows(table, "same").index) == list(METRICS)
    assert not table.drop(columns="train_excess").isna().any().any()
    without = {"missing groups", "RF-PC", "RF-gene", "QC", *METRICS_OF["memorisation"]}
    without |= {"variance ratio", "log-total variance", "fold-change slope"}  # their control
    assert set(table["metric"][table["train_excess"].isna()]) == without
    assert set(table.attrs["seconds"]) == set(METRICS_OF) - {"composition"}
    assert table.attrs["wall_seconds"] > 0
    assert table.attrs["n_cells"] == table["n"].max()


def test_the_verdict_follows_its_rule(report):
    table = report[0]
    better = table["better"]

    def worse(excess):
        either = excess.abs().where(better.str.startswith("near"), excess)
        return (-excess).where(better == "higher", either)

    both = np.sqrt((table["spread"] ** 2 + table["control_spread"] ** 2) / 2)
    noise = np.maximum(table["control_spread"], both)
    explained = np.maximum(worse(table["train_excess"].fillna(0)), 0)
    beyond = worse(table["excess"]) - explained
    tolerance = [
        METRICS[name].allowed(control)
        for name, control in zip(table["metric"], table["control"], strict=True)
    ]
    flag = (beyond > 3 * noise) & (worse(table["excess"]) > tolerance)
    np.testing.assert_array_equal(table["flag"], flag)
    np.testing.assert_array_equal(table["verdict"] == "not told apart", beyond <= 3 * noise)
    assert flag.any()
    assert not flag.all()


def test_the_report_is_kept_and_survives_a_file(report, tmp_path):
    table, test = report
    test.write_h5ad(tmp_path / "test.h5ad")
    kept = ad.read_h5ad(tmp_path / "test.h5ad").uns["evaluation"]
    found = kept["report"].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        found.astype(object), table.astype(object), check_names=False, check_index_type=False
    )
    assert kept["settings"]["n_train"] == table.attrs["n_train"]
    worst = kept["settings"]["memorisation"]["same"]["group"][0]
    assert worst == table.attrs["memorisation"]["same"][0]["group"]


def test_only_reports_are_replaced(cells):
    train, test, same = cells
    test = test.copy()
    test.uns["mine"] = {"a": 1}
    options = {"metrics": "variation", "n_repeats": 1}
    with pytest.raises(ValueError, match=r"uns\['mine'\] is taken"):
        _run(train, test, same, key_added="mine", **options)
    with pytest.raises(ValueError, match=r"test is a view"):
        _run(train, test[:200], same, key_added="new", **options)
    for _ in range(2):
        _run(train, test, same, key_added="new", **options)
    assert set(test.uns) == {"truth", "mine", "new"}


def test_each_planted_fault_is_flagged_by_its_row_and_real_cells_by_none():
    adata = datasets.simulate_latent(1200, n_vars=120, n_types=4, latent_sd=0.7, seed=1)
    train, test, other = thirds(adata)
    _check_faults(_run(train, test, all_faults(train, other), metrics=QUICK))


def test_each_planted_fault_is_flagged_on_real_cells(pbmc):
    train, test, other = thirds(pbmc)
    _check_faults(_run(train, test, all_faults(train, other), metrics=QUICK))


@pytest.mark.slow
def test_each_planted_fault_is_flagged_on_other_real_cells(shared_data):
    adata = ad.read_h5ad(shared_data("pbmc3k_labelled.h5ad"))
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)
    order = np.argsort(-np.asarray(counts.sum(axis=0)).ravel())
    adata = ad.AnnData(obs=adata.obs[[GROUP]], var=adata.var[[]], layers={"counts": counts})
    train, test, other = thirds(adata[:, np.sort(order[:500])].copy())
    table = _run(train, test, all_faults(train, other), n_repeats=3)
    _check_faults(table)
    assert _rows(table, "shuffled genes")["flag"]["RF-PC"]
    assert _rows(table, "means")["flag"][["RF-PC", "RF-gene", "LR-gene", "QC"]].all()


def _check_faults(table):
    flags = table.pivot(index="metric", columns="model", values="flag")
    assert not flags["real"].any(), flags.index[flags["real"]].tolist()
    for fault, rows in MADE_FOR.items():
        assert flags[fault][rows].all(), (fault, flags[fault][rows])
    # Rows are specific: copies are real cells in all else, and what is left of a model that
    # forgot a type is compared with the same types of real cells.
    for fault, family in (("copies", "memorisation"), ("a type missing", "composition")):
        others = [name for name in flags.index if METRICS[name].family != family]
        assert not flags[fault][others].any(), (fault, flags[fault][others])


def test_gene_order_does_not_matter_and_nothing_is_changed(cells):
    train, test, same = cells
    before = [adata.layers["counts"].copy() for adata in cells]
    options = {"n_repeats": 1, "metrics": QUICK}
    first = _run(train, test, same, n_jobs=1, **options)
    again = _run(train[:, ::-1].copy(), test, same[:, ::-1].copy(), n_jobs=3, **options)
    pd.testing.assert_frame_equal(first, again)
    assert (first["model"] == "synthetic").all()
    assert first["spread"][first["metric"] != "missing groups"].isna().all()
    assert first["control_spread"].notna().all()
    assert "evaluation" not in test.uns
    for adata, counts in zip(cells, before, strict=True):
        assert (adata.layers["counts"] != counts).nnz == 0


def test_a_models_rows_do_not_depend_on_who_else_is_compared(cells):
    train, test, same = cells
    options = {"n_repeats": 1, "metrics": ["LR-gene", "MMD", "memorisation"]}
    alone = _run(train, test, {"a": same}, **options)
    second = _run(train, test, {"b": train, "a": same}, baselines=["group mean"], **options)
    second = second[second["model"] == "a"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, second)


def test_another_seed_cuts_other_halves_and_groups_are_optional(cells):
    train, test, same = cells
    options = {"groupby": None, "n_repeats": 1, "metrics": QUICK}
    first, other = (_run(train, test, same, seed=seed, **options) for seed in (0, 1))
    assert np.isfinite(first["value"]).all()
    assert not {"DE overlap", "train-on-synthetic F1"} & set(first["metric"])
    drawn = first["metric"] != "missing groups"
    assert not np.isclose(first["control"], other["control"])[drawn].any()


def test_sizes_are_what_was_asked_for(cells):
    train, test, same = cells
    options = {"metrics": ["LR-gene", "variance ratio"], "n_repeats": 1}
    table = _run(train, test, same, max_cells=60, max_cells_classifier=30, max_genes=10, **options)
    n = table.set_index("metric")["n"]
    assert abs(n["variance ratio"] - 60) <= 2
    assert abs(n["LR-gene"] - 30) <= 2
    assert table.attrs["n_genes_classifier"] == 10
    whole = _run(train, test, same, max_cells=None, max_cells_classifier=None, **options)
    assert (whole["n"] == whole["n"].iloc[0]).all()
    assert whole["n"].iloc[0] == sum(n // 2 for n in test.obs[GROUP].value_counts())


def test_a_missing_type_does_not_hide_and_its_control_has_the_same_types(cells):
    train, test, same = cells
    label = "type_1"
    options = {"metrics": ["variation", "MMD", "missing groups"], "n_repeats": 2}
    table = _run(train, test, {"all": same, "less": without_type(same, label)}, **options)
    rows = _rows(table, "less")
    share = (test.obs[GROUP] == label).mean()
    assert rows["value"]["missing groups"] == pytest.approx(share, abs=0.01)
    assert label in rows["note"]["missing groups"]
    # The same as if nobody had ever had that type.
    rest = [without_type(adata, label) for adata in (train, test)]
    for adata in rest:
        adata.obs[GROUP] = adata.obs[GROUP].cat.remove_unused_categories()
    wanted = _rows(table, "all")["n"]["MMD"] - rows["n"]["MMD"]
    assert wanted == (test.obs[GROUP] == label).sum() // 2
    assert not rows["flag"].drop("missing groups").any()


def test_few_training_cells_occur_twice_and_the_report_says_so(cells):
    train, test, same = cells
    few = train[train.obs.groupby(GROUP, observed=True).head(20).index].copy()
    table = _run(
        few, test, same, baselines="training cells", metrics=["MMD", "variation"], n_repeats=1
    )
    note = _rows(table, "training cells")["note"]["variance ratio"]
    assert "occur twice" in note
    none = train[train.obs[GROUP] != "type_0"].copy()
    table = _run(none, test, same, baselines=True, metrics=["MMD", "variation"], n_repeats=1)
    assert _rows(table, "group mean")["flag"]["missing groups"]


def test_training_cells_of_other_groups_leave_no_control(cells):
    train, test, same = cells
    other = train.copy()
    other.obs[GROUP] = "elsewhere"
    rows = _run(other, test, same, metrics=["variation", "memorisation", "MMD"], n_repeats=1)
    verdicts = rows.set_index("metric")["verdict"]
    assert (verdicts[METRICS_OF["variation"] + METRICS_OF["memorisation"]] == "no control").all()
    assert verdicts["MMD"] == "not told apart"
    with pytest.raises(ValueError, match="baselines=False"):
        _run(other, test, same, baselines=True)


def test_evaluate_says_what_is_wrong(cells):
    train, test, same = cells

    def run(train=train, test=test, synthetic=same, **more):
        _run(train, test, synthetic, **more)

    with pytest.raises(GeneMismatchError, match=r"train lacks 'gene_0'"):
        run(train=train[:, 1:])
    with pytest.raises(
        GeneMismatchError, match=r"synthetic 'synthetic' has besides them 'gene_0'"
    ):
        run(train=train[:, 1:], test=test[:, 1:])
    with pytest.raises(KeyError, match="has no layer 'raw'"):
        run(layer="raw")
    with pytest.raises(KeyError, match="has no column 'tissue'"):
        run(groupby="tissue")
    with pytest.raises(ValueError, match="too few cells in 3 groups"):
        run(synthetic={"few": same[:20]})
    with pytest.raises(ValueError, match="no cells in 3 of the 3 groups"):
        run(synthetic={"none": same[:0]})
    with pytest.raises(ValueError, match="Hold out more"):
        run(test=test[:6])
    with pytest.raises(ValueError, match="empty mapping"):
        run(synthetic={})
    with pytest.raises(ValueError, match="'group mean', which is empty or a baseline's name"):
        run(synthetic={"group mean": same}, baselines=True)
    with pytest.raises(ValueError, match="n_repeats"):
        run(n_repeats=0)
    with pytest.raises(ValueError, match="max_cells must be a whole number of at least 10"):
        run(max_cells=3)
    with pytest.raises(ValueError, match="metrics has 'RF'; allowed are the families"):
        run(metrics=["RF"])
    with pytest.raises(ValueError, match="baselines has 'copula'; allowed are independent NB"):
        run(baselines=["copula"])
    logged = same.copy()
    logged.layers["counts"] = logged.layers["counts"].log1p()
    with pytest.raises(ValueError, match="does not hold counts"):
        run(synthetic=logged)


# Baselines


def _with(adata, **obs):
    adata = adata.copy()
    for key, values in obs.items():
        adata.obs[key] = values
    return adata


def test_evaluate_names_arguments_of_another_type(cells):
    train, test, same = cells
    for wrong in (None, "cells.h5ad", [same], {"a": None}):
        with pytest.raises(TypeError, match=r"synthetic.* must be an AnnData"):
            _run(train, test, wrong)
    with pytest.raises(TypeError, match="train must be an AnnData, got NoneType"):
        _run(None, test, same)
    with pytest.raises(TypeError, match="test must be an AnnData, got DataFrame"):
        _run(train, test.to_df(), same)
    for options in ({"metrics": 5}, {"metrics": [5]}, {"groupby": 5}, {"baselines": None}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be a name, a list"):
            _run(train, test, same, **options)
    for seed in (None, 1.5, -1, "a"):
        with pytest.raises(ValueError, match="seed must be a whole number of at least 0"):
            _run(train, test, same, seed=seed)
    with pytest.raises(ValueError, match="names are the same as text"):
        _run(train, test, {1: same, "1": same})


def test_missing_labels_are_no_group(cells):
    labels = cells[0].obs[GROUP].astype(object).to_numpy(copy=True)
    labels[:12] = np.nan
    for i, name in enumerate(["train", "test", "synthetic 'synthetic'"]):
        given = list(cells)
        given[i] = _with(given[i], **{GROUP: labels[: given[i].n_obs]})
        first = given[i].obs_names[0]
        with pytest.raises(
            CovariateError, match=rf"{name}.obs\['cell_type'\] has 12 .* \(cells '{first}'"
        ):
            _run(*given)


def test_groups_of_several_columns_are_never_merged(cells):
    split = [
        _with(
            adata,
            a=np.where(np.arange(adata.n_obs) % 2, "x | y", "x"),
            b=np.where(np.arange(adata.n_obs) % 2, "z", "y | z"),
        )
        for adata in cells
    ]
    report = _run(*split, groupby=["a", "b"], metrics="variation", n_repeats=1)
    assert len(report.attrs["groups"]) == 2


def test_held_out_cells_are_on_one_side_only(cells):
    train, test, same = cells
    options = {"metrics": "variation", "n_repeats": 1}
    leaking = ad.concat([train, test[:7, ::-1]])
    with pytest.raises(ValueError, match="train has 7 of test's very cells"):
        _run(leaking, test, same, **options)
    with pytest.raises(ValueError, match=r"synthetic 'm' has 29\d of test's very cells"):
        _run(train, test, {"m": test}, **options)
    # The names alone prove nothing, and neither do the counts.
    renamed = same.copy()
    renamed.obs_names = test.obs_names[: same.n_obs]
    _run(train, test, renamed, **options)
    copies = test.copy()
    copies.obs_names = copies.obs_names + "_copy"
    _run(train, test, copies, **options)


def test_cells_without_anything_are_refused_and_a_single_gene_is_enough(cells):
    train, test, same = cells
    with pytest.raises(ValueError, match="test has no genes"):
        _run(*(adata[:, :0].copy() for adata in cells))
    with pytest.raises(ValueError, match="train has no cells"):
        _run(train[:0].copy(), test, same)
    empty = same.copy()
    empty.layers["counts"] = empty.layers["counts"] * 0
    with pytest.raises(ValueError, match="synthetic 'synthetic' has no counts"):
        _run(train, test, empty)
    rows = _rows(
        _run(*(adata[:, :1].copy() for adata in cells), metrics=QUICK, n_repeats=1), "synthetic"
    )
    for name in METRICS_OF["memorisation"]:
        assert rows["verdict"][name] in ("undefined", "no control")
        assert "single gene" in rows["note"][name]


def test_cells_in_an_open_file_are_those_in_memory(cells, tmp_path):
    opened = []
    for i, adata in enumerate(cells):
        ad.AnnData(adata.layers["counts"], obs=adata.obs, var=adata.var).write_h5ad(
            tmp_path / f"{i}.h5ad"
        )
        opened.append(ad.read_h5ad(tmp_path / f"{i}.h5ad", backed="r"))
    options = {"metrics": "variation", "n_repeats": 1}
    pd.testing.assert_frame_equal(_run(*opened, layer=None, **options), _run(*cells, **options))


def _counts(mean, theta, n, seed):
    rng = np.random.default_rng(seed)
    rate = rng.gamma(theta, mean / theta, (n, len(mean)))
    return sparse.csr_matrix(rng.poisson(rate))


@pytest.mark.parametrize("make", [independent_nb, nb_copula])
def test_baselines_have_the_moments_of_their_cells(make):
    mean, theta = np.array([0.2, 3.0, 40.0]), np.array([0.5, 2.0, 8.0])
    cells = _counts(mean, theta, 2000, seed=0)
    found = make(cells, 20_000, np.random.default_rng(1)).toarray()
    given = cells.toarray()
    np.testing.assert_allclose(found.mean(axis=0), given.mean(axis=0), rtol=0.04)
    np.testing.assert_allclose(found.var(axis=0), given.var(axis=0, ddof=1), rtol=0.08)
    # And their law is negative binomial with these moments, not just the moments.
    m, v = given.mean(axis=0), given.var(axis=0, ddof=1)
    size = m**2 / (v - m)
    zeros = stats.nbinom.pmf(0, size, size / (size + m))
    np.testing.assert_allclose((found == 0).mean(axis=0), zeros, atol=0.012)


def test_genes_without_overdispersion_are_poisson():
    rng = np.random.default_rng(0)
    cells = sparse.csr_matrix(rng.binomial(20, 0.5, (400, 2)))  # less variable than Poisson
    for make in (independent_nb, nb_copula):
        found = make(cells, 20_000, np.random.default_rng(1)).toarray()
        np.testing.assert_allclose(found.var(axis=0), 10, rtol=0.05)


def test_the_copula_carries_rank_correlations_and_independence_none():
    correlation = np.array([[1, 0.7, -0.4], [0.7, 1, 0], [-0.4, 0, 1]])
    rng = np.random.default_rng(0)
    z = rng.multivariate_normal(np.zeros(3), correlation, 2000)
    size = np.array([2.0, 4.0, 3.0])
    mean = np.array([200.0, 300.0, 400.0])  # so high that ties hardly matter
    cells = sparse.csr_matrix(stats.nbinom.ppf(stats.norm.cdf(z), size, size / (size + mean)))
    found = nb_copula(cells, 20_000, np.random.default_rng(1)).toarray()
    expected = 6 / np.pi * np.arcsin(correlation / 2)  # Spearman's, of a Gaussian copula
    np.testing.assert_allclose(stats.spearmanr(found).statistic, expected, atol=0.05)
    alone = independent_nb(cells, 20_000, np.random.default_rng(1)).toarray()
    np.testing.assert_allclose(stats.spearmanr(alone).statistic, np.eye(3), atol=0.03)


def test_the_copula_keeps_depth_where_independence_loses_it():
    adata = datasets.simulate_nb(2000, n_vars=50, n_types=1, log_depth=(6.0, 0.6), seed=3)
    cells = adata.layers["counts"]
    spread = [
        np.log1p(np.asarray(make(cells, 4000, np.random.default_rng(0)).sum(axis=1))).var()
        for make in (nb_copula, independent_nb)
    ]
    real = np.log1p(np.asarray(cells.sum(axis=1))).var()
    assert spread[0] == pytest.approx(real, rel=0.2)
    assert spread[1] < 0.4 * real
