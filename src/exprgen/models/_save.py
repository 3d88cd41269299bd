"""``save`` and ``load``: a folder of plain tensors and types, without training rows.

``model.pt`` has scvi-tools' own layout (weights, gene names, attributes), but nothing in it needs
a pickle: it is read with ``weights_only=True``, after its checksum. A checksum says that a file is
as it was written, not that a model wrote it: what does not make a model is refused by name.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self
from zipfile import BadZipFile

import anndata as ad
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model._utils import parse_device_args

from exprgen import _arguments, _files, _validate
from exprgen._conditions import ConditionSchema
from exprgen._errors import CheckpointError, ReproducibilityWarning, name_some
from exprgen.models._fields import CONDITIONS_KEY
from exprgen.models._host import setup_in_words
from exprgen.models._mudata import own_names, read_h5mu, write_h5mu
from exprgen.models._setup import SetupMixin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from exprgen.module import ExpressionModule

__all__ = ["SaveMixin", "fill", "naming"]

ADATA_FILE, MDATA_FILE = "adata.h5ad", "mdata.h5mu"


class SaveMixin(SetupMixin):
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
            Whether to write the model's data beside it, as ``adata.h5ad`` or ``mdata.h5mu``.
        min_cells
            Combinations of conditions with fewer training cells are left out of
            :attr:`conditions`.
        donor_labels
            Whether to keep donors' labels, which says who was trained on. If not they are replaced
            by numbers: the loaded model has its donors' effects, not whose they are, and takes
            every donor it is asked about as a new one.

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
        extra = dict([_data_file(self._own_data())]) if save_anndata else {}
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
        adata: AnnData | MuData | Literal[False] | None = None,
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
            Of a model of ``setup_mudata``, a MuData, or the modelled modality alone if it has
            every condition under its name in :attr:`conditions`.
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
            If it is damaged, of another class, of a newer format, holds more than plain tensors
            and types, or weights that are not finite.
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
        manifest, payload = _files.read_folder(
            folder, expected_class=cls.__name__, prefix=prefix or ""
        )
        with naming(folder, "description"):
            attributes = dict(payload["attr_dict"])
            registry = attributes.pop("registry_")
            arguments = attributes["init_params_"]["non_kwargs"]
            _check_registry(registry)
            method = registry["setup_method_name"]
            known = inspect.signature(getattr(cls, method)).parameters.keys()
            if unknown := registry["setup_args"].keys() - (known - {"adata", "mdata", "kwargs"}):
                raise TypeError(f"{method} takes no {name_some(sorted(unknown))}")
        with naming(folder, "weights"):
            state = registry["field_registries"][CONDITIONS_KEY]["state_registry"]
            in_genes = cls.takes_continuous and state["data_kind"] != "counts"
            _check_sizes(arguments, payload["model_state_dict"], in_genes=in_genes)
        for name, read in ((ADATA_FILE, ad.read_h5ad), (MDATA_FILE, read_h5mu)):
            data_file = f"{prefix or ''}{name}"
            if adata is None and data_file in manifest["files"]:  # no other has been verified
                with naming(folder, data_file):
                    adata = read(folder / data_file)
        attach = isinstance(adata, AnnData | MuData)
        if attach:
            adata = cls._adopt(adata, registry)
        elif adata is not None and adata is not False:
            _validate.check_anndata(adata, method="load")
        with naming(folder, "description"):
            model = cls(adata if attach else None, None if attach else registry, **arguments)
        with naming(folder, "weights"):
            fill(model.module, payload["model_state_dict"])
        with naming(folder, "state"):
            model._restore(attributes)
        model.to_device(torch_device)
        model.module.eval()
        return model

    def _restore(self, attributes: Mapping[str, Any]) -> None:
        """Set what a saved model knew; names that this class does not save are left out."""
        for name, new in list(vars(self).items()):
            if name.endswith("_") and name in attributes:
                value = attributes[name]
                if new is not None and not isinstance(value, type(new)):
                    raise TypeError(f"{name} is a {type(value).__name__}")
                setattr(self, name, value)
        if self.conditions_ is not None:
            _ = self.conditions  # decodes all of it

    @staticmethod
    def load_registry(dir_path: str | Path, prefix: str | None = None) -> dict[str, Any]:
        """Read what ``setup_anndata`` registered for a saved model; nothing is executed.

        Parameters
        ----------
        dir_path, prefix
            As in :meth:`load`.

        Raises
        ------
        FileNotFoundError, CheckpointError, UntrustedFileError
            As in :meth:`load`.
        """
        _, payload = _files.read_folder(dir_path, expected_class=None, prefix=prefix or "")
        with naming(Path(dir_path), "description"):
            registry = payload["attr_dict"]["registry_"]
            _check_registry(registry)
        return registry

    @staticmethod
    def view_setup_args(dir_path: str | Path, prefix: str | None = None) -> None:
        """Print the arguments of ``setup_anndata`` of a saved model; nothing is executed.

        Parameters
        ----------
        dir_path, prefix
            As in :meth:`load`.

        Raises
        ------
        FileNotFoundError, CheckpointError, UntrustedFileError
            As in :meth:`load`.
        """
        registry = SaveMixin.load_registry(dir_path, prefix)
        sys.stdout.write(setup_in_words(registry))

    @classmethod
    def convert_legacy_save(
        cls,
        dir_path: str | Path,
        output_dir_path: str | Path,
        overwrite: bool = False,
        prefix: str | None = None,
    ) -> NoReturn:
        """Refuse: scvi-tools' old format is a pickle, and no model of exprgen was saved in it.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            f"No {cls.__name__} was ever saved in the format of scvi-tools before 0.15, and "
            "reading it could run code. Load the model by load(), or train it anew."
        )

    @classmethod
    def _adopt(cls, adata: AnnData | MuData, registry: dict[str, Any]) -> AnnData | MuData:
        """Set up ``adata`` as the saved model's data was; a copy if its genes are re-ordered."""
        said, several = registry["setup_args"], isinstance(adata, MuData)
        if not (several and "modality" in said):
            _validate.check_anndata(adata, method="load")
            state = registry["field_registries"]["X"]["state_registry"]
            order = _validate.align_genes(adata.var_names, state["column_names"])
            if order is not None:
                adata = adata[:, order].copy()
            said = {role: key for role, key in own_names(said).items() if role != "modality"}
        schema = ConditionSchema.from_dict(
            registry["field_registries"][CONDITIONS_KEY]["state_registry"]["schema"]
        )
        if schema.has_coded_donors:
            warnings.warn(
                "This model was saved without its donors' labels: all donors of adata are new to "
                "it. Save with donor_labels=True to keep them.",
                ReproducibilityWarning,
                stacklevel=3,
            )
        setup = cls.setup_mudata if several else cls.setup_anndata
        setup(adata, source_registry=registry, **said)
        return adata


