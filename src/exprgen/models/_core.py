"""What all verbs share: the state of a model, how cells are read and results written."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model.base import BaseModelClass

from exprgen import _arguments, _slots, _validate
from exprgen._conditions import ConditionSchema
from exprgen._errors import ExtrapolationWarning, GeneMismatchError, name_some
from exprgen._observed import ObservedConditions
from exprgen._random import isolated, resolve_seed
from exprgen.likelihoods._gaussian import Rectified
from exprgen.models._cells import Cells, GeneReader, cell_keys, library_of, split_labels
from exprgen.models._fields import CONDITIONS_KEY, encode_cells
from exprgen.models._mudata import home_of, in_modality, own_names, read_modality, target_of
from exprgen.models._query import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from exprgen.models._query import Query
    from exprgen.module import ExpressionModule

__all__ = ["ModelCore", "fingerprint"]


class ModelCore(BaseModelClass):
    """State of a model, how it reads cells and where it writes results."""

    needs_counts: bool
    """Whether the likelihood is one of counts."""

    takes_continuous: ClassVar[bool] = False
    """Whether a model of counts takes continuous values as well, as they are."""

    _refused_in_genes: ClassVar[tuple[str, ...]] = ("batch_key", "donor_key")
    """Roles that have no place where continuous values are modelled in gene space."""

    module: ExpressionModule
    is_trained_: bool
    history_: dict[str, Any] | None

    def __init__(
        self,
        adata: AnnData | MuData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        if isinstance(adata, MuData) and self._get_most_recent_anndata_manager(adata) is None:
            name = type(self).__name__
            raise ValueError(
                f"mdata is not set up for {name}: call {name}.setup_mudata(mdata, modality=...) "
                "first."
            )
        super().__init__(adata, registry)
        self.seed_ = resolve_seed(seed)
        self.schema = ConditionSchema.from_dict(self._setup_state["schema"])
        self.cell_keys_: dict[str, np.ndarray] = {}
        # Whether the space was taken over trained, on the cells of these keys.
        self.autoencoder_taken_over_ = False
        self.conditions_: dict[str, Any] | None = None
        if adata is not None:
            self._observe()

    @property
    def _density_options(self) -> Mapping[str, Any]:
        """How the density draws, where the caller of a verb has said so."""
        return {}

    @property
    def _setup_state(self) -> dict[str, Any]:
        return self.registry_["field_registries"][CONDITIONS_KEY]["state_registry"]

    @property
    def _setup_args(self) -> dict[str, Any]:
        return own_names(self.registry_["setup_args"])

    @property
    def var_names(self) -> pd.Index:
        """Names of the modelled genes, in the model's order."""
        state = self.registry_["field_registries"]["X"]["state_registry"]
        return pd.Index(np.asarray(state["column_names"], dtype=object))

    def _set_module(self, build: Callable[[], ExpressionModule], shape: Mapping[str, Any]) -> None:
        """Build the module with the model's seed; the caller's random streams go on as before."""
        with isolated(self.seed_):
            self.module = build()
        words = ", ".join(f"{key}={value}" for key, value in shape.items())
        self._model_summary_string = f"{type(self).__name__} with {words}"

    @property
    def _observed(self) -> ObservedConditions:
        if self.conditions_ is None:
            raise RuntimeError("This model has seen no data yet.")
        return ObservedConditions.from_dict(self.conditions_, self.schema)

    def _observe(self, rows: np.ndarray | slice = slice(None)) -> None:
        """Remember which combinations of conditions the given cells have."""
        table, _ = self.schema.parse(self._readable(self.adata), argument="adata")
        self.conditions_ = ObservedConditions.fit(self.schema, table.iloc[rows]).to_dict()

    @property
    def conditions(self) -> pd.DataFrame:
        """What the model can be asked: combinations of conditions and batch, most frequent first.

        ``n_train`` counts the training cells (before training: all registered cells). Continuous
        conditions of more than 20 values are summarised by minimum, median and maximum.
        """
        if self.conditions_ is None:
            return pd.DataFrame()
        return self._observed.frame

    def __repr__(self) -> str:
        state = "trained" if self.is_trained_ else "not trained"
        return f"{self._model_summary_string}, {len(self.var_names)} genes, {state}"

    def _check_trained(self) -> None:
        if not self.is_trained_:
            raise RuntimeError(f"This {type(self).__name__} is not trained: call train() first.")

    def _check_has_depth(self, *, default: Any = None, **argument: Any) -> None:
        """Refuse an argument about depth or fold changes where values are normalised for depth.

        Raises
        ------
        ValueError
            If the argument is not left at its ``default``.
        """
        ((name, value),) = argument.items()
        is_default = value is None if default is None else isinstance(value, str)
        if self.needs_counts or (is_default and value == default):
            return
        raise ValueError(
            f"{name}={value!r} needs a model of counts: {type(self).__name__} models values that "
            f"are normalised for depth. Leave {name} out, or use exprgen.NBVAE on the counts."
        )

    def _check_has_noise(self, verb: str) -> None:
        """Refuse a verb about what a cell's values leave open, where they leave nothing open.

        Raises
        ------
        ValueError
            If the model is one in gene space.
        """
        if not self.module.space.has_noise:
            raise ValueError(
                f"{verb} needs a model that tells a cell's state from the noise of its values. "
                f"This {type(self).__name__} models the values themselves, in gene space: given a "
                "cell's own it would return them. Use exprgen.CondVAE, or a model of the counts."
            )

    def _fingerprint(self) -> str:
        """A short hash of all weights: the same for a model that was saved and loaded."""
        return fingerprint(self.module)

    @property
    def _device(self) -> torch.device:
        return self.module.device

    # How cells are read and results written ------------------------------------------------

    def _own_data(self) -> AnnData | MuData:
        if self.adata is None:
            raise ValueError(
                f"This {type(self).__name__} was loaded without data: give an AnnData."
            )
        return self.adata

    def _readable(self, data: Any, *also: str) -> Any:
        """A MuData's modelled modality with its conditions, to read from; all else as it is."""
        if not isinstance(data, MuData):
            return data
        return read_modality(data, self._modality_setup(data), *also)

    def _home(self, data: AnnData | MuData) -> AnnData:
        """Where results about ``data`` are written."""
        if isinstance(data, MuData):
            return home_of(data, self._modality_setup(data))
        return data

    def _modality_setup(self, mdata: MuData) -> dict[str, Any]:
        """Arguments of ``setup_mudata``.

        Raises
        ------
        TypeError
            If the model was set up with an AnnData.
        """
        said: dict[str, Any] = self.registry_["setup_args"]
        if "modality" not in said:
            _validate.check_anndata(mdata, method=f"This {type(self).__name__}")
        return said

    def _cells(
        self,
        given: AnnData | MuData | None,
        indices: Any = None,
        *,
        unseen: Literal["error", "null"] = "error",
        training: bool = False,
    ) -> Cells:
        """Check and encode cells, without changing the object they come in.

        Warns
        -----
        ExtrapolationWarning
            Not for ``training``: if values lie below all that a continuous model can draw.
        """
        _arguments.check_choice(unseen, "unseen", ("error", "null"))
        given = self._own_data() if given is None else given
        adata = self._readable(given)
        layer = self._setup_args["layer"]
        with in_modality(None if adata is given else self._setup_args["modality"]):
            summary = _validate.check_query_data(
                adata,
                layer,
                needs_counts=self.needs_counts,
                allow_non_integer=self._setup_args["allow_non_integer"],
            )
        order = _validate.align_genes(adata.var_names, self.var_names)
        reader = GeneReader(_validate.matrix_of(adata, layer), order)
        totals = summary.row_totals if order is None else reader.totals()
        library = library_of(adata, self._setup_args["size_factor_key"], totals)
        codes = encode_cells(self.schema, adata, unseen=unseen)
        rows = np.arange(adata.n_obs)
        if indices is not None:
            rows = _arguments.check_indices(indices, adata.n_obs)
        cells = Cells(given, adata, reader, rows, codes[rows], library[rows])
        if not training:
            self._warn_of_values_below(cells)
        return cells

    def _warn_of_values_below(self, cells: Cells, block: int = 4096) -> None:
        likelihood = self.module.space.likelihood
        if not isinstance(likelihood, Rectified):
            return
        of_gene, n_cells = np.zeros(len(self.var_names), np.int64), 0
        for start in range(0, len(cells), block):
            x = torch.from_numpy(cells.reader.rows(cells.rows[start : start + block]))
            below = likelihood.below(x.to(self._device)).cpu().numpy()
            of_gene += below.sum(0)
            n_cells += int(below.any(1).sum())
        if n_cells:
            warnings.warn(
                f"{of_gene.sum()} values in {n_cells} of {len(cells)} cells lie below their "
                "gene's least value in training, where the model has no probability: genes "
                f"{name_some(self.var_names[of_gene > 0])}. To the model they are that least "
                "value; the log-likelihood of these cells is -inf. Are the values on the scale of "
                "training?",
                ExtrapolationWarning,
                stacklevel=4,
            )

    def _ask(self, conditions: Any, **options: Any) -> Query:
        """What a caller asks, see :func:`exprgen.models._query.ask`."""
        return ask(self.schema, self._observed, conditions, **options)

    def _check_same_genes(self, adata: AnnData, *, quiet: bool = True) -> np.ndarray | None:
        """Column of ``adata`` for each of the model's genes; layers need all of them and no more.

        Raises
        ------
        GeneMismatchError
            If ``adata`` has other genes, so that a layer cannot hold the results.
        """
        order = _validate.align_genes(adata.var_names, self.var_names, quiet=quiet)
        if adata.n_vars != len(self.var_names):
            raise GeneMismatchError(
                f"adata has {adata.n_vars} genes, the model {len(self.var_names)}: a layer cannot "
                "hold the results. Give adata[:, model.var_names].copy(), or genes=[...] to write "
                "to obsm."
            )
        return order

    def _write(
        self,
        given: AnnData | MuData,
        verb: str,
        values: Mapping[str, np.ndarray],
        info: dict[str, Any],
        *,
        split: pd.Categorical | None,
        selected: np.ndarray | None,
        key_added: str,
        overwrite: bool,
        copy: bool,
        replaces: Sequence[str] = (),
    ) -> AnnData | MuData:
        """Write arrays ``(n_obs, n_genes)`` to layers, in the order of ``given``'s genes."""
        target = target_of(given, copy)
        adata = self._home(target)
        order = self._check_same_genes(adata) if selected is None else None
        if order is not None:
            place = np.argsort(order)
            values = {name: array[:, place] for name, array in values.items()}
        _slots.write(
            adata,
            key_added,
            verb,
            model=type(self).__name__,
            layers=values,
            obs={} if split is None else {"split": split},
            info=info,
            var_names=None if selected is None else list(self.var_names[selected]),
            replaces=replaces,
            overwrite=overwrite,
        )
        return target

    def _split_of(self, adata: AnnData) -> pd.Categorical | None:
        """Whether each cell was trained on; ``None`` without counts of the model's genes."""
        layer = self._setup_args["layer"]
        matrix = adata.X if layer is None else adata.layers.get(layer)
        if matrix is None or not self.var_names.isin(adata.var_names).all():
            return None
        return split_labels(cell_keys(adata, self._reader(adata)), self.cell_keys_)

    def _reader(self, adata: AnnData) -> GeneReader:
        """Rows of the modelled layer, genes in the model's order.

        Raises
        ------
        KeyError, GeneMismatchError
            If there is no such layer, or genes are missing.
        """
        matrix = _validate.matrix_of(adata, self._setup_args["layer"])
        order = _validate.align_genes(adata.var_names, self.var_names, quiet=True)
        return GeneReader(matrix, order)

    def _new_adata(self, query: Query) -> AnnData:
        """An AnnData with a row per condition and no counts, to write to."""
        obs = self.schema.restore(query.table)
        obs.index = obs.index.astype(str)
        adata = AnnData(obs=obs, var=pd.DataFrame(index=self.var_names))
        if query.embedding is not None:
            adata.obsm[self.schema.embedding_key] = query.embedding
        return adata


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of all weights."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
