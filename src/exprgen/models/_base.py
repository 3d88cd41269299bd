"""Setup, training and files of every model; the verbs are in the mixins beside this file.

A :class:`GenerativeModel` is the AnnData side of an :class:`~exprgen.module.ExpressionModule`:
it validates, encodes, trains and saves. A concrete model only says which module it is.
"""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass

from exprgen import _validate
from exprgen._conditions import ConditionSchema
from exprgen._errors import closest
from exprgen._observed import ObservedConditions
from exprgen._random import isolated, resolve_seed
from exprgen.models._cells import library_of
from exprgen.models._fields import CONDITIONS_KEY, ConditionField, expression_field
from exprgen.models._generate import GenerateMixin
from exprgen.models._infer import InferMixin
from exprgen.models._predict import PredictMixin
from exprgen.models._save import SaveMixin
from exprgen.models._train import TrainMixin
from exprgen.module import ExpressionModule

__all__ = ["GenerativeModel"]

logger = logging.getLogger("exprgen")

_SCVI_WORDS = {
    "labels_key": "categorical_condition_keys",
    "categorical_covariate_keys": "batch_key (nuisance) or categorical_condition_keys (generated)",
    "continuous_covariate_keys": "continuous_condition_keys",
}


class GenerativeModel(
    TrainMixin,
    GenerateMixin,
    PredictMixin,
    InferMixin,
    SaveMixin,
    BaseModelClass,
):
    """A conditional generative model p(x | c) of expression.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`.
    registry
        The registry of a saved model, instead of data.
    seed
        Of the initial weights and of training; ``None`` takes ``scvi.settings.seed``, or fresh
        entropy. It is kept as ``model.seed_``.
    """

    needs_counts: ClassVar[bool]
    """Whether the likelihood is one of counts."""

    module: ExpressionModule

    def __init__(
        self,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(adata, registry)
        self.seed_ = resolve_seed(seed)
        self.schema = ConditionSchema.from_dict(self._setup_state["schema"])
        self.cell_keys_: dict[str, np.ndarray] = {}
        self.conditions_: dict[str, Any] | None = None
        if adata is not None:
            self._observe(np.arange(adata.n_obs))

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        donor_key: str | None = None,
        categorical_condition_keys: list[str] | None = None,
        continuous_condition_keys: list[str] | None = None,
        condition_embedding_key: str | None = None,
        size_factor_key: str | None = None,
        allow_non_integer: bool = False,
        **kwargs: Any,
    ) -> None:
        """Say which parts of ``adata`` are modelled, and in which role.

        Nothing of ``adata`` is changed except for scvi-tools' two ``_scvi_*`` identifiers in
        ``uns``. All values are checked here, before anything is registered.

        Parameters
        ----------
        adata
            Cells × genes; not a view.
        layer
            Layer to model; ``None`` is ``adata.X``.
        batch_key
            Column of obs that is *nuisance*: it reaches the decoder and the depth, never the
            latent representation.
        donor_key
            Column of obs whose labels are a sample of many: a random effect.
        categorical_condition_keys, continuous_condition_keys
            Columns of obs that cells are generated on.
        condition_embedding_key
            Key of obsm with one vector per cell to generate on.
        size_factor_key
            Column of obs that stands for the cells' depth, instead of their totals.
        allow_non_integer
            Whether counts may have fractions (ambient-corrected ones do).
        **kwargs
            ``source_registry`` of a saved model, passed to
            :meth:`scvi.data.AnnDataManager.register_fields`.

        Raises
        ------
        TypeError, KeyError, SetupError, CovariateError
            If an argument or the data cannot be used; the message says where and what to do.

        Warns
        -----
        DataQualityWarning
            If something looks unlike what was meant.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        cls._check_setup_words(kwargs)
        summary = _validate.check_setup_data(
            adata, layer, needs_counts=cls.needs_counts, allow_non_integer=allow_non_integer
        )
        source = kwargs.get("source_registry")
        if source is None:
            schema = ConditionSchema.fit(
                adata.obs,
                categorical=categorical_condition_keys,
                continuous=continuous_condition_keys,
                batch=batch_key,
                donor=donor_key,
                embedding=_validate.embedding_of(adata, condition_embedding_key),
            )
        else:
            state = source["field_registries"][CONDITIONS_KEY]["state_registry"]
            schema = ConditionSchema.from_dict(state["schema"])
        library_of(adata, size_factor_key, summary.row_totals)
        extra = {"data_kind": "counts" if cls.needs_counts else "continuous"}
        manager = AnnDataManager(
            fields=[expression_field(layer), ConditionField(schema, extra)],
            setup_method_args=setup_method_args,
        )
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)

    @classmethod
    def _check_setup_words(cls, kwargs: dict[str, Any]) -> None:
        """Refuse keywords that scvi-tools would swallow."""
        for word in kwargs.keys() - {"source_registry"}:
            if word in _SCVI_WORDS:
                hint = f" In exprgen this is {_SCVI_WORDS[word]}."
            else:
                hint = closest(word, inspect.signature(cls.setup_anndata).parameters)
            raise TypeError(f"setup_anndata() got an unexpected argument {word!r}.{hint}")

    @property
    def _setup_state(self) -> dict[str, Any]:
        return self.registry_["field_registries"][CONDITIONS_KEY]["state_registry"]

    @property
    def _setup_args(self) -> dict[str, Any]:
        return self.registry_["setup_args"]

    @property
    def var_names(self) -> pd.Index:
        """Names of the modelled genes, in the model's order."""
        state = self.registry_["field_registries"]["X"]["state_registry"]
        return pd.Index(np.asarray(state["column_names"], dtype=object))

    @abstractmethod
    def _build_module(self, **module_kwargs: Any) -> ExpressionModule:
        """Make the module from the arguments of ``__init__`` that shape it."""

    def _set_module(self, module_kwargs: dict[str, Any]) -> None:
        """Build the module with the model's seed; the caller's random streams go on as before."""
        with isolated(self.seed_):
            self.module = self._build_module(**module_kwargs)
        words = ", ".join(f"{key}={value}" for key, value in module_kwargs.items())
        self._model_summary_string = f"{type(self).__name__} with {words}"

    @property
    def _observed(self) -> ObservedConditions:
        if self.conditions_ is None:
            raise RuntimeError("This model has seen no data yet.")
        return ObservedConditions.from_dict(self.conditions_, self.schema)

    def _observe(self, rows: np.ndarray) -> None:
        """Remember which combinations of conditions the given cells have."""
        table, _ = self.schema.parse(self.adata, argument="adata")
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

    @property
    def _device(self) -> torch.device:
        return self.module.device
