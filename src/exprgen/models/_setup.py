"""``setup_anndata`` and ``setup_mudata``: what is modelled, and what it is conditioned on."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

from scvi.data import AnnDataManager

from exprgen import _arguments, _validate
from exprgen._conditions import ConditionSchema
from exprgen._errors import SetupError, closest
from exprgen.models._cells import library_of
from exprgen.models._core import ModelCore
from exprgen.models._fields import CONDITIONS_KEY, ConditionField, expression_field
from exprgen.models._mudata import (
    ModalityManager,
    check_mudata,
    in_modality,
    own_names,
    read_modality,
)

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["SetupMixin"]

logger = logging.getLogger("exprgen")

_SCVI_WORDS = {
    "labels_key": "categorical_condition_keys",
    "categorical_covariate_keys": "batch_key (nuisance) or categorical_condition_keys (generated)",
    "continuous_covariate_keys": "continuous_condition_keys",
    "modalities": "modality, and 'modality:key' for what other modalities have",
}


class SetupMixin(ModelCore):
    """How a model is told what the data are."""

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
            Layer to model; ``None`` is ``adata.X``. Flow and diffusion models take continuous
            values as well as counts: where most values that are not 0 have fractions.
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
            Column of obs that stands for the cells' depth, instead of their totals; models of
            counts only.
        allow_non_integer
            Whether counts may have fractions (ambient-corrected ones do); models of continuous
            values take fractions whatever it says.
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
        said = cls._get_setup_method_args(**locals())
        cls._check_setup_words(kwargs, "setup_anndata")
        cls._register(adata, adata, said, kwargs)

    @classmethod
    def setup_mudata(
        cls,
        mdata: MuData,
        *,
        modality: str,
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
        """Say which modality of ``mdata`` is modelled, and what it is conditioned on.

        One modality is modelled; the others can only condition. Cells are matched by name, and
        those of a modality that conditions must be those of the modelled one. Verbs then take a
        MuData where they take an AnnData: they read the modality and its conditions, count cells
        in the modality's order, write to ``mdata.mod[modality]`` and return the MuData. Nothing of
        ``mdata`` is changed except for scvi-tools' two ``_scvi_*`` identifiers in ``uns``.

        A key is a name in ``mdata`` or in the modelled modality, or is written
        ``"modality:key"``; the modelled modality's own prefix is not part of the condition's name.

        Parameters
        ----------
        mdata
            Cells in several modalities; not a view.
        modality
            Name of the modality to model.
        layer
            Layer of that modality; ``None`` is its ``X``.
        batch_key, donor_key, categorical_condition_keys, continuous_condition_keys
            Columns of obs, in the roles of :meth:`setup_anndata`.
        condition_embedding_key
            One vector per cell to generate on: a key of obsm, or the name of another modality,
            all of whose ``X`` is taken as it is. A sparse one is made dense, up to 2,000 columns.
        size_factor_key, allow_non_integer, **kwargs
            As in :meth:`setup_anndata`.

        Raises
        ------
        TypeError, KeyError, SetupError, CovariateError
            If an argument or the data cannot be used; the message says where and what to do.

        Warns
        -----
        DataQualityWarning
            If something looks unlike what was meant.
        """
        said = cls._get_setup_method_args(**locals())
        cls._check_setup_words(kwargs, "setup_mudata")
        check_mudata(mdata)
        adata = read_modality(mdata, said["setup_args"], at_setup=True)
        with in_modality(modality):
            cls._register(mdata, adata, said, kwargs)

    @classmethod
    def _register(
        cls, data: AnnData | MuData, adata: AnnData, said: dict[str, Any], kwargs: dict[str, Any]
    ) -> None:
        """Check ``adata``, which is ``data`` or a modality of it, and register ``data``."""
        roles = own_names(said["setup_args"])
        layer, size_factor_key = roles["layer"], roles["size_factor_key"]
        _arguments.check_bool(roles["allow_non_integer"], "allow_non_integer")
        source = kwargs.get("source_registry")
        state = source and source["field_registries"][CONDITIONS_KEY]["state_registry"]
        needs_counts: bool | None = cls.needs_counts
        if cls.takes_continuous:
            needs_counts = state["data_kind"] == "counts" if state else None
            if roles["allow_non_integer"]:
                needs_counts = True
        summary = _validate.check_setup_data(
            adata,
            layer,
            needs_counts=needs_counts,
            allow_non_integer=roles["allow_non_integer"],
        )
        if needs_counts is None:
            needs_counts = not summary.is_fractional
        if not needs_counts:
            cls._check_continuous_roles(roles)
        if state is None:
            schema = ConditionSchema.fit(
                adata.obs,
                categorical=roles["categorical_condition_keys"],
                continuous=roles["continuous_condition_keys"],
                batch=roles["batch_key"],
                donor=roles["donor_key"],
                embedding=_validate.embedding_of(adata, roles["condition_embedding_key"]),
            )
        else:
            schema = ConditionSchema.from_dict(state["schema"])
        library_of(adata, size_factor_key, summary.row_totals)
        extra = {"data_kind": "counts" if needs_counts else "continuous"}
        manager = (AnnDataManager if data is adata else ModalityManager)(
            fields=[expression_field(layer), ConditionField(schema, size_factor_key, extra)],
            setup_method_args=said,
        )
        manager.register_fields(data, **kwargs)
        cls.register_manager(manager)

    @classmethod
    def _check_continuous_roles(cls, roles: dict[str, Any]) -> None:
        """Refuse roles that need counts or, in gene space, a decoder."""
        if (key := roles["size_factor_key"]) is not None:
            raise SetupError(
                f"size_factor_key={key!r} is for models of counts; {cls.__name__} models values "
                "that are normalised for depth. Leave it out."
            )
        if not cls.takes_continuous:
            return
        logger.info(
            "The values are no counts: %s models them in gene space. Where counts are at hand, "
            "give these.",
            cls.__name__,
        )
        for name in cls._refused_in_genes:
            if (key := roles[name]) is not None:
                raise SetupError(
                    f"{name}={key!r} acts in a decoder, and {cls.__name__} has none for "
                    "continuous values. Give the column in categorical_condition_keys, give "
                    "counts, or use exprgen.CondVAE."
                )

    @classmethod
    def _check_setup_words(cls, kwargs: dict[str, Any], method: str) -> None:
        """Refuse keywords that scvi-tools would swallow."""
        for word in kwargs.keys() - {"source_registry"}:
            if word in _SCVI_WORDS:
                hint = f" In exprgen this is {_SCVI_WORDS[word]}."
            else:
                hint = closest(word, inspect.signature(getattr(cls, method)).parameters)
            raise TypeError(f"{method}() got an unexpected argument {word!r}.{hint}")
