"""The models whose density is a path from noise: ``ExprFlow`` and ``ExprDiffusion``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np

from exprgen import _arguments
from exprgen._errors import closest
from exprgen.models._base import GenerativeModel
from exprgen.models._build import (
    Architecture,
    build_gene_module,
    build_module,
    refuse_useless,
)
from exprgen.models._cells import cell_keys
from exprgen.models._presets import NBVAE, count_likelihood
from exprgen.solvers import SOLVERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData
    from mudata import MuData

    from exprgen.densities import Path

__all__ = ["PathModel"]

KINDS = ("counts", "continuous")
"""What a layer may hold."""

_DRAWING: ContextVar[tuple[PathModel, dict[str, Any]] | None] = ContextVar("drawing", default=None)
"""Which model is drawing in this thread, and how."""


class PathModel(GenerativeModel):
    """What flow and diffusion models share: a path.

    Of counts it is one in the space of an autoencoder, of continuous values in that of the genes.
    """

    needs_counts = True
    takes_continuous = True

    _AUTOENCODER: ClassVar[tuple[str, ...]] = (
        "n_latent", "n_hidden", "n_layers", "dropout", "n_components", "likelihood", "dispersion",
    )  # fmt: skip

    def __init__(
        self,
        adata: AnnData | MuData | None,
        registry: dict[str, Any] | None,
        *,
        seed: int | None,
        said: dict[str, Any],
    ) -> None:
        """``said`` has the arguments of the public class: the autoencoder's, and the path's."""
        autoencoder = {name: said[name] for name in self._AUTOENCODER}
        others = {"adata", "registry", "seed", *autoencoder}
        path = {
            name.replace("density_", "n_"): said[name]
            for name in inspect.signature(type(self)).parameters
            if name not in others
        }
        law, dispersion = count_likelihood(autoencoder["likelihood"], autoencoder["dispersion"])
        shape = {k: v for k, v in autoencoder.items() if k not in ("likelihood", "dispersion")}
        architecture = Architecture(density="mixture", **shape)
        super().__init__(adata, registry, seed=seed)
        kind = self._setup_state["data_kind"]
        self.needs_counts = _arguments.check_choice(kind, "kind", KINDS) == "counts"
        if self.needs_counts:
            path = {**path, "solver": path["solver"] or "heun"}
            said = {"likelihood": autoencoder["likelihood"], "dispersion": dispersion}
            build_module(self, law, architecture, path, **said)
            return
        useless = [
            name for name in (*self._AUTOENCODER, "target", "objective") if name != "n_latent"
        ]
        why = (
            f"{type(self).__name__} models them in gene space, without an autoencoder, by a "
            "network whose target is its own and whose size is density_hidden and density_layers."
        )
        refuse_useless(type(self), {**path, **autoencoder}, useless, why)
        path = {**path, "solver": path["solver"] or "arc", "target": "edm"}
        build_gene_module(self, autoencoder["n_latent"], path)

    @classmethod
    def from_autoencoder(cls, model: NBVAE, *, seed: int | None = None, **path: Any) -> Self:
        """A model whose autoencoder is that of a trained :class:`~exprgen.NBVAE`.

        Its weights are copied; :meth:`train` then trains the density alone, on the split that the
        other model was trained on.

        Parameters
        ----------
        model
            Trained, with its data and a mixture as density.
        seed
            Of the density's initial weights and training; ``None`` takes the model's.
        **path
            Arguments of this class about its density.

        Raises
        ------
        TypeError, ValueError
            If the model is no such model.
        """
        if not isinstance(model, NBVAE):
            raise TypeError(f"model must be an exprgen.NBVAE, got {type(model).__name__}.")
        model._check_trained()
        said = model.init_params_["non_kwargs"]
        if said["density"] != "mixture":
            raise ValueError(f"model must have density='mixture', got {said['density']!r}.")
        for word in path.keys() & {*cls._AUTOENCODER, "adata", "registry"}:
            raise TypeError(f"from_autoencoder() takes {word} from the model.")
        data, split = model._own_data(), (model.train_indices_, model.validation_indices_)
        cells = model._cells(None, training=True)
        keys = cell_keys(cells.adata, cells.reader)
        for name, rows in zip(("train", "validation"), split, strict=True):
            own = keys[rows[rows < len(keys)]]
            if not np.array_equal(own, model.cell_keys_[name]):
                raise ValueError("model must have the data that it was trained on, not others.")
        setup = getattr(cls, model.registry_["setup_method_name"])
        setup(data, source_registry=model.registry_, **model.registry_["setup_args"])
        shape = {word: said[word] for word in cls._AUTOENCODER}
        new = cls(data, seed=model.seed_ if seed is None else seed, **shape, **path)
        new.module.space.load_state_dict(model.module.space.state_dict())
        new.module.autoencoder_prior.load_state_dict(model.module.density.state_dict())
        new.module.initialized.fill_(True)
        new.autoencoder_taken_over_, new.cell_keys_ = True, model.cell_keys_
        return new

    @property
    def _path(self) -> Path:
        return cast("Path", self.module.density)

    @contextmanager
    def _drawing(
        self,
        guidance: float | Mapping[str, float],
        n_steps: int | None,
        solver: str | None,
    ) -> Iterator[None]:
        """Inside, cells are drawn as said."""
        options: dict[str, Any] = {}
        if n_steps is not None:
            options["n_steps"] = _arguments.check_positive_int(n_steps, "n_steps")
        if solver is not None:
            options["solver"] = _arguments.check_choice(solver, "solver", tuple(SOLVERS))
            if solver != self._path.solver:
                options.setdefault("n_steps", SOLVERS[solver].usual_steps)
        weights = self._guidance(guidance)
        if any(weight != 1 for weight in weights):
            if self._path.condition_dropout == 0:
                raise ValueError(
                    f"guidance={guidance!r} needs a model that has also seen cells without their "
                    "conditions; this one was made with condition_dropout=0."
                )
            options["guidance"] = weights
        token = _DRAWING.set((self, options))
        try:
            yield
        finally:
            _DRAWING.reset(token)

    @property
    def _density_options(self) -> Mapping[str, Any]:
        said = _DRAWING.get()
        return said[1] if said is not None and said[0] is self else {}

    def _guidance(self, guidance: float | Mapping[str, float]) -> list[float]:
        """A weight per condition, in their order."""
        keys = self.schema.condition_keys
        if not isinstance(guidance, Mapping):
            weight = _arguments.check_number(guidance, "guidance")
            if weight != 1 and not keys:
                raise ValueError(f"guidance={guidance!r} weighs conditions; this model has none.")
            return [weight] * len(keys)
        for key in guidance:
            if key not in keys:
                raise KeyError(
                    f"guidance has {key!r}, which is no condition; there are {keys}."
                    f"{closest(str(key), keys)}"
                )
        return [
            _arguments.check_number(guidance.get(key, 1.0), f"guidance[{key!r}]") for key in keys
        ]

    def sample(
        self,
        *args: Any,
        guidance: float | Mapping[str, float] = 1.0,
        n_steps: int | None = None,
        solver: str | None = None,
        **kwargs: Any,
    ) -> AnnData:
        """Draw new cells for given conditions.

        Parameters
        ----------
        *args, **kwargs
            See :meth:`NBVAE.sample`.
        guidance
            Weight of all conditions, or of each by name: 1 as trained, 0 as if it were not known,
            above 1 further apart than cells are, and with another variance than they have: mostly
            less where the condition's law is narrower than that of all cells, more where it is
            wider :cite:p:`ho2022`. It acts on the latent state; the decoder reads conditions as
            they are. Every condition with another weight than 0 and 1 doubles the evaluations of
            the network.
        n_steps, solver
            Of :mod:`exprgen.solvers`, in place of the model's own.

        Returns
        -------
        As :meth:`NBVAE.sample`.
        """
        with self._drawing(guidance, n_steps, solver):
            return super().sample(*args, **kwargs)

    def predict(
        self,
        *args: Any,
        guidance: float | Mapping[str, float] = 1.0,
        n_steps: int | None = None,
        solver: str | None = None,
        **kwargs: Any,
    ) -> AnnData | MuData:
        """Mean, spread and quantiles of p(x | c).

        Parameters
        ----------
        *args, **kwargs
            See :meth:`NBVAE.predict`.
        guidance, n_steps, solver
            See :meth:`sample`.

        Returns
        -------
        As :meth:`NBVAE.predict`.
        """
        with self._drawing(guidance, n_steps, solver):
            return super().predict(*args, **kwargs)
