"""Verbs about given cells: likelihood, latent representation, posterior predictive draws."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from exprgen import _arguments, _slots, _validate
from exprgen._errors import GeneMismatchError
from exprgen._random import generator, resolve_seed
from exprgen.models._cells import Cells, GeneReader, cell_keys, library_of, split_labels
from exprgen.models._fields import encode_cells
from exprgen.models._progress import blocks
from exprgen.models._query import CELL, Query
from exprgen.module import ExpressionModule

if TYPE_CHECKING:
    import sparse

__all__ = ["InferMixin"]

logger = logging.getLogger("exprgen")


class InferMixin:
    """Verbs about given cells, and how they are read and written."""

    module: ExpressionModule

    def log_likelihood(
        self,
        adata: AnnData | None = None,
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
        """log p(x | c) of each cell: an importance-weighted *lower bound*, nats per cell.

        The bound tightens with ``n_samples`` and is evaluated in float64. With a size factor it
        is log p(x | depth, c).

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
        seed = resolve_seed(seed)
        cells = self._cells(adata, indices, unseen=unseen)
        _check_writable(cells.adata, indices, key_added)
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
                cells.adata,
                key_added,
                "log_likelihood",
                model=type(self).__name__,
                obs={"log_likelihood": values, "split": cells.split},
                info=info,
                overwrite=overwrite,
            )
        return values

    @torch.no_grad()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
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
        ``unseen="null"``.

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
            If the model has conditions: the latent state is then computed given them.
        """
        self._check_trained()
        if self.schema.condition_keys:
            warnings.warn(
                f"The latent representation is computed given {self.schema.condition_keys}: it "
                "holds what these do not explain. Train without conditions for an unsupervised "
                "embedding.",
                UserWarning,
                stacklevel=3,  # beyond torch.no_grad's wrapper
            )
        cells = self._cells(adata, indices, unseen=unseen)
        _check_writable(cells.adata, indices, key_added)
        mean = np.zeros((len(cells), self.module.space.n_latent), np.float32)
        std = np.zeros_like(mean)
        for _, part in blocks(len(cells), "Latent representation", show=progress_bar):
            z, sd = self.module.represent(*cells.tensors(part, self._device))
            mean[part], std[part] = z.cpu().numpy(), sd.cpu().numpy()
        if key_added is not None:
            _slots.write(
                cells.adata,
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
        adata: AnnData | None = None,
        indices: Any = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        *,
        seed: int | None = None,
    ) -> sparse.GCXS:
        """Counts drawn given each cell's own counts, for posterior predictive checks.

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
        seed
            As in :meth:`sample`.

        Returns
        -------
        Sparse array ``(n_cells, n_genes)``, or ``(n_cells, n_genes, n_samples)`` of several.
        """
        import sparse

        self._check_trained()
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
                y = centre + sd * torch.randn(sd.shape, generator=noise).to(sd)
                counts.append(space.likelihood.draw(space.decode(y, c, effect), noise).numpy())
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

    # How cells are read and results written ------------------------------------------------

    def _own_data(self) -> AnnData:
        if self.adata is None:
            raise ValueError(
                f"This {type(self).__name__} was loaded without data: give an AnnData."
            )
        return self.adata

    def _cells(
        self, adata: AnnData | None, indices: Any = None, *, unseen: str = "error"
    ) -> Cells:
        """Check and encode cells, without changing the object they come in."""
        _arguments.check_choice(unseen, "unseen", ("error", "null"))
        adata = self._own_data() if adata is None else adata
        layer = self._setup_args["layer"]
        summary = _validate.check_query_data(
            adata,
            layer,
            needs_counts=self.needs_counts,
            allow_non_integer=self._setup_args["allow_non_integer"],
        )
        order = _validate.align_genes(adata.var_names, self.var_names)
        reader = GeneReader(_validate.matrix_of(adata, layer), order)
        totals = summary.row_totals if order is None else reader.totals()
        library = library_of(adata, self._setup_args["size_factor_key"], totals)
        codes = encode_cells(self.schema, adata, unseen=unseen)
        rows = np.arange(adata.n_obs)
        if indices is not None:
            rows = _arguments.check_indices(indices, adata.n_obs)
        split = split_labels(cell_keys(adata, totals), self.cell_keys_)
        return Cells(adata, reader, rows, codes[rows], library[rows], split)

    def _check_same_genes(self, adata: AnnData, *, quiet: bool = True) -> np.ndarray | None:
        """Column of ``adata`` for each of the model's genes; layers need all of them and no more.

        Raises
        ------
        GeneMismatchError
            If ``adata`` has other genes, so that a layer cannot hold the results.
        """
        order = _validate.align_genes(adata.var_names, self.var_names, quiet=quiet)
        if adata.n_vars != len(self.var_names):
            raise GeneMismatchError(
                f"adata has {adata.n_vars} genes, the model {len(self.var_names)}: a layer cannot "
                "hold the results. Give adata[:, model.var_names].copy(), or genes=[...] to write "
                "to obsm."
            )
        return order

    def _write(
        self,
        adata: AnnData,
        verb: str,
        values: Mapping[str, np.ndarray],
        info: dict[str, Any],
        *,
        split: pd.Categorical | None,
        selected: np.ndarray | None,
        key_added: str,
        overwrite: bool,
        copy: bool,
    ) -> AnnData:
        """Write arrays ``(n_obs, n_genes)`` to layers, in the order of ``adata``'s genes."""
        order = self._check_same_genes(adata) if selected is None else None
        if order is not None:
            place = np.argsort(order)
            values = {name: array[:, place] for name, array in values.items()}
        target = _slots.target(adata, copy)
        _slots.write(
            target,
            key_added,
            verb,
            model=type(self).__name__,
            layers=values,
            obs={} if split is None else {"split": split},
            info=info,
            var_names=None if selected is None else list(self.var_names[selected]),
            overwrite=overwrite,
        )
        return target

    def _split_of(self, adata: AnnData) -> pd.Categorical | None:
        """Whether each cell was trained on; ``None`` without counts of the model's genes."""
        layer = self._setup_args["layer"]
        matrix = adata.X if layer is None else adata.layers.get(layer)
        if matrix is None or not self.var_names.isin(adata.var_names).all():
            return None
        order = _validate.align_genes(adata.var_names, self.var_names, quiet=True)
        totals = GeneReader(matrix, order).totals()
        return split_labels(cell_keys(adata, totals), self.cell_keys_)

    def _new_adata(self, query: Query) -> AnnData:
        """An AnnData with a row per condition and no counts, to write to."""
        obs = self.schema.restore(query.table)
        obs.index = obs.index.astype(str)
        adata = AnnData(obs=obs, var=pd.DataFrame(index=self.var_names))
        if query.embedding is not None:
            adata.obsm[self.schema.embedding_key] = query.embedding
        return adata


def _check_writable(adata: AnnData, indices: Any, key_added: str | None) -> None:
    """Refuse to write results of some cells, or into a view; before they are computed."""
    if key_added is None:
        return
    if indices is not None or adata.is_view:
        raise ValueError(
            f"key_added={key_added!r} writes the results of all cells into adata, but "
            + ("indices selects some" if indices is not None else "adata is a view")
            + ". Give adata[...].copy(), or leave key_added out and use the array returned."
        )
