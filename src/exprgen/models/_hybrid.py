"""``HybridResidualModel``: a predictor's mean, and the distribution around it."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
import pandas as pd
from anndata import AnnData

from exprgen import _arguments, _validate
from exprgen._errors import DataQualityWarning, ExtrapolationWarning
from exprgen.means import Mean, PrecomputedMean, as_mean
from exprgen.models._base import GenerativeModel
from exprgen.models._build import (
    Architecture,
    build_module,
    build_residual_module,
    refuse_useless,
)
from exprgen.models._cells import GeneReader
from exprgen.models._means import (
    CodesWithMean,
    distinct_rows,
    inputs_of,
    restored_mean,
    state_of,
)
from exprgen.models._presets import count_likelihood
from exprgen.train import CellDataset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mudata import MuData

    from exprgen.likelihoods import Dispersion
    from exprgen.models._cells import Cells
    from exprgen.models._query import Query
    from exprgen.spaces import KnownMean, LatentSpace

__all__ = ["HybridResidualModel"]

logger = logging.getLogger("exprgen")

_OF_COUNTS = ("mixture", "gaussian", "flow", "path")
_OF_RESIDUALS = ("path", "low_rank", "gaussian")
_OF_AUTOENCODER = (
    "n_hidden", "n_layers", "dropout", "n_components", "likelihood", "dispersion",
)  # fmt: skip


class HybridResidualModel(GenerativeModel):
    """A supervised predictor's mean, and the distribution around it.

    Of continuous values the model is the predicted mean plus a residual, whose scale depends on
    the conditions, whose law is the gene's own, and which genes share by a few factors; the mean
    of what it draws is the predictor's. Of counts the mean is where the decoder of :class:`NBVAE`
    starts from: effects of conditions that are learned besides are shrunk to none.

    What is learned are **out-of-sample** residuals, of predictions that never saw their cell: a
    predictor fits its training cells better than new ones, and a distribution learned from its own
    residuals is too narrow. An unfitted predictor is cross-fitted, donors left out whole if a
    ``donor_key`` is registered; a fitted one is never refitted, and its out-of-sample predictions
    must be given.

    Parameters
    ----------
    adata, registry, seed
        See :class:`NBVAE`.
    mean
        The predictor: ``"ridge"`` regression, ``"group"`` means, or ``"hierarchical"``, with
        effects of donors; a scikit-learn regressor; a trained :class:`torch.nn.Module`; any
        callable on the table of conditions; the name of a layer with out-of-sample predictions
        that were made elsewhere; or a :class:`~exprgen.means.Mean`. It reads the raw columns of
        conditions (an embedding as ``{key}_0`` ...), and predicts the values of the layer; of
        counts, log(1 + counts per ten thousand), as :func:`scanpy.pp.log1p` has them.
    out_of_sample
        Of a fitted predictor: the layer with its out-of-sample predictions of the registered
        cells, an array ``(n_obs, n_vars)``, or ``"predict"`` if it never saw these cells.
    n_folds
        Parts in which predictors without a closed form are cross-fitted.
    n_latent
        Dimensions of z; of continuous values, factors that residuals share at most.
    n_hidden, n_layers, dropout, n_components, likelihood, dispersion
        Of the autoencoder of counts, see :class:`NBVAE`; refused for continuous values.
    density
        Of the latent state, or the factors, given the conditions and their mean. Of counts
        ``"mixture"`` (the default), ``"gaussian"``, ``"flow"`` or ``"path"``; of residuals
        ``"path"`` (the default), flow matching; ``"low_rank"``, normal factors; or
        ``"gaussian"``, no factors: genes are independent given the conditions.
    density_hidden, density_layers
        Width and number of the blocks of a path's network.

    Examples
    --------
    >>> import exprgen, scanpy as sc
    >>> adata = exprgen.datasets.pbmc68k_reduced()
    >>> exprgen.HybridResidualModel.setup_anndata(
    ...     adata, layer="counts", categorical_condition_keys=["cell_type"]
    ... )
    >>> model = exprgen.HybridResidualModel(adata, mean="ridge", seed=0)
    """

    needs_counts = True
    takes_continuous = True

    _refused_in_genes: ClassVar[tuple[str, ...]] = ("batch_key",)
    _given_mean: np.ndarray | None = None
    """Where the caller of a verb has said what the mean is."""

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        mean: Any = "ridge",
        out_of_sample: Any = None,
        n_folds: int = 5,
        seed: int | None = None,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        density: Literal["mixture", "gaussian", "flow", "path", "low_rank"] | None = None,
        n_components: int = 10,
        likelihood: Literal["contaminated_nb", "nb", "poisson"] = "contaminated_nb",
        dispersion: Dispersion | None = None,
        density_hidden: int = 128,
        density_layers: int = 2,
    ) -> None:
        law, spread = count_likelihood(likelihood, dispersion)
        _arguments.check_positive_int(n_folds, "n_folds", minimum=2)
        super().__init__(adata, registry, seed=seed)
        self.needs_counts = self._setup_state["data_kind"] == "counts"
        said = locals()
        self.init_params_ = self._get_init_params(said)
        # A file keeps what was learned, not what it was called with.
        for word in ("mean", "out_of_sample"):
            del self.init_params_["non_kwargs"][word]
        self.mean: Mean = as_mean(
            "ridge" if adata is None else mean, **self._around(out_of_sample)
        )
        self.mean_state_: dict[str, Any] = {}
        path = {"n_hidden": density_hidden, "n_layers": density_layers, "condition_dropout": 0.0}
        if not self.needs_counts:
            why = f"{type(self).__name__} models residuals of them without an autoencoder."
            refuse_useless(type(self), said, _OF_AUTOENCODER, why)
            density = _arguments.check_choice(density or "path", "density", _OF_RESIDUALS)
            build_residual_module(self, n_latent, density, path)
            return
        density = _arguments.check_choice(density or "mixture", "density", _OF_COUNTS)
        prior: Any = "mixture" if density == "path" else density
        build_module(
            self,
            law,
            Architecture(n_latent, n_hidden, n_layers, dropout, prior, n_components),
            path if density == "path" else None,
            has_mean=True,
            likelihood=likelihood,
            dispersion=spread,
        )

    def _around(self, out_of_sample: Any) -> dict[str, Any]:
        """What else a predictor is made of: layers, and which columns are labels."""
        layers = {} if self.adata is None else self._readable(self.adata).layers
        return {
            "layers": layers,
            "out_of_sample": out_of_sample,
            "categorical_keys": self.schema.categorical_keys,
        }

    # Training ------------------------------------------------------------------------------

    def _with_training_means(
        self, dataset: CellDataset, train_idx: np.ndarray, val_idx: np.ndarray
    ) -> CellDataset:
        """Fit the mean to the training cells; give each the prediction that never saw it."""
        adata = self._readable(self.adata)
        table, embedding = self.schema.parse(adata, argument="adata")
        inputs = inputs_of(self.schema, table, embedding)
        y = self._targets(dataset)
        groups = self._groups(table)
        options = {"n_folds": self.init_params_["non_kwargs"]["n_folds"], "seed": self.seed_}
        if self.mean.came_fitted:
            # What was predicted elsewhere is in the order of all registered cells.
            left_out = self.mean.out_of_sample(inputs, y)
            self.mean.fit(inputs, y)
            means = (
                left_out if isinstance(self.mean, PrecomputedMean) else self.mean.predict(inputs)
            )
            variance = self.mean.parameter_variance(inputs)
        else:
            # Labels that only validation cells have are known, by a weight of 0.
            rows = np.sort(np.r_[train_idx, val_idx])
            weights = np.isin(rows, train_idx).astype(float)
            of_rows = None if groups is None else groups[rows]
            self.mean.fit(inputs.iloc[rows], y[rows], weights, groups=of_rows, seed=self.seed_)
            means, variance = np.zeros_like(y), None
            with warnings.catch_warnings():
                # Of validation cells alone; what is asked later is warned of then.
                warnings.simplefilter("ignore", ExtrapolationWarning)
                means[rows] = self.mean.predict(inputs.iloc[rows])
            if (left_open := self.mean.parameter_variance(inputs.iloc[rows])) is not None:
                variance = np.zeros_like(y)
                variance[rows] = left_open
            of_train = None if groups is None else groups[train_idx]
            left_out = means.copy()
            left_out[train_idx] = self.mean.out_of_sample(
                inputs.iloc[train_idx], y[train_idx], of_train, **options
            )
        self.mean_state_ = state_of(self.mean, inputs.iloc[train_idx])
        self._known_mean.fit(means[train_idx])
        known = self._known_mean.columns(means, variance, left_out)
        codes = CodesWithMean(dataset.conditions, known, np.arange(len(known)))
        return CellDataset(dataset.reader, codes, dataset.library)

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
        self._given_mean = mean
        try:
            yield
        finally:
            del self._given_mean

    def sample(self, *args: Any, mean: Any = None, **kwargs: Any) -> AnnData:
        """Draw new cells for given conditions.

        Parameters
        ----------
        *args, **kwargs
            See :meth:`NBVAE.sample`.
        mean
            What the predictor says of every row of conditions, ``(n_rows, n_vars)``, where the
            model's mean is precomputed; an AnnData may have it in the layer of that name instead.

        Returns
        -------
        As :meth:`NBVAE.sample`.
        """
        with self._around_mean(mean):
            return super().sample(*args, **kwargs)

    def predict(self, *args: Any, mean: Any = None, **kwargs: Any) -> AnnData | MuData:
        """Mean, spread and quantiles of p(x | c).

        Parameters
        ----------
        *args, **kwargs
            See :meth:`NBVAE.predict`. Where the predictor knows what its parameters leave open,
            as ``"hierarchical"`` does, the layer ``{key}_std_parameter`` has that term of the
            standard deviation.
        mean
            As in :meth:`sample`.

        Returns
        -------
        As :meth:`NBVAE.predict`.
        """
        with self._around_mean(mean):
            return super().predict(*args, **kwargs)

    # Files ---------------------------------------------------------------------------------

    @classmethod
    def load(cls, *args: Any, mean: Any = None, **kwargs: Any) -> Self:
        """Read a model from a folder; nothing in the folder is executed.

        Parameters
        ----------
        *args, **kwargs
            See :meth:`NBVAE.load`.
        mean
            The predictor, fitted, where it is code, which a file does not hold: a torch module, a
            callable, a tree ensemble (``model.mean.fitted`` of the trained model).

        Raises
        ------
        ValueError
            If a predictor is to be given and is not, or predicts otherwise than the one that the
            model was trained with.
        FileNotFoundError, CheckpointError, UntrustedFileError
            See :meth:`NBVAE.load`.
        """
        model = super().load(*args, **kwargs)
        if mean is not None or model.mean_state_.get("kind") == "code":
            given = None if mean is None else as_mean(mean)
            model.mean = restored_mean(model.mean_state_, given)
        return model

    def _restore(self, attributes: Mapping[str, Any]) -> None:
        super()._restore(attributes)
        if self.mean_state_.get("kind", "code") != "code":
            self.mean = restored_mean(self.mean_state_, None)