def _with_coded_donors(registry: dict[str, Any], schema: ConditionSchema) -> dict[str, Any]:
    """The registry with donors' labels replaced by numbers."""
    if schema.donor is None:
        return registry
    fields = dict(registry["field_registries"])
    field = dict(fields[CONDITIONS_KEY])
    coded = schema.with_coded_donors().to_dict()
    field["state_registry"] = {**field["state_registry"], "schema": coded}
    fields[CONDITIONS_KEY] = field
    return {**registry, "field_registries": fields}


_MADE_UP = (
    ArithmeticError,
    AttributeError,
    BadZipFile,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What comes of a file that no model has written."""


def _data_file(data: AnnData | MuData) -> tuple[str, Callable[[Path], object]]:
    """Name of the file that a model's data are saved in, and what writes it."""
    if isinstance(data, MuData):
        return MDATA_FILE, partial(write_h5mu, data)
    return ADATA_FILE, data.write_h5ad


@contextmanager
def naming(folder: Path, part: str) -> Iterator[None]:
    """Say which part of a model's folder is no part of a model."""
    try:
        yield
    except _MADE_UP as error:
        raise CheckpointError(
            f"The model in {folder} is corrupted: its {part} cannot be used "
            f"({type(error).__name__}: {error}). Take another copy of the model."
        ) from error


def _check_registry(registry: Mapping[str, Any]) -> None:
    """Read all of a registry that printing it, or setting up data by it, needs."""
    fields, said = registry["field_registries"], registry["setup_args"]
    ConditionSchema.from_dict(fields[CONDITIONS_KEY]["state_registry"]["schema"])
    texts = [registry["model_name"], *fields["X"]["state_registry"]["column_names"], *said]
    for value in said.values():
        if not isinstance(value, bool | None):
            texts += value if isinstance(value, list) else [value]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{name_some(wrong)} is no text")
    if not registry["model_name"].isidentifier():
        raise ValueError(f"{registry['model_name']!r} is no class")
    _ = said["layer"], own_names(said)
    _arguments.check_bool(said["allow_non_integer"], "allow_non_integer")
    several = "modality" in said
    if registry["setup_method_name"] != ("setup_mudata" if several else "setup_anndata"):
        raise ValueError(f"{registry['setup_method_name']!r} is no method of setup")


def _check_sizes(
    arguments: Mapping[str, Any], weights: Mapping[str, Any], *, in_genes: bool = False
) -> None:
    """Refuse networks that the weights cannot fill, before memory is asked for them."""
    sizes, density = ["n_latent"], arguments.get("density")
    # Models of a density for choice have a path's network if they say so; flow models always.
    if density == "path" or (density is None and ("solver" in arguments or in_genes)):
        sizes += ["density_hidden", "density_layers"]
    if not in_genes:
        sizes += ["n_hidden", "n_layers"]
        # Paths have a mixture as prior.
        sizes += ["n_components"] * (density in (None, "mixture", "path"))
    shapes = [tuple(value.shape) for value in weights.values() if torch.is_tensor(value)]
    largest = max(len(shapes), *(n for shape in shapes for n in shape), 0)
    for name in sizes:
        size = arguments.get(name)
        if isinstance(size, int) and size > largest:  # what else it may be, the class refuses
            raise ValueError(f"{name} is {size}, but the largest of their dimensions {largest}")


def fill(module: ExpressionModule, weights: Mapping[str, Any]) -> None:
    """Load weights that are those of the module: names, shapes, kinds of numbers, finite."""
    own = module.state_dict()
    if differ := sorted(map(str, own.keys() ^ weights.keys())):
        raise KeyError(f"{name_some(differ)} missing or unknown")
    for name, like in own.items():
        value = weights[name]
        if not (torch.is_tensor(value) and value.layout == torch.strided):
            raise TypeError(f"{name} is no array")
        floating = value.is_floating_point() and like.is_floating_point()  # of any precision
        if value.shape != like.shape or not (floating or value.dtype == like.dtype):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and type {value.dtype}, not "
                f"{tuple(like.shape)} and {like.dtype}"
            )
        if not torch.isfinite(value.to(like)).all():
            raise ValueError(f"{name} has values that are not finite")
    module.load_state_dict(weights)
