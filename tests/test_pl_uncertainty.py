"""Plots of calibration, intervals, latent variance, training: what is drawn is what is there."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from exprgen import _slots, pl, tl

LEVELS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99)


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


@pytest.fixture
def adata():
    """300 cells of two types and three genes with their own law as prediction."""
    return _cells(300, seed=0)


def _cells(n, *, seed, narrow=1.0, layer="counts"):
    import anndata as ad

    rng = np.random.default_rng(seed)
    types = np.where(np.arange(n) < n // 2, "b", "a")
    mean = np.where(types[:, None] == "a", 3.0, 12.0) * np.array([0.2, 1.0, 3.0])
    obs = pd.DataFrame({"cell_type": types}, index=[f"c{i}_{seed}" for i in range(n)])
    cells = ad.AnnData(obs=obs, var=pd.DataFrame(index=["x", "y", "z"]))
    cells.layers[layer] = rng.negative_binomial(2, 2 / (2 + mean)).astype(np.float32)
    law = stats.nbinom(2 / narrow, 2 / narrow / (2 / narrow + mean))
    layers = {_slots.quantile_name(q): law.ppf(q).astype(np.float32) for q in LEVELS}
    layers |= {"mean": mean, "std": law.std(), "std_latent": 0.5 * law.std()}
    info = {"of": "cell", "n_cells": 0, "quantiles": list(LEVELS), "layer": layer}
    split = pd.Categorical(["new"] * n, categories=["train", "validation", "new"])
    _slots.write(
        cells, "exprgen", "predict", model="NBVAE", layers=layers, obs={"split": split}, info=info
    )
    return cells


def _line(ax, label):
    [line] = [line for line in ax.lines if line.get_label() == label]
    return np.asarray(line.get_ydata())


def _bars(ax):
    [bars] = [patch for patch in ax.patches if patch.get_label() == "predicted"]
    return bars.get_data().values


def test_calibration_is_flat_for_the_true_law_and_not_for_a_narrow_one(adata):
    axes = pl.calibration(adata, groupby="cell_type", control=_cells(400, seed=1), show=False)
    assert [ax.get_title(loc="left") for ax in axes] == ["a", "b"]
    assert axes[0].get_title(loc="right") == "150 cells"
    # 450 values of a type: a standard deviation of 2.4 points, and the interpolation.
    assert all(np.abs(_line(ax, "predicted")).max() < 10 for ax in axes)
    assert all(np.abs(_line(ax, "among real cells")).max() < 10 for ax in axes)
    [narrow] = pl.calibration(_cells(300, seed=0, narrow=0.1), show=False)
    assert _line(narrow, "predicted").min() < -15


def test_pit_has_the_cells_shares_and_raised_ends_if_narrow(adata):
    [ax] = pl.pit(adata, n_bins=10, show=False)
    bars = _bars(ax)
    assert bars.mean() == pytest.approx(1)
    assert np.abs(bars - 1).max() < 0.35
    [ax] = pl.pit(_cells(300, seed=0, narrow=0.1), n_bins=10, show=False)
    narrow = _bars(ax)
    assert min(narrow[0], narrow[-1]) > 1.2
    with pytest.raises(ValueError, match="control has no cell of the group 'b'"):
        pl.pit(adata, groupby="cell_type", control=adata[150:])
    with pytest.raises(ValueError, match="layer='raw' is not what was modelled"):
        pl.pit(adata, layer="raw")
    [ax] = pl.pit(_cells(300, seed=0, layer="raw"), n_bins=10, show=False)
    np.testing.assert_array_equal(_bars(ax), bars)
    with pytest.raises(KeyError, match="no predictions under key='other'"):
        pl.calibration(adata, key="other")


def test_intervals_show_both_and_their_coverage(adata):
    with pytest.raises(KeyError, match=r"run exprgen\.tl\.conformalize"):
        pl.intervals(adata, "y", groupby="cell_type", show=False)
    tl.conformalize(adata, _cells(300, seed=2), seed=0)
    axes = pl.intervals(adata, ["y", "z"], groupby="cell_type", show=False)
    assert [ax.get_title(loc="left") for ax in axes] == ["y", "z"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b"]
    x, shares = adata.layers["counts"][:, 1], []
    for names in (("q05", "q95"), ("lower", "upper")):
        low, high = (adata.layers[f"exprgen_{name}"][:, 1] for name in names)
        shares.append(100 * ((low <= x) & (x <= high)).mean())
    assert axes[0].get_title(loc="right") == f"{shares[0]:.0f} → {shares[1]:.0f} % inside"
    bar = axes[0].lines[1].get_xdata()  # the first group's predicted interval
    of_a = adata.obs["cell_type"] == "a"
    assert bar[1] == adata.layers["exprgen_q95"][of_a, 1][0] + 0.25
    with pytest.raises(KeyError, match="genes are unknown: 'w'"):
        pl.intervals(adata, "w", groupby="cell_type", show=False)
    with pytest.raises(KeyError, match="groupby='type'"):
        pl.intervals(adata, "y", groupby="type", show=False)


def test_latent_variance_is_the_share_of_the_variance(adata):
    adata.layers["exprgen_std_latent"][:, 2] *= 1.5
    ax = pl.latent_variance(adata, groupby="cell_type", n_genes=2, show=False)
    shown = ax.images[0].get_array()
    assert shown.shape == (2, 2)
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names[0] == "z"
    np.testing.assert_allclose(shown[:, 0], 0.75**2, rtol=1e-6)
    np.testing.assert_allclose(shown[:, 1], 0.25, rtol=1e-6)
    del adata.layers["exprgen_std_latent"]
    with pytest.raises(KeyError, match="no exprgen_std_latent"):
        pl.latent_variance(adata, groupby="cell_type")


def test_history_draws_every_stage_and_its_best_epoch():
    def losses(*values):
        return pd.DataFrame({"loss": values}, index=pd.RangeIndex(len(values), name="epoch"))

    given = {
        "elbo_train": losses(5.0, 4.0, 3.5),
        "elbo_validation": losses(6.0, 4.5, 4.6),
        "density_loss_train": losses(2.0, 1.0),
    }
    axes = pl.history(given, show=False)
    assert [ax.get_title(loc="left") for ax in axes] == ["Autoencoder", "Density"]
    np.testing.assert_array_equal(_line(axes[0], "validation"), [6, 4.5, 4.6])
    [best] = axes[0].collections
    np.testing.assert_array_equal(best.get_offsets(), [[2, 4.5]])
    with pytest.raises(ValueError, match="no history of training"):
        pl.history({})


def test_intervals_of_means_draw_donors(adata):
    adata.obs["donor"] = [f"d{i % 15}" for i in range(300)]
    record = adata.uns["exprgen"]["predict"]
    record["of"], record["n_cells"] = "mean", 10
    calibration = _cells(300, seed=2)
    calibration.obs["donor"] = [f"other_{i % 15}" for i in range(300)]
    calibration.uns["exprgen"]["predict"].update(record)
    tl.conformalize(adata, calibration, donor_key="donor", seed=0)
    [ax] = pl.intervals(adata, "y", groupby="cell_type", show=False)
    dots = ax.collections[0].get_offsets()
    assert len(dots) == 15
    means = adata[adata.obs["cell_type"] == "a"].to_df("counts").groupby(
        adata.obs["donor"][adata.obs["cell_type"] == "a"]
    )["y"].mean()  # fmt: skip
    np.testing.assert_allclose(np.sort(dots[:, 0]), np.sort(means), rtol=1e-6)
    with pytest.raises(ValueError, match="predictions are of means"):
        pl.calibration(adata)


def test_few_cells_have_no_band_and_long_names_stand_above_their_number():
    adata = _cells(40, seed=0)
    name = "CD16+ monocytes, stimulated"
    adata.obs["cell_type"] = [name] * 30 + ["few"] * 10
    axes = pl.pit(adata, groupby="cell_type", return_fig=True).axes
    assert [len(ax.patches) for ax in axes] == [2, 1]
    assert axes[0].figure.legends[0].get_texts()[0].get_text() == "95 % of bars, if exact"
    for long, short in (axes, pl.calibration(adata, groupby="cell_type")):
        assert long.get_title(loc="left") == f"{name}\n"
        assert short.get_title(loc="left") == "few"


def test_one_gene_and_its_legend_have_room(adata):
    names = {"a": "a", "b": "a type with a name that is long and tells all of it"}
    adata.obs["cell_type"] = adata.obs["cell_type"].map(names)
    tl.conformalize(adata, _cells(300, seed=2), seed=0)
    for figure in (
        pl.intervals(adata, "y", groupby="cell_type", return_fig=True),
        pl.uncertainty(adata, "y", groupby="cell_type", return_fig=True),
    ):
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert figure.axes[0].get_window_extent().width / figure.dpi > 2


def test_sparse_predictions_are_drawn(adata):
    from scipy import sparse

    tl.conformalize(adata, _cells(300, seed=2), seed=0)
    thin = adata.copy()
    for name in thin.layers:
        thin.layers[name] = sparse.csr_matrix(thin.layers[name])
    pictures = []
    for cells in (adata, thin):
        [ax] = pl.intervals(cells, "y", groupby="cell_type")
        image = pl.latent_variance(cells, groupby="cell_type").images[0].get_array()
        pictures.append([image, *(line.get_xdata() for line in ax.lines)])
    for one, other in zip(*pictures, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("plot", "error", "message"),
    [
        (
            lambda a: pl.calibration(a, control="x"),
            TypeError,
            "control= wants an AnnData, got",
        ),
        (
            lambda a: pl.calibration(a, axes="x"),
            TypeError,
            "axes must be matplotlib axes, got",
        ),
        (lambda a: pl.calibration(a, n_cols=0), ValueError, "n_cols must be at least 1, got 0"),
        (lambda a: pl.pit(a, n_bins=0), ValueError, "n_bins must be at least 2, got 0"),
        (lambda a: pl.pit(a, n_bins=2.5), TypeError, "n_bins must be an integer, got 2.5"),
        (lambda a: pl.pit("a.h5ad"), TypeError, r"adata= wants an AnnData, got str\. Read it"),
        (lambda a: pl.pit(_mudata(a)), TypeError, r"adata is a MuData.*mdata\['rna'\]"),
        (lambda a: pl.outliers(_mudata(a)), TypeError, r"adata is a MuData.*mdata\['rna'\]"),
        (lambda a: pl.history(3), TypeError, "model must be a trained model, .* got int"),
        (
            lambda a: pl.intervals(a, "y", groupby="cell_type", max_cells=-1),
            ValueError,
            "max_cells must be at least 1, got -1",
        ),
    ],
)
def test_wrong_arguments_are_named(adata, plot, error, message):
    with pytest.raises(error, match=message):
        plot(adata)


def _mudata(adata):
    from mudata import MuData

    from exprgen.models._mudata import quietly

    with quietly():
        return MuData({"rna": adata})


def test_slots_that_are_gone_are_named(adata):
    tl.conformalize(adata, _cells(300, seed=2), seed=0)
    del adata.layers["exprgen_lower"]
    with pytest.raises(KeyError, match=r"no exprgen_lower, which exprgen\.tl\.conformalize"):
        pl.intervals(adata, "y", groupby="cell_type")
    adata.uns["exprgen"] = {"outliers": {"against": "library"}}
    with pytest.raises(KeyError, match=r"no 'exprgen_outlier_pvalue', which exprgen"):
        pl.outliers(adata)
    adata.uns["exprgen"] = "text"
    with pytest.raises(KeyError, match="no outliers under 'exprgen'"):
        pl.outliers(adata)


def test_uncertainty_reads_what_was_modelled():
    cells = _cells(120, seed=0, layer="raw")
    values = cells.layers["raw"] + 0.25  # not counts any more, and neither are the quantiles
    cells.layers["raw"] = values
    for name in [name for name in cells.layers if name.startswith("exprgen_q")]:
        cells.layers[name] = cells.layers[name] + 0.25
    axes = pl.uncertainty(cells, ["z", "x"], groupby="cell_type", show=False)
    assert axes[0].get_xlabel() == "value per cell"
    inside = (cells.layers["exprgen_q05"] <= values) & (values <= cells.layers["exprgen_q95"])
    assert axes[0].get_title(loc="right") == f"{100 * inside[:, 2].mean():.0f} % inside"
    of_a = (cells.obs["cell_type"] == "a").to_numpy()
    assert axes[1].lines[0].get_xdata()[0] == pytest.approx(values[of_a, 0].mean())
    with pytest.raises(ValueError, match="interval must be two of the predicted quantiles, 'q01'"):
        pl.uncertainty(cells, "x", groupby="cell_type", interval=("q03", "q95"))
    cells.uns["exprgen"]["predict"]["of"] = "mean"
    with pytest.raises(ValueError, match="predictions are of means"):
        pl.uncertainty(cells, "x", groupby="cell_type")
