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

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from exprgen._errors import name_some
from exprgen.tl._baselines import baseline_cells, check_baselines
from exprgen.tl._gather import collect, remarks, seconds, worst_first
from exprgen.tl._halves import cut, half_sizes, read, same_cells, short_of
from exprgen.tl._names import check_names
from exprgen.tl._repeats import Plan, run, schedule
from exprgen.tl._report import METRICS, RULE, assemble, check_metrics
from exprgen.tl._store import check_target, store

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData

    from exprgen.tl._halves import Cells

__all__ = ["evaluate"]


def evaluate(
    train: AnnData,
    test: AnnData,
    synthetic: AnnData | Mapping[str, AnnData],
    *,
    groupby: str | Sequence[str] | None = None,
    layer: str | None = "counts",
    metrics: str | Sequence[str] | None = None,
    baselines: bool | Sequence[str] = True,
    n_repeats: int = 5,
    max_cells: int | None = 500,
    max_cells_classifier: int | None = 200,
    max_genes: int | None = 2000,
    key_added: str | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Compare synthetic cells with held-out cells, with a real-vs-real control for every number.

    Parameters
    ----------
    train
        The cells the model was trained on: what baselines are made of and copies are looked for
        in, and the control of variances and of slopes of fold changes.
    test
        Held-out cells, never seen in training. Groups of fewer than four are left out.
    synthetic
        Cells generated for the conditions of ``test``, or a mapping of model names to such; of
        every group at least half as many as ``test`` has (up to ``max_cells``). Draw more for
        more independent repeats. A group of which a model has no cell at all is counted in the
        row ``missing groups``; the model's other rows, and their controls, are then about the
        other groups.
    groupby
        Column(s) of ``.obs`` (all objects must have them) whose composition is matched, so that
        composition itself is not judged; variances and correlations are taken within them. None
        for no groups.
    layer
        Where all objects keep their counts; None for ``.X``.
    metrics
        Rows wanted besides ``missing groups``, by ``metric`` or ``family``; None for all. The
        three forests take most of the time.
    baselines
        Whether to add rows for what a model must beat, or which: ``"independent NB"`` (per gene
        and group), ``"NB + copula"`` (the same, with a Gaussian copula), ``"training cells"``
        and ``"group mean"``.
    n_repeats
        Random halves of the held-out cells. (Controls have ten, those of forests three, or
        ``n_repeats`` if that is more; baselines' forests have one, and so no ``spread``.)
    max_cells
        Cells on each side; None for half of ``test``. Groups keep their proportions, and at least
        two cells.
    max_cells_classifier
        Cells on each side for classifiers, a subset of the others; None for ``max_cells``.
    max_genes
        Genes that classifiers in gene space see, the most variable of ``test``; None for all.
    key_added
        Where to keep the report in ``test.uns``: ``uns[key_added]["report"]``, and how it came
        about in ``["settings"]``. None to leave ``test`` alone.
    n_jobs
        Threads that grow the classifiers' forests, most of the work; None for as many as there are
        processors. The numbers do not depend on it.
    seed
        The same seed gives the same numbers.
    progress_bar
        Whether to show one.

    Returns
    -------
    pandas.DataFrame
        One row per model (or baseline, see ``kind``) and metric. ``value`` and ``control`` are
        means over repeats, ``spread`` and ``control_spread`` standard deviations over repeats
        (the repeats share cells, so this is not a standard error), ``excess = value - control``,
        ``n`` the cells on each side, ``better`` the direction.

        ``deviation`` is the excess, positive if worse, in units of noise: of ``control_spread``,
        or of the root mean square of both spreads if that is larger. Where training cells, put in
        the model's place, are worse than the control as well (by ``train_excess``; known but for
        forests and memorisation), that much is taken off first. ``verdict`` says
        ``"not told apart"`` if it is at most 3; ``"close"`` if it is more but the excess is within
        ``tolerance`` (in the metric's unit); else ``"off"``, and ``flag`` is True (also for
        ``"undefined"``, a value that does not exist for such cells; ``"no control"`` if real cells
        have none). ``note`` says what else there is to say.

        ``.attrs`` has the settings, cells and genes in use, how many genes are constant in
        ``test`` (variances and correlations leave them out), seconds per family (summed over
        comparisons), and ``memorisation``: per model the groups, worst first, with
        nearest-neighbour ratio, membership AUC, its z, and the number of held-out cells.

        ========================  ===============================================================
        family                    metrics
        ========================  ===============================================================
        composition               ``missing groups``: share of the held-out cells
        classifier                AUC for telling synthetic from held-out cells: ``RF-PC`` random
                                  forest on 50 principal components, ``RF-gene`` and ``LR-gene``
                                  forest and logistic regression on genes, ``QC`` forest on
                                  quality numbers per cell
        distance                  of principal components: ``MMD`` (root of the biased estimate of
                                  its square, for a ratio to the control to make sense;
                                  permutation p in ``note``), ``energy distance``, ``sliced
                                  Wasserstein``, ``Wasserstein``
        neighbours                ``precision``, ``recall``, ``density``, ``coverage``, ``local
                                  mixing``, of principal components
        variation                 synthetic over held-out within groups: ``variance ratio`` of
                                  the median gene, ``log-total variance``
        genes                     ``gene correlation`` within groups and ``... overall``, top 200
                                  genes; guards that cells without structure pass: ``mean
                                  correlation``, ``mean agreement``, ``sd agreement``, ``zero
                                  agreement``, ``zero fraction difference``
        fold changes              each group against the rest: ``fold-change slope`` (free of
                                  noise), ``fold-change rank correlation``, ``DE overlap``
        calibration               synthetic cells as predictions for held-out cells of the group,
                                  log1p counts of the top 200 genes: ``interval coverage`` (90 %,
                                  by randomised PIT), ``intervals within 3 points`` (share of
                                  genes and groups), ``PIT distance`` to uniform, ``CRPS``,
                                  ``interval score``, ``interval width``
        memorisation              copies of training cells: ``nearest-neighbour ratio``,
                                  ``membership AUC``, ``membership z of worst group``
        downstream                ``train-on-synthetic F1`` of classifying groups
        ========================  ===============================================================

        See :mod:`exprgen.metrics` for definitions. Values are log1p of counts per 10,000 unless
        said.

    Raises
    ------
    GeneMismatchError
        The objects differ in their genes (order does not matter).
    KeyError
        A column of ``groupby`` or the layer is missing.
    CovariateError
        A label in such a column is missing.
    TypeError
        An argument is of another type.
    ValueError
        No counts, cells of ``test`` (by name and counts) on another side, too few held-out cells,
        too few (but some) synthetic cells of a group, a name that ``metrics`` or ``baselines``
        does not know, or a ``key_added`` that is taken.
    """
    start = perf_counter()
    _check_numbers(
        n_repeats=n_repeats,
        max_cells=max_cells,
        max_cells_classifier=max_cells_classifier,
        max_genes=max_genes,
        n_jobs=n_jobs,
        seed=seed,
    )
    wanted = check_metrics(metrics)
    made = check_baselines(baselines)
    for name, adata in (("train", train), ("test", test)):
        _check_anndata(adata, name)
    named = _named(synthetic, made)
    check_target(test, key_added)
    keys = None if groupby is None else check_names(groupby, "groupby")
    held_out = read(test, test, keys, layer, name="test")
    trained = read(train, test, keys, layer, name="train")
    if not len(trained):
        raise ValueError("train has no cells; give those that the model was trained on.")
    candidates = {
        name: read(adata, test, keys, layer, name=f"synthetic {name!r}")
        for name, adata in named.items()
    }
    _refuse_test_cells(held_out, test, "train", trained, train)
    for name, adata in named.items():
        _refuse_test_cells(held_out, test, f"synthetic {name!r}", candidates[name], adata)
    half = cut(half_sizes(held_out), max_cells)
    missing = {name: short_of(cells, half, name) for name, cells in candidates.items()}
    notes: dict[tuple[str, str], str] = {}
    double = {group: 2 * n for group, n in half.items()}
    if made and not set(half) & set(trained.sizes):
        raise ValueError(
            "train has none of the groups of test, so no baseline can be made of it; pass "
            "baselines=False."
        )
    for name in made:
        candidates[name], remark = baseline_cells(name, trained, double, seed=seed)
        missing[name] = [group for group in half if group not in trained.sizes]
        notes |= {(name, metric): remark for metric in METRICS if remark}
    for name, groups in missing.items():
        share = sum(half[group] for group in groups) / sum(half.values())
        if groups:
            notes[name, "missing groups"] = f"{share:.1%} of held-out cells: {name_some(groups)}"

    plan = Plan.of(
        held_out,
        trained,
        half,
        max_few=max_cells_classifier,
        max_genes=max_genes,
        wanted=wanted,
        seed=seed,
        n_jobs=n_jobs,
    )
    tasks = schedule(list(candidates), made, missing, n_repeats)
    results = run(plan, tasks, candidates, progress_bar=progress_bar)

    kinds = {name: "baseline" if name in made else "model" for name in candidates}
    values = collect(results, plan, missing, kinds)
    notes |= remarks(results)
    report = assemble(values, wanted=wanted, kinds=kinds, notes=notes)
    report.attrs = {
        "rule": RULE,
        "seed": seed,
        "n_repeats": n_repeats,
        "n_cells": sum(half.values()),
        "n_cells_classifier": sum(cut(half, max_cells_classifier).values()),
        "n_test": len(held_out),
        "n_train": len(trained),
        "n_genes": int(held_out.counts.shape[1]),
        "n_genes_constant": _n_constant(held_out),
        "n_genes_classifier": len(plan.genes),
        "groups": list(half),
        "groups_left_out": sorted(set(held_out.sizes) - set(half)),
        "memorisation": worst_first(results),
        "seconds": seconds(results),
        "wall_seconds": perf_counter() - start,
    }
    if key_added is not None:
        store(test, key_added, report)
    return report


def _n_constant(cells: Cells) -> int:
    """Genes with the same count in all cells; no correlation is defined for them."""
    lowest, highest = (of(axis=0).toarray() for of in (cells.counts.min, cells.counts.max))
    return int((lowest == highest).sum())


def _named(synthetic: AnnData | Mapping[str, AnnData], baselines: list[str]) -> dict[str, AnnData]:
    if isinstance(synthetic, Mapping):
        if not synthetic:
            raise ValueError("synthetic is an empty mapping; give at least one model's cells.")
        named = {str(name): adata for name, adata in synthetic.items()}
        if len(named) < len(synthetic):
            raise ValueError(
                f"synthetic has models whose names are the same as text: {list(synthetic)}; name "
                "them otherwise."
            )
        for name, adata in named.items():
            _check_anndata(adata, f"synthetic[{name!r}]")
    else:
        _check_anndata(synthetic, "synthetic", " or a mapping of names to such")
        provenance = synthetic.uns.get("exprgen", {})
        model = provenance.get("model") if isinstance(provenance, Mapping) else None
        named = {str(model or "synthetic"): synthetic}
    taken = [name for name in named if name in baselines or not name]
    if taken:
        raise ValueError(
            f"synthetic has a model named {taken[0]!r}, which is empty or a baseline's name; name "
            "it otherwise, or leave that baseline out of baselines=."
        )
    return named


def _check_anndata(value: object, name: str, others: str = "") -> None:
    from anndata import AnnData

    if not isinstance(value, AnnData):
        raise TypeError(f"{name} must be an AnnData{others}, got {type(value).__name__}.")


def _refuse_test_cells(
    held_out: Cells, test: AnnData, name: str, cells: Cells, adata: AnnData
) -> None:
    """Of cells that a model has seen, or that are compared with themselves, nothing is learned."""
    same = same_cells(held_out, test.obs_names, cells, adata.obs_names)
    if same:
        raise ValueError(
            f"{name} has {len(same)} of test's very cells (the same names and counts, e.g. "
            f"{name_some(same)}). Held-out cells must be neither trained on nor compared with "
            "themselves: leave them out on one side."
        )


def _check_numbers(**given: int | None) -> None:
    """Counts: whole, and large enough to compare anything."""
    lowest = {"max_cells": 10, "max_cells_classifier": 10, "seed": 0}
    for name, value in given.items():
        if value is None and name not in ("n_repeats", "seed"):
            continue
        least = lowest.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
