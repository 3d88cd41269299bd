"""``save`` and ``load``: a folder of plain tensors and types, without training rows.

``model.pt`` has scvi-tools' own layout (weights, gene names, attributes), but nothing in it needs
a pickle: it is read with ``weights_only=True``, after its checksum.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import anndata as ad
from anndata import AnnData
from scvi.model._utils import parse_device_args

from exprgen import _arguments, _files, _validate
from exprgen._conditions import ConditionSchema
from exprgen._errors import ReproducibilityWarning
from exprgen.models._core import ModelCore
from exprgen.models._fields import CONDITIONS_KEY

__all__ = ["SaveMixin"]

logger = logging.getLogger("exprgen")

ADATA_FILE = "adata.h5ad"


class SaveMixin(ModelCore):
    """Model folders."""

    def save(
        self,
        dir_path: str | Path,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        *,
        min_cells: int = 1,
        donor_labels: bool = False,
    ) -> None:
        """Write the model to a folder that holds no training cells.

        In their place stands :attr:`conditions`: which combinations of conditions were trained
        on, how many cells of each, and quantiles. The folder is written beside its place and then
        swapped in: whatever happens, the old model or the new one can be loaded.

        Parameters
        ----------
        dir_path
            Folder to write.
        prefix
            Of the files' names.
        overwrite
            Whether to replace a model that is there.
        save_anndata
            Whether to write the model's data beside it, as ``adata.h5ad``.
        min_cells
            Combinations of conditions with fewer training cells are left out of
            :attr:`conditions`.
        donor_labels
            Whether to keep donors' labels. If not they are replaced by numbers, and the loaded
            model takes every donor it is asked about as a new one.

        Raises
        ------
        FileExistsError, NotADirectoryError, PermissionError, OSError
            If the folder cannot be written; what was there is untouched.
        """
        _arguments.check_positive_int(min_cells, "min_cells")
        attributes = {
            name: value for name, value in self._get_user_attributes() if name.endswith("_")
        }
        if self.conditions_ is not None:
            attributes["conditions_"] = self._observed.drop_rare(min_cells).to_dict()
        if not donor_labels:
            attributes["registry_"] = _with_coded_donors(attributes["registry_"], self.schema)
        payload = {
            "model_state_dict": self.module.state_dict(),
            "var_names": self.var_names.to_numpy(),
            "attr_dict": attributes,
        }
        manifest = {
            "class": type(self).__name__,
            "var_names": list(self.var_names),
            "condition_schema": attributes["registry_"]["field_registries"][CONDITIONS_KEY][
                "state_registry"
            ]["schema"],
            "init_params": _files.to_plain(self.init_params_),
        }
        extra = {}
        if save_anndata:
            extra[f"{prefix or ''}{ADATA_FILE}"] = self._own_data().write_h5ad
        _files.write_folder(
            dir_path,
            manifest=manifest,
            payload=payload,
            overwrite=overwrite,
            extra=extra,
            prefix=prefix or "",
        )

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: AnnData | Literal[False] | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
    ) -> Self:
        """Read a model from a folder; nothing in the folder is executed.

        Parameters
        ----------
        dir_path
            Folder that :meth:`save` wrote.
        adata
            Data to attach, with the columns of setup; genes are put in the model's order by name.
            ``None`` takes the data saved with the model, if any; ``False`` takes none. A model
            without data can sample and predict.
        accelerator, device
            Where to put the weights, as in scvi-tools.
        prefix
            Of the files' names.

        Raises
        ------
        FileNotFoundError
            If there is no model.
        CheckpointError, UntrustedFileError
            If it is damaged, of another class, of a newer format, or holds more than plain
            tensors and types.
        GeneMismatchError, CovariateError, KeyError
            If ``adata`` does not fit the model.
        """
        _, _, torch_device = parse_device_args(
            accelerator=accelerator,
            devices=device,
            return_device="torch",
            validate_single_device=True,
        )
        folder = Path(dir_path).expanduser()
        _, payload = _files.read_folder(folder, expected_class=cls.__name__, prefix=prefix or "")
        attributes = dict(payload["attr_dict"])
        registry = attributes.pop("registry_")
        saved_data = folder / f"{prefix or ''}{ADATA_FILE}"
        if adata is None and saved_data.exists():
            adata = ad.read_h5ad(saved_data)
        attach = isinstance(adata, AnnData)
        if attach:
            adata = cls._adopt(adata, registry)
        elif adata is not None and adata is not False:
            _validate.check_anndata(adata, method="load")
        model = cls(
            adata if attach else None,
            None if attach else registry,
            **attributes["init_params_"]["non_kwargs"],
        )
        model.module.load_state_dict(payload["model_state_dict"])
        for name, value in attributes.items():
            setattr(model, name, value)
        model.to_device(torch_device)
        model.module.eval()
        return model

    @classmethod
    def _adopt(cls, adata: AnnData, registry: dict[str, Any]) -> AnnData:
        """Set up ``adata`` as the saved model's data was; a copy if its genes are re-ordered."""
        state = registry["field_registries"]["X"]["state_registry"]
        order = _validate.align_genes(adata.var_names, state["column_names"])
        if order is not None:
            adata = adata[:, order].copy()
        schema = ConditionSchema.from_dict(
            registry["field_registries"][CONDITIONS_KEY]["state_registry"]["schema"]
        )
        if schema.donor is not None and all(_is_coded(label) for label in schema.donor.labels):
            warnings.warn(
                "This model was saved without its donors' labels: all donors of adata are new to "
                "it. Save with donor_labels=True to keep them.",
                ReproducibilityWarning,
                stacklevel=3,
            )
        cls.setup_anndata(adata, source_registry=registry, **registry["setup_args"])
        return adata


def _with_coded_donors(registry: dict[str, Any], schema: ConditionSchema) -> dict[str, Any]:
    """The registry with donors' labels replaced by numbers."""
    if schema.donor is None:
        return registry
    labels = tuple(_CODED.format(i) for i in range(len(schema.donor.labels)))
    coded = replace(schema, donor=replace(schema.donor, labels=labels, dtype="object"))
    fields = dict(registry["field_registries"])
    field = dict(fields[CONDITIONS_KEY])
    field["state_registry"] = {**field["state_registry"], "schema": coded.to_dict()}
    fields[CONDITIONS_KEY] = field
    return {**registry, "field_registries": fields}


_CODED = "coded_donor_{}"


def _is_coded(label: Any) -> bool:
    return str(label).startswith(_CODED.format(""))
