"""Repeats: which comparisons are made, and on which cells."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from exprgen import metrics
from exprgen.tl._halves import cut, draw
from exprgen.tl._measures import Comparison, add_up, measure, measures_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from exprgen.tl._halves import Cells, Sizes
    from exprgen.tl._measures import Measure, Measured

__all__ = ["CONTROL", "Plan", "Task", "run", "schedule"]

CONTROL = ""
"""The model's name in tasks of the control."""

_N_CONTROLS = 10  # repeats of the control: its spread is the yardstick
_N_CONTROLS_SLOW = 3
_N_REPEATS_SLOW = 1  # of the slow measures, for baselines, which lie far from real cells
_MAX_TRAIN = 50_000  # training cells in which copies are looked for


@dataclass(frozen=True)
class Task:
    """One repeat of one candidate, or (``model`` empty) of the control, on some groups."""

    model: str
    repeat: int
    without: tuple[str, ...]
    slow: bool  # whether forests grow, too


@dataclass
class Plan:
    """What all comparisons share."""

    held_out: Cells
    trained: Cells
    copied: Cells
    half: Sizes
    max_few: int | None
    genes: np.ndarray
    wanted: list[str] | None
    seed: int
    n_jobs: int

    @classmethod
    def of(
        cls,
        held_out: Cells,
        trained: Cells,
        half: Sizes,
        *,
        max_few: int | None,
        max_genes: int | None,
        wanted: list[str] | None,
        seed: int,
        n_jobs: int | None,
    ) -> Plan:
        """Choose the genes for classifiers, and the training cells in which to look for copies."""
        genes = _variable_genes(held_out, max_genes)
        copied = _subset(trained, _MAX_TRAIN, seed)
        n_jobs = -1 if n_jobs is None else n_jobs
        return cls(held_out, trained, copied, half, max_few, genes, wanted, seed, n_jobs)

    def sizes(self, without: tuple[str, ...]) -> Sizes:
        return {group: n for group, n in self.half.items() if group not in without}

    def run(self, task: Task, cells: Cells | None, bandwidth: float | None) -> Measured:
        """One repeat: the same halves for all, and the same draws whoever else is compared."""
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
            n_jobs=self.n_jobs,
        )
        chosen = [
            entry
            for entry in measures_of(self.wanted, n_groups=len(sizes))
            if task.slow or not entry.slow
        ]
        if cells is not None:
            return measure(comparison, chosen)
        if bandwidth is None and any(entry.family == "distance" for entry in chosen):
            comparison.bandwidth = metrics.median_distance(*comparison.pcs) or 1.0
            comparison.details["bandwidth"] = comparison.bandwidth
        done = measure(comparison, [entry for entry in chosen if not entry.against_train])
        return self._with_train(done, comparison, chosen, sizes, rng[2], full=task.slow)

    def _with_train(
        self,
        done: Measured,
        control: Comparison,
        chosen: list[Measure],
        sizes: Sizes,
        rng: np.random.Generator,
        *,
        full: bool,
    ) -> Measured:
        """Add what training cells give in A's place: controls of some, allowances of others."""
        third = replace(control, candidate=self._drawn(rng, self.trained, sizes), details={})
        found = third.candidate.sizes
        own = [entry for entry in chosen if entry.against_train]
        if not any(min(found[group], sizes[group]) > 1 for group in found):
            names = [name for entry in own for name in entry.names]
            return done._replace(values=done.values | dict.fromkeys(names, float("nan")))
        # Fewer cells would differ for that reason alone; and copies are what they are.
        others = [
            entry
            for entry in chosen
            if full and found == sizes and not (entry.against_train or entry.slow)
            and entry.family != "memorisation"
        ]  # fmt: skip
        controls, allowances = measure(third, own), measure(third, others)
        return done._replace(
            values=done.values | controls.values,
            of_train=allowances.values,
            seconds=add_up(done.seconds, controls.seconds, allowances.seconds),
        )

    @staticmethod
    def _drawn(rng: np.random.Generator, cells: Cells, sizes: Sizes) -> Cells:
        return cells[np.concatenate(list(draw(rng, cells, sizes).values()))]

    def _few(self, groups: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The first cells of every group: random ones, as the order is."""
        few = cut(sizes, self.max_few)
        return np.concatenate([np.flatnonzero(groups == group)[:n] for group, n in few.items()])


def schedule(
    candidates: list[str], made: list[str], missing: dict[str, list[str]], n_repeats: int
) -> list[Task]:
    """Controls first, one set for every composition of groups that some candidate has."""
    n_slow = max(n_repeats, _N_CONTROLS_SLOW)
    tasks = []
    for without in dict.fromkeys(tuple(missing[name]) for name in candidates):
        tasks += [
            Task(CONTROL, repeat, without, slow=repeat < n_slow)
            for repeat in range(max(n_repeats, _N_CONTROLS))
        ]
    for name in candidates:
        n_slow = min(n_repeats, _N_REPEATS_SLOW) if name in made else n_repeats
        tasks += [
            Task(name, repeat, tuple(missing[name]), slow=repeat < n_slow)
            for repeat in range(n_repeats)
        ]
    return tasks


def run(
    plan: Plan, tasks: list[Task], candidates: Mapping[str, Cells], *, progress_bar: bool
) -> dict[Task, Measured]:
    """All comparisons, in order: those of models need their control's bandwidth."""
    from tqdm.auto import tqdm

    results: dict[Task, Measured] = {}
    # Forests on threads change the warning filters for a moment and can leave them changed.
    with warnings.catch_warnings():
        for task in tqdm(tasks, desc="Evaluating", disable=not progress_bar):
            is_control = task.model == CONTROL
            bandwidth = None if is_control else _bandwidth(results, task)
            cells = None if is_control else candidates[task.model]
            results[task] = plan.run(task, cells, bandwidth)
    return results


def _bandwidth(results: Mapping[Task, Measured], task: Task) -> float | None:
    """That of the control of the same repeat."""
    controls = (replace(task, model=CONTROL, slow=slow) for slow in (True, False))
    return next(results[c].details.get("bandwidth") for c in controls if c in results)


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
