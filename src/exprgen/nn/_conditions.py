"""Encoded conditions -> features that networks read.

The encoded matrix has one column per categorical condition (code), continuous condition,
embedding dimension, and one each for batch and donor codes; -1 stands for *unknown*.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from exprgen._conditions import ConditionLayout

__all__ = ["ConditionFeatures"]


class ConditionFeatures(nn.Module):
    """Split the encoded conditions by role.

    Parameters
    ----------
    layout
        What the columns of the encoded matrix are.
    """

    def __init__(self, layout: ConditionLayout) -> None:
        super().__init__()
        self.layout = layout
        n_categorical = len(layout.n_categories)
        self._numbers = slice(
            n_categorical, n_categorical + layout.n_continuous + layout.n_embedding
        )
        self._batch_column = self._numbers.stop
        self._donor_column = self._numbers.stop + (layout.n_batch > 0)
        self.n_features = 1 + sum(layout.n_categories) + layout.n_continuous + layout.n_embedding

    @property
    def blocks(self) -> list[int]:
        """Width of each condition's features, in their order after the constant."""
        layout = self.layout
        embedding = [layout.n_embedding] if layout.n_embedding else []
        return [*layout.n_categories, *[1] * layout.n_continuous, *embedding]

    @property
    def labels(self) -> list[slice]:
        """Columns of each categorical condition and of the batch among features and batch."""
        starts = list(accumulate(self.layout.n_categories, initial=1))
        columns = [slice(*ends) for ends in pairwise(starts)]
        if self.layout.n_batch:
            columns.append(slice(self.n_features, self.n_features + self.layout.n_batch))
        return columns

    def conditions(self, c: Tensor) -> Tensor:
        """What is generated on: a constant 1, one-hot labels, numbers, ``(n_obs, n_features)``.

        The constant lets a model without any condition run through the same networks.
        """
        columns = [c.new_ones(len(c), 1)]
        columns += [
            one_hot(c[:, i].long(), n).to(c.dtype) for i, n in enumerate(self.layout.n_categories)
        ]
        return torch.cat([*columns, c[:, self._numbers]], dim=1)

    def batch(self, c: Tensor) -> Tensor:
        """One-hot batch, ``(n_obs, n_batch)``; an unknown batch is the average of all."""
        n_batch = self.layout.n_batch
        if n_batch == 0:
            return c.new_zeros(len(c), 0)
        codes = c[:, self._batch_column].long()
        known = one_hot(codes.clamp(min=0), n_batch).to(c.dtype)
        return torch.where(codes.unsqueeze(1) < 0, c.new_full((), 1 / n_batch), known)

    def batch_is_unknown(self, c: Tensor) -> Tensor:
        """Whether a batch is registered and unknown, ``(n_obs,)``."""
        if self.layout.n_batch == 0:
            return torch.zeros(len(c), dtype=torch.bool, device=c.device)
        return c[:, self._batch_column] < 0

    def with_batch(self, c: Tensor, code: int) -> Tensor:
        """The same cells in another batch."""
        c = c.clone()
        c[:, self._batch_column] = code
        return c

    def donor(self, c: Tensor) -> Tensor:
        """Donor codes, ``(n_obs,)``; -1 is a donor unknown to the model."""
        if self.layout.n_donor == 0:
            return torch.full((len(c),), -1, dtype=torch.long, device=c.device)
        return c[:, self._donor_column].long()
