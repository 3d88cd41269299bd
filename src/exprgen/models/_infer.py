"""Verbs about given cells: likelihood, latent representation, posterior predictive draws."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from exprgen import _arguments, _slots
from exprgen._random import generator, resolve_seed
from exprgen.models._core import ModelCore
from exprgen.models._progress import blocks
from exprgen.models._query import CELL

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sparse
    from anndata import AnnData
    from mudata import MuData

__all__ = ["InferMixin"]

logger = logging.getLogger("exprgen")


class InferMixin(ModelCore):
    """Verbs about given cells."""

    def log_likelihood(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Any = None,
        n_samples: int = 50,
        given: Literal["conditions", "depth"] = "conditions",
        unseen: Literal["error", "null"] = "error",
        key_added: str | None = None,
        overwrite: bool = False,
        progress_bar: bool = True,
        seed: int | None = None,
    ) -> np.ndarray:
        """Log p(x | c) of each cell: an importance-weighted *lower bound*, nats per cell.

        The bound tightens with ``n_samples`` and is evaluated in float64. With a size factor it
        is log p(x | depth, c). Of continuous values it is a density, in units of the layer: it
        compares models of the same layer, never with those of counts. It is ``-inf`` for a cell
        with a value below its gene's least one in training, which such a model excludes; there
        is a warning that counts these values. In training and validation they count as that
        least value, so that one of them does not decide which epoch is the best.

        Parameters
        ----------
        adata
            Cells; ``None`` is the model's own data.
        indices
            Which cells.
        n_samples
            Importance samples per cell.
        given
            ``"depth"`` conditions on depth at the observed total as well, to compare with models
            that are only defined so.
        unseen
            ``"null"`` takes batches that training has not seen as the average of those it has.
        key_added
            Prefix under which to write ``obs["{key}_log_likelihood"]``; ``None`` writes nothing.
        overwrite, progress_bar, seed
            As in :meth:`predict`.

        Returns
        -------
        Array ``(n_cells,)``, float64.
        """
        self._check_trained()
        _arguments.check_positive_int(n_samples, "n_samples")
        _arguments.check_choice(given, "given", ("conditions", "depth"))
        self._check_has_depth(given=given, default="conditions")
        seed = resolve_seed(seed)
        cells = self._cells(adata, indices, unseen=unseen)
        _check_writable(cells.given, indices, key_added)
        values = np.zeros(len(cells))
        for block, part in blocks(len(cells), "Log-likelihood", show=progress_bar):
            bound = self.module.log_likelihood(
                *cells.tensors(part, self._device),
                n_samples=n_samples,
                generator=generator(seed, CELL, block),
                given_depth=given == "depth",
            )
            values[part] = bound.cpu().numpy()
        if key_added is not None:
            info = {"n_samples": n_samples, "seed": seed, "estimator": "bound", "given": given}
            info["unit"] = "nats per cell"
            _slots.write(
                self._home(cells.given),
                key_added,
                "log_likelihood",
                model=type(self).__name__,
                obs={"log_likelihood": values, "split": self._split_of(cells.adata)},
                info=info,
                overwrite=overwrite,
            )
        return values

    @torch.no_grad()
    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        indices: Any = None,
        *,
        return_dist: bool = False,
        unseen: Literal["error", "null"] = "error",
        key_added: str | None = None,
        overwrite: bool = False,
        progress_bar: bool = True,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Posterior mean of the latent state z of each cell.

        The encoder does not see the batch: cells of a new batch are mapped with
        ``unseen="null"``. In gene space it is the principal components of the cell's normal
        scores, see :class:`~exprgen.spaces.GeneSpace`, which know nothing of conditions.

        Parameters
        ----------
        adata
            Cells; ``None`` is the model's own data.
        indices
            Which cells.
        return_dist
            Whether to return the posterior's standard deviations as well.
        unseen
            ``"null"`` accepts batches that training has not seen.
        key_added
            Key under which to write ``obsm["X_{key}"]`` and ``obsm["X_{key}_std"]``.
        overwrite, progress_bar
            As in :meth:`predict`.

        Returns
        -------
        Mean ``(n_cells, n_latent)``; with ``return_dist`` mean and standard deviation.

        Warns
        -----
        UserWarning
            If the model has conditions: the latent state is then computed given them (not in gene
            space).
        """
        self._check_trained()
        if self.schema.condition_keys and self.module.space.has_noise:
            warnings.warn(
                f"The latent representation is computed given {self.schema.condition_keys}: it "
                "holds what these do not explain. Train without conditions for an unsupervised "
                "embedding.",
                UserWarning,
                stacklevel=3,  # beyond torch.no_grad's wrapper
            )
        cells = self._cells(adata, indices, unseen=unseen)
        _check_writable(cells.given, indices, key_added)
        mean = np.zeros((len(cells), self.module.space.n_latent), np.float32)
        std = np.zeros_like(mean)
        for _, part in blocks(len(cells), "Latent representation", show=progress_bar):
            z, sd = self.module.represent(*cells.tensors(part, self._device))
            mean[part], std[part] = z.cpu().numpy(), sd.cpu().numpy()
        if key_added is not None:
            _slots.write(
                self._home(cells.given),
                key_added,
                "get_latent_representation",
                model=type(self).__name__,
                obsm={"latent": mean, "latent_std": std},
                info={},
                overwrite=overwrite,
            )
        return (mean, std) if return_dist else mean

    @torch.no_grad()
    def posterior_predictive_sample(
        self,
        adata: AnnData | MuData | None = None,
        indices: Any = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> sparse.GCXS:
        """Values drawn given each cell's own, for posterior predictive checks.

        This is scvi-tools' contract, on which its
        :class:`~scvi.criticism.PosteriorPredictiveCheck` runs. For new cells see :meth:`sample`.

        Parameters
        ----------
        adata, indices
            Which cells.
        n_samples
            Draws per cell.
        gene_list
            Which genes.
        batch_size
            Part of the contract, without effect: draws come in blocks of a fixed size.
        seed
            As in :meth:`sample`.

        Returns
        -------
        Sparse array ``(n_cells, n_genes)``, or ``(n_cells, n_genes, n_samples)`` of several.
        """
        import sparse

        self._check_trained()
        self._check_has_noise("posterior_predictive_sample")
        _arguments.check_positive_int(n_samples, "n_samples")
        seed = resolve_seed(seed)
        cells = self._cells(adata, indices)
        columns = _arguments.check_genes(gene_list, self.var_names)
        space = self.module.space
        places, values = [np.zeros((3, 0), np.intp)], [np.zeros(0, np.float32)]
        for block, part in blocks(len(cells), "Posterior predictive", show=False):
            noise = generator(seed, CELL, block)
            x, c, library = cells.tensors(part, self._device)
            centre, sd = space.encode(x, c, library)
            effect = space.known_effect(c)
            counts = []
            for _ in range(n_samples):
                y = space.draw(centre, sd, noise)
                location, extra = space.decode(y, c, effect)
                counts.append(space.likelihood.draw(location, noise, extra).numpy())
            drawn = np.stack(counts, -1)[:, columns]
            place = np.stack(np.nonzero(drawn))
            values.append(drawn[tuple(place)])
            place[0] += part.start
            places.append(place)
        # Put together here: to concatenate its arrays this package compiles for seconds.
        n_dims = 2 if n_samples == 1 else 3
        place, shape = np.concatenate(places, 1), (len(cells), len(columns), n_samples)
        coo = sparse.COO(place[:n_dims], np.concatenate(values), shape=shape[:n_dims])
        return sparse.GCXS.from_coo(coo)


def _check_writable(adata: AnnData | MuData, indices: Any, key_added: str | None) -> None:
    """Refuse to write results of some cells, or into a view; before they are computed."""
    if key_added is None:
        return
    if indices is not None or adata.is_view:
        raise ValueError(
            f"key_added={key_added!r} writes the results of all cells into adata, but "
            + ("indices selects some" if indices is not None else "adata is a view")
            + ". Give adata[...].copy(), or leave key_added out and use the array returned."
        )
