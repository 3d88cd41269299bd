"""Evaluation tells good cells from bad, and real from real not at all; concat is fair."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from exprgen import datasets, tl
from exprgen._errors import GeneMismatchError


def _split(adata, *sizes):
    rows = np.random.default_rng(0).permutation(adata.n_obs)
    return [adata[part].copy() for part in np.split(rows, np.cumsum(sizes))[: len(sizes)]]


def _synthetic(adata):
    """As a model would hand them out."""
    cells = adata.copy()
    cells.obs = cells.obs[["cell_type"]].copy()
    cells.obs["synthetic"] = True
    cells.obs["library"] = np.asarray(cells.X.sum(axis=1)).ravel()
    cells.obs["n_train"] = 10
    cells.obs["support"] = "seen"
    cells.obs_names = [f"synthetic_{i}" for i in range(cells.n_obs)]
    cells.uns = {"exprgen": {"model": "NBVAE", "size_factor_key": ""}}
    return cells


def _shuffle_genes(adata):
    """Every gene permuted within its type: marginals kept, cells destroyed."""
    rng = np.random.default_rng(1)
    counts = adata.layers["counts"].toarray()
    for label in adata.obs["cell_type"].unique():
        rows = np.flatnonzero(adata.obs["cell_type"] == label)
        for gene in range(adata.n_vars):
            counts[rows, gene] = counts[rng.permutation(rows), gene]
    shuffled = adata.copy()
    shuffled.layers["counts"] = sparse.csr_matrix(counts)
    return shuffled


@pytest.fixture(scope="module")
def cells():
    """Train, test, cells of the same law, and those with their genes shuffled."""
    adata = datasets.simulate_latent(1200, n_vars=60, n_types=3, latent_sd=1.0, seed=4)
    train, test, same, more = _split(adata, 300, 300, 300, 300)
    return train, test, _synthetic(same), _synthetic(_shuffle_genes(more))


@pytest.fixture(scope="module")
def report(cells):
    train, test, same, shuffled = cells
    return tl.evaluate(
        train,
        test,
        {"same": same, "shuffled": shuffled},
        groupby="cell_type",
        n_repeats=2,
        progress_bar=False,
    )


def test_cells_of_the_same_law_match_the_control(report):
    rows = report[report["model"] == "same"].set_index("metric")
    assert rows["excess"][["RF-PC", "RF-gene", "LR-gene", "QC"]].abs().max() < 0.13
    assert rows["value"]["variance ratio"] == pytest.approx(1, abs=0.1)
    assert rows["control"]["variance ratio"] == pytest.approx(1, abs=0.1)
    assert rows["excess"]["gene correlation"] == pytest.approx(0, abs=0.06)
    assert (rows["n"] == rows["n"].iloc[0]).all()
    assert rows["n"].iloc[0] in (149, 150)


def test_destroyed_structure_shows_and_guards_do_not(report):
    rows = report[report["model"] == "shuffled"].set_index("metric")
    assert rows["excess"]["RF-PC"] > 0.1
    assert rows["excess"]["gene correlation"] < -0.4
    assert rows["value"]["mean correlation"] > 0.98


def test_the_report_is_one_row_per_model_and_metric(report):
    assert list(report.columns) == [
        "model", "metric", "value", "spread", "control", "control_spread", "excess", "n", "better",
    ]  # fmt: skip
    assert len(report) == 2 * report["metric"].nunique()
    assert not report.isna().any().any()
    # The control is real against real: no model can change it.
    per_model = [part.set_index("metric")["control"] for _, part in report.groupby("model")]
    pd.testing.assert_series_equal(*per_model)


def test_gene_order_does_not_matter_and_nothing_is_changed(cells):
    train, test, same, _ = cells
    before = [adata.layers["counts"].copy() for adata in (train, test, same)]
    options = {"groupby": "cell_type", "n_repeats": 1, "progress_bar": False}
    first = tl.evaluate(train, test, same, **options)
    again = tl.evaluate(train[:, ::-1].copy(), test, same[:, ::-1].copy(), **options)
    pd.testing.assert_frame_equal(first, again)
    assert (first["model"] == "NBVAE").all()
    assert first["spread"].isna().all()
    for adata, counts in zip((train, test, same), before, strict=True):
        assert (adata.layers["counts"] != counts).nnz == 0


def test_another_seed_cuts_other_halves_and_groups_are_optional(cells):
    train, test, same, _ = cells
    options = {"groupby": None, "n_repeats": 1, "progress_bar": False}
    first = tl.evaluate(train, test, same, seed=0, **options)
    other = tl.evaluate(train, test, same, seed=1, **options)
    assert np.isfinite(first["value"]).all()
    assert not np.isclose(first["control"], other["control"]).any()


def test_evaluate_says_what_is_wrong(cells):
    train, test, same, _ = cells

    def run(train=train, test=test, synthetic=same, groupby="cell_type", layer="counts", **more):
        tl.evaluate(
            train, test, synthetic, groupby=groupby, layer=layer, progress_bar=False, **more
        )

    with pytest.raises(GeneMismatchError, match=r"train lacks 'gene_0'"):
        run(train=train[:, 1:])
    with pytest.raises(GeneMismatchError, match=r"synthetic 'NBVAE' has besides them 'gene_0'"):
        run(train=train[:, 1:], test=test[:, 1:])
    with pytest.raises(KeyError, match="has no layer 'raw'"):
        run(layer="raw")
    with pytest.raises(KeyError, match="has no column 'tissue'"):
        run(groupby="tissue")
    with pytest.raises(ValueError, match="too few cells in 3 groups"):
        run(synthetic={"few": same[:20]})
    with pytest.raises(ValueError, match="Hold out more"):
        run(test=test[:6])
    with pytest.raises(ValueError, match="empty mapping"):
        run(synthetic={})
    with pytest.raises(ValueError, match="n_repeats"):
        run(n_repeats=0)
    logged = same.copy()
    logged.layers["counts"] = logged.layers["counts"].log1p()
    with pytest.raises(ValueError, match="does not hold counts"):
        run(synthetic=logged)


def test_identical_cells_stay_identical_through_scanpy(pbmc):
    import scanpy as sc

    synthetic = _synthetic(pbmc[:, ::2])
    real = pbmc[:, ::-1].copy()
    real.X = real.X.log1p()  # whatever .X holds, counts come from the layer
    combined = tl.concat(real, synthetic)
    sc.pp.normalize_total(combined, target_sum=1e4)
    sc.pp.log1p(combined)
    values = combined.X.toarray()
    np.testing.assert_array_equal(values[:700], values[700:])
    library = combined.obs["library"].to_numpy()
    np.testing.assert_array_equal(library[:700], library[700:])


def test_concat_keeps_flags_labels_and_dtypes(pbmc, tmp_path):
    import anndata

    real, synthetic = pbmc[:300].copy(), _synthetic(pbmc[300:])
    real.obs["cell_type"] = real.obs["cell_type"].astype(str)
    synthetic.obs["cell_type"] = synthetic.obs["cell_type"].cat.add_categories("new type")
    synthetic.obs.iloc[0, 0] = "new type"
    real.obs["passed"] = True
    synthetic.obs_names = ["synthetic_0", *real.obs_names[1:300], *synthetic.obs_names[300:]]
    combined = tl.concat(real, synthetic)

    assert combined.obs_names.is_unique
    assert combined.obs_names[:300].tolist() == real.obs_names.tolist()
    assert combined.obs["synthetic"].dtype == bool
    assert combined.obs["synthetic"].sum() == 400
    expected = [*real.obs["cell_type"], *synthetic.obs["cell_type"]]
    assert combined.obs["cell_type"].tolist() == expected
    assert isinstance(combined.obs["cell_type"].dtype, pd.CategoricalDtype)
    assert combined.obs["n_genes"].dtype == "Int64"
    assert combined.obs["passed"].dtype == "boolean"
    assert combined.obs["support"].isna().sum() == 300
    assert (combined.layers["counts"] != combined.X).nnz == 0
    assert not np.shares_memory(combined.X.data, combined.layers["counts"].data)

    combined.write_h5ad(tmp_path / "combined.h5ad")
    again = anndata.read_h5ad(tmp_path / "combined.h5ad")
    pd.testing.assert_frame_equal(again.obs, combined.obs)


def test_concat_puts_a_size_factor_on_one_scale(pbmc):
    synthetic = _synthetic(pbmc)
    synthetic.obs["library"] = pbmc.obs["n_counts"].to_numpy() * 1.0
    synthetic.uns["exprgen"]["size_factor_key"] = "n_counts"
    library = tl.concat(pbmc, synthetic).obs["library"].to_numpy()
    np.testing.assert_array_equal(library[:700], pbmc.obs["n_counts"])
    np.testing.assert_array_equal(library[700:], pbmc.obs["n_counts"])
    del pbmc.obs["n_counts"]
    with pytest.raises(KeyError, match="real.obs has no 'n_counts'"):
        tl.concat(pbmc, synthetic)


def test_concat_needs_every_modelled_gene(pbmc):
    synthetic = _synthetic(pbmc)
    with pytest.raises(GeneMismatchError, match="real lacks 'HES4'"):
        tl.concat(pbmc[:, 1:].copy(), synthetic)
    twice = pbmc.copy()
    twice.var_names = ["HES4", "HES4", *pbmc.var_names[2:]]
    with pytest.raises(GeneMismatchError, match="not unique"):
        tl.concat(twice, synthetic)


MIXED = [
    (np.array([1, 2, 3]), ["1", "new_donor_0", "new_donor_1"]),
    (np.array([1.5, 2.0, np.nan]), ["1.5", "new_donor_0", "new_donor_1"]),
    ([True, False, True], ["True", "False", "new"]),
    (pd.array([1, None, 3], dtype="Int64"), ["1", "3", "new"]),
    (pd.array([True, None, False], dtype="boolean"), ["True", "False", "new"]),
    (pd.Categorical([1, 2, 3]), ["1", "2", "new"]),
    (pd.Categorical(pd.array([1, 2, 3], dtype="Int64")), pd.Categorical(["1", "2", "new"])),
    (pd.array(["1", None, "2"], dtype="string"), np.array([1, 2, 3])),
    (np.array(["1", 1, 2.5], dtype=object), ["1", "2.5", "new"]),
    ([True, False, True], [0, 1, 2]),
]
ALIKE = [
    (np.array([1, 2, 3]), pd.Categorical([1, 2, 4])),
    (pd.Categorical([1, 2, 3]), pd.Categorical([1.0, 2.5, 4.0])),
    (pd.Categorical([True, False, True]), [True, True, False]),
    (pd.Categorical(pd.array([1, 2, None], dtype="Int64")), pd.Categorical([1, 2, 4])),
    (np.array([1, 2, 3], dtype=object), np.array([1, 2, 4], dtype=object)),
    ([True, False, True], np.full(3, np.nan)),
    (np.full(3, None), np.full(3, None)),
    (np.full(3, np.nan), ["a", "b", None]),
    (pd.array(["a", None, "b"], dtype="string"), ["a", "b", "c"]),
]


@pytest.mark.parametrize(("one", "other"), MIXED + ALIKE)
@pytest.mark.parametrize("swap", [False, True])
def test_concat_keeps_labels_of_every_type(one, other, swap, pbmc, tmp_path):
    import anndata

    sides = [pbmc[:3].copy(), _synthetic(pbmc[3:6])]
    values = [other, one] if swap else [one, other]
    for side, value in zip(sides, values, strict=True):
        side.obs["donor"] = pd.Series(value, index=side.obs_names)
    combined = tl.concat(*sides)
    expected = [*map(list, values)]
    expected = pd.Series([*expected[0], *expected[1]], dtype=object)
    texts = expected.where(expected.isna(), expected.map(str))
    is_mixed = any(one is pair[0] for pair in MIXED)
    found = combined.obs["donor"]
    assert found.isna().tolist() == expected.isna().tolist()
    wanted = (texts if is_mixed else expected).dropna()
    assert found.dropna().tolist() == wanted.tolist()
    if is_mixed:
        assert isinstance(found.dtype, pd.CategoricalDtype)
    combined.write_h5ad(tmp_path / "combined.h5ad")
    again = anndata.read_h5ad(tmp_path / "combined.h5ad").obs["donor"]
    assert again.dropna().tolist() == wanted.tolist()


def test_concat_of_counts_in_x(pbmc, tmp_path):
    combined = tl.concat(pbmc, _synthetic(pbmc), layer=None)
    assert not any(combined.layers)  # None, from anndata 0.13 on, is X
    combined.write_h5ad(tmp_path / "combined.h5ad")
