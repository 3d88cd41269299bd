r"""Which noise a data point is joined with.

Where pairs are independent, paths of the same condition cross, and the velocity averages over
them. To pair each batch so that :math:`\sum_i \|y_i - \varepsilon_{\pi(i)}\|^2` is least, an
optimal transport :cite:p:`tong2024,pooladian2023`, straightens them, and fewer steps do.

The noise must stay standard normal *given the condition*, for so it is drawn when sampling. A
plan that mixes conditions hands each of them its own corner of the noise, and biases what is
generated :cite:p:`cheng2025`. Hence rows are matched with rows of the same labels only. Numbers
rarely repeat; there every noise comes with the numbers of the row it was drawn for, and a match
that changes them pays for it. The noise then nearly forgets them, and paths are still straighter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COUPLINGS", "independent", "labels_and_numbers", "optimal_transport"]


_PENALTY = 100.0
"""Price of a squared difference in a number, in units of the squared distance y to noise."""


def independent(y: Tensor, noise: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
    """The noise as it is, ``(n_obs, n_dims)``."""
    return noise


def optimal_transport(y: Tensor, noise: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
    """Permute the noise among rows of the same labels into an *exact* optimal transport.

    Parameters
    ----------
    y, noise
        Standardised data and standard normal noise, ``(n_obs, n_dims)``.
    labels
        Code of each row's combination of labels, ``(n_obs,)``.
    numbers
        Each row's numeric conditions, standardised, ``(n_obs, n_numbers)``; may have no column.

    Returns
    -------
    The noise's rows, in the data's order, ``(n_obs, n_dims)``.
    """
    import ot

    matched = noise.clone()
    sizes = torch.unique(labels, return_counts=True)[1]
    for rows in labels.argsort().split(sizes.tolist()):
        cost = _squared_distances(y[rows], noise[rows])
        cost += _PENALTY * _squared_distances(numbers[rows], numbers[rows])
        # No weights are uniform ones; the plan then is a permutation.
        plan = ot.emd([], [], cost.numpy())
        matched[rows] = noise[rows[torch.as_tensor(plan.argmax(1), device=rows.device)]]
    return matched


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a.detach().double(), b.detach().double()).square().cpu()


def labels_and_numbers(features: Tensor) -> tuple[Tensor, Tensor]:
    """Split condition features by what may be matched.

    Parameters
    ----------
    features
        ``(n_obs, n_features)``.

    Returns
    -------
    The code of each row's combination of labels, ``(n_obs,)``, a label being a column of zeros
    and ones; and all other columns, ``(n_obs, n_numbers)``.
    """
    is_label = ((features == 0) | (features == 1)).all(0)
    labels = torch.unique(features[:, is_label], dim=0, return_inverse=True)[1]
    return labels, features[:, ~is_label]


COUPLINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "independent": independent,
    "optimal_transport": optimal_transport,
}
"""Couplings by name, functions of data, noise, labels and numbers."""
