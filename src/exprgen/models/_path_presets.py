"""The public flow and diffusion models: arguments, and which path they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from exprgen.models._paths import PathModel
from exprgen.models._train_arguments import known_words

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from exprgen.likelihoods import Dispersion
    from exprgen.schedules import Target, Times, Weighting

__all__ = ["ExprDiffusion", "ExprFlow"]


class ExprFlow(PathModel):
    """Flow matching in the latent space of counts, or in the space of genes.

    An autoencoder of counts, which is :class:`NBVAE`, is trained first. A flow then learns the law
    of its latent state and depth given the conditions, by regression on the velocity of straight
    paths from noise :cite:p:`lipman2023`; a few steps along them draw a cell. Its log-density is
    exact up to the solver's error, so that :meth:`log_likelihood` is a bound of the same kind as
    every other model's.

    Continuous values are modelled as they are, in gene space: every gene by its normal score,
    with a peak at its least value, and all genes by one path, without an autoencoder. Its
    log-density is an *estimate* then, with random signs for the trace, and :meth:`log_likelihood`
    an *estimate* of the *bound* that the scores of what was not detected leave. Where counts are
    at hand prefer these.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`, or MuData with :meth:`setup_mudata`.
    registry
        The registry of a saved model, instead of data.
    seed
        Of the initial weights and of training.
    n_latent
        Dimensions of z; in gene space, principal components that the network reads and
        :meth:`get_latent_representation` returns.
    n_hidden, n_layers, dropout, n_components, likelihood, dispersion
        Of the autoencoder, see :class:`NBVAE`; refused in gene space.
    density_hidden, density_layers
        Width and number of the blocks of the flow's network.
    condition_dropout
        Share of training rows in which a condition is hidden, so that it can be weighed by
        ``guidance``.
    coupling
        Of data and noise in training: ``"independent"``, or ``"optimal_transport"`` within
        conditions :cite:p:`tong2024`, which straightens paths at four times the cost.
    objective
        ``"matching"``, or ``"mle"``: maximum likelihood of the continuous normalizing flow
        :cite:p:`grathwohl2019`, which is far slower (not in gene space).
    solver, n_steps
        How to draw, see :mod:`exprgen.solvers`; ``None`` is ``"heun"``, in gene space ``"arc"``.

    Examples
    --------
    >>> import exprgen
    >>> adata = exprgen.datasets.pbmc68k_reduced()
    >>> exprgen.ExprFlow.setup_anndata(
    ...     adata, layer="counts", categorical_condition_keys=["cell_type"]
    ... )
    >>> model = exprgen.ExprFlow(adata, seed=0)
    """

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
        n_components: int = 10,
        likelihood: Literal["contaminated_nb", "nb", "poisson"] = "contaminated_nb",
        dispersion: Dispersion | None = None,
        density_hidden: int = 256,
        density_layers: int = 2,
        condition_dropout: float = 0.1,
        coupling: Literal["independent", "optimal_transport"] = "independent",
        objective: Literal["matching", "mle"] = "matching",
        solver: str | None = None,
        n_steps: int = 5,
    ) -> None:
        super().__init__(adata, registry, seed=seed, said=locals())
        self.init_params_ = self._get_init_params(locals())


class ExprDiffusion(PathModel):
    """Score-based diffusion in the latent space of counts, or in the space of genes.

    As :class:`ExprFlow`, with a path on which variance is preserved and a network that tells data
    from noise :cite:p:`ho2020,song2021`.

    Parameters
    ----------
    adata, registry, seed
        See :class:`ExprFlow`.
    n_latent, n_hidden, n_layers, dropout, n_components, likelihood, dispersion
        See :class:`ExprFlow`.
    density_hidden, density_layers, condition_dropout
        See :class:`ExprFlow`.
    schedule
        ``"cosine"``, ``"vp"``, ``"sub_vp"``, ``"ve"``, ``"edm"`` or ``"linear"``, see
        :mod:`exprgen.schedules`.
    target
        What the network predicts: ``"v"`` :cite:p:`salimans2022`, ``"noise"``, ``"data"``,
        ``"score"``, ``"velocity"`` or ``"edm"``, the preconditioned one :cite:p:`karras2022`; in
        gene space it is always that.
    weighting
        Of errors by time: ``"uniform"``, ``"min_snr"``, ``"likelihood"`` or ``"edm"``.
    times
        Law of the times of training: ``"uniform"``, ``"logit_normal"`` or ``"log_normal"``.
    solver, n_steps
        How to draw, see :mod:`exprgen.solvers`.

    Examples
    --------
    >>> import exprgen
    >>> adata = exprgen.datasets.pbmc68k_reduced()
    >>> exprgen.ExprDiffusion.setup_anndata(
    ...     adata, layer="counts", categorical_condition_keys=["cell_type"]
    ... )
    >>> model = exprgen.ExprDiffusion(adata, seed=0)
    """

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
        n_components: int = 10,
        likelihood: Literal["contaminated_nb", "nb", "poisson"] = "contaminated_nb",
        dispersion: Dispersion | None = None,
        density_hidden: int = 256,
        density_layers: int = 2,
        condition_dropout: float = 0.1,
        schedule: str = "cosine",
        target: Target = "v",
        weighting: Weighting = "uniform",
        times: Times = "uniform",
        solver: str | None = None,
        n_steps: int = 5,
    ) -> None:
        super().__init__(adata, registry, seed=seed, said=locals())
        self.init_params_ = self._get_init_params(locals())
