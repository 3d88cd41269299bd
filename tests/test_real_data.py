"""On real data sets beside the repository; skipped where they are absent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import scanpy as sc
from scipy import sparse
from scvi.criticism import PosteriorPredictiveCheck

import exprgen

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _read(path: Path, n_genes: int) -> ad.AnnData:
    adata = ad.read_h5ad(path)
    order = np.argsort(-np.asarray(adata.X.sum(0)).ravel())
    names = adata.var.get("symbol", adata.var_names)
    keep = np.union1d(order[:n_genes], np.flatnonzero(names == "ISG15"))
    adata = adata[:, keep].copy()
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    return adata


def _log_isg15(adata: ad.AnnData) -> float:
    counts = adata.X.toarray()
    share = counts / counts.sum(1, keepdims=True)
    return float(np.log1p(1e4 * share[:, adata.var_names == "ISG15"]).mean())


def test_interferon_turns_isg15_on(shared_data: Callable[[str], Path]) -> None:
    adata = _read(shared_data("kang_ifnb_muscat.h5ad"), 400)
    exprgen.NBVAE.setup_anndata(adata, categorical_condition_keys=["cell_type", "condition"])
    model = exprgen.NBVAE(adata, seed=0)
    model.train(progress_bar=False)
    for condition in ("ctrl", "stim"):
        real = adata[adata.obs["condition"] == condition]
        drawn = model.sample(real, seed=0, progress_bar=False)
        assert abs(_log_isg15(drawn) - _log_isg15(real)) < 0.3


def test_posterior_predictive_check_of_scvi_runs(pbmc: ad.AnnData) -> None:
    cells = pbmc[:150].copy()
    sc.pp.filter_genes(cells, min_cells=1)
    exprgen.NBVAE.setup_anndata(cells, layer="counts")
    model = exprgen.NBVAE(cells, seed=0)
    model.train(2, progress_bar=False)
    cells.layers["dense"] = cells.layers["counts"].toarray()
    check = PosteriorPredictiveCheck(cells, {"nbvae": model}, count_layer_key="dense", n_samples=2)
    check.coefficient_of_variation("cells")  # scvi-tools names axes the other way round
    drawn, real = (check.metrics["cv_gene"][name].to_numpy() for name in ("nbvae", "Raw"))
    known = np.isfinite(drawn) & np.isfinite(real)  # a gene that is never drawn has none
    assert known.mean() > 0.8
    assert np.corrcoef(drawn[known], real[known])[0, 1] > 0.8
