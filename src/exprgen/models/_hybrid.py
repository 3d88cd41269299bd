"""``HybridResidualModel``: a predictor's mean, and the distribution around it."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from exprgen import _arguments
from exprgen.means import as_mean
from exprgen.models._around_mean import AroundMean
from exprgen.models._build import (
    Architecture,
    build_module,
    build_residual_module,
    refuse_useless,
)
from exprgen.models._means import restored_mean
from exprgen.models._presets import count_likelihood
from exprgen.models._train_arguments import known_words

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from exprgen.likelihoods import Dispersion

__all__ = ["HybridResidualModel"]

# The first is the default.
_OF_COUNTS = ("mixture", "gaussian", "flow", "path")
_OF_RESIDUALS = ("path", "low_rank", "gaussian")
_OF_AUTOENCODER = (
    "n_hidden", "n_layers", "dropout", "n_components", "likelihood", "dispersion",
)  # fmt: skip


class HybridResidualModel(AroundMean):
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

    @known_words
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
        self._n_folds = _arguments.check_positive_int(n_folds, "n_folds", minimum=2)
        super().__init__(adata, registry, seed=seed)
        self.needs_counts = self._setup_state["data_kind"] == "counts"
        said = locals()
        self.init_params_ = self._get_init_params(said)
        # A file keeps what was learned, not what it was called with.
        for word in ("mean", "out_of_sample"):
            del self.init_params_["non_kwargs"][word]
        self.mean, self.mean_state_ = as_mean("ridge"), {}
        if adata is not None:
            # A copy: what is learned here is not the caller's, nor another model's.
            self.mean = copy(
                as_mean(
                    mean,
                    layers=self._home(adata).layers,
                    out_of_sample=out_of_sample,
                    categorical_keys=self.schema.categorical_keys,
                )
            )
        path = {"n_hidden": density_hidden, "n_layers": density_layers, "condition_dropout": 0.0}
        if not self.needs_counts:
            why = f"{type(self).__name__} models residuals of them without an autoencoder."
            refuse_useless(type(self), said, _OF_AUTOENCODER, why)
            density = _density(density, _OF_RESIDUALS, "continuous values")
            build_residual_module(self, n_latent, density, path)
            return
        density = _density(density, _OF_COUNTS, "counts")
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

    def counterfactual(self, *args: Any, mean: Any = None, **kwargs: Any) -> AnnData:
        """The same cells under other conditions, as new cells.

        Parameters
        ----------
        *args, **kwargs
            See :meth:`NBVAE.counterfactual`.
        mean
            What the predictor says of every cell under the changed conditions, as in
            :meth:`sample`.

        Returns
        -------
        As :meth:`NBVAE.counterfactual`.
        """
        with self._around_mean(mean):
            return super().counterfactual(*args, **kwargs)

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


def _density(density: str | None, choices: tuple[str, ...], kind: str) -> Any:
    """What was chosen, or the default."""
    if density is None:
        return choices[0]
    if density not in choices:
        raise ValueError(
            f"density must be one of {list(choices)} of {kind}, which the layer was read as; got "
            f"{density!r}."
        )
    return density
