r"""Distances between two samples of cells, as distributions.

With :math:`A, A' \sim P` and :math:`B, B' \sim Q` independent,

.. math:: \text{energy}(P, Q) &= 2\,E\|A - B\| - E\|A - A'\| - E\|B - B'\|, \\
          \text{MMD}^2(P, Q) &= E\,k(A, A') + E\,k(B, B') - 2\,E\,k(A, B), \qquad
          k(x, y) = e^{-\|x - y\|^2 / 2 h^2}, \\
          W_2^2(P, Q) &= \min_{A \sim P,\ B \sim Q} E\|A - B\|^2 .

All are 0 if and only if :math:`P = Q`. Energy and MMD have *unbiased* estimates, which centre at 0
for two samples of one distribution (and so may be negative); the Wasserstein distances of finite
samples are always positive and are read beside their value for real against real cells. Distances
are Euclidean: give features on one scale, principal components of normalised values say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from exprgen.metrics._checks import at_least, points

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exprgen.metrics._features import Matrix

__all__ = [
    "MMDTest",
    "energy_distance",
    "median_distance",
    "mmd",
    "mmd_test",
    "sliced_wasserstein",
    "wasserstein",
]

_BLOCK = 4_000_000  # distances held at once: 32 MB
_MEDIAN_OF = 2000  # cells that the median distance is taken over


class MMDTest(NamedTuple):
    """Unbiased squared maximum mean discrepancy and its permutation p-value."""

    statistic: float
    p_value: float


def energy_distance(a: Matrix, b: Matrix) -> float:
    """Energy distance :cite:p:`szekely2013`, unbiased.

    Parameters
    ----------
    a, b
        Features, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``.

    Returns
    -------
    float
        In the unit of the features; 0 is best. An estimate, unbiased: for real against real cells
        it scatters around 0 and may be negative. (SciPy's, in one dimension, is the square root of
        the biased one.)

    Raises
    ------
    ValueError
        Different features, fewer than two cells, or values that are not finite.
    """
    a, b = _centred(a, b)
    between, within_a, within_b = (
        sum(float(np.sqrt(block).sum()) for _, block in squared_distances(x, y))
        for x, y in ((a, b), (a, a), (b, b))
    )
    n, m = len(a), len(b)
    return 2 * between / (n * m) - within_a / (n * (n - 1)) - within_b / (m * (m - 1))


def median_distance(a: Matrix, b: Matrix) -> float:
    """Median Euclidean distance between two cells of the pooled samples :cite:p:`gretton2012`.

    The default bandwidth of :func:`mmd`. It differs a little from pair to pair of samples: to
    compare several models, take one bandwidth, from real cells, for all of them.

    Parameters
    ----------
    a, b
        Features, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``.

    Returns
    -------
    float
        Not negative. Of more than 2,000 cells, as many, evenly spaced, are used.
    """
    pooled = np.concatenate(_centred(a, b))
    pooled = pooled[:: -(-len(pooled) // _MEDIAN_OF)]
    squared = np.concatenate([block for _, block in squared_distances(pooled, pooled)])
    return float(np.median(np.sqrt(squared[np.triu(np.ones(squared.shape, bool), k=1)])))


def mmd(
    a: Matrix,
    b: Matrix,
    *,
    bandwidth: float | None = None,
    estimator: Literal["unbiased", "biased"] = "unbiased",
) -> float:
    r"""Squared maximum mean discrepancy with a Gaussian kernel :cite:p:`gretton2012`.

    Parameters
    ----------
    a, b
        Features, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``.
    bandwidth
        :math:`h`, in the unit of the features; None for :func:`median_distance`.
    estimator
        ``"unbiased"`` leaves out the kernel of a cell with itself and centres at 0 for real
        against real cells. ``"biased"`` keeps it, is never negative, and about
        :math:`(1 - \bar k)(1/n_a + 1/n_b)` for real against real: the one to divide by its
        control.

    Returns
    -------
    float
        At most 2 (and at least about :math:`-2/n`, unbiased); 0 is best.

    Raises
    ------
    ValueError
        Different features, fewer than two cells, values that are not finite, or a bandwidth that
        is not positive.
    """
    if estimator not in ("unbiased", "biased"):
        raise ValueError(f"estimator must be 'unbiased' or 'biased', got {estimator!r}.")
    a, b = _centred(a, b)
    h = _bandwidth(a, b, bandwidth)
    within_a, within_b, between = (
        sum(float(_kernel(block, h).sum()) for _, block in squared_distances(x, y))
        for x, y in ((a, a), (b, b), (a, b))
    )
    n, m = len(a), len(b)
    if estimator == "biased":
        return max(0.0, within_a / n**2 + within_b / m**2 - 2 * between / (n * m))
    return (within_a - n) / (n * (n - 1)) + (within_b - m) / (m * (m - 1)) - 2 * between / (n * m)


def mmd_test(
    a: Matrix,
    b: Matrix,
    *,
    n_permutations: int = 200,
    bandwidth: float | None = None,
    seed: int = 0,
) -> MMDTest:
    """Permutation test of "both samples have one distribution" :cite:p:`gretton2012`.

    Parameters
    ----------
    a, b
        Features, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``.
    n_permutations
        Random relabellings of the pooled cells.
    bandwidth
        As in :func:`mmd`.
    seed
        Of the relabellings.

    Returns
    -------
    MMDTest
        ``statistic`` is :func:`mmd`. ``p_value`` counts the observed labelling among the
        permutations: at least ``1 / (n_permutations + 1)``, and uniform (to its grid, so exact)
        for two samples of one distribution if all cells are independent. Cells of the same groups
        in different proportions are a difference, too: match the composition first.

    Raises
    ------
    ValueError
        As :func:`mmd`, or no permutation.
    """
    at_least("n_permutations", n_permutations, 1)
    a, b = _centred(a, b)
    h = _bandwidth(a, b, bandwidth)
    pooled = np.concatenate([a, b])
    n, total = len(a), len(pooled)
    rng = np.random.default_rng(seed)
    # Column 0 is the observed labelling: one matrix product with the kernel serves all of them.
    in_a = np.zeros((total, n_permutations + 1))
    in_a[:n, 0] = 1
    for column in range(1, n_permutations + 1):
        in_a[rng.permutation(total)[:n], column] = 1
    within_a, to_a, all_pairs = np.zeros(n_permutations + 1), np.zeros(n_permutations + 1), 0.0
    for rows, block in squared_distances(pooled, pooled):
        kernel = _kernel(block, h)
        product = kernel @ in_a
        within_a += (in_a[rows] * product).sum(axis=0)
        to_a += product.sum(axis=0)
        all_pairs += float(kernel.sum())
    between = to_a - within_a
    within_b = all_pairs - within_a - 2 * between
    m = total - n
    statistics = (
        (within_a - n) / (n * (n - 1))
        + (within_b - m) / (m * (m - 1))
        - 2 * between / (n * m)
    )  # fmt: skip
    # The same cells in another order differ by rounding alone; a tie counts against rejection.
    as_large = statistics[1:] >= statistics[0] - 1e-12
    return MMDTest(float(statistics[0]), float((1 + as_large.sum()) / (1 + n_permutations)))


def sliced_wasserstein(a: Matrix, b: Matrix, *, n_projections: int = 100, seed: int = 0) -> float:
    r"""Sliced 2-Wasserstein distance :cite:p:`bonneel2015`.

    The root of the mean, over random directions, of the squared one-dimensional :math:`W_2`
    of the projections, which is exact (also for samples of unequal size).

    Parameters
    ----------
    a, b
        Features, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``.
    n_projections
        Random directions, uniform on the sphere.
    seed
        Of the directions.

    Returns
    -------
    float
        Not negative, in the unit of the features; 0 is best, but real against real cells are
        above it. A shift by :math:`\delta` in ``n_features`` dimensions reads
        :math:`\|\delta\| / \sqrt{n_\text{features}}`. An estimate of the mean over all directions.

    Raises
    ------
    ValueError
        Different features, no cells, values that are not finite, or no projection.
    """
    at_least("n_projections", n_projections, 1)
    a, b = points(a=a, b=b)
    directions = np.random.default_rng(seed).normal(size=(a.shape[1], n_projections))
    directions /= np.linalg.norm(directions, axis=0)
    sorted_a, sorted_b = np.sort(a @ directions, axis=0), np.sort(b @ directions, axis=0)
    # Both quantile functions are constant between the levels i / n_a and j / n_b.
    n, m = len(a), len(b)
    levels = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # in units of 1 / nm
    weights = np.diff(levels, prepend=0) / (n * m)
    gaps = sorted_a[(levels - 1) // m] - sorted_b[(levels - 1) // n]
    return float(np.sqrt(np.mean(weights @ gaps**2)))


def wasserstein(a: Matrix, b: Matrix) -> float:
    """2-Wasserstein distance of the two samples, by exact optimal transport.

    Parameters
    ----------
    a, b
        Features, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``. Time grows faster than
        the square of the number of cells: some seconds for 2,000 against 2,000.

    Returns
    -------
    float
        Not negative, in the unit of the features; 0 is best, but in many dimensions real against
        real cells are far above it. Exact for the samples, biased upwards for what they are drawn
        from. Needs POT :cite:p:`flamary2021`.

    Raises
    ------
    ValueError
        Different features, no cells, or values that are not finite.
    RuntimeError
        The solver did not converge.
    """
    import ot

    a, b = points(a=a, b=b)
    centre = np.concatenate([a, b]).mean(axis=0)
    cost = np.concatenate([block for _, block in squared_distances(a - centre, b - centre)])
    plan, log = ot.emd(
        np.full(len(a), 1 / len(a)),
        np.full(len(b), 1 / len(b)),
        cost,
        numItermax=100_000_000,
        log=True,
    )
    if log["warning"] is not None:
        raise RuntimeError(f"optimal transport did not converge: {log['warning']}")
    return float(np.sqrt((plan * cost).sum()))


def squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of all rows of ``a`` to all of ``b``, by blocks of rows of ``a``.

    By one matrix product. A row is at distance exactly 0 from itself where ``b is a``; other
    rounding is of the order of 1e-16 of the squared norms, so centre the data first.
    """
    norm_a, norm_b = (np.einsum("ij,ij->i", x, x) for x in (a, b))
    step = max(1, _BLOCK // max(1, len(b)))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        block = a[rows] @ b.T
        block *= -2
        block += norm_a[rows, None]
        block += norm_b
        np.maximum(block, 0, out=block)
        if a is b:
            np.fill_diagonal(block[:, rows], 0)
        yield rows, block


def _centred(a: Matrix, b: Matrix) -> tuple[np.ndarray, np.ndarray]:
    a, b = points(a=a, b=b, n_min=2)
    centre = (a.sum(axis=0) + b.sum(axis=0)) / (len(a) + len(b))
    return a - centre, b - centre


def _bandwidth(a: np.ndarray, b: np.ndarray, bandwidth: float | None) -> float:
    if bandwidth is None:
        bandwidth = median_distance(a, b)
        if bandwidth == 0:
            raise ValueError(
                "more than half of the pairs of cells are identical, so their median distance, "
                "the default bandwidth, is 0; give a bandwidth."
            )
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}.")
    return bandwidth


def _kernel(squared: np.ndarray, h: float) -> np.ndarray:
    squared *= -1 / (2 * h**2)
    return np.exp(squared, out=squared)
