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

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen import metrics as measures
from exprgen._errors import name_some
from exprgen.tl._baselines import baseline_cells, check_baselines
from exprgen.tl._halves import Cells, cut, draw, half_sizes, read, short_of
from exprgen.tl._measures import Comparison, Measured, measure, measures_of
from exprgen.tl._report import METRICS, RULE, assemble, check_metrics
from exprgen.tl._store import check_target, store

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from exprgen.tl._halves import Sizes

__all__ = ["evaluate"]

_N_CONTROLS = 10  # repeats of the control: its spread is the yardstick
_N_CONTROLS_SLOW = 3
_N_REPEATS_SLOW = 2  # of the slow measures, for baselines
_MAX_TRAIN = 50_000  # training cells in which copies are looked for
_CONTROL = ""


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
    max_cells_classifier: int | None = 250,
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
        Rows wanted, by ``metric`` or ``family``; None for all. Forests take most of the time.
    baselines
        Whether to add rows for what a model must beat, or which: ``"independent NB"`` (per gene
        and group), ``"NB + copula"`` (the same, with a Gaussian copula), ``"training cells"``
        and ``"group mean"``.
    n_repeats
        Random halves of the held-out cells. (Controls have ten, those of forests three, or
        ``n_repeats`` if that is more; baselines' forests have two.)
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
        Threads; None for as many as there are processors. The numbers do not depend on it.
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
        or of the root mean square of both spreads if that is larger. ``verdict`` is ``"as real"``
        if it is at most 3; ``"close"`` if it is more but the excess is within the metric's
        tolerance; else ``"off"``, and ``flag`` is True (also for ``"undefined"``, a value that
        does not exist for such cells; ``"no control"`` if real cells have none). ``note`` says
        what else there is to say.

        ``.attrs`` has the settings, cells and genes in use, seconds per family (summed over
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
        distance                  of principal components: ``MMD`` (biased, so that its ratio to
                                  the control makes sense; permutation p in ``note``), ``energy
                                  distance``, ``sliced Wasserstein``, ``Wasserstein``
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
    ValueError
        No counts, too few held-out cells, too few (but some) synthetic cells of a group, a name
        that ``metrics`` or ``baselines`` does not know, or a ``key_added`` that is taken.
    """
    from threadpoolctl import threadpool_limits

    start = perf_counter()
    _check_numbers(
        n_repeats=n_repeats,
        max_cells=max_cells,
        max_cells_classifier=max_cells_classifier,
        max_genes=max_genes,
        n_jobs=n_jobs,
    )
    wanted = check_metrics(metrics)
    made = check_baselines(baselines)
    check_target(test, key_added)
    named = _named(synthetic, made)
    held_out = read(test, test, groupby, layer, name="test")
    trained = read(train, test, groupby, layer, name="train")
    candidates = {
        name: read(adata, test, groupby, layer, name=f"synthetic {name!r}")
        for name, adata in named.items()
    }
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

    plan = _Plan(
        held_out=held_out,
        trained=trained,
        copied=_subset(trained, _MAX_TRAIN, seed),
        half=half,
        max_few=max_cells_classifier,
        genes=_variable_genes(held_out, max_genes),
        wanted=wanted,
        seed=seed,
    )
    tasks = _tasks(list(candidates), made, missing, n_repeats)
    with _threads(n_jobs) as pool, threadpool_limits(1), warnings.catch_warnings():
        results = _run(pool, plan, tasks, candidates, progress_bar)

    kinds = {name: "baseline" if name in made else "model" for name in candidates}
    values, controls = _collect(results, plan, missing, kinds)
    notes |= _remarks(results, missing)
    report = assemble(values, controls, wanted=wanted, kinds=kinds, notes=notes)
    report.attrs = {
        "rule": RULE,
        "seed": seed,
        "n_repeats": n_repeats,
        "n_cells": sum(half.values()),
        "n_cells_classifier": sum(cut(half, max_cells_classifier).values()),
        "n_test": len(held_out),
        "n_train": len(trained),
        "n_genes": int(held_out.counts.shape[1]),
        "n_genes_classifier": len(plan.genes),
        "groups": list(half),
        "groups_left_out": sorted(set(held_out.sizes) - set(half)),
        "memorisation": _worst_first(results),
        "seconds": _seconds(results),
        "wall_seconds": perf_counter() - start,
    }
    if key_added is not None:
        store(test, key_added, report)
    return report


@dataclass(frozen=True)
class _Task:
    """One repeat of one candidate, or (``model`` empty) of the control, on some groups."""

    model: str
    repeat: int
    without: tuple[str, ...]
    slow: bool
    fast: bool = True


@dataclass
class _Plan:
    """What all comparisons share."""

    held_out: Cells
    trained: Cells
    copied: Cells
    half: Sizes
    max_few: int | None
    genes: np.ndarray
    wanted: list[str] | None
    seed: int

    def sizes(self, without: tuple[str, ...]) -> Sizes:
        return {group: n for group, n in self.half.items() if group not in without}

    def run(self, task: _Task, cells: Cells | None, bandwidth: float | None) -> Measured:
        """One repeat: the same halves for every candidate, and the same draws whoever else runs."""
        sizes = self.sizes(task.without)
        rng = [np.random.default_rng([self.seed, task.repeat, side]) for side in range(3)]
        both = draw(rng[0], self.held_out, {group: 2 * n for group, n in self.half.items()})
        a, b = (
            self.held_out[np.concatenate([both[group][k::2] for group in sizes])] for k in (0, 1)
        )
        comparison = Comparison(
            candidate=a if cells is None else self._drawn(rng[1], cells, sizes),
            b=b,
            a=a,
            train=self.copied,
            few=self._few(b.groups, sizes),
            genes=self.genes,
            bandwidth=bandwidth,
            seed=self.seed + task.repeat,
        )
        chosen = [
            entry
            for entry in measures_of(self.wanted, n_groups=len(sizes))
            if (task.slow if entry.slow else task.fast)
        ]
        if cells is not None:
            return measure(comparison, chosen)
        if bandwidth is None and any(entry.family == "distance" for entry in chosen):
            comparison.bandwidth = measures.median_distance(*comparison.pcs) or 1.0
            comparison.details["bandwidth"] = comparison.bandwidth
        done = measure(comparison, [entry for entry in chosen if not entry.against_train])
        against_train = [entry for entry in chosen if entry.against_train]
        if not against_train:
            return done
        third = replace(
            comparison, candidate=self._drawn(rng[2], self.trained, sizes), details={}
        )
        known = set(third.candidate.sizes)
        if not any(min(third.candidate.sizes[group], sizes[group]) > 1 for group in known):
            names = [name for entry in against_train for name in entry.names]
            return done._replace(values=done.values | dict.fromkeys(names, float("nan")))
        extra = measure(third, against_train)
        seconds = {
            family: done.seconds.get(family, 0) + extra.seconds.get(family, 0)
            for family in {**done.seconds, **extra.seconds}
        }
        return done._replace(values=done.values | extra.values, seconds=seconds)

    @staticmethod
    def _drawn(rng: np.random.Generator, cells: Cells, sizes: Sizes) -> Cells:
        return cells[np.concatenate(list(draw(rng, cells, sizes).values()))]

    def _few(self, groups: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The first cells of every group: random ones, as the order is."""
        few = cut(sizes, self.max_few)
        return np.concatenate([np.flatnonzero(groups == group)[:n] for group, n in few.items()])


def _tasks(
    candidates: list[str], made: list[str], missing: dict[str, list[str]], n_repeats: int
) -> list[_Task]:
    """Controls first, one set for every composition of groups that some candidate has."""
    n_slow = max(n_repeats, _N_CONTROLS_SLOW)
    tasks = []
    for without in dict.fromkeys(tuple(missing[name]) for name in candidates):
        tasks += [
            _Task(_CONTROL, repeat, without, slow=repeat < n_slow)
            for repeat in range(max(n_repeats, _N_CONTROLS))
        ]
    for name in candidates:
        n_slow = min(n_repeats, _N_REPEATS_SLOW) if name in made else n_repeats
        tasks += [
            _Task(name, repeat, tuple(missing[name]), slow=repeat < n_slow)
            for repeat in range(n_repeats)
        ]
    return tasks


def _run(
    pool: ThreadPoolExecutor,
    plan: _Plan,
    tasks: list[_Task],
    candidates: Mapping[str, Cells],
    progress_bar: bool,
) -> dict[_Task, Measured]:
    """All comparisons; those of models wait for their control, which gives the bandwidth."""
    from tqdm.auto import tqdm

    results: dict[_Task, Measured] = {}
    with tqdm(total=len(tasks), desc="Evaluating", disable=not progress_bar) as bar:
        for is_control in (True, False):
            futures: dict[Future[Measured], _Task] = {}
            for task in tasks:
                if (task.model == _CONTROL) != is_control:
                    continue
                bandwidth = None
                if not is_control:
                    control = replace(task, model=_CONTROL, slow=False)
                    found = results.get(control) or results[replace(control, slow=True)]
                    bandwidth = found.details.get("bandwidth")
                cells = None if is_control else candidates[task.model]
                futures[pool.submit(plan.run, task, cells, bandwidth)] = task
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                bar.update()
    return {task: results[task] for task in tasks}


def _collect(
    results: Mapping[_Task, Measured],
    plan: _Plan,
    missing: Mapping[str, list[str]],
    kinds: Mapping[str, str],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Values of all models, and for each model those of its control."""
    import pandas as pd

    classifier_rows = {
        name for entry in measures_of(None, n_groups=2) if entry.few for name in entry.names
    }
    total = sum(plan.half.values())
    values: list[tuple[str, str, float, int]] = []
    controls: list[tuple[str, str, float, int]] = []
    for model in kinds:
        without = tuple(missing[model])
        sizes = plan.sizes(without)
        n, n_few = (sum(cut(sizes, limit).values()) for limit in (None, plan.max_few))
        share = 1 - sum(sizes.values()) / total
        values += [(model, "missing groups", share, total)] * 2
        controls += [(model, "missing groups", 0.0, total)] * 2
        for task, found in results.items():
            if task.without != without or task.model not in (model, _CONTROL):
                continue
            rows = values if task.model == model else controls
            rows += [
                (model, name, value, n_few if name in classifier_rows else n)
                for name, value in found.values.items()
            ]
    columns = ["model", "metric", "value", "n"]
    return pd.DataFrame(values, columns=columns), pd.DataFrame(controls, columns=columns)


def _remarks(
    results: Mapping[_Task, Measured], missing: Mapping[str, list[str]]
) -> dict[tuple[str, str], str]:
    """What rows say besides their numbers."""
    notes: dict[tuple[str, str], str] = {}
    p_values: dict[str, list[float]] = {}
    for task, found in results.items():
        if task.model == _CONTROL:
            continue
        notes |= {(task.model, name): reason for name, reason in found.missing.items()}
        if "p" in found.details:
            p_values.setdefault(task.model, []).append(found.details["p"])
    for model, p in p_values.items():
        notes[model, "MMD"] = f"permutation p = {np.median(p):.3g} (median over repeats)"
    for model, groups in _worst_first(results).items():
        worst = groups[0]
        notes[model, "membership z of worst group"] = (
            f"often worst: {worst['group']} (AUC {worst['auc']:.2f}, n = {worst['n']})"
        )
    return notes


def _worst_first(results: Mapping[_Task, Measured]) -> dict[str, list[dict[str, Any]]]:
    """Memorisation per model and group, means over repeats, by falling z."""
    found: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
    for task, result in results.items():
        if task.model != _CONTROL:
            for group, *numbers in result.details.get("memorisation", ()):
                found.setdefault(task.model, {}).setdefault(str(group), []).append(tuple(numbers))
    tables = {}
    for model, groups in found.items():
        means = {group: np.mean(numbers, axis=0) for group, numbers in groups.items()}
        tables[model] = [
            {"group": group, "ratio": float(m[0]), "auc": float(m[1]), "z": float(m[2]), "n": int(m[3])}
            for group, m in sorted(means.items(), key=lambda item: -item[1][2])
        ]
    return tables


def _seconds(results: Mapping[_Task, Measured]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for found in results.values():
        for family, spent in found.seconds.items():
            seconds[family] = seconds.get(family, 0.0) + spent
    return seconds


def _named(synthetic: AnnData | Mapping[str, AnnData], baselines: list[str]) -> dict[str, AnnData]:
    if isinstance(synthetic, Mapping):
        if not synthetic:
            raise ValueError("synthetic is an empty mapping; give at least one model's cells.")
        named = {str(name): adata for name, adata in synthetic.items()}
    else:
        provenance = synthetic.uns.get("exprgen", {})
        named = {str(provenance.get("model", "synthetic")): synthetic}
    taken = [name for name in named if name in baselines or not name]
    if taken:
        raise ValueError(
            f"synthetic has a model named {taken[0]!r}, which is empty or a baseline's name; name "
            "it otherwise, or leave that baseline out of baselines=."
        )
    return named


def _variable_genes(cells: Cells, max_genes: int | None) -> np.ndarray:
    """Genes by falling variance in held-out cells, the first ``max_genes``."""
    values = cells.values
    mean = np.asarray(values.mean(axis=0), dtype=np.float64).ravel()
    square = np.asarray(values.multiply(values).mean(axis=0), dtype=np.float64).ravel()
    return np.argsort(-(square - mean**2), kind="stable")[:max_genes]


def _subset(cells: Cells, max_cells: int, seed: int) -> Cells:
    if len(cells) <= max_cells:
        return cells
    return cells[np.sort(np.random.default_rng(seed).permutation(len(cells))[:max_cells])]


@contextmanager
def _threads(n_jobs: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool that, should something fail, does not go on with what has not begun."""
    if n_jobs is None:
        n_jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    pool = ThreadPoolExecutor(n_jobs or os.cpu_count() or 1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _check_numbers(**given: int | None) -> None:
    """Counts: whole, and large enough to compare anything."""
    lowest = {"max_cells": 10, "max_cells_classifier": 10}
    for name, value in given.items():
        if value is None and name != "n_repeats":
            continue
        least = lowest.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
