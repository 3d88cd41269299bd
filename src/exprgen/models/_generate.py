"""``sample`` and ``counterfactual``: verbs that return new cells."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from exprgen import _arguments, _slots
from exprgen._random import generator, resolve_seed
from exprgen._stores import check_store, new_store, open_zarr
from exprgen.models._core import ModelCore
from exprgen.models._effects import donor_effects, fold_changes
from exprgen.models._progress import blocks
from exprgen.models._query import CELL, TABLE, Query, log_library
from exprgen.models._statistics import Moments
from exprgen.models._transport import decoder_under

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mudata import MuData


__all__ = ["GenerateMixin"]

Drawn: TypeAlias = tuple[sparse.csr_matrix | np.ndarray, np.ndarray]
"""Values of some cells, ``(n, n_vars)``, and their depths, ``(n,)``, empty without depth."""


class GenerateMixin(ModelCore):
    """Verbs that return new cells."""

    @torch.no_grad()
    def sample(
        self,
        conditions: pd.DataFrame | Mapping[str, Any] | AnnData | MuData | None = None,
        n_obs: int = 1,
        *,
        marginalize: Sequence[str] = (),
        log_fold_change: Mapping[str, float] | pd.Series | pd.DataFrame | None = None,
        library: Literal["sampled"] | float | np.ndarray = "sampled",
        unseen: Literal["error", "null"] = "error",
        on_extrapolation: Literal["warn", "raise", "ignore"] = "warn",
        backed: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
        progress_bar: bool = True,
        seed: int | None = None,
    ) -> AnnData:
        """Draw new cells for given conditions.

        Every value is drawn through the whole model: latent state and depth from p(y | c), the
        donor's effect, and the value from the likelihood.

        Parameters
        ----------
        conditions
            A table or mapping of conditions (scalars are repeated), or an AnnData whose obs and
            obsm are read. ``None`` draws conditions as they occur in training.
        n_obs
            Cells per row of conditions (with ``None``: cells in all). Cells of row i are rows
            ``i * n_obs`` to ``(i + 1) * n_obs - 1``.
        marginalize
            Conditions to leave out and draw as training saw them. Batch and donor are drawn
            whenever they are not given, once per row of conditions: the batch from those seen
            with the conditions, the donor as a new one.
        log_fold_change
            Known log2 fold changes to plant in the means: a mapping or Series by gene, or a
            DataFrame of rows of conditions × genes.
        library
            ``"sampled"``, jointly with the latent state; or fixed depths, a number or one per
            row of conditions, on the scale of setup (totals, or size factors). Models of counts
            only, as is ``log_fold_change``.
        unseen
            ``"null"`` treats a batch that training has not seen as not given.
        on_extrapolation
            What to do outside the trained range or for combinations never seen together.
        backed
            Path of a zarr store to write the cells to as they are drawn; ``None`` keeps them in
            memory. The cells are the same, and are stored once, also where setup had a layer. If
            anything fails, nothing is left at the path.
        overwrite
            Whether to replace a zarr store that is at the path.
        progress_bar
            Whether to show one when it takes more than a few seconds.
        seed
            The same seed gives the same cells. ``None`` takes ``scvi.settings.seed``, or fresh
            entropy; it is recorded in ``uns["exprgen"]``.

        Returns
        -------
        New AnnData with counts (CSR) or continuous values (dense) in X and the layer of setup,
        conditions and ``synthetic``, ``library`` (of counts), ``n_train``, ``support`` and
        ``extrapolated`` in obs, and provenance in ``uns["exprgen"]``. With ``backed`` values are
        left in the store, see :func:`exprgen.datasets.open_zarr`.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        KeyError, TypeError, ValueError, CovariateError, UnseenCategoryError
            If the conditions are not what the model knows.
        FileExistsError
            If something is at the path of ``backed`` that may not be replaced.

        Warns
        -----
        ExtrapolationWarning
            If conditions lie outside what training saw.
        """
        self._check_trained()
        _arguments.check_positive_int(n_obs, "n_obs", minimum=0)
        _arguments.check_bool(overwrite, "overwrite")
        place = None
        if backed is not None:
            read = self._readable(self.adata), self._readable(conditions)
            place = check_store(backed, overwrite=overwrite, reading=read)
        self._check_has_depth(library=library, default="sampled")
        self._check_has_depth(log_fold_change=log_fold_change)
        seed = resolve_seed(seed)
        query = self._ask(
            self._readable(conditions),
            n_obs=n_obs,
            marginalize=marginalize,
            unseen=unseen,
            on_extrapolation=on_extrapolation,
            rng=np.random.default_rng([seed, TABLE]),
        )
        log_depth = log_library(library, query.rows, query.n_rows)
        planted = fold_changes(log_fold_change, query, self.var_names)
        drawn = self._drawn_cells(query, log_depth, planted, seed, progress_bar)
        if place is None:
            return self._synthetic(query, *self._stack(list(drawn)), seed)
        with new_store(place, overwrite=overwrite) as store:
            depths = [np.zeros(0, np.float32)]
            store.append(self._nothing)
            for values, depth in drawn:
                store.append(values)
                depths.append(depth)
            store.write(self._described(query, np.concatenate(depths), seed))
        return open_zarr(place)

    def _drawn_cells(
        self,
        query: Query,
        log_depth: Tensor | None,
        planted: Callable[[slice], Tensor] | None,
        seed: int,
        progress_bar: bool,
    ) -> Iterator[Drawn]:
        """Values and depths of the cells asked for, block by block."""
        space = self.module.space
        for block, part in blocks(len(query.table), "Sampling", show=progress_bar):
            noise = generator(seed, CELL, block)
            effect = donor_effects(self.module, query.codes[part], query.donors[part], seed)
            c = torch.from_numpy(query.codes[part]).to(self._device)
            depth = None if log_depth is None else log_depth[part].to(self._device)
            y, (location, extra) = self.module.sample(
                c, noise, log_depth=depth, effect=effect, **self._density_options
            )
            if planted is not None:
                location = location + planted(part).to(location)
            values = space.likelihood.draw(location, noise, extra).numpy()
            yield self._with_depths(values, space.log_depth(y, c))

    @torch.no_grad()
    def counterfactual(
        self,
        adata: AnnData | MuData | None = None,
        *,
        to: Mapping[str, Any],
        indices: np.ndarray | None = None,
        n_samples: int = 25,
        on_extrapolation: Literal["warn", "raise", "ignore"] = "warn",
        key_added: str = "exprgen",
        progress_bar: bool = True,
        seed: int | None = None,
    ) -> AnnData:
        """The same cells under other conditions, as new cells.

        Each cell's latent state is drawn from its posterior given its counts, shifted by the
        difference between the mean latent states of the two conditions, E[z | c'] - E[z | c], and
        decoded under the new ones. What is held: the cell's place relative to its condition's
        mean, its depth, its batch and its donor's effect.

        Where the labels of the new conditions were never seen together, the response is that of
        the most similar combinations that were seen both before and after the change, weighted
        by similarity; with none such the networks extrapolate. There is a warning in any case,
        and ``obs["support"]`` says so.

        In gene space the path is followed instead, back to noise under the cell's own conditions
        and forth under the others: what is held is the cell's place in the whole law of its
        condition. That takes some eighty evaluations of the network for every draw. Around a
        predictor's mean of continuous values each gene keeps its place in the law of its
        residuals, and nothing is drawn.

        Parameters
        ----------
        adata
            Cells; ``None`` is the model's own.
        to
            Conditions to change, by name: a value, or one per cell.
        indices
            Which cells.
        n_samples
            Posterior draws per cell that the statistics average over.
        on_extrapolation
            What to do about conditions outside what training saw.
        key_added
            Prefix of the statistics' layers.
        progress_bar, seed
            As in :meth:`sample`.

        Returns
        -------
        New AnnData: one draw per cell in X and the layer of setup, mean and standard
        deviation of the draws in layers, changed conditions in obs, and ``obs["source"]``, the
        name of the cell that it came from.
        """
        self._check_trained()
        _arguments.check_positive_int(n_samples, "n_samples")
        _slots.check_key(key_added)
        seed = resolve_seed(seed)
        cells = self._cells(adata, indices)
        source, embedding = self.schema.parse(cells.adata, argument="adata")
        source = source.iloc[cells.rows]
        embedding = None if embedding is None else embedding[cells.rows]
        changed = self._changed(source, embedding, to)
        query = self._ask(
            changed,
            on_extrapolation=on_extrapolation,
            rng=np.random.default_rng([seed, TABLE]),
        )
        n_vars = len(self.var_names)
        mean, std = np.zeros((2, len(source), n_vars), np.float32)
        kept = []
        space, seen = self.module.space, self._observed.label_codes
        for block, part in blocks(len(source), "Counterfactual", show=progress_bar):
            noise = generator(seed, CELL, block)
            x, c, library = cells.tensors(part, self._device)
            new_c = torch.from_numpy(query.codes[part]).to(self._device)
            centre, sd = space.encode(x, c, library)
            decode = decoder_under(self.module, x, c, new_c, seen)
            moments = Moments()
            for _ in range(n_samples):
                y = space.draw(centre, sd, noise)
                log_depth = space.log_depth(y, c)
                location, extra = decode(y, log_depth)
                drawn = space.likelihood.draw(location, noise, extra)
                moments.add(drawn)
            mean[part], std[part] = moments.mean.numpy(), moments.variance().sqrt().numpy()
            kept.append(self._with_depths(drawn.numpy(), log_depth))
        synthetic = self._synthetic(query, *self._stack(kept), seed)
        synthetic.obs["source"] = cells.adata.obs_names[cells.rows].to_numpy()
        synthetic.layers[f"{key_added}_mean"], synthetic.layers[f"{key_added}_std"] = mean, std
        return synthetic

    def _changed(
        self, source: pd.DataFrame, embedding: np.ndarray | None, to: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The cells' conditions with those in ``to`` replaced, as a mapping to ask with."""
        if not to:
            raise ValueError(f"to must name a condition to change: {self.schema.condition_keys}.")
        self.schema.parse(to, argument="to")
        key = self.schema.embedding_key
        # By position, as everywhere, also where a value is a Series.
        columns = {
            name: value if np.ndim(value) == 0 else np.asarray(value)
            for name, value in to.items()
            if name != key
        }
        for name, value in columns.items():
            if np.ndim(value) and len(value) != len(source):
                raise ValueError(
                    f"to[{name!r}] must be one value or one for each of the {len(source)} cells, "
                    f"got {len(value)}."
                )
        table = source.assign(**columns)
        conditions: dict[str, Any] = {name: table[name].to_numpy() for name in table}
        if key is not None and embedding is not None:
            conditions[key] = np.broadcast_to(to.get(key, embedding), embedding.shape)
        return conditions

    def _packed(self, values: np.ndarray) -> sparse.csr_matrix | np.ndarray:
        """Draws ``(n, n_vars)`` in the form that they are kept in: counts are mostly 0."""
        return sparse.csr_matrix(values) if self.needs_counts else values

    @property
    def _nothing(self) -> sparse.csr_matrix | np.ndarray:
        """No draws, ``(0, n_vars)``."""
        return self._packed(np.zeros((0, len(self.var_names)), np.float32))

    def _with_depths(self, values: np.ndarray, log_depth: Tensor | None) -> Drawn:
        """Draws of a block, and depths on the scale of setup, which real cells' column has."""
        depth = self.module.space.depth
        if depth is None or log_depth is None:
            return self._packed(values), np.zeros(0, np.float32)
        depths = log_depth.exp().cpu().numpy() if depth.observed else values.sum(1)
        return self._packed(values), depths

    def _stack(self, drawn: list[Drawn]) -> Drawn:
        """Draws and depths of all blocks, in order."""
        values, depths = zip(*(drawn or [(self._nothing, np.zeros(0, np.float32))]), strict=True)
        stacked = sparse.vstack(values, "csr") if self.needs_counts else np.concatenate(values)
        return stacked, np.concatenate(depths)

    def _synthetic(
        self,
        query: Query,
        values: sparse.csr_matrix | np.ndarray,
        depths: np.ndarray,
        seed: int,
    ) -> AnnData:
        """Sampled cells as an AnnData that survives scanpy."""
        synthetic = self._described(query, depths, seed)
        synthetic.X = values
        layer = self._setup_args["layer"]
        if layer is not None:
            synthetic.layers[layer] = values.copy()
        return synthetic

    def _described(self, query: Query, depths: np.ndarray, seed: int) -> AnnData:
        """All that is said of sampled cells but their values."""
        table, schema = query.table, self.schema
        obs = schema.restore(table.reset_index(drop=True))
        obs.index = [f"synthetic_{i}" for i in range(len(table))]
        obs["synthetic"] = True
        if self.module.space.depth is not None:
            obs["library"] = depths
        obs["n_train"] = self._observed.n_train(table)
        obs["support"] = pd.Categorical(
            self._observed.support(table, query.embedding),
            categories=["seen", "between", "unseen combination", "outside range"],
        )
        obs["extrapolated"] = obs["support"].isin(["unseen combination", "outside range"])
        synthetic = AnnData(obs=obs, var=pd.DataFrame(index=self.var_names))
        if query.embedding is not None:
            synthetic.obsm[schema.embedding_key] = query.embedding
        synthetic.uns["exprgen"] = {
            "model": type(self).__name__,
            "version": version("exprgen"),
            "seed": seed,
            "layer": self._setup_args["layer"] or "",
            "size_factor_key": self._setup_args["size_factor_key"] or "",
            "training_seed": self.seed_,
            **self._density_options,
        }
        return synthetic
