"""A path whose mean is 0 under every condition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exprgen.densities._base import ConditionalDensity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from exprgen.densities._path import Path

__all__ = ["Centred"]

_N_DRAWS = 128


class Centred(ConditionalDensity):
    """The law of y - E[y | c], y being a path's; the mean is an *estimate* from 128 paired draws.

    What a predictor of the mean has missed by chance, in few cells, is not to be learned a second
    time.

    Parameters
    ----------
    path
        What is trained, drawn from and centred.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.n_dims, path.n_features)
        self.path = path
        self.estimator = path.estimator

    def standardise(self, y: Tensor) -> None:
        """See :meth:`Path.standardise`."""
        self.path.standardise(y)

    def loss(
        self, y: Tensor, features: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The path's own loss, ``(n_obs,)``. See :meth:`Path.loss`."""
        return self.path.loss(y, features, generator)

    def log_prob(self, y: Tensor, features: Tensor) -> Tensor:
        """Log-density, ``(n_obs,)``, nats. See :meth:`Path.log_prob`."""
        return self.path.log_prob(y + self.path.mean(features, _N_DRAWS), features)

    def log_prob_last(self, last: Tensor, features: Tensor) -> Tensor:
        """Log-density of the last coordinate, ``(n_obs,)``. See :meth:`Path.log_prob_last`."""
        return self.path.log_prob_last(last + self.path.mean(features, _N_DRAWS)[:, -1], features)

    def sample(
        self, features: Tensor, generator: torch.Generator, last: Tensor | None = None
    ) -> Tensor:
        """Draw y, ``(n_obs, n_dims)``. See :meth:`Path.sample`."""
        centre = self.path.mean(features, _N_DRAWS)
        if last is not None:
            last = last + centre[:, -1]
        return self.path.sample(features, generator, last) - centre

    def mean(self, features: Tensor) -> Tensor:
        """0, ``(n_obs, n_dims)``."""
        return features.new_zeros(len(features), self.n_dims)
