r"""How far synthetic cells are from held-out real cells, beside how far real cells are.

No two-sample measure reaches its ideal on finite samples, so every value is read against a
*control*: the same measure, on real cells only. In each repeat the held-out cells are cut into
random halves A and B with the same number of cells of every group; synthetic cells S are drawn,
without replacement, to A's size and composition; then

.. math:: \text{value} = m(S, B), \qquad \text{control} = m(A, B), \qquad
          \text{excess} = \text{value} - \text{control},

averaged over repeats. What a comparison uses is fitted on that comparison alone: principal
components on the pooled pair, never on the training cells (which would make even *real* training
cells look synthetic), and no cell enters twice (a duplicate gives its twin away across folds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exprgen import metrics
from exprgen._errors import name_some
from exprgen.tl._counts import gene_positions, read_counts

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData

__all__ = ["evaluate"]

_BETTER = {
    "RF-PC": "lower",
    "RF-gene": "lower",
    "LR-gene": "lower",
    "QC": "lower",
    "variance ratio": "near 1",
    "gene correlation": "higher",
    "zero fraction difference": "lower",
    "mean correlation": "higher",
}


class _Cells(NamedTuple):
    """Counts (CSR), their normalised values (CSR) and the group of every cell."""

    counts: sp.csr_matrix
    values: sp.csr_matrix
    groups: np.ndarray

    def take(self, rows: np.ndarray) -> _Cells:
        return _Cells(self.counts[rows], self.values[rows], self.groups[rows])


def evaluate(
    train: AnnData,
    test: AnnData,
    synthetic: AnnData | Mapping[str, AnnData],
    *,
    groupby: str | Sequence[str] | None = None,
    layer: str | None = "counts",
    n_repeats: int = 5,
    seed: int = 0,
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Compare synthetic cells with held-out cells, with a real-vs-real control for every number.

    Parameters
    ----------
    train
        The cells the model was trained on (used for the control of the variance ratio).
    test
        Held-out cells, never seen in training; at least two of some group.
    synthetic
        Cells generated for the conditions of ``test``, or a mapping of model names to such; at
        least half as many per group as ``test`` has. Draw more for more independent repeats.
    groupby
        Column(s) of ``.obs`` (all objects must have them) whose composition is matched; variances
        and correlations are taken within them. None for no groups.
    layer
        Where all objects keep their counts; None for ``.X``.
    n_repeats
        Random halves of the held-out cells.
    seed
        The same seed gives the same numbers.
    progress_bar
        Whether to show one.

    Returns
    -------
    pandas.DataFrame
        One row per model and metric. ``value`` and ``control`` are means over repeats, ``spread``
        and ``control_spread`` standard deviations over repeats (nan for one repeat; the repeats
        share cells, so this is not a standard error), ``excess = value - control``, ``n`` the
        cells on each side, ``better`` the direction. Metrics:

        ``RF-PC``, ``RF-gene``, ``LR-gene``, ``QC``
            AUC of a classifier that tells synthetic from held-out cells (.5:
            indistinguishable): random forest on 50 principal components, random forest and
            logistic regression on genes, random forest on five quality numbers per cell.
        ``variance ratio``
            Synthetic over held-out variance within groups, median gene, log1p of counts per
            10,000; the control is training over held-out cells.
        ``gene correlation``
            Agreement of within-group gene-gene correlations, top 200 genes; grows with ``n``.
        ``zero fraction difference``, ``mean correlation``
            Guards: gene-wise models without any cell structure pass them.

        See :mod:`exprgen.metrics` for definitions.

    Raises
    ------
    GeneMismatchError
        The objects differ in their genes (order does not matter).
    KeyError
        A column of ``groupby`` or the layer is missing.
    ValueError
        No counts, too few held-out cells, or too few synthetic cells of a group.
    """
    import pandas as pd
    from tqdm import tqdm

    if n_repeats < 1:
        raise ValueError(f"n_repeats must be at least 1, got {n_repeats}.")
    named = _named(synthetic)
    held_out = _read(test, test, groupby, layer, name="test")
    trained = _read(train, test, groupby, layer, name="train")
    models = {
        name: _read(adata, test, groupby, layer, name=f"synthetic {name!r}")
        for name, adata in named.items()
    }
    half = _half_sizes(held_out.groups)
    for name, cells in models.items():
        _check_enough(cells.groups, half, name)

    rows = []
    with tqdm(
        total=n_repeats * (1 + len(models)), desc="Evaluating", disable=not progress_bar
    ) as bar:
        for repeat in range(n_repeats):
            rng = np.random.default_rng([seed, repeat])
            draw = _draw(rng, held_out.groups, {group: 2 * n for group, n in half.items()})
            a, b = (held_out.take(np.concatenate([d[k::2] for d in draw])) for k in (0, 1))
            t = trained.take(np.concatenate(_draw(rng, trained.groups, half)))
            control = _compare(a, b, seed=seed + repeat) | {"variance ratio": _variance(t, b)}
            bar.update()
            for name, cells in models.items():
                s = cells.take(np.concatenate(_draw(rng, cells.groups, half)))
                for metric, value in _compare(s, b, seed=seed + repeat).items():
                    rows.append((name, metric, value, control[metric]))
                bar.update()

    table = pd.DataFrame(rows, columns=["model", "metric", "value", "control"])
    grouped = table.groupby(["model", "metric"], sort=False)
    report = grouped.mean().join(grouped.std(ddof=1).add_suffix("_spread")).reset_index()
    report = report.rename(columns={"value_spread": "spread"})
    report["excess"] = report["value"] - report["control"]
    report["n"] = sum(half.values())
    report["better"] = report["metric"].map(_BETTER)
    return report[
        [
            "model",
            "metric",
            "value",
            "spread",
            "control",
            "control_spread",
            "excess",
            "n",
            "better",
        ]
    ]


