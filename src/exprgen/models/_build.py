"""From arguments to a module: which space, which density, of what shape."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from exprgen import _arguments
from exprgen.densities import (
    Centred,
    Gaussian,
    Mixture,
    NormalizingFlow,
    Path,
    StandardNormal,
)
from exprgen.module import ExpressionModule
from exprgen.nn import GeneDenoiser
from exprgen.spaces import ContinuousLatentSpace, GeneSpace, LatentSpace, ResidualSpace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from exprgen.densities import ConditionalDensity
    from exprgen.likelihoods import Likelihood
    from exprgen.models._base import GenerativeModel
    from exprgen.spaces import Space

__all__ = [
    "Architecture",
    "DensityName",
    "build_gene_module",
    "build_module",
    "build_residual_module",
    "refuse_useless",
]

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
        sizes = space.n_dims, 1 + sum(space.density_blocks)
        if self.density == "mixture":
            return Mixture(*sizes, n_components=self.n_components)
        return Gaussian(*sizes) if self.density == "gaussian" else NormalizingFlow(*sizes)


def build_module(
    model: GenerativeModel,
    law: Callable[[int], Likelihood],
    architecture: Architecture,
    path: Mapping[str, Any] | None = None,
    has_mean: bool = False,
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
    has_mean
        Whether a predictor's mean comes with the conditions; models of counts only.
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
                has_mean=has_mean,
                **architecture.networks,
            )
        else:
            space = ContinuousLatentSpace(n_vars, layout, law(n_vars), **architecture.networks)
        density = architecture.density_of(space)
        if path is None:
            return ExpressionModule(space, density)
        flow = _path_of(space, depth_first=True, **path)
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
        shape = {name: path[name] for name in _SHAPE}
        network = GeneDenoiser(space.scores, space.density_blocks, **shape)
        others = {name: value for name, value in path.items() if name not in _SHAPE}
        return ExpressionModule(space, _path_of(space, network=network, **others))

    said = {"space": "genes", "n_latent": n_latent, "density": "path", **_named(path)}
    model._set_module(build, said)


def build_residual_module(
    model: GenerativeModel, n_latent: int, density: str, path: Mapping[str, Any]
) -> None:
    """Give a model of continuous values around a predictor's mean its module.

    Parameters
    ----------
    model
        Set up, without a module.
    n_latent
        Factors at most.
    density
        ``"path"``, ``"low_rank"`` or ``"gaussian"``.
    path
        Arguments of the :class:`~exprgen.densities.Path`, of its network as well.
    """
    _arguments.check_positive_int(n_latent, "n_latent")
    _check_network(path)

    def build() -> ExpressionModule:
        space = ResidualSpace(
            len(model.var_names),
            model.schema.layout,
            n_latent=n_latent,
            is_correlated=density != "gaussian",
        )
        if density == "path":
            return ExpressionModule(space, Centred(_path_of(space, **path)))
        return ExpressionModule(space, StandardNormal(n_latent, 1 + sum(space.density_blocks)))

    said = {"space": "residuals", "n_latent": n_latent, "density": density}
    model._set_module(build, {**said, **_named(path)} if density == "path" else said)


def refuse_useless(
    model_class: type, said: Mapping[str, Any], names: Sequence[str], why: str
) -> None:
    """Refuse arguments that have no use for continuous values, where not left as they are.

    Raises
    ------
    ValueError
        If one of ``names`` in ``said`` is not the default of the class.
    """
    known = inspect.signature(model_class).parameters
    for name in names:
        if name in said and said[name] != known[name].default:
            raise ValueError(
                f"{name}={said[name]!r} has no use for continuous values: {why} Leave {name} out."
            )


def _path_of(space: Space, **path: Any) -> Path:
    """A path of a space's y."""
    blocks = space.density_blocks
    return Path(space.n_dims, 1 + sum(blocks), blocks=blocks, **path)


def _check_network(path: Mapping[str, Any]) -> None:
    for name in _SHAPE:
        _arguments.check_positive_int(path[name], f"density_{name[2:]}")


def _named(path: Mapping[str, Any]) -> dict[str, Any]:
    """A path's arguments by the names that the models have for them."""
    names = {"n_hidden": "density_hidden", "n_layers": "density_layers"}
    return {names.get(name, name): value for name, value in path.items()}
