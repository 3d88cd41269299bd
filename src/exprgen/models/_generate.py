"""``sample`` and ``counterfactual``: verbs that return new cells."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from exprgen import _arguments, _slots
from exprgen._random import generator, resolve_seed
from exprgen.models._core import ModelCore
from exprgen.models._progress import blocks
from exprgen.models._query import CELL, DONOR, TABLE, Query, log_library
from exprgen.models._statistics import Moments
from exprgen.models._transport import decoder_under

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mudata import MuData

    from exprgen.module import ExpressionModule

__all__ = ["GenerateMixin"]


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
        progress_bar
            Whether to show one when it takes more than a few seconds.
        seed
            The same seed gives the same cells. ``None`` takes ``scvi.settings.seed``, or fresh
            entropy; it is recorded in ``uns["exprgen"]``.

        Returns
        -------
        New AnnData with counts (CSR) or continuous values (dense) in X and the layer of setup,
        conditions and ``synthetic``, ``library`` (of counts), ``n_train``, ``support`` and
        ``extrapolated`` in obs, and provenance in ``uns["exprgen"]``.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        KeyError, TypeError, ValueError, CovariateError, UnseenCategoryError
            If the conditions are not what the model knows.

        Warns
        -----
        ExtrapolationWarning
            If conditions lie outside what training saw.
        """
        self._check_trained()
        _arguments.check_positive_int(n_obs, "n_obs", minimum=0)
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
        n_cells = len(query.table)
        log_depth = log_library(library, query.rows, query.n_rows)
        planted = _planted(log_fold_change, query, self.var_names)
        space, drawn = self.module.space, []
        for block, part in blocks(n_cells, "Sampling", show=progress_bar):
            noise = generator(seed, CELL, block)
            effect = _donor_effects(self.module, query.codes[part], query.donors[part], seed)
            c = torch.from_numpy(query.codes[part]).to(self._device)
            depth = None if log_depth is None else log_depth[part].to(self._device)
            y, (location, extra) = self.module.sample(
                c, noise, log_depth=depth, effect=effect, **self._density_options
            )
            if planted is not None:
                location = location + planted(part).to(location)
            values = space.likelihood.draw(location, noise, extra).numpy()
            drawn.append((self._packed(values), _depths(space.log_depth(y, c))))
        values, depths = self._stack(drawn)
        return self._synthetic(query, values, depths, seed)

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
            kept.append((self._packed(drawn.numpy()), _depths(log_depth)))
        values, depths = self._stack(kept)
        synthetic = self._synthetic(query, values, depths, seed)
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

    def _stack(
        self, blocks: list[tuple[sparse.csr_matrix | np.ndarray, np.ndarray]]
    ) -> tuple[sparse.csr_matrix | np.ndarray, np.ndarray]:
        """Draws and depths of all blocks, in order."""
        if not blocks:
            return self._packed(np.zeros((0, len(self.var_names)), np.float32)), np.zeros(0)
        values, depths = zip(*blocks, strict=True)
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
        table, schema = query.table, self.schema
        obs = schema.restore(table.reset_index(drop=True))
        obs.index = [f"synthetic_{i}" for i in range(len(table))]
        obs["synthetic"] = True
        if self.module.space.depth is not None:
            # On the scale of setup: what a user would compare with the real cells' column.
            observed = self.module.space.depth.observed
            obs["library"] = depths if observed else np.asarray(values.sum(1)).ravel()
        obs["n_train"] = self._observed.n_train(table)
        obs["support"] = pd.Categorical(
            self._observed.support(table, query.embedding),
            categories=["seen", "between", "unseen combination", "outside range"],
        )
        obs["extrapolated"] = obs["support"].isin(["unseen combination", "outside range"])
        synthetic = AnnData(X=values, obs=obs, var=pd.DataFrame(index=self.var_names))
        layer = self._setup_args["layer"]
        if layer is not None:
            synthetic.layers[layer] = values.copy()
        if query.embedding is not None:
            synthetic.obsm[schema.embedding_key] = query.embedding
        synthetic.uns["exprgen"] = {
            "model": type(self).__name__,
            "version": version("exprgen"),
            "seed": seed,
            "layer": layer or "",
            "size_factor_key": self._setup_args["size_factor_key"] or "",
            "training_seed": self.seed_,
            **self._density_options,
        }
        return synthetic


def _donor_effects(
    module: ExpressionModule, codes: np.ndarray, donors: np.ndarray, seed: int
) -> Tensor | None:
    """Each row's donor effect, ``(n, n_vars)``: rows of one donor number share one draw."""
    space = module.space
    if space.donors is None:
        return None
    known = space.features.donor(torch.from_numpy(codes)).numpy()
    numbers, first, inverse = np.unique(donors, return_index=True, return_inverse=True)
    draws = [
        space.donors.draw(
            int(known[row]), 1, generator(seed, DONOR, int(number)), space.donor_depths
        )[0]
        for number, row in zip(numbers, first, strict=True)
    ]
    return torch.stack(draws)[torch.from_numpy(inverse)]


def _planted(
    log_fold_change: Mapping[str, float] | pd.Series | pd.DataFrame | None,
    query: Query,
    var_names: pd.Index,
) -> Callable[[slice], torch.Tensor] | None:
    """Function from a slice of cells to natural-log shifts of their means, ``(n, n_vars)``."""
    if log_fold_change is None:
        return None
    if isinstance(log_fold_change, pd.DataFrame):
        changes, rows = log_fold_change, query.rows
        if len(changes) != query.n_rows:
            raise ValueError(
                f"log_fold_change has {len(changes)} rows, conditions have {query.n_rows}: give "
                "one per row, or a mapping by gene."
            )
    else:
        if not isinstance(log_fold_change, Mapping | pd.Series):
            raise TypeError(
                "log_fold_change must be a mapping or Series by gene, or a DataFrame of rows of "
                f"conditions x genes; got {log_fold_change!r} ({type(log_fold_change).__name__})."
            )
        series = pd.Series(log_fold_change, dtype=object)
        changes = pd.DataFrame([series.to_numpy()], columns=list(series.index))
        rows = np.zeros(len(query.rows), dtype=np.int64)
    genes = _arguments.check_genes(changes.columns, var_names)
    try:
        values = changes.to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"log_fold_change must hold numbers: {error}.") from error
    if not np.isfinite(values).all():
        raise ValueError("log_fold_change must be finite.")
    table = np.zeros((len(values), len(var_names)), dtype=np.float32)
    table[:, genes] = values * np.log(2)
    return lambda part: torch.from_numpy(table[rows[part]])


def _depths(log_depth: Tensor | None) -> np.ndarray:
    """Depths of a block of cells; none without depth."""
    return np.zeros(0) if log_depth is None else log_depth.exp().cpu().numpy()
