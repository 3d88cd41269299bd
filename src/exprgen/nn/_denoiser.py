r"""The network of a path: a point, a place on the path and conditions in; a prediction out.

A residual network of which every block is normalised, scaled, shifted and gated by the sum of
embeddings of the place and of each condition (adaptive LayerNorm that starts at zero
:cite:p:`peebles2023`): blocks start as the identity and the output starts at 0. Conditions
interact through what the blocks make of the sum.

Every condition has a *null token*, learned, which stands in where the condition is not to be seen
:cite:p:`ho2022`. One network thereby holds the laws given any subset of the conditions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Denoiser", "owners"]

_N_FREQUENCIES = 8
_N_EMBEDDING = 64
_TOKEN_SCALE = 0.3


def owners(blocks: Sequence[int]) -> Tensor:
    """The condition that each feature after the constant belongs to, ``(n_features - 1,)``."""
    widths = torch.tensor(blocks, dtype=torch.long)
    return torch.arange(len(blocks)).repeat_interleave(widths)


class Denoiser(nn.Module):
    """Residual network with adaptive LayerNorm and a null token per condition.

    Parameters
    ----------
    n_dims
        Dimensions of y.
    blocks
        Width of each condition's features, in their order after the constant: labels for a
        categorical condition, 1 for a number, the dimensions of an embedding.
    n_given
        Further numbers that are always seen, such as the depth.
    n_hidden, n_layers, dropout
        Width and number of the residual blocks, and dropout inside them.
    n_outputs
        Numbers that are predicted, where these are not the dimensions of y.
    """

    _owner: Tensor
    _frequencies: Tensor

    def __init__(
        self,
        n_dims: int,
        blocks: Sequence[int],
        *,
        n_given: int = 0,
        n_hidden: int = 256,
        n_layers: int = 3,
        dropout: float = 0.0,
        n_outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.n_dims = n_dims
        self.n_conditions = len(blocks)
        self.input = nn.Linear(n_dims + n_given, n_hidden)
        self.place = nn.Sequential(
            nn.Linear(2 * _N_FREQUENCIES, _N_EMBEDDING),
            nn.SiLU(),
            nn.Linear(_N_EMBEDDING, _N_EMBEDDING),
        )
        # The embeddings side by side: each condition has rows of its own.
        self.tokens = nn.Parameter(torch.randn(sum(blocks), _N_EMBEDDING) * _TOKEN_SCALE)
        self.null = nn.Parameter(torch.randn(len(blocks), _N_EMBEDDING) * _TOKEN_SCALE)
        self.layers = nn.ModuleList(_Block(n_hidden, dropout) for _ in range(n_layers))
        self.output = nn.Linear(n_hidden, n_dims if n_outputs is None else n_outputs)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("_owner", owners(blocks), persistent=False)
        # Slow ones: a field that changes quickly along the path takes solvers more steps.
        frequencies = math.pi * 2 ** torch.linspace(-1, 1, _N_FREQUENCIES)
        self.register_buffer("_frequencies", frequencies, persistent=False)

    def forward(
        self,
        y: Tensor,
        place: Tensor,
        features: Tensor,
        keep: Tensor | None = None,
        given: Tensor | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Predict.

        Parameters
        ----------
        y
            Points of the path, ``(n_obs, n_dims)``.
        place
            Where on the path they are, from 0 to 1, ``(n_obs,)`` or ``()``.
        features
            Condition features, the constant first, ``(n_obs, n_features)``.
        keep
            Which conditions are seen, boolean, ``(n_obs, n_conditions)`` or
            ``(n_conditions,)``; all where ``None``.
        given
            Further numbers, ``(n_obs, n_given)``.
        rows
            The row of place, features and keep that each point has, ``(n_obs,)``, if they are
            listed once for all points that share them: they are then embedded once.

        Returns
        -------
        The prediction, ``(n_obs, n_dims)``, or ``(n_obs, n_outputs)``.
        """
        context = nn.functional.silu(self._context(place, features, keep))
        h = self.input(y if given is None else torch.cat([y, given], dim=1))
        for layer in self.layers:
            h = layer(h, context, rows)
        return self.output(h)

    def _context(self, place: Tensor, features: Tensor, keep: Tensor | None) -> Tensor:
        """Sum of the embeddings of place and conditions, ``(n_rows, n_embedding)``."""
        phase = place.to(features).reshape(-1, 1) * self._frequencies
        context = self.place(torch.cat([phase.sin(), phase.cos()], dim=1))
        values = features[:, 1:]
        if keep is None:
            return context + values @ self.tokens
        seen = keep.to(features)
        return context + values * seen[..., self._owner] @ self.tokens + (1 - seen) @ self.null


class _Block(nn.Module):
    """h + gate · f(scale · normalised h + shift), with all three from the context."""

    def __init__(self, n_hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_hidden, elementwise_affine=False)
        self.modulation = nn.Linear(_N_EMBEDDING, 3 * n_hidden)
        self.change = nn.Sequential(nn.Linear(n_hidden, n_hidden), nn.SiLU(), nn.Dropout(dropout))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, context: Tensor, rows: Tensor | None) -> Tensor:
        modulation = self.modulation(context)
        if rows is not None and len(modulation) > 1:
            modulation = modulation.index_select(0, rows)
        scale, shift, gate = modulation.chunk(3, dim=-1)
        normal = self.norm(h)
        return h + gate * self.change(torch.addcmul(normal + shift, normal, scale))
