"""From results of single comparisons to the values, controls and remarks of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen.tl._halves import cut
from exprgen.tl._measures import measures_of
from exprgen.tl._repeats import CONTROL

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from exprgen.tl._measures import Measured
    from exprgen.tl._repeats import Plan, Task

__all__ = ["collect", "remarks", "seconds", "worst_first"]


def collect(
    results: Mapping[Task, Measured],
    plan: Plan,
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
            if task.without != without or task.model not in (model, CONTROL):
                continue
            rows = values if task.model == model else controls
            rows += [
                (model, name, value, n_few if name in classifier_rows else n)
                for name, value in found.values.items()
            ]
    columns = ["model", "metric", "value", "n"]
    return pd.DataFrame(values, columns=columns), pd.DataFrame(controls, columns=columns)


def remarks(results: Mapping[Task, Measured]) -> dict[tuple[str, str], str]:
    """What rows say besides their numbers."""
    notes: dict[tuple[str, str], str] = {}
    p_values: dict[str, list[float]] = {}
    for task, found in results.items():
        if task.model == CONTROL:
            continue
        notes |= {(task.model, name): reason for name, reason in found.missing.items()}
        if "p" in found.details:
            p_values.setdefault(task.model, []).append(found.details["p"])
    for model, p in p_values.items():
        notes[model, "MMD"] = f"permutation p = {np.median(p):.3g} (median over repeats)"
    for model, groups in worst_first(results).items():
        worst = groups[0]
        notes[model, "membership z of worst group"] = (
            f"often worst: {worst['group']} (AUC {worst['auc']:.2f}, n = {worst['n']})"
        )
    return notes


def worst_first(results: Mapping[Task, Measured]) -> dict[str, list[dict[str, Any]]]:
    """Memorisation per model and group, means over repeats, by falling z."""
    found: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
    for task, result in results.items():
        if task.model != CONTROL:
            for group, *numbers in result.details.get("memorisation", ()):
                found.setdefault(task.model, {}).setdefault(str(group), []).append(tuple(numbers))
    tables = {}
    for model, groups in found.items():
        means = {group: np.mean(numbers, axis=0) for group, numbers in groups.items()}
        tables[model] = [
            {
                "group": group,
                "ratio": float(m[0]),
                "auc": float(m[1]),
                "z": float(m[2]),
                "n": int(m[3]),
            }
            for group, m in sorted(means.items(), key=lambda item: -item[1][2])
        ]
    return tables


def seconds(results: Mapping[Task, Measured]) -> dict[str, float]:
    """Time spent per family of metrics, over all comparisons."""
    spent: dict[str, float] = {}
    for found in results.values():
        for family, took in found.seconds.items():
            spent[family] = spent.get(family, 0.0) + took
    return spent
