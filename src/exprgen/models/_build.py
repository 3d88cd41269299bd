"""From arguments to a module: which space, which density, of what shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from exprgen import _arguments
from exprgen.densities import Gaussian, Mixture, NormalizingFlow, Path
from exprgen.module import ExpressionModule
from exprgen.nn import GeneDenoiser
from exprgen.spaces import ContinuousLatentSpace, GeneSpace, LatentSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from exprgen.densities import ConditionalDensity
    from exprgen.likelihoods import Likelihood
    from exprgen.models._base import GenerativeModel
    from exprgen.spaces import Space

__all__ = ["Architecture", "DensityName", "build_gene_module", "build_module"]

# Of a path's network.
_SHAPE = ("n_hidden", "n_layers")
DensityName = Literal["mixture", "gaussian", "flow"]


@dataclass(frozen=True)
class Architecture:
    """Shape of the networks and kind of density; checked when it is made.

    Parameters
    ----------
    n_latent, n_hidden, n_layers, dropout
        Dimensions of z; width, number and dropout of the hidden layers of encoder and decoder.
    density
        p(y | c): ``"mixture"``, ``"gaussian"`` or ``"flow"``.
    n_components
        Gaussians in a mixture.
    """

    n_latent: int
    n_hidden: int
    n_layers: int
    dropout: float
    density: DensityName
    n_components: int

    def __post_init__(self) -> None:
        for name in ("n_latent", "n_hidden", "n_layers", "n_components"):
            _arguments.check_positive_int(getattr(self, name), name)
        _arguments.check_number(self.dropout, "dropout", "[0, 1)")
        _arguments.check_choice(self.density, "density", ("mixture", "gaussian", "flow"))

    @property
    def networks(self) -> dict[str, Any]:
        """What a space wants to know."""
        names = ("n_latent", "n_hidden", "n_layers", "dropout")
        return {name: getattr(self, name) for name in names}

    def density_of(self, space: Space) -> ConditionalDensity:
        """The density of a space's y."""
        sizes = space.n_dims, space.features.n_features
        if self.density == "mixture":
            return Mixture(*sizes, n_components=self.n_components)
        return Gaussian(*sizes) if self.density == "gaussian" else NormalizingFlow(*sizes)


def build_module(
    model: GenerativeModel,
    law: Callable[[int], Likelihood],
    architecture: Architecture,
    path: Mapping[str, Any] | None = None,
    **said: Any,
) -> None:
    """Give a model its module.

    Parameters
    ----------
    model
        Set up, without a module.
    law
        From the number of genes to p(x | decoder's output); of counts or continuous values as
        the model is.
    architecture
        The rest of the module.
    path
        Arguments of the :class:`~exprgen.densities.Path` that is the density in the end; the
        architecture's is what the space is trained with then.
    **said
        What else the model's description should name.
    """

    def build() -> ExpressionModule:
        n_vars, layout = len(model.var_names), model.schema.layout
        space: Space
        if model.needs_counts:
            space = LatentSpace(
                n_vars,
                layout,
                law(n_vars),
                depth_is_observed=model._setup_args["size_factor_key"] is not None,
                **architecture.networks,
            )
        else:
            space = ContinuousLatentSpace(n_vars, layout, law(n_vars), **architecture.networks)
        density = architecture.density_of(space)
        if path is None:
            return ExpressionModule(space, density)
        sizes = space.n_dims, space.features.n_features
        flow = Path(*sizes, blocks=space.features.blocks, depth_first=True, **path)
        return ExpressionModule(space, flow, prior=density)

    if path is not None:
        _check_network(path)
        said = {"density": "path", **said, **_named(path)}
    model._set_module(build, {**asdict(architecture), **said})


def build_gene_module(model: GenerativeModel, n_latent: int, path: Mapping[str, Any]) -> None:
    """Give a model of continuous values its module in gene space.

    Parameters
    ----------
    model
        Set up, without a module.
    n_latent
        Principal components that stand for the state of a cell.
    path
        Arguments of the :class:`~exprgen.densities.Path`, of its network as well.
    """
    _arguments.check_positive_int(n_latent, "n_latent")
    _check_network(path)

    def build() -> ExpressionModule:
        space = GeneSpace(len(model.var_names), model.schema.layout, n_latent=n_latent)
        blocks = space.features.blocks
        network = GeneDenoiser(space.scores, blocks, **{name: path[name] for name in _SHAPE})
        others = {name: value for name, value in path.items() if name not in _SHAPE}
        sizes = space.n_dims, space.features.n_features
        return ExpressionModule(space, Path(*sizes, blocks=blocks, network=network, **others))

    said = {"space": "genes", "n_latent": n_latent, "density": "path", **_named(path)}
    model._set_module(build, said)


def _check_network(path: Mapping[str, Any]) -> None:
    for name in _SHAPE:
        _arguments.check_positive_int(path[name], f"density_{name[2:]}")


def _named(path: Mapping[str, Any]) -> dict[str, Any]:
    """A path's arguments by the names that the models have for them."""
    names = {"n_hidden": "density_hidden", "n_layers": "density_layers"}
    return {names.get(name, name): value for name, value in path.items()}
