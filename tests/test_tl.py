"""Real and synthetic cells in one object, and nothing tells them apart that is not in them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from exprgen import tl
from exprgen._errors import GeneMismatchError


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
