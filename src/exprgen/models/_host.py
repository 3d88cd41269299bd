"""What a model inherits from scvi-tools besides its verbs: in our words, or refused.

Taken over as they are, some of these methods would pair genes by position, and some print what a
registry of another layout holds.
"""

from __future__ import annotations

import sys
from pprint import pformat
from typing import TYPE_CHECKING, Any, NoReturn

from exprgen.models._core import ModelCore

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from anndata import AnnData
    from mudata import MuData
    from scipy import sparse

__all__ = ["HostMixin", "setup_in_words"]


class HostMixin(ModelCore):
    """The rest of :class:`scvi.model.base.BaseModelClass`."""

    @property
    def adata(self) -> AnnData | MuData | None:
        """Data attached to the model; ``None`` if it was loaded without.

        Raises
        ------
        AttributeError
            If other data are assigned: the model's conditions and split are those of its own.
        """
        return self._adata

    @adata.setter
    def adata(self, adata: object) -> NoReturn:
        raise AttributeError(
            "adata cannot be replaced: the model's conditions, genes and split are those of the "
            "data it was set up with. Give other cells to the verbs, e.g. denoise(cells), or "
            "attach them to a saved model by load(path, cells)."
        )

    def get_var_names(self, legacy_mudata_format: bool = False) -> np.ndarray:
        """Names of the modelled genes, as :attr:`var_names`; of a MuData, of its one modality.

        Parameters
        ----------
        legacy_mudata_format
            Part of scvi-tools' contract, without effect.
        """
        names: np.ndarray = self.var_names.to_numpy()
        return names

    def data_registry(self, registry_key: str) -> np.ndarray | sparse.spmatrix:
        """The modelled matrix of the model's own data, ``(n_obs, n_vars)``, under the key ``"X"``.

        Raises
        ------
        ValueError
            If the model was loaded without data.
        KeyError
            If it is any other key: conditions stay in ``obs``, and are encoded when read.
        """
        self._own_data()
        if registry_key != "X":
            raise KeyError(
                f"registry_key={registry_key!r}: 'X' alone is registered. Conditions are columns "
                "of adata.obs, see get_setup_arg() for their names."
            )
        return super().data_registry(registry_key)

    def get_from_registry(
        self, adata: AnnData | MuData, registry_key: str
    ) -> np.ndarray | sparse.spmatrix:
        """As :meth:`data_registry`, and of the model's own data alone.

        Raises
        ------
        ValueError
            If ``adata`` is not the model's own.
        """
        if adata is not self._own_data():
            raise ValueError(
                "get_from_registry reads model.adata alone: verbs take other cells as they are, "
                "without registering them. Read adata.X or adata.layers."
            )
        return self.data_registry(registry_key)

    def deregister_manager(self, adata: AnnData | MuData | None = None) -> None:
        """Let scvi-tools forget what it registered of ``adata``, or of all data but the model's.

        Raises
        ------
        ValueError
            If the model was loaded without data, or ``adata`` was not set up.
        """
        self._own_data()
        super().deregister_manager(adata)

    def view_setup_method_args(self) -> None:
        """Print the arguments of setup."""
        sys.stdout.write(setup_in_words(self.registry_))

    def view_registry(self, hide_state_registries: bool = False) -> None:
        """Print the model, the arguments of setup and the most frequent conditions.

        Parameters
        ----------
        hide_state_registries
            Whether to leave the conditions out.
        """
        sys.stdout.write(f"{self!r}\n")
        self.view_setup_method_args()
        if not hide_state_registries:
            sys.stdout.write(f"{self.conditions.head(20).to_string()}\n")

    def view_anndata_setup(
        self, adata: AnnData | MuData | None = None, hide_state_registries: bool = False
    ) -> None:
        """Print what setup registered, see :meth:`view_registry`.

        Raises
        ------
        ValueError
            If ``adata`` is not the model's own.
        """
        if adata is not None and adata is not self.adata:
            raise ValueError(
                f"adata was not set up for this {type(self).__name__}, which knows model.adata "
                "alone. Leave adata out."
            )
        self.view_registry(hide_state_registries)

    def transfer_fields(self, adata: object, **kwargs: object) -> NoReturn:
        """Refuse: it would pair genes by position.

        Raises
        ------
        NotImplementedError
            Always.
        """
        self._refuse(
            "transfer_fields",
            "verbs take other cells as they are, and match genes by name. To train on other "
            f"cells, use {type(self).__name__}.load(path, adata)",
        )

    def update_setup_method_args(self, setup_method_args: object) -> NoReturn:
        """Refuse: the model would no longer be that of its setup.

        Raises
        ------
        NotImplementedError
            Always.
        """
        self._refuse(
            "update_setup_method_args",
            "run setup_anndata or setup_mudata again and create a new model",
        )

    def get_normalized_expression(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse: whether it is of a cell, or of its conditions, has two verbs here.

        Raises
        ------
        NotImplementedError
            Always.
        """
        self._refuse(
            "get_normalized_expression",
            "denoise() is what a cell has without its noise, predict() what its conditions let "
            "expect; both write layers",
        )

    def differential_abundance(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse: it compares densities of cells, where here conditions generate cells.

        Raises
        ------
        NotImplementedError
            Always.
        """
        self._refuse(
            "differential_abundance",
            "it is about how many cells of a kind there are, which is not modelled here. What "
            "differs in their expression is in exprgen.tl.effect",
        )

    def _refuse(self, name: str, instead: str) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} has no {name}: {instead}.")


def setup_in_words(registry: Mapping[str, Any]) -> str:
    """Which method of setup was called, and its arguments; lines."""
    said = pformat(dict(registry["setup_args"]), sort_dicts=False)
    return f"{registry['model_name']}.{registry['setup_method_name']} was called with\n{said}\n"
