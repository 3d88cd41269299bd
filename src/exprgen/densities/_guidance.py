r"""What a path and a depth expect, with conditions hidden, weighed and composed.

A network with null tokens knows the laws given any subset S of the conditions. *Guidance*
:cite:p:`ho2022` composes them, with one weight per condition, multilinearly:

.. math::
    v(w) = \sum_S \prod_{i \in S} w_i \prod_{i \notin S} (1 - w_i)\; v(S),

which is *exact* where all weights are 0 or 1: the law given those of weight 1. With one condition
it is the usual :math:`v(\emptyset) + w\,(v(c) - v(\emptyset))`. A weight above 1 follows no law
that the network has learned: it moves draws away from what they would be without the condition,
and narrows them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from exprgen._arguments import check_number
from exprgen.densities._mixture import Mixture
from exprgen.nn._denoiser import owners
from exprgen.schedules import predict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from exprgen.schedules import Coefficients, Prediction, Schedule, Target

__all__ = ["GuidedField", "HidingMixture", "Term", "WatchedField", "evaluate", "terms_of"]


class Term(NamedTuple):
    """Which conditions are seen, ``(n_conditions,)`` or by row, all if ``None``; and a weight."""

    keep: Tensor | None = None
    weight: float = 1.0


def terms_of(guidance: Sequence[float] | Tensor | None, n_conditions: int) -> tuple[Term, ...]:
    """Terms of the composition; the last sees all conditions that any sees.

    Raises
    ------
    ValueError
        If there is not one weight from 0 up per condition.
    """
    if guidance is None:
        return (Term(),)
    weights = [check_number(float(w), "guidance") for w in guidance]
    if len(weights) != n_conditions:
        raise ValueError(
            f"guidance must be {n_conditions} weights, one per condition, got {len(weights)}."
        )
    options = [((w == 1, 1.0),) if w in (0, 1) else ((False, 1 - w), (True, w)) for w in weights]
    return tuple(
        Term(
            torch.tensor([seen for seen, _ in subset], dtype=torch.bool),
            math.prod(factor for _, factor in subset),
        )
        for subset in product(*options)
    )


def evaluate(
    network: nn.Module,
    y_t: Tensor,
    at: Coefficients,
    features: Tensor,
    keep: Tensor | None = None,
    given: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The network's output for points of the path, of an input of unit variance."""
    place = torch.atan2(at.alpha, at.sigma) * (2 / math.pi)
    return network(y_t / at.norm, place, features, keep, given, rows=rows)


@dataclass(frozen=True)
class GuidedField:
    """The field of a path under conditions, for solvers.

    Parameters
    ----------
    network, schedule, target
        What is evaluated where, and what it predicts.
    features
        Condition features, ``(n_rows, n_features)``.
    given
        Further numbers, ``(n_obs, n_given)``.
    terms
        What is composed.
    rows
        The row of the features that each point has, ``(n_obs,)``; in line if ``None``.
    """

    network: nn.Module
    schedule: Schedule
    target: Target
    features: Tensor
    given: Tensor | None = None
    terms: tuple[Term, ...] = (Term(),)
    rows: Tensor | None = None

    def predict(self, y_t: Tensor, t: Tensor) -> Prediction:
        """Predict from points ``(n_obs, n_dims)`` at a time ``()``."""
        # Data and noise are linear in the output given the point, and weights add up to 1: to
        # compose outputs is to compose predictions.
        at = self.schedule(t)
        outputs = [
            weight * evaluate(self.network, y_t, at, self.features, keep, self.given, self.rows)
            for keep, weight in self.terms
        ]
        return predict(self.target, sum(outputs[1:], outputs[0]), y_t, at)


@dataclass(frozen=True)
class WatchedField:
    """A field that stops its solver where points are no numbers.

    Parameters
    ----------
    field
        What the solver follows.
    n_steps
        How many steps it takes; ``None`` where the tolerance decides.
    """

    field: GuidedField
    n_steps: int | None

    @property
    def schedule(self) -> Schedule:
        """That of the field."""
        return self.field.schedule

    def predict(self, y_t: Tensor, t: Tensor) -> Prediction:
        """Predict from points ``(n_obs, n_dims)`` at a time ``()``."""
        self.check(y_t, t)
        return self.field.predict(y_t, t)

    def check(self, y_t: Tensor, t: Tensor) -> None:
        """Refuse points at a time ``()`` that are not finite.

        Raises
        ------
        RuntimeError
            If any is not; it names the step that led to them.
        """
        if torch.isfinite(y_t).all():
            return
        if self.n_steps is not None:
            step = int((self.schedule.times(self.n_steps) < t).sum())
            where = f"in step {step} of {self.n_steps}"
        else:  # it takes the length of its first step from the field
            where = f"at time {float(t):.3g} of the path" if t.isfinite() else "in its first step"
        raise RuntimeError(
            f"The solver came to points that are NaN or infinite {where}. Draw with weights of "
            "guidance nearer to 1, or train the density with a smaller learning rate."
        )


class HidingMixture(Mixture):
    """A one-dimensional mixture of which conditions can be hidden.

    It reads features with 0 where they are hidden, and which conditions are.

    Parameters
    ----------
    blocks
        Width of each condition's features, in their order after the constant.
    """

    _owner: Tensor

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(1, 1 + sum(blocks) + len(blocks))
        self.register_buffer("_owner", owners(blocks), persistent=False)
        self.n_conditions = len(blocks)

    def visible(self, features: Tensor, keep: Tensor | None) -> Tensor:
        """Features for this mixture, of condition features and which to keep."""
        if keep is None:
            keep = features.new_ones(self.n_conditions)
        seen = keep.to(features).expand(len(features), -1)
        values = features[:, 1:] * seen[:, self._owner]
        return torch.cat([features[:, :1], values, 1 - seen], dim=1)
