"""``predict`` and ``denoise``: statistics per cell and gene, written into the AnnData."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from exprgen import _arguments, _slots
from exprgen._errors import CovariateError, name_some
from exprgen._random import generator, resolve_seed
from exprgen._stores import check_store, new_store, open_zarr
from exprgen.models._core import ModelCore
from exprgen.models._progress import blocks, track
from exprgen.models._query import CELL, TABLE, Query, log_library, with_batch
from exprgen.models._results import InMemory, InStore
from exprgen.models._statistics import (
    Moments,
    Predictive,
    pooled,
    predictive_of_cell,
    predictive_of_mean,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from mudata import MuData

    from exprgen.spaces import Autoencoder, Decoded

__all__ = ["PredictMixin"]

logger = logging.getLogger("exprgen")


class PredictMixin(ModelCore):
    """Verbs that write statistics into an AnnData."""

    def predict(
        self,
        conditions: pd.DataFrame | Mapping[str, Any] | AnnData | MuData | None = None,
        *,
        of: Literal["cell", "mean"] = "cell",
        n_cells: int | None = None,
        genes: Sequence[str] | None = None,
        library: float | np.ndarray | None = None,
        n_samples: int = 1000,
        quantiles: Sequence[float] = (0.05, 0.95),
        unseen: Literal["error", "null"] = "error",
        on_extrapolation: Literal["warn", "raise", "ignore"] = "warn",
        key_added: str = "exprgen",
        overwrite: bool = False,
        copy: bool = False,
        backed: str | os.PathLike[str] | None = None,
        progress_bar: bool = True,
        seed: int | None = None,
    ) -> AnnData | MuData:
        """Mean, spread and quantiles of p(x | c), per cell and gene.

        This uses the conditions, never the cells' own counts; for those see :meth:`denoise`.
        Rows with equal conditions share one computation.

        Parameters
        ----------
        conditions
            An AnnData (results are written to it), or a table or mapping of conditions (a new
            AnnData comes back, one row per condition). ``None`` is the model's own data.
        of
            ``"cell"``: the values of a cell. ``"mean"``: the mean of ``n_cells`` cells of
            one donor, the pseudobulk; its interval holds the between-donor variance if a
            ``donor_key`` was registered and the donor is new.
        n_cells
            Cells in the mean; ``None`` is infinitely many, which needs a ``donor_key``.
        genes
            Only these genes; results then go to obsm, with their names in ``uns``.
        library
            Fixed depths on the scale of setup, one number or one per row; ``None`` draws them
            jointly with the latent state. Models of counts only.
        n_samples
            Draws per distinct row of conditions.
        quantiles
            Which quantiles to write, each in (0, 1).
        unseen, on_extrapolation
            As in :meth:`sample`.
        key_added
            Prefix of the slots: layers ``{key}_mean``, ``{key}_std`` and its terms
            ``{key}_std_latent`` and ``{key}_std_donor``, ``{key}_q05`` …, ``obs["{key}_split"]``,
            and ``uns[key]``. Units are those of the modelled layer.
        overwrite
            Whether to replace slots of these names that exprgen did not write.
        copy
            Whether to write to a copy.
        backed
            Path of a zarr store to write the results to as they come, where they are too many for
            memory: a new AnnData with the conditions' obs, the genes asked for and the results in
            layers, all genes or some. ``overwrite`` is then about a store at the path.
        progress_bar, seed
            As in :meth:`sample`.

        Returns
        -------
        The AnnData that carries the results: the same object, or a copy if it was a view. With
        ``backed`` that of the store, see :func:`exprgen.datasets.open_zarr`.
        """
        return self._predict(
            (self,),
            conditions,
            of=of,
            n_cells=n_cells,
            genes=genes,
            library=library,
            n_samples=n_samples,
            quantiles=quantiles,
            unseen=unseen,
            on_extrapolation=on_extrapolation,
            key_added=key_added,
            overwrite=overwrite,
            copy=copy,
            backed=backed,
            progress_bar=progress_bar,
            seed=seed,
        )

    def _predict(
        self,
        models: Sequence[PredictMixin],
        conditions: pd.DataFrame | Mapping[str, Any] | AnnData | MuData | None,
        *,
        of: Literal["cell", "mean"],
        n_cells: int | None,
        genes: Sequence[str] | None,
        library: float | np.ndarray | None,
        n_samples: int,
        quantiles: Sequence[float],
        unseen: Literal["error", "null"],
        on_extrapolation: Literal["warn", "raise", "ignore"],
        key_added: str,
        overwrite: bool,
        copy: bool,
        progress_bar: bool,
        seed: int | None,
        backed: str | os.PathLike[str] | None = None,
    ) -> AnnData | MuData:
        """:meth:`predict` by several models, of which this is one, as equally likely."""
        self._check_trained()
        _arguments.check_choice(of, "of", ("cell", "mean"))
        _arguments.check_positive_int(n_samples, "n_samples")
        quantiles = _arguments.check_quantiles(quantiles)
        if n_cells is not None:
            _arguments.check_positive_int(n_cells, "n_cells")
        elif of == "mean" and self.module.space.donors is None:
            raise ValueError(
                "of='mean' of infinitely many cells has no spread without a donor_key: give "
                "n_cells, the number of cells in the mean."
            )
        self._check_has_depth(library=library)
        selected = None if genes is None else _arguments.check_genes(genes, self.var_names)
        place = None
        if backed is not None:
            _arguments.check_bool(overwrite, "overwrite")
            read = self._readable(self.adata), self._readable(conditions)
            place = check_store(backed, overwrite=overwrite, reading=read)
            _slots.check_key(key_added)
            if copy:
                raise ValueError("copy=True is of no use with backed, which writes to no AnnData.")
        seed = resolve_seed(seed)
        if conditions is None:
            conditions = self._own_data()
        target, conditions = conditions, self._readable(conditions)
        given = isinstance(conditions, AnnData)
        if given:
            logger.info("predict uses the conditions, not the counts; see denoise for those.")
            if selected is None and place is None:
                self._check_same_genes(conditions, quiet=False)
        split = self._split_of(conditions) if given else None
        if of == "mean":
            self._check_batch_given(conditions)
        queries = [
            model._ask(
                conditions,
                draw_batch=False,
                unseen=unseen,
                on_extrapolation=on_extrapolation if model is self else "ignore",
                rng=np.random.default_rng([seed, TABLE]),
            )
            for model in models
        ]
        query = queries[0]
        known_donors = [
            model._known_donors(asked) for model, asked in zip(models, queries, strict=True)
        ]
        every, *others = map(set, known_donors)
        if partly := every.union(*others) - every.intersection(*others):
            raise ValueError(
                f"Donors {name_some(sorted(partly))} are known to some of the models and new to "
                "others, which were loaded without their donors' labels: save all of them with "
                "donor_labels=True, or leave the donor out of conditions."
            )
        rows = np.arange(len(query.table))
        log_depth = log_library("sampled" if library is None else library, rows, len(rows))
        names = [_slots.quantile_name(q) for q in quantiles]
        columns = slice(None) if selected is None else selected
        laws = [
            model._laws(
                asked, log_depth, of, n_cells, n_samples, seed, progress_bar and model is self
            )
            for model, asked in zip(models, queries, strict=True)
        ]

        def filled(results: InMemory) -> Mapping[str, Any]:
            for group, law in pooled(laws):
                slots = law.slots(quantiles, names)
                results.add(group, {name: value[columns] for name, value in slots.items()})
            return results.close()

        info: dict[str, Any] = {
            "of": of,
            "n_cells": n_cells or 0,
            "n_samples": n_samples,
            "quantiles": list(quantiles),
            "library": _in_words(library),
            "unseen": unseen,
            "layer": self._setup_args["layer"] or "",
            "weights": self._fingerprint(),
            "known_donors": known_donors[0] or None,
            "seed": seed,
            **self._density_options,
        }
        if len(models) > 1:
            info["n_models"] = len(models)
        if place is not None:
            about = conditions if isinstance(conditions, AnnData) else self._new_adata(query)
            genes_asked = pd.DataFrame(index=self.var_names[columns])
            described = AnnData(obs=about.obs.copy(), var=genes_asked)
            with new_store(place, overwrite=overwrite) as store:
                _slots.write(
                    described,
                    key_added,
                    "predict",
                    model=type(self).__name__,
                    layers=filled(InStore(len(rows), store, key_added)),
                    obs={} if split is None else {"split": split},
                    info=info,
                    overwrite=True,
                )
                store.write(described)
            return open_zarr(place)
        return self._write(
            target if given else self._new_adata(query),
            "predict",
            filled(InMemory(len(rows))),
            info,
            split=split,
            selected=selected,
            key_added=key_added,
            overwrite=overwrite,
            copy=copy,
            replaces=("conformalize",),
        )

    def _known_donors(self, query: Query) -> list[str]:
        """Labels among those asked about whose own effect the model has learned."""
        donors = self.schema.donor
        if donors is None or donors.key not in query.table:
            return []
        labels = query.table[donors.key]
        return sorted(map(str, labels[donors.lookup(labels) >= 0].unique()))

    def _parameter_share(self, query: Query, row: int) -> Tensor | None:
        """Share of a row's variance that a predictor's parameters leave, ``(n_vars,)``."""
        c = torch.from_numpy(query.codes[[row]]).to(self._device)
        share = self.module.space.parameter_share(c)
        return None if share is None else share[0]

    def _check_batch_given(self, conditions: pd.DataFrame | Mapping[str, Any] | AnnData) -> None:
        """A mean's interval holds donors and cells, not batches: those must be known."""
        table, _ = self.schema.parse(conditions)
        if self.schema.batch_key is not None and self.schema.batch_key not in table:
            raise CovariateError(
                f"of='mean' needs the batch: give {self.schema.batch_key!r} in conditions. Its "
                "interval would otherwise leave out how much batches differ."
            )

    def _laws(
        self,
        query: Query,
        log_depth: Tensor | None,
        of: Literal["cell", "mean"],
        n_cells: int | None,
        n_samples: int,
        seed: int,
        progress_bar: bool,
    ) -> Iterator[tuple[np.ndarray, Predictive]]:
        """The law of each distinct row of conditions, and the rows that it is the law of."""
        distinct = query.keys if log_depth is None else np.c_[query.keys, log_depth.numpy()]
        _, first, inverse = np.unique(distinct, axis=0, return_index=True, return_inverse=True)
        # Of a fixed depth nothing is left to a donor.
        depths = self.module.space.donor_depths if log_depth is None else None
        groups = np.split(np.argsort(inverse, kind="stable"), np.bincount(inverse).cumsum()[:-1])
        # As they first occur, so that results that are written as they come are so in order.
        for i in track(np.argsort(first), "Predicting", show=progress_bar):
            row = int(first[i])
            noise = generator(seed, CELL, int(i))
            depth = None if log_depth is None else log_depth[row]
            decoded, donor = self._decoded(query, row, depth, n_samples, noise, seed)
            law = self.module, decoded, donor, noise
            share = self._parameter_share(query, row)
            if of == "cell":
                yield groups[i], predictive_of_cell(*law, depths, share)
            else:
                yield groups[i], predictive_of_mean(*law, n_cells, depths, share)

    def _decoded(
        self,
        query: Query,
        row: int,
        log_depth: Tensor | None,
        n_samples: int,
        noise: torch.Generator,
        seed: int,
    ) -> tuple[Decoded, int]:
        """``n_samples`` draws of the decoder's output for one row, and its donor."""
        _, c, decoded = self._drawn(query, row, log_depth, n_samples, noise, seed)
        return decoded, int(self.module.space.features.donor(c[:1]))

    def _drawn(
        self,
        query: Query,
        row: int,
        log_depth: Tensor | None,
        n_samples: int,
        noise: torch.Generator,
        seed: int,
    ) -> tuple[Tensor, Tensor, Decoded]:
        """Draws of y for one row, their conditions, and the decoder's output without donor.

        An unknown batch is drawn anew for each.
        """
        space = self.module.space
        repeated = np.full(n_samples, row)
        codes = query.codes[repeated]
        if space.features.batch_is_unknown(torch.from_numpy(codes[:1])).any():
            table = query.table.iloc[repeated].drop(columns=self.schema.batch_key, errors="ignore")
            rng = np.random.default_rng([seed, TABLE, row])
            table = with_batch(self.schema, self._observed, table, rng=rng)
            embedding = None if query.embedding is None else query.embedding[repeated]
            encoded = self.schema.encode(table, embedding, on_extrapolation="ignore")
            codes[:, : encoded.shape[1]] = encoded
        c = torch.from_numpy(codes).to(self._device)
        depth = None if log_depth is None else log_depth.expand(n_samples).to(self._device)
        y, decoded = self.module.sample(c, noise, log_depth=depth, **self._density_options)
        return y, c, decoded

    @torch.no_grad()
    def denoise(
        self,
        adata: AnnData | MuData | None = None,
        *,
        batch: str = "average",
        library: Literal["observed"] | float = "observed",
        genes: Sequence[str] | None = None,
        n_samples: int = 25,
        key_added: str = "exprgen",
        overwrite: bool = False,
        copy: bool = False,
        progress_bar: bool = True,
        seed: int | None = None,
    ) -> AnnData | MuData:
        """Expected expression given each cell's own counts, with its posterior uncertainty.

        Not in gene space, where a cell's own values leave nothing open.

        Parameters
        ----------
        adata
            Cells; ``None`` is the model's own data.
        batch
            ``"average"`` decodes each cell in every training batch and averages, which removes
            the batch effect; ``"observed"`` in its own; or the label of one batch.
        library
            ``"observed"``, the cell's own depth; or one depth for all, e.g. ``1e4`` for counts per
            ten thousand (models of counts only).
        genes, key_added, overwrite, copy, progress_bar, seed
            As in :meth:`predict`; slots are ``{key}_denoised`` and ``{key}_denoised_std``, the
            standard deviation of the expectation under the cell's posterior.
        n_samples
            Draws of the latent state per cell.

        Returns
        -------
        The AnnData that carries the results: the same object, or a copy if it was a view.
        """
        self._check_trained()
        self._check_has_noise("denoise")
        _arguments.check_positive_int(n_samples, "n_samples")
        self._check_has_depth(library=library, default="observed")
        selected = None if genes is None else _arguments.check_genes(genes, self.var_names)
        fixed = None
        if not (isinstance(library, str) and library == "observed"):
            fixed = log_library(_number(library), np.zeros(1, int), 1)
        seed = resolve_seed(seed)
        cells = self._cells(adata, unseen="error" if batch == "observed" else "null")
        split = self._split_of(cells.adata)
        if selected is None:
            self._check_same_genes(cells.adata)
        codes = self._batches_to_decode(batch)
        columns = slice(None) if selected is None else selected
        n_genes = len(self.var_names) if selected is None else len(selected)
        results = {k: np.zeros((len(cells), n_genes), np.float32) for k in _DENOISED}
        space = cast("Autoencoder", self.module.space)
        for block, part in blocks(len(cells), "Denoising", show=progress_bar):
            noise = generator(seed, CELL, block)
            x, c, depth = cells.tensors(part, self._device)
            centre, sd = space.encode(x, c, depth)
            effect = space.known_effect(c)
            moments = Moments()
            for _ in range(n_samples):
                y = space.draw(centre, sd, noise)
                log_depth = space.log_depth(y, c) if fixed is None else fixed.expand(len(y)).to(y)
                expected = []
                for code in codes:
                    as_in = c if code is None else space.features.with_batch(c, code)
                    decoded = space.decode_at(y[:, : space.n_latent], log_depth, as_in, effect)
                    if fixed is not None and log_depth is not None:
                        decoded = space.at_depth(decoded, log_depth)
                    expected.append(space.likelihood.signal(*decoded)[:, columns])
                moments.add(torch.stack(expected).mean(0))
            results["denoised"][part] = moments.mean.cpu().numpy()
            results["denoised_std"][part] = moments.variance().sqrt().cpu().numpy()
        info = {"batch": batch, "library": str(library), "n_samples": n_samples, "seed": seed}
        return self._write(
            cells.given,
            "denoise",
            results,
            info,
            split=split,
            selected=selected,
            key_added=key_added,
            overwrite=overwrite,
            copy=copy,
        )

    def _batches_to_decode(self, batch: str) -> list[int | None]:
        """Codes of the batches to average over; ``None`` is the cell's own."""
        labels = self.schema.batch
        if batch == "observed":
            return [None]
        if labels is None:
            if batch == "average":
                return [None]
            raise ValueError(f"batch={batch!r}: the model has no batch_key.")
        if batch == "average":
            return list(range(len(labels)))
        column = pd.Series([batch], index=["batch"])
        return [int(labels.encode(column, "batch", unseen="error")[0])]


_DENOISED = ("denoised", "denoised_std")


def _in_words(library: float | np.ndarray | None) -> float | str:
    """How depth came about, for the record."""
    if library is None:
        return "sampled"
    return float(library) if np.ndim(library) == 0 else "one per row"


def _number(library: Any) -> float:
    """The depth that all cells are given."""
    if isinstance(library, bool) or not isinstance(library, int | float | np.number):
        raise ValueError(f"library must be 'observed' or a number, got {library!r}.")
    return float(library)
