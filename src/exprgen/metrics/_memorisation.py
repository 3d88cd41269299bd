r"""Are synthetic cells copies of training cells?

A model that has learned the distribution is as far from the cells it was trained on as from cells
of the same origin that it never saw; one that has memorised is nearer to the former. Held-out
cells that differ from training cells for another reason (other donors, another batch) make an
honest model look as if it memorised: compare within what both have, and hold out at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from exprgen.metrics._checks import common_groups, group_labels, points
from exprgen.metrics._neighbours import nearest_distances

if TYPE_CHECKING:
    from exprgen.metrics._features import Matrix

__all__ = ["Memorisation", "membership_auc", "memorisation", "nearest_neighbour_ratio"]

_N_SUBSETS = 10


class Memorisation(NamedTuple):
    """Signs of memorisation in one group.

    ``ratio`` is :func:`nearest_neighbour_ratio`, ``auc`` :func:`membership_auc`, ``z`` how many
    standard deviations (of no memorisation) ``auc`` lies above .5, and ``n`` the held-out cells.
    """

    group: object
    ratio: float
    auc: float
    z: float
    n: int


def nearest_neighbour_ratio(
    synthetic: Matrix, train: Matrix, held_out: Matrix, *, seed: int = 0
) -> float:
    r"""Median distance to the nearest training cell over that to the nearest held-out cell.

    Parameters
    ----------
    synthetic, train, held_out
        Features on one scale, shapes ``(n_synthetic, n_features)``, ``(n_train, n_features)``
        and ``(n_held_out, n_features)``.
    seed
        Of the subsets that make sizes equal.

    Returns
    -------
    float
        Not negative. 1: no memorisation, also what fresh real cells give; towards 0: copies.
        ``nan`` if the median distance to held-out cells is 0. The median sees copying only if
        about half of the synthetic cells are copies; :func:`membership_auc` sees less.

    Raises
    ------
    ValueError
        Different features, no cells, or values that are not finite.

    Notes
    -----
    More cells have a nearer nearest one, so both sides need equal numbers. Surplus held-out cells
    are left out at random. Surplus training cells are *not*: the copied ones would go with them.
    Instead the effect of their number is divided out, which is measured on held-out cells, as
    their median distance to all training cells over that to random subsets of ``n_held_out``.
    """
    synthetic, train, held_out = points(synthetic=synthetic, train=train, held_out=held_out)
    rng = np.random.default_rng(seed)
    held_out = held_out[rng.permutation(len(held_out))[: len(train)]]
    n = len(held_out)
    to_train = np.median(nearest_distances(synthetic, train))
    to_held_out = np.median(nearest_distances(synthetic, held_out))
    effect_of_n = 1.0
    if len(train) > n:
        shuffled = rng.permutation(len(train))
        n_subsets = min(_N_SUBSETS, len(train) // n)
        few = [
            nearest_distances(held_out, train[shuffled[i * n : (i + 1) * n]])
            for i in range(n_subsets)
        ]
        effect_of_n = _over(np.median(nearest_distances(held_out, train)), np.median(few))
    return _over(to_train, to_held_out * effect_of_n)


def membership_auc(synthetic: Matrix, train: Matrix, held_out: Matrix) -> float:
    """Success of an attack that tells training cells by their distance to synthetic ones.

    The attacker holds the synthetic cells and guesses that a real cell was in the training data
    if its nearest synthetic cell is near :cite:p:`chen2020`.

    Parameters
    ----------
    synthetic, train, held_out
        Features on one scale, shapes ``(n_synthetic, n_features)``, ``(n_train, n_features)``
        and ``(n_held_out, n_features)``.

    Returns
    -------
    float
        The attack's area under the ROC curve, in [0, 1]. .5: no memorisation, also for unequal
        numbers of cells, and what fresh real cells give; 1: every training cell is told. If a
        share of the training cells is copied, about .5 + half that share.

    Raises
    ------
    ValueError
        Different features, no cells, or values that are not finite.
    """
    from scipy.stats import rankdata

    synthetic, train, held_out = points(synthetic=synthetic, train=train, held_out=held_out)
    distances = nearest_distances(np.concatenate([train, held_out]), synthetic)
    n, m = len(train), len(held_out)
    ranks = rankdata(-distances)[:n].sum()
    return float((ranks - n * (n + 1) / 2) / (n * m))


def memorisation(
    synthetic: Matrix,
    train: Matrix,
    held_out: Matrix,
    *,
    groups_synthetic: np.ndarray | None = None,
    groups_train: np.ndarray | None = None,
    groups_held_out: np.ndarray | None = None,
    seed: int = 0,
) -> list[Memorisation]:
    """Memorisation group by group, worst first.

    A model can be honest about large groups and copy the few cells of a small one.

    Parameters
    ----------
    synthetic, train, held_out
        Features on one scale, shapes ``(n_synthetic, n_features)``, ``(n_train, n_features)``
        and ``(n_held_out, n_features)``.
    groups_synthetic, groups_train, groups_held_out
        Group of every cell. Groups with fewer than two cells on any side are left out. Without
        groups, all cells are one.
    seed
        As in :func:`nearest_neighbour_ratio`.

    Returns
    -------
    list of Memorisation
        By falling ``z``, which weighs an AUC by the number of cells it stands on. Without
        memorisation ``z`` is about standard normal in each group; the largest of many groups is
        above 2 by chance.

    Raises
    ------
    ValueError
        As :func:`nearest_neighbour_ratio`, or no group has two cells on all sides.
    """
    synthetic, train, held_out = points(synthetic=synthetic, train=train, held_out=held_out)
    labels_s, labels_t, labels_h = group_labels(
        groups_synthetic=(groups_synthetic, len(synthetic)),
        groups_train=(groups_train, len(train)),
        groups_held_out=(groups_held_out, len(held_out)),
    )
    found = []
    for group in common_groups(labels_s, labels_t, labels_h):
        s, t, h = (
            synthetic[labels_s == group],
            train[labels_t == group],
            held_out[labels_h == group],
        )
        auc = membership_auc(s, t, h)
        sd = np.sqrt((len(t) + len(h) + 1) / (12 * len(t) * len(h)))  # Mann and Whitney's
        ratio = nearest_neighbour_ratio(s, t, h, seed=seed)
        found.append(Memorisation(group, ratio, auc, float((auc - 0.5) / sd), len(h)))
    return sorted(found, key=lambda m: -m.z)


def _over(a: float, b: float) -> float:
    return float(a / b) if b > 0 else float("nan")
