"""Results in an AnnData: what is replaced, what is left alone, all or nothing, and files."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from exprgen._slots import quantile_name, target, write

INFO = {
    "seed": 3,
    "quantiles": (0.05, 0.95),
    "of": "cell",
    "estimator": {"name": "exact", "steps": np.int64(2), "flag": True},
    "genes": ["a", "b"],
    "library": None,
}


@pytest.fixture
def adata() -> ad.AnnData:
    adata = ad.AnnData(
        sparse.csr_matrix(np.eye(5, 4, dtype=np.float32)),
        obs=pd.DataFrame({"cell_type": list("aabbb")}, index=[f"c{i}" for i in range(5)]),
        var=pd.DataFrame(index=list("wxyz")),
    )
    adata.layers["counts"] = adata.X.copy()
    adata.layers["mine_mean"] = adata.X.copy()
    return adata


def layer(value: float = 1.0, n_vars: int = 4) -> np.ndarray:
    return np.full((5, n_vars), value, dtype=np.float32)


def predict(adata, value=1.0, *, names=("mean", "q05"), **options):
    layers = {name: layer(value, len(options.get("var_names", "wxyz"))) for name in names}
    options = {"model": "NBVAE", "info": INFO} | options
    write(adata, options.pop("key", "exprgen"), "predict", layers=layers, **options)


def everything(adata) -> dict:
    """All there is in an AnnData, by place; object identity of arrays included."""
    found = {"obs": list(adata.obs), "uns": list(adata.uns), "record": adata.uns.get("exprgen")}
    for store in ("layers", "obsm"):
        found |= {f"{store}/{k}": id(v) for k, v in getattr(adata, store).items()}
    return found | {f"obs/{k}": adata.obs[k].tolist() for k in adata.obs}


def test_names_and_record(adata):
    predict(adata)
    write(
        adata,
        "exprgen",
        "represent",
        model="NBVAE",
        obsm={"latent": layer(), "latent_std": layer(), "other": layer()},
        obs={"log_likelihood": np.arange(5.0), "split": pd.Categorical(list("tttvv"))},
        info={},
    )
    # From anndata 0.13 on, None among the layers is X.
    names = [name for name in adata.layers if name is not None]
    assert names == ["counts", "mine_mean", "exprgen_mean", "exprgen_q05"]
    assert list(adata.obsm) == ["X_exprgen", "X_exprgen_std", "exprgen_other"]
    assert list(adata.obs) == ["cell_type", "exprgen_log_likelihood", "exprgen_split"]
    record = adata.uns["exprgen"]
    assert record["model"] == "NBVAE"
    assert record["predict"]["slots"].tolist() == ["layers/exprgen_mean", "layers/exprgen_q05"]
    assert len(record["slots"]) == 7
    assert record["predict"]["seed"] == 3
    assert "library" not in record["predict"]


def test_again_replaces_its_own_and_what_depended_on_it(adata):
    predict(adata)
    write(adata, "exprgen", "conformal", model="NBVAE", layers={"lower": layer()}, info={})
    write(adata, "exprgen", "denoise", model="NBVAE", layers={"denoised": layer()}, info={})
    predict(adata, 2.0, names=("mean",), replaces=("conformal",))
    assert list(adata.layers)[-2:] == ["exprgen_mean", "exprgen_denoised"]
    assert adata.layers["exprgen_mean"][0, 0] == 2
    assert adata.uns["exprgen"]["slots"].tolist() == [
        "layers/exprgen_denoised",
        "layers/exprgen_mean",
    ]
    assert "conformal" not in adata.uns["exprgen"]


def test_again_after_the_user_removed_a_slot(adata):
    predict(adata)
    del adata.layers["exprgen_q05"]
    predict(adata, 2.0, names=("mean",))
    assert "exprgen_q05" not in adata.layers


def test_provenance_of_synthetic_cells_is_kept(adata):
    adata.uns["exprgen"] = {"model": "NBVAE", "layer": "counts", "size_factor_key": ""}
    predict(adata)
    assert adata.uns["exprgen"]["layer"] == "counts"


@pytest.mark.parametrize(
    ("store", "name", "value"),
    [
        ("layers", "exprgen_mean", layer(7)),
        ("uns", "exprgen", "my notes"),
        ("uns", "exprgen", {1}),
    ],
)
def test_what_is_the_users_stays(adata, store, name, value):
    getattr(adata, store)[name] = value
    before = everything(adata)
    with pytest.raises(ValueError, match=f"{name}.*overwrite=True"):
        predict(adata)
    assert everything(adata) == before
    predict(adata, overwrite=True)
    assert adata.layers["exprgen_mean"][0, 0] == 1


def test_another_model_needs_another_key(adata):
    predict(adata)
    with pytest.raises(ValueError, match="NBVAE.*CondVAE.*key_added"):
        predict(adata, model="CondVAE")
    predict(adata, 3.0, model="CondVAE", key="second")
    assert (adata.layers["exprgen_mean"][0, 0], adata.layers["second_mean"][0, 0]) == (1, 3)
    predict(adata, 4.0, names=("std",), model="CondVAE", overwrite=True)
    assert "exprgen_mean" not in adata.layers
    assert adata.uns["exprgen"]["model"] == "CondVAE"


def test_some_genes_go_to_obsm(adata):
    predict(adata, var_names=["y", "w"])
    assert adata.obsm["exprgen_mean"].shape == (5, 2)
    assert adata.uns["exprgen"]["predict"]["var_names"].tolist() == ["y", "w"]
    predict(adata)
    assert "exprgen_mean" not in adata.obsm
    assert "var_names" not in adata.uns["exprgen"]["predict"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {"mean": layer(n_vars=3)}}, r"mean.*\(5, 3\).*\(5, 4\)"),
        ({"layers": {"mean": layer()[:4]}}, r"mean.*\(4, 4\).*\(5, 4\)"),
        ({"layers": {"mean": layer(np.nan)}}, "mean has 20 values that are not finite"),
        ({"layers": {"mean": sparse.csr_matrix(layer(np.inf))}}, "not finite"),
        ({"obsm": {"latent": layer()[:4]}}, r"latent.*\(4, 4\).*\(5, 4\)"),
        ({"obs": {"depth": np.ones(4)}}, "depth has 4 values, adata has 5 cells"),
        ({"layers": {"mean": layer()}, "var_names": ["w"]}, r"\(5, 4\).*\(5, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(adata, options, message):
    before = everything(adata)
    good = {"obs": {"fits": np.ones(5)}}
    with pytest.raises(ValueError, match=message):
        write(adata, "exprgen", "predict", model="NBVAE", info={}, **(good | options))
    assert everything(adata) == before


def test_what_a_file_cannot_hold_is_refused(adata):
    before = everything(adata)
    with pytest.raises(TypeError, match=r"info\['seed'\]"):
        predict(adata, info={"seed": 2**70})
    with pytest.raises(ValueError, match="'a/b'"):
        predict(adata, key="a/b")
    assert everything(adata) == before


@pytest.mark.parametrize("first", [True, False])
def test_a_write_that_fails_halfway_leaves_what_was_there(adata, first, monkeypatch):
    if not first:
        predict(adata)
        write(adata, "exprgen", "predict2", model="NBVAE", obs={"depth": np.ones(5)}, info={})
    before = everything(adata)
    monkeypatch.setattr("exprgen._slots.check_values", lambda *_: None)
    with pytest.raises(ValueError, match="dimension"):  # AnnData's own, for the last of them
        write(
            adata,
            "exprgen",
            "predict",
            model="NBVAE",
            layers={"mean": layer(9), "std": layer(9), "q05": layer()[:2]},
            obs={"depth": np.zeros(5)},
            info={},
        )
    monkeypatch.undo()
    assert everything(adata) == before


def test_rows_go_by_position_not_by_index(adata):
    scrambled = pd.Series(np.arange(5.0), index=["c4", "c3", "c2", "c1", "c0"])
    write(adata, "exprgen", "predict", model="NBVAE", obs={"marker": scrambled}, info={})
    assert adata.obs["exprgen_marker"].tolist() == [0, 1, 2, 3, 4]


def test_a_view_is_copied_and_its_parent_left_alone(adata):
    view = adata[:3]
    result = target(view, copy=False)
    assert result is not view
    write(result, "k", "predict", model="NBVAE", layers={"mean": layer()[:3]}, info={})
    assert view.is_view
    assert "k_mean" not in adata.layers
    assert target(adata, copy=False) is adata
    assert target(adata, copy=True) is not adata


def test_backed_cells_are_copied_into_memory(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    result = target(backed, copy=True)
    assert not result.isbacked
    assert (result.X != adata.X).nnz == 0


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.filterwarnings("ignore:The data type")
@pytest.mark.parametrize("file_format", ["h5ad", "zarr"])
def test_files_give_back_the_same(adata, file_format, tmp_path):
    predict(adata)
    write(
        adata,
        "exprgen",
        "denoise",
        model="NBVAE",
        layers={"denoised": layer(n_vars=1)},
        obsm={"latent": layer()},
        obs={"log_likelihood": np.arange(5.0), "split": pd.Categorical(list("tttvv"))},
        info=INFO,
        var_names=["y"],
    )
    path = tmp_path / f"a.{file_format}"
    if file_format == "h5ad":
        adata.write_h5ad(path)
        back = ad.read_h5ad(path)
    else:
        pytest.importorskip("zarr")
        with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
            adata.write_zarr(path)
        back = ad.read_zarr(path)
    pd.testing.assert_frame_equal(back.obs, adata.obs)
    np.testing.assert_equal(dict(back.uns), dict(adata.uns))
    np.testing.assert_equal(dict(back.obsm), dict(adata.obsm))
    np.testing.assert_equal(back.layers["exprgen_mean"], adata.layers["exprgen_mean"])
    predict(back, names=("mean",))  # what was read is known as ours
    assert "exprgen_q05" not in back.layers


@pytest.mark.parametrize(
    ("quantile", "name"),
    [(0.05, "q05"), (0.025, "q02.5"), (0.95, "q95"), (0.5, "q50"), (0.999, "q99.9"),
     (0.001, "q00.1"), (0.07, "q07"), (0.29, "q29")],
)  # fmt: skip
def test_quantile_names(quantile, name):
    assert quantile_name(quantile) == name


def test_another_model_keeps_where_sampled_cells_come_from(adata):
    source = {"model": "NBVAE", "seed": 3, "layer": "counts", "size_factor_key": "depth"}
    adata.uns["exprgen"] = dict(source)
    predict(adata)
    predict(adata, model="CountFlow", names=("mean",), overwrite=True)
    record = adata.uns["exprgen"]
    assert {k: record[k] for k in source} == source | {"model": "CountFlow"}
    assert record["slots"].tolist() == ["layers/exprgen_mean"]
    assert "exprgen_q05" not in adata.layers
