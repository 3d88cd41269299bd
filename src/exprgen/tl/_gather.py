"""From results of single comparisons to the values, controls and remarks of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exprgen.tl._halves import cut
from exprgen.tl._measures import add_up, measures_of
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
) -> pd.DataFrame:
    """Every value: columns ``model``, ``role``, ``metric``, ``value``, ``n``.

    Roles are ``"value"``, ``"control"`` and ``"train"`` (what training cells give); those of the
    control, one for every composition of groups, are listed with each model they belong to.
    """
    import pandas as pd

    of_few = {name for entry in measures_of(None, n_groups=2) if entry.few for name in entry.names}
    total = sum(plan.half.values())
    rows: list[tuple[str, str, str, float, int]] = []
    for model in kinds:
        without = tuple(missing[model])
        sizes = plan.sizes(without)
        n, n_few = (sum(cut(sizes, limit).values()) for limit in (None, plan.max_few))
        share = 1 - sum(sizes.values()) / total
        for role, of_role in (("value", share), ("control", 0.0)):
            rows += [(model, role, "missing groups", of_role, total)] * 2
        for task, found in results.items():
            if task.without != without or task.model not in (model, CONTROL):
                continue
            role = "control" if task.model == CONTROL else "value"
            for role_, values in ((role, found.values), ("train", found.of_train)):
                rows += [
                    (model, role_, name, value, n_few if name in of_few else n)
                    for name, value in values.items()
                ]
    return pd.DataFrame(rows, columns=["model", "role", "metric", "value", "n"])


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
    return add_up(*(found.seconds for found in results.values()))
