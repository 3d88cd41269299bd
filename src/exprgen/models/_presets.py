"""The public models: which space and which density."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from exprgen import _arguments
from exprgen.densities import Mixture
from exprgen.likelihoods import ContaminatedNegativeBinomial, NegativeBinomial
from exprgen.models._base import GenerativeModel
from exprgen.module import ExpressionModule
from exprgen.spaces import LatentSpace

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["NBVAE"]

_LIKELIHOODS = {"contaminated_nb": ContaminatedNegativeBinomial, "nb": NegativeBinomial}


class NBVAE(GenerativeModel):
    """Variational autoencoder of counts with a learned conditional prior.

    Counts are negative binomial given a latent state z and the depth, which are drawn jointly from
    a mixture of Gaussians that depends on the conditions :cite:p:`Lopez2018`. By default a learned
    share of the counts are outliers, isolated large counts as droplet data have them; without
    that, each one inflates the dispersion of its gene in all cells.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`.
    registry
        The registry of a saved model, instead of data.
    seed
        Of the initial weights and of training.
    n_latent
        Dimensions of z.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    dropout
        Share of hidden units left out in a training step.
    n_components
        Gaussians in the prior.
    likelihood
        ``"contaminated_nb"``, or ``"nb"`` without outliers.

    Examples
    --------
    >>> import exprgen
    >>> adata = exprgen.datasets.pbmc68k_reduced()
    >>> exprgen.NBVAE.setup_anndata(
    ...     adata, layer="counts", categorical_condition_keys=["cell_type"]
    ... )
    >>> model = exprgen.NBVAE(adata, seed=0)
    >>> model.train()
    >>> synthetic = model.sample({"cell_type": "CD19+ B"}, n_obs=100)
    """

    needs_counts = True

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        seed: int | None = None,
        n_latent: int = 10,
        n_hidden: int = 256,
        n_layers: int = 1,
        dropout: float = 0.1,
        n_components: int = 10,
        likelihood: Literal["contaminated_nb", "nb"] = "contaminated_nb",
    ) -> None:
        _arguments.check_choice(likelihood, "likelihood", tuple(_LIKELIHOODS))
        for name, value in (
            ("n_latent", n_latent),
            ("n_hidden", n_hidden),
            ("n_layers", n_layers),
            ("n_components", n_components),
        ):
            _arguments.check_positive_int(value, name)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}.")
        super().__init__(adata, registry, seed=seed)
        shape: dict[str, Any] = {
            "n_latent": n_latent,
            "n_hidden": n_hidden,
            "n_layers": n_layers,
            "dropout": dropout,
        }
        n_vars = len(self.var_names)

        def build() -> ExpressionModule:
            space = LatentSpace(
                n_vars,
                self.schema.layout,
                _LIKELIHOODS[likelihood](n_vars),
                depth_is_observed=self._setup_args["size_factor_key"] is not None,
                **shape,
            )
            density = Mixture(space.n_dims, space.features.n_features, n_components=n_components)
            return ExpressionModule(space, density)

        self._set_module(build, {**shape, "n_components": n_components, "likelihood": likelihood})
        self.init_params_ = self._get_init_params(locals())
