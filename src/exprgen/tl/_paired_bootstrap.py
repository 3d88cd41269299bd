"""F1 scores of several classifiers on the same draws of cells, or of donors."""

from __future__ import annotations

import numpy as np

__all__ = ["compared", "f1_of_draws", "weights_of_units"]


def weights_of_units(unit: np.ndarray, n_bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """How often each unit is drawn, ``(1 + n_bootstrap, n_units)``; all of them once at first."""
    n = int(unit.max()) + 1
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap)
    return np.vstack([np.ones((1, n), drawn.dtype), drawn]).astype(np.float32)


def f1_of_draws(
    predicted: np.ndarray,
    truth: np.ndarray,
    groups: np.ndarray,
    unit: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """F1 of each group on each draw of the units, ``(n_draws, n_groups)``; 0 where undefined."""
    n = weights.shape[1]

    def per_unit(condition: np.ndarray) -> np.ndarray:
        return np.bincount(unit, condition, minlength=n)

    scores = np.zeros((len(weights), len(groups)))
    for i, group in enumerate(groups):
        is_group, called = truth == group, predicted == group
        hits = weights @ per_unit(is_group & called)
        both = weights @ (per_unit(is_group) + per_unit(called))
        scores[:, i] = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return scores


def compared(value: np.ndarray, baseline: np.ndarray, level: float) -> dict[str, float]:
    """Two scores, their first entry observed and the others bootstrapped."""
    difference = value - baseline
    drawn = difference[1:]
    lower, upper = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    n = len(drawn)
    below, above = ((drawn <= 0).sum() + 1) / (n + 1), ((drawn >= 0).sum() + 1) / (n + 1)
    return {
        "value": value[0],
        "baseline": baseline[0],
        "difference": difference[0],
        "lower": lower,
        "upper": upper,
        "p_value": min(1.0, 2 * min(below, above)),
    }
