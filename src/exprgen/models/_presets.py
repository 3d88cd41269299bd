"""The public models: which likelihood, in which space, with which density."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from exprgen import _arguments
from exprgen.likelihoods import (
    ContaminatedNegativeBinomial,
    Gaussian,
    MixtureOfGaussians,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from exprgen.models._base import GenerativeModel
from exprgen.models._build import Architecture, build_module
from exprgen.models._train_arguments import known_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from mudata import MuData

    from exprgen.likelihoods import Dispersion, Likelihood
    from exprgen.models._build import DensityName

__all__ = ["NBVAE", "ZINBVAE", "CondVAE", "count_likelihood"]

_COUNTS = {
    "contaminated_nb": ContaminatedNegativeBinomial,
    "nb": NegativeBinomial,
    "poisson": Poisson,
}
_CONTINUOUS = {"gaussian": Gaussian, "mixture_of_gaussians": MixtureOfGaussians}
_DISPERSIONS = ("gene", "gene-cell")


def _with_dispersion(
    choices: dict[str, Any], likelihood: str, dispersion: str, without: str
) -> Any:
    """The likelihood's class with its dispersion; ``without`` names the one that has none."""
    _arguments.check_choice(likelihood, "likelihood", tuple(choices))
    _arguments.check_choice(dispersion, "dispersion", _DISPERSIONS)
    if likelihood != without:
        return partial(choices[likelihood], dispersion=dispersion)
    if dispersion != "gene":
        raise ValueError(
            f"dispersion={dispersion!r} does not go with likelihood={likelihood!r}, which has no "
            'spread that depends on the cell: leave it at "gene".'
        )
    return choices[likelihood]


def count_likelihood(
    likelihood: str, dispersion: Dispersion | None
) -> tuple[Callable[[int], Likelihood], Dispersion]:
    """The likelihood's class with its dispersion, and which that is."""
    if dispersion is None:
        dispersion = "gene" if likelihood == "poisson" else "gene-cell"
    return _with_dispersion(_COUNTS, likelihood, dispersion, "poisson"), dispersion


class NBVAE(GenerativeModel):
    """Variational autoencoder of counts with a learned conditional prior.

    Counts are negative binomial given a latent state z and the depth, which are drawn jointly from
    a mixture of Gaussians that depends on the conditions :cite:p:`Lopez2018`. By default a learned
    share of the counts are outliers, isolated large counts as droplet data have them; without
    that, each one inflates the dispersion of its gene in all cells.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`, or MuData with :meth:`setup_mudata`.
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
    density
        Of z and depth given the conditions: ``"mixture"`` of Gaussians, one ``"gaussian"``, or a
        normalizing ``"flow"``.
    n_components
        Gaussians in a mixture.
    likelihood
        ``"contaminated_nb"``; ``"nb"``, without outliers; or ``"poisson"``, without dispersion.
    dispersion
        ``"gene"``: one inverse dispersion per gene. ``"gene-cell"``: it also depends, linearly in
        its logarithm, on the latent state, the conditions and the batch. ``None`` is
        ``"gene-cell"`` where the likelihood has a dispersion.

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

    @known_words
    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        seed: int | None = None,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        density: DensityName = "mixture",
        n_components: int = 10,
        likelihood: Literal["contaminated_nb", "nb", "poisson"] = "contaminated_nb",
        dispersion: Dispersion | None = None,
    ) -> None:
        law, dispersion = count_likelihood(likelihood, dispersion)
        shape = Architecture(n_latent, n_hidden, n_layers, dropout, density, n_components)
        super().__init__(adata, registry, seed=seed)
        build_module(self, law, shape, likelihood=likelihood, dispersion=dispersion)
        self.init_params_ = self._get_init_params(locals())


class ZINBVAE(GenerativeModel):
    """Variational autoencoder of counts, some of which are 0 whatever their mean.

    As :class:`NBVAE`, with a zero-inflated negative binomial :cite:p:`Lopez2018`: a share of each
    gene's counts, which depends on the cell, is replaced by 0. Counts of molecules (UMIs) have no
    such zeros :cite:p:`svensson2020`; full-length protocols without them may.

    Parameters
    ----------
    adata, registry, seed, n_latent, n_hidden, n_layers, dropout, density, n_components, dispersion
        See :class:`NBVAE`.

    Examples
    --------
    >>> import exprgen
    >>> adata = exprgen.datasets.pbmc68k_reduced()
    >>> exprgen.ZINBVAE.setup_anndata(
    ...     adata, layer="counts", categorical_condition_keys=["cell_type"]
    ... )
    >>> model = exprgen.ZINBVAE(adata, seed=0)
    """

    needs_counts = True

    @known_words
    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        seed: int | None = None,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        density: DensityName = "mixture",
        n_components: int = 10,
        dispersion: Dispersion = "gene",
    ) -> None:
        _arguments.check_choice(dispersion, "dispersion", _DISPERSIONS)
        law = partial(ZeroInflatedNegativeBinomial, dispersion=dispersion)
        shape = Architecture(n_latent, n_hidden, n_layers, dropout, density, n_components)
        super().__init__(adata, registry, seed=seed)
        build_module(self, law, shape, dispersion=dispersion)
        self.init_params_ = self._get_init_params(locals())


class CondVAE(GenerativeModel):
    """Variational autoencoder of continuous expression with a learned conditional prior.

    For layers that are normalised and log-transformed, or that were never counts. Values are a
    mixture of Gaussians given a latent state z, or one Gaussian, and bounded below by each gene's
    least value in training: what is not detected is a peak of exact zeros, with a probability of
    its own (see :mod:`exprgen.likelihoods`). There is no depth: such values are normalised for it,
    and what normalisation does to counts of few molecules is not undone. Where counts are at hand
    prefer :class:`NBVAE`.

    Parameters
    ----------
    adata, registry, seed, n_latent, n_hidden, n_layers, dropout, density, n_components
        See :class:`NBVAE`.
    likelihood
        ``"mixture_of_gaussians"``: two per gene, whose weights depend on the cell; or one
        ``"gaussian"``.
    dispersion
        ``"gene"``: one standard deviation per gene. ``"gene-cell"``: the decoder changes it from
        cell to cell (``"gaussian"`` only).

    Examples
    --------
    >>> import exprgen, scanpy as sc
    >>> adata = exprgen.datasets.pbmc68k_reduced()
    >>> adata.X = adata.layers["counts"].copy()
    >>> sc.pp.normalize_total(adata, target_sum=1e4)
    >>> sc.pp.log1p(adata)
    >>> exprgen.CondVAE.setup_anndata(adata, categorical_condition_keys=["cell_type"])
    >>> model = exprgen.CondVAE(adata, seed=0)
    """

    needs_counts = False

    @known_words
    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        seed: int | None = None,
        n_latent: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        density: DensityName = "mixture",
        n_components: int = 10,
        likelihood: Literal["mixture_of_gaussians", "gaussian"] = "mixture_of_gaussians",
        dispersion: Dispersion = "gene",
    ) -> None:
        law = _with_dispersion(_CONTINUOUS, likelihood, dispersion, "mixture_of_gaussians")
        shape = Architecture(n_latent, n_hidden, n_layers, dropout, density, n_components)
        super().__init__(adata, registry, seed=seed)
        build_module(self, law, shape, likelihood=likelihood, dispersion=dispersion)
        self.init_params_ = self._get_init_params(locals())
