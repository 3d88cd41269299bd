r"""How little a model expects of given cells: the scores that outliers are found by.

Two terms, both in nats. That of the *counts* is what the importance-weighted bound leaves of
:math:`-\log p(x \mid \ell, c)`, given the observed depth. That of the *state* is

.. math::
    \log \frac{q(\bar z \mid x, c)}{p(\bar z \mid \bar\ell, c)},
    \qquad \bar z = E_q z,\; \bar\ell = E_q \ell,

how far the cell's counts move the state from what is likely before they are seen. The bound holds
this term as well, on average over q, where the noise of a thousand genes drowns it; hence the two
are kept apart. In gene space a cell's state is its expression, and the first term says all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from anndata import AnnData

from exprgen._random import generator
from exprgen.models._core import ModelCore
from exprgen.models._progress import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["TERMS", "Surprise", "SurpriseMixin"]

TERMS = ("likelihood", "latent")
"""Names of the terms, of the counts and of the state."""


class Surprise(NamedTuple):
    """Terms ``(n_obs, n_terms)``, nats, and what they are proxies of, by name, each ``(n_obs,)``.

    These are the library and the number of genes detected, above their least value; of continuous
    values, which are normalised for depth, the second alone.
    """

    terms: np.ndarray
    technical: dict[str, np.ndarray]


class SurpriseMixin(ModelCore):
    """Scores of cells for :func:`exprgen.tl.outliers`."""

    @torch.no_grad()
    def _surprise(
        self,
        adata: AnnData,
        terms: Sequence[str],
        *,
        conditions: Literal["own", "best"],
        n_samples: int,
        unseen: Literal["error", "null"],
        noise: tuple[int, int],
        description: str,
        progress_bar: bool,
    ) -> Surprise:
        """Some of :data:`TERMS` for all cells.

        With ``conditions="best"`` a cell is judged under those labels of training under which its
        counts are the likeliest, whatever labels it has. ``noise`` is a seed and a purpose.
        """
        given = [adata] if conditions == "own" else self._under_known_labels(adata)
        options = [self._cells(some, unseen=unseen) for some in given]
        cells = options[0]
        lower = torch.as_tensor(self.module.space.likelihood.lower)
        values = np.zeros((len(cells), len(terms)))
        detected = np.zeros(len(cells))
        for block, part in blocks(len(cells), description, show=progress_bar):
            x, c, library = cells.tensors(part, self._device)
            detected[part] = (x > lower.to(x)).sum(1).cpu().numpy()
            if not self.needs_counts:
                # As in training: a single value below all others is no reason for infinity.
                x = torch.maximum(x, lower.to(x))
            if not terms:
                continue
            found = []
            for option in options:
                c = torch.from_numpy(option.codes[part]).to(c)
                of_block = generator(*noise, block)
                found.append(self._both_terms(x, c, library, terms, n_samples, of_block))
            by_option = torch.stack(found).cpu().numpy()  # the counts' term is the first
            nearest = by_option[:, :, 0].argmin(0)
            both = by_option[nearest, np.arange(len(nearest))]
            values[part] = both[:, [TERMS.index(term) for term in terms]]
        technical = {"library": cells.library} if self.needs_counts else {}
        return Surprise(values, technical | {"genes detected": detected})

    def _both_terms(
        self,
        x: Tensor,
        c: Tensor,
        library: Tensor,
        terms: Sequence[str],
        n_samples: int,
        noise: torch.Generator,
    ) -> Tensor:
        """The terms of some cells, ``(n, 2)``, float64; 0 for that of the state if not wanted."""
        bound = self.module.log_likelihood(
            x,
            c,
            library,
            n_samples=n_samples,
            generator=noise,
            given_depth=self.module.space.depth is not None,
        )
        latent = torch.zeros_like(bound)
        if "latent" in terms:
            latent = self.module.latent_surprise(x, c, library)
        return torch.stack([-bound, latent], 1)

    def _under_known_labels(self, adata: AnnData) -> list[AnnData]:
        """The same cells, all under one combination of labels of training; matrices are shared."""
        layer, embedding = self._setup_args["layer"], self.schema.embedding_key
        labels = self._observed.frame[self.schema.categorical_keys].drop_duplicates()
        return [
            AnnData(
                X=adata.X if layer is None else None,
                layers={} if layer is None else {layer: adata.layers[layer]},
                obs=adata.obs.assign(**labels.iloc[i].to_dict()),
                var=adata.var[[]],
                obsm={} if embedding is None else {embedding: adata.obsm[embedding]},
            )
            for i in range(len(labels))
        ]