def _compare(a: _Cells, b: _Cells, *, seed: int) -> dict[str, float]:
    """Every metric of cells ``a`` against real cells ``b`` of the same number and composition."""
    values_a, values_b = a.values.toarray(), b.values.toarray()
    groups: dict[str, Any] = {"groups_synthetic": a.groups, "groups_real": b.groups}
    pcs = metrics.pooled_pcs(values_a, values_b, seed=seed)
    quality = metrics.quality_features(a.counts), metrics.quality_features(b.counts)
    return {
        "RF-PC": metrics.c2st_auc(*pcs, seed=seed),
        "RF-gene": metrics.c2st_auc(values_a, values_b, seed=seed),
        "LR-gene": metrics.c2st_auc(values_a, values_b, classifier="logistic", seed=seed),
        "QC": metrics.c2st_auc(*quality, seed=seed),
        "variance ratio": metrics.variance_ratio(values_a, values_b, **groups),
        "gene correlation": metrics.gene_correlation_agreement(values_a, values_b, **groups),
        "zero fraction difference": metrics.zero_fraction_difference(a.counts, b.counts),
        "mean correlation": metrics.mean_correlation(values_a, values_b, **groups),
    }


def _variance(train: _Cells, b: _Cells) -> float:
    """Training over held-out variance; nan where training has no group in common."""
    if not np.isin(train.groups, b.groups).any():
        return float("nan")
    groups: dict[str, Any] = {"groups_synthetic": train.groups, "groups_real": b.groups}
    return metrics.variance_ratio(train.values, b.values, **groups)


def _named(synthetic: AnnData | Mapping[str, AnnData]) -> dict[str, AnnData]:
    if isinstance(synthetic, Mapping):
        if not synthetic:
            raise ValueError("synthetic is an empty mapping; give at least one model's cells.")
        return {str(name): adata for name, adata in synthetic.items()}
    provenance = synthetic.uns.get("exprgen", {})
    return {str(provenance.get("model", "synthetic")): synthetic}


def _read(
    adata: AnnData,
    reference: AnnData,
    groupby: str | Sequence[str] | None,
    layer: str | None,
    *,
    name: str,
) -> _Cells:
    """Counts in the gene order of ``reference``, normalised values, one group label per cell."""
    genes = gene_positions(adata.var_names, reference.var_names, name=name, exact=True)
    counts = read_counts(adata, layer, name=name)[:, genes]
    keys = [groupby] if isinstance(groupby, str) else list(groupby or ())
    missing = [key for key in keys if key not in adata.obs]
    if missing:
        raise KeyError(
            f"{name}.obs has no column {name_some(missing)}; its columns are "
            f"{list(adata.obs.columns)}."
        )
    labels = [adata.obs[key].astype(str) for key in keys]
    groups = np.array([" | ".join(cell) for cell in zip(*labels, strict=True)], dtype=object)
    if not keys:
        groups = np.full(adata.n_obs, "all cells", dtype=object)
    return _Cells(counts, metrics.log_cp10k(counts), groups)


def _half_sizes(groups: np.ndarray) -> dict[str, int]:
    """Cells per group in half of the held-out cells; single cells are left out."""
    names, sizes = np.unique(groups.astype(str), return_counts=True)
    half = {str(g): int(n) // 2 for g, n in zip(names, sizes, strict=True) if n >= 2}
    if sum(half.values()) < 10:
        raise ValueError(
            f"test has too few cells to compare: its halves hold {sum(half.values())} cells "
            "(10 needed). Hold out more cells, or group them more coarsely."
        )
    return half


def _check_enough(groups: np.ndarray, needed: dict[str, int], name: str) -> None:
    short = {g: n for g, n in needed.items() if int((groups == g).sum()) < n}
    if short:
        listed = name_some([f"{g}: {n}" for g, n in short.items()])
        raise ValueError(
            f"synthetic {name!r} has too few cells in {len(short)} groups; needed are at least "
            f"{listed}. Sample at least half as many cells per group as test has."
        )


def _draw(rng: np.random.Generator, groups: np.ndarray, sizes: dict[str, int]) -> list[np.ndarray]:
    """Random rows of every group, without replacement: ``sizes`` of them, or all there are."""
    return [
        rng.permutation(np.flatnonzero(groups == group))[:size] for group, size in sizes.items()
    ]
