"""What a model around a predictor's mean does besides: fit it, and hand on what it predicts."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from anndata import AnnData

from exprgen import _validate
from exprgen._errors import DataQualityWarning, ExtrapolationWarning
from exprgen.means import Mean, PrecomputedMean
from exprgen.models._base import GenerativeModel
from exprgen.models._cells import GeneReader
from exprgen.models._means import (
    CodesWithMean,
    check_residuals,
    distinct_rows,
    inputs_of,
    restored_mean,
    state_of,
)
from exprgen.train import CellDataset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from exprgen.models._cells import Cells
    from exprgen.models._query import Query
    from exprgen.spaces import KnownMean, LatentSpace

__all__ = ["AroundMean"]

_GIVEN: ContextVar[tuple[AroundMean, Any] | None] = ContextVar("given_mean", default=None)
"""Which model is asked around a given mean in this thread, and the mean."""


class AroundMean(GenerativeModel):
    """A model whose space is around what a predictor says of conditions."""

    mean: Mean
    """The predictor."""

    mean_state_: dict[str, Any]
    """What a file keeps of it."""

    _n_folds: int
    """Parts in which it is cross-fitted."""

    # Training ------------------------------------------------------------------------------

    @property
    def _holds_all_genes(self) -> bool:
        """What the mean is fitted to."""
        return True

    def _fitted_rows(self, train_idx: np.ndarray, val_idx: np.ndarray) -> np.ndarray:
        """Of residuals all cells: each is left out of what predicts it, and samples are few."""
        return train_idx if self.needs_counts else np.sort(np.r_[train_idx, val_idx])

    def _with_training_means(
        self, dataset: CellDataset, fitted: np.ndarray, val_idx: np.ndarray
    ) -> CellDataset:
        """Fit the mean to some cells; give each the prediction that never saw it."""
        if len(fitted) < 2:
            raise ValueError(
                f"{len(fitted)} training cell is left by train_size or split_key; a mean and "
                "what is left of it need at least 2."
            )
        adata = self._readable(self.adata)
        table, embedding = self.schema.parse(adata, argument="adata")
        inputs = inputs_of(self.schema, table, embedding)
        y = self._targets(dataset)
        groups = self._groups(table)
        mean, variance = copy(self.mean), None
        mean.var_names = list(self.var_names)
        if mean.came_fitted:
            # What was predicted elsewhere is in the order of all registered cells.
            left_out = mean.out_of_sample(inputs, y)
            mean.fit(inputs, y)
            means = left_out if isinstance(mean, PrecomputedMean) else mean.predict(inputs)
        else:
            # Labels that only validation cells have are known, by a weight of 0.
            rows = np.union1d(fitted, val_idx)
            weights = np.isin(rows, fitted).astype(float)
            of_rows, of_fitted = (None if groups is None else groups[i] for i in (rows, fitted))
            mean.fit(inputs.iloc[rows], y[rows], weights, groups=of_rows, seed=self.seed_)
            means = np.zeros_like(y)
            with warnings.catch_warnings():
                # Of validation cells alone; what is asked later is warned of then.
                warnings.simplefilter("ignore", ExtrapolationWarning)
                means[rows] = mean.predict(inputs.iloc[rows])
            if (left_open := mean.parameter_variance(inputs.iloc[rows])) is not None:
                variance = np.zeros_like(y)
                variance[rows] = left_open
            left_out = means.copy()
            left_out[fitted] = mean.out_of_sample(
                inputs.iloc[fitted],
                y[fitted],
                of_fitted,
                n_folds=self._n_folds,
                seed=self.seed_,
            )
        check_residuals(
            y[fitted],
            left_out[fitted],
            mean.name,
            of_counts=self.needs_counts,
            came_fitted=mean.came_fitted,
        )
        self.mean = mean
        self.mean_state_ = state_of(mean, inputs.iloc[fitted])
        self._known_mean.fit(means[fitted])
        known = self._known_mean.columns(means, variance, left_out)
        codes = CodesWithMean(dataset.conditions, known, np.arange(len(known)))
        return CellDataset(dataset.reader, codes, dataset.library)

    def _said(self) -> dict[str, Any]:
        return {**super()._said(), "mean": self.mean.name}

    @property
    def _known_mean(self) -> KnownMean:
        return cast("KnownMean", self.module.space.mean)

    def _targets(self, dataset: CellDataset, block: int = 4096) -> np.ndarray:
        """What the mean is to predict of all registered cells, ``(n_obs, n_vars)``, float64."""
        y = np.empty(dataset.reader.shape)
        for start in range(0, len(y), block):
            part = np.arange(start, min(start + block, len(y)))
            y[part] = dataset.reader.rows(part)
        if self.needs_counts:
            space = cast("LatentSpace", self.module.space)
            depth = dataset.library.double().numpy().clip(0.5)
            if self._setup_args["size_factor_key"] is not None:
                space.unit.fill_(depth.mean())
            y *= float(space.unit) / depth[:, None]
            np.log1p(y, out=y)
        return y

    def _groups(self, table: pd.DataFrame) -> np.ndarray | None:
        """Donors, which are left out whole; ``None`` without."""
        key = self.schema.donor_key
        if key is None:
            return None
        donors = table[key].astype(str).to_numpy()
        if len(np.unique(donors)) > 1:
            return donors
        warnings.warn(
            f"donor_key={key!r} has one donor: residuals are out of sample for cells of this "
            "donor, not for new donors.",
            DataQualityWarning,
            stacklevel=4,
        )
        return None

    # Verbs ---------------------------------------------------------------------------------

    def _of_inputs(self, codes: Any, inputs: pd.DataFrame, rows: Any = slice(None)) -> Any:
        """Codes of some rows of the inputs, with what is predicted of them."""
        first, row = distinct_rows(inputs)
        some = inputs.iloc[first]
        known = self._known_mean.columns(
            self.mean.predict(some), self.mean.parameter_variance(some)
        )
        return CodesWithMean(codes, known, row[rows])

    def _ask(self, conditions: Any, **options: Any) -> Query:
        query = super()._ask(conditions, **options)
        mean, given = self.mean, self._given_mean
        if isinstance(mean, PrecomputedMean):
            if given is None and isinstance(conditions, AnnData):
                given = self._layer(conditions, mean.name)
            means = mean.predict(pd.DataFrame(index=range(query.n_rows)), given)
            known = self._known_mean.columns(means)
            return replace(query, codes=CodesWithMean(query.codes, known, query.rows))
        if given is not None:
            raise ValueError(
                f"mean=array is for means that are precomputed; this model's is {mean.name}, "
                "which predicts what is asked for. Leave mean out."
            )
        inputs = inputs_of(self.schema, query.table, query.embedding)
        return replace(query, codes=self._of_inputs(query.codes, inputs))

    def _layer(self, adata: AnnData, name: str) -> np.ndarray | None:
        """A layer, its genes in the model's order; ``None`` if there is none."""
        if name not in adata.layers:
            return None
        order = _validate.align_genes(adata.var_names, self.var_names, quiet=True)
        return GeneReader(adata.layers[name], order).rows(np.arange(adata.n_obs))

    def _cells(self, *args: Any, training: bool = False, **options: Any) -> Cells:
        cells = super()._cells(*args, training=training, **options)
        mean = self.mean
        if training:
            return cells
        if isinstance(mean, PrecomputedMean):
            layer = self._layer(cells.adata, mean.name)
            if layer is None:
                raise KeyError(
                    f"adata has no layer {mean.name!r}: the mean of this model is precomputed. "
                    "Give what the same predictor says of these cells there."
                )
            means = mean.predict(pd.DataFrame(index=range(len(layer))), layer)
            known = self._known_mean.columns(means)
            return replace(cells, codes=CodesWithMean(cells.codes, known, cells.rows))
        inputs = inputs_of(self.schema, *self.schema.parse(cells.adata, argument="adata"))
        return replace(cells, codes=self._of_inputs(cells.codes, inputs, cells.rows))

    @contextmanager
    def _around_mean(self, mean: Any) -> Iterator[None]:
        """Inside, the conditions asked about have this mean."""
        token = _GIVEN.set((self, mean))
        try:
            yield
        finally:
            _GIVEN.reset(token)

    @property
    def _given_mean(self) -> Any:
        """What the caller of a verb has said the mean is."""
        said = _GIVEN.get()
        return said[1] if said is not None and said[0] is self else None

    def _restore(self, attributes: Mapping[str, Any]) -> None:
        super()._restore(attributes)
        if self.is_trained_ and "kind" not in self.mean_state_:
            raise KeyError("mean_state_ has no predictor")
        if self.mean_state_.get("kind", "code") != "code":
            self.mean = restored_mean(self.mean_state_, None)
