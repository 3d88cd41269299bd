"""What is drawn is what the data say; what is missing is named with its remedy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from exprgen import _slots, pl, tl


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")


def test_moments_draws_gene_statistics(pbmc):
    real, synthetic = pbmc[:200].copy(), pbmc[200:400, ::-1].copy()
    axes = pl.moments(real, synthetic, control=pbmc[400:600], show=False)
    control, drawn = axes[0].collections
    assert len(axes) == 3
    floor = 0.5 / 200
    expected = [
        np.maximum(np.asarray(cells.X.mean(axis=0)).ravel(), floor)
        for cells in (real, pbmc[200:400], pbmc[400:600])
    ]
    np.testing.assert_allclose(drawn.get_offsets(), np.column_stack(expected[:2]), rtol=1e-5)
    np.testing.assert_allclose(control.get_offsets()[:, 1], expected[2], rtol=1e-5)
    variance = real.X.toarray().astype(float).var(axis=0, ddof=1)
    np.testing.assert_allclose(
        axes[1].collections[1].get_offsets()[:, 0], np.maximum(variance, floor), rtol=1e-5
    )
    zeros = (pbmc[200:400].X.toarray() == 0).mean(axis=0)
    np.testing.assert_allclose(axes[2].collections[1].get_offsets()[:, 1], zeros)


def test_moments_matches_groups_and_halves_without_control(pbmc):
    few = pbmc[pbmc.obs["cell_type"] == "CD19+ B"].copy()
    axes = pl.moments(pbmc, few, groupby="cell_type", show=False)
    lowest = axes[0].collections[1].get_offsets().min()
    assert lowest == pytest.approx(0.5 / (95 // 2))  # all sides cut to half of the B cells
    other = pbmc[pbmc.obs["cell_type"] == "CD34+"]
    with pytest.raises(ValueError, match="in common"):
        pl.moments(other, few, groupby="cell_type", show=False)
    with pytest.raises(KeyError, match="tissue"):
        pl.moments(pbmc, pbmc, groupby="tissue", show=False)


def _predicted(pbmc):
    counts = pbmc.X.toarray()
    above = np.arange(700)[:, None] < 175
    layers = {"mean": counts + 1.0, "std": counts + 1.0, "q95": counts + 2.0}
    layers["q05"] = np.where(above, counts + 1.0, counts)
    info = {"of": "cell", "n_cells": 0, "quantiles": [0.05, 0.95], "layer": ""}
    _slots.write(pbmc, "exprgen", "predict", model="NBVAE", layers=layers, info=info)
    return pbmc


def test_uncertainty_draws_means_and_counts_coverage(pbmc):
    pbmc = _predicted(pbmc)
    axes = pl.uncertainty(pbmc, ["LYZ", "NKG7"], groupby="cell_type", show=False)
    assert [ax.get_title(loc="left") for ax in axes] == ["LYZ", "NKG7"]
    assert axes[0].get_title(loc="right") == "75 % inside"
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == list(pbmc.obs["cell_type"].cat.categories)
    b_cells = pbmc[pbmc.obs["cell_type"] == "CD19+ B", "LYZ"]
    observed = axes[0].lines[names.index("CD19+ B")].get_xdata()
    np.testing.assert_allclose(observed, b_cells.X.toarray().mean())
    figure = pl.uncertainty(pbmc, "LYZ", groupby="cell_type", show=False, return_fig=True)
    assert figure.legends[0].get_texts()[-1].get_text() == "predicted 5–95 %"


def test_uncertainty_names_what_is_missing(pbmc):
    with pytest.raises(KeyError, match=r"model\.predict\(adata"):
        pl.uncertainty(pbmc, "LYZ", groupby="cell_type", show=False)
    pbmc = _predicted(pbmc)
    with pytest.raises(KeyError, match="Did you mean 'LYZ'"):
        pl.uncertainty(pbmc, "LYZZ", groupby="cell_type", show=False)
    with pytest.raises(KeyError, match="tissue"):
        pl.uncertainty(pbmc, "LYZ", groupby="tissue", show=False)
    with pytest.raises(ValueError, match="genes is empty"):
        pl.uncertainty(pbmc, [], groupby="cell_type", show=False)


def test_embedding_shows_every_cell_on_its_side(pbmc):
    synthetic = pbmc[:100].copy()
    synthetic.obs_names = [f"synthetic_{i}" for i in range(100)]
    combined = tl.concat(pbmc, synthetic)
    with pytest.raises(KeyError, match=r"sc\.tl\.umap"):
        pl.embedding(combined, groupby="cell_type", show=False)
    points = np.random.default_rng(0).normal(size=(800, 2))
    combined.obsm["X_umap"] = points
    combined.uns["cell_type_colors"] = [f"#0000{i:02x}" for i in range(10)]
    before = combined.obs.copy()

    axes = pl.embedding(combined, groupby="cell_type", show=False)
    for ax, member in zip(axes, (np.arange(800) < 700, np.arange(800) >= 700), strict=False):
        drawn = ax.collections[1].get_offsets()
        assert {tuple(p) for p in drawn} == {tuple(p) for p in points[member]}
    assert len(axes[2].collections[0].get_offsets()) == 800
    labels = [text.get_text() for text in axes[0].figure.legends[0].get_texts()]
    assert labels == list(combined.obs["cell_type"].cat.categories)
    assert combined.obs.equals(before)
    with pytest.raises(KeyError, match="tissue"):
        pl.embedding(combined, groupby="tissue", show=False)


def test_figures_draw_on_given_axes(pbmc):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3)
    drawn = pl.moments(pbmc, pbmc, axes=axes, show=False)
    assert list(drawn) == list(axes)
    assert pl.moments(pbmc, pbmc, axes=axes, show=False, return_fig=True) is figure
    with pytest.raises(ValueError, match="3 matplotlib axes, got 2"):
        pl.moments(pbmc, pbmc, axes=axes[:2], show=False)


def _report():
    """Two models and a baseline, one row of each kind."""
    deviations = {"not told apart": 1.0, "close": 4.0, "off": 25.0}
    rows = []
    for model, kind, verdicts in (
        ("good", "model", ("not told apart", "close", "not told apart")),
        ("bad", "model", ("off", "off", "undefined")),
        ("group mean", "baseline", ("off", "off", "off")),
    ):
        metrics = (("RF-PC", "classifier"), ("MMD", "distance"), ("density", "neighbours"))
        for (metric, family), verdict in zip(metrics, verdicts, strict=True):
            missing = verdict == "undefined"
            rows.append(
                {
                    "model": model, "metric": metric, "family": family, "kind": kind,
                    "value": np.nan if missing else 0.75, "control": 0.5, "control_spread": 0.01,
                    "deviation": deviations.get(verdict, np.nan),
                    "verdict": verdict, "flag": verdict in ("off", "undefined"),
                    "better": "near 1" if metric == "density" else "lower",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_evaluation_draws_a_cell_per_model_and_metric_by_its_verdict(pbmc):
    report = _report()
    ax = pl.evaluation(report, show=False)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "RF-PC ↓",
        "MMD ↓",
        "density → 1",
    ]
    names = ["real vs real", "good", "bad", "group mean"]
    assert [label.get_text() for label in ax.get_xticklabels()] == names
    colours = np.array([patch.get_facecolor() for patch in ax.patches[3:]]).reshape(3, 3, 4)
    good, bad, baseline = colours
    assert (good[0] == good[2]).all()
    assert (good[0] != good[1]).any()
    assert (bad[0] == baseline).all()
    texts = [text for text in ax.texts if text.get_text() == "0.750"]
    assert [text.get_fontweight() for text in texts] == ["normal"] * 3 + ["bold"] * 5
    assert sum(text.get_text() == "0.500 ± 0.01" for text in ax.texts) == 3
    pbmc.uns["evaluation"] = {"report": report, "settings": {}}
    figure = pl.evaluation(
        pbmc, models=["bad", "good"], metrics=["MMD", "neighbours"], show=False, return_fig=True
    )
    [again] = figure.axes
    assert [label.get_text() for label in again.get_yticklabels()] == ["MMD ↓", "density → 1"]
    assert [label.get_text() for label in again.get_xticklabels()] == [names[0], "bad", "good"]


def test_evaluation_draws_on_given_axes_and_names_what_is_missing(pbmc):
    import matplotlib.pyplot as plt

    _, given = plt.subplots()
    assert pl.evaluation(_report(), ax=given, show=False) is given
    with pytest.raises(KeyError, match=r"no evaluation report under 'evaluation'"):
        pl.evaluation(pbmc)
    with pytest.raises(KeyError, match=r"no column 'deviation'"):
        pl.evaluation(_report().drop(columns="deviation"))
    with pytest.raises(KeyError, match=r"models has 'best'"):
        pl.evaluation(_report(), models=["best"])
    with pytest.raises(KeyError, match=r"metrics has 'RF'"):
        pl.evaluation(_report(), metrics=["RF"])


def test_evaluation_refuses_what_it_cannot_draw():
    report = _report()
    for options in ({"models": []}, {"metrics": []}):
        with pytest.raises(ValueError, match="is empty; name some"):
            pl.evaluation(report, **options)
    for options in ({"models": 5}, {"metrics": [5]}):
        with pytest.raises(TypeError, match="must be a name, a list of names, or None, got"):
            pl.evaluation(report, **options)
    with pytest.raises(TypeError, match="ax must be matplotlib axes, or None, got int"):
        pl.evaluation(report, ax=5)
    with pytest.raises(TypeError, match="report must be the table from tl.evaluate"):
        pl.evaluation("report.csv")
    with pytest.raises(ValueError, match="report has no rows"):
        pl.evaluation(report[:0])
    with pytest.raises(ValueError, match="same model and metric: 'good: RF-PC', .* and 6 more"):
        pl.evaluation(pd.concat([report, report]))


def test_evaluation_takes_single_names_and_values_that_are_not_there():
    report = _report()
    report.loc[report["model"] == "bad", ["value", "deviation"]] = np.nan
    ax = pl.evaluation(report, models="bad", metrics="classifier", show=False)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["real vs real", "bad"]
    assert "–" in [text.get_text() for text in ax.texts]
    np.testing.assert_array_equal(ax.patches[1].get_facecolor(), [1, 1, 1, 1])
