"""Do intervals hold what they promise?"""

from __future__ import annotations

from typing import Any

import numpy as np

from exprgen.metrics._checks import at_least, dense, numbers

__all__ = ["coverage", "crps", "interval_score", "pit", "sharpness"]


def coverage(lower: np.ndarray, upper: np.ndarray, x: np.ndarray) -> float:
    """Share of values inside their closed intervals ``[lower, upper]``.

    Parameters
    ----------
    lower, upper, x
        Arrays that broadcast against each other, usually ``(n_obs, n_vars)``; sparse ones too.

    Returns
    -------
    float
        In [0, 1]; best is the nominal level. Counts are discrete, so closed intervals between
        exact quantiles cover *at least* the nominal level.

    Raises
    ------
    ValueError
        A lower end above its upper end, no values, or some that are not finite.
    """
    lower, upper, x = _intervals(lower=lower, upper=upper, x=x)
    return float(((lower <= x) & (x <= upper)).mean())


def pit(samples: np.ndarray, x: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Randomised probability integral transform of values among samples :cite:p:`czado2009`.

    The rank of the value among the samples, ties broken at random, spread evenly over its share
    of [0, 1].

    Parameters
    ----------
    samples
        Predictive draws, shape ``(n_samples, n_obs, n_vars)``.
    x
        Observed values, shape ``(n_obs, n_vars)``.
    seed
        Of the randomisation.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_obs, n_vars)``, in (0, 1). Uniform, exactly and for counts too, if the value
        and the samples are draws from one distribution: a histogram with a hump has intervals
        that are too wide, one with ends raised too narrow ones.

    Raises
    ------
    ValueError
        Shapes that do not fit, no values, or some that are not finite.
    """
    samples, x = _draws(samples, x, n_min=1)
    below, equal = (samples < x).sum(axis=0), (samples == x).sum(axis=0)
    u = np.random.default_rng(seed).random(x.shape)
    return (below + u * (equal + 1)) / (len(samples) + 1)


def crps(samples: np.ndarray, x: np.ndarray) -> float:
    r"""Continuous ranked probability score, averaged over values :cite:p:`gneiting2007`.

    :math:`E|S - x| - \tfrac12 E|S - S'|` with the unbiased ("fair") estimate of the second term
    :cite:p:`ferro2014`, so that the expectation does not depend on the number of samples.

    Parameters
    ----------
    samples
        Predictive draws, shape ``(n_samples, n_obs, n_vars)``, at least two.
    x
        Observed values, shape ``(n_obs, n_vars)``.

    Returns
    -------
    float
        In the unit of ``x``; lower is better. A proper score: its expectation is lowest for the
        true distribution, where it is :math:`\tfrac12 E|X - X'|`, not 0. Genes with high counts
        dominate; give log values to weigh them alike. An estimate, unbiased.

    Raises
    ------
    ValueError
        Shapes that do not fit, fewer than two samples, no values, or some that are not finite.
    """
    samples, x = _draws(samples, x, n_min=2)
    n = len(samples)
    accuracy = np.abs(samples - x).mean()
    # The sum of |s_i - s_j| over pairs, from sorted samples: rank i enters 2i - n - 1 times.
    weights = 2.0 * np.arange(1, n + 1) - n - 1
    spread = np.tensordot(weights, np.sort(samples, axis=0), axes=1).mean() / (n * (n - 1))
    return float(accuracy - spread)


def interval_score(lower: np.ndarray, upper: np.ndarray, x: np.ndarray, *, alpha: float) -> float:
    r"""Winkler's interval score, averaged over values :cite:p:`gneiting2007`.

    The width of the interval, plus :math:`2/\alpha` times the distance of a value outside it.

    Parameters
    ----------
    lower, upper, x
        Arrays that broadcast against each other, usually ``(n_obs, n_vars)``; sparse ones too.
    alpha
        One minus the nominal level: .1 for 90 % intervals.

    Returns
    -------
    float
        Not negative, in the unit of ``x``; lower is better, and lowest in expectation for the
        true quantiles at :math:`\alpha/2` and :math:`1 - \alpha/2`, where it is not 0.

    Raises
    ------
    ValueError
        A lower end above its upper end, no values, some that are not finite, or ``alpha`` not
        between 0 and 1.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}; it is .1 for 90 %.")
    lower, upper, x = _intervals(lower=lower, upper=upper, x=x)
    outside = np.maximum(lower - x, 0) + np.maximum(x - upper, 0)
    return float((upper - lower + 2 / alpha * outside).mean())


def sharpness(lower: np.ndarray, upper: np.ndarray) -> float:
    """Mean width of intervals.

    Parameters
    ----------
    lower, upper
        Arrays that broadcast against each other, usually ``(n_obs, n_vars)``; sparse ones too.

    Returns
    -------
    float
        Not negative, in the unit of the intervals; lower is better among intervals that hold
        their level (:func:`coverage`), and means nothing without it
        :cite:p:`gneiting2007sharpness`.

    Raises
    ------
    ValueError
        A lower end above its upper end, no values, or some that are not finite.
    """
    lower, upper = _intervals(lower=lower, upper=upper)
    return float((upper - lower).mean())


def _intervals(**given: Any) -> list[np.ndarray]:
    """Lower ends, upper ends and perhaps values: dense, float64, of one shape, not crossed."""
    as_floats = [_floats(name, values) for name, values in given.items()]
    try:
        arrays = list(np.broadcast_arrays(*as_floats))
    except ValueError:
        shapes = ", ".join(f"{k}: {v.shape}" for k, v in zip(given, as_floats, strict=True))
        raise ValueError(f"shapes do not fit each other ({shapes}).") from None
    n_crossed = int((arrays[0] > arrays[1]).sum())
    if n_crossed:
        raise ValueError(
            f"{n_crossed} of {arrays[0].size} intervals have lower > upper; swap or fix the "
            "bounds."
        )
    return arrays


def _draws(samples: Any, x: Any, *, n_min: int) -> tuple[np.ndarray, np.ndarray]:
    samples, x = _floats("samples", samples), _floats("x", x)
    if samples.ndim != x.ndim + 1 or samples.shape[1:] != x.shape:
        raise ValueError(
            f"samples must have shape (n_samples, *x.shape) = (n_samples, "
            f"{', '.join(map(str, x.shape))}), got {samples.shape}."
        )
    at_least("the number of samples", len(samples), n_min)
    return samples, x


def _floats(name: str, values: Any) -> np.ndarray:
    return np.asarray(dense(numbers(name, values)), dtype=np.float64)
