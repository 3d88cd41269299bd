"""What ``setup_anndata`` registers with scvi-tools: the expression matrix and the conditions.

Both leave the user's object as it is: nothing is cast, copied or re-ordered in place, and the
encoded conditions are not stored in it, but recomputed from ``obs`` when they are needed. The
registry keeps what a saved model must know: the schema, and a digest of each column, so that an
edit after setup is noticed.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from scvi.data.fields import BaseAnnDataField, LayerField

from exprgen._conditions import ConditionSchema
from exprgen._errors import CovariateError, DataQualityWarning, name_some

if TYPE_CHECKING:
    import rich.table
    from anndata import AnnData

__all__ = ["CONDITIONS_KEY", "ConditionField", "expression_field"]

CONDITIONS_KEY = "conditions"


def expression_field(layer: str | None) -> LayerField:
    """The matrix to model; already checked, and never rewritten."""
    return LayerField(REGISTRY_KEYS.X_KEY, layer, is_count_data=False, correct_data_format=False)


class ConditionField(BaseAnnDataField):
    """Columns of obs and a key of obsm, as one schema.

    Parameters
    ----------
    schema
        Fitted to the object that will be registered, or taken from a saved model.
    size_factor_key
        Column of obs with the cells' depths, if any.
    extra
        Further plain state to keep in the registry.
    """

    def __init__(
        self, schema: ConditionSchema, size_factor_key: str | None, extra: dict[str, Any]
    ) -> None:
        super().__init__()
        self.schema = schema
        self.size_factor_key = size_factor_key
        self.extra = extra

    registry_key = CONDITIONS_KEY
    attr_name = "obs"
    attr_key = None
    is_empty = False

    def validate_field(self, adata: AnnData) -> None:
        """Encoding validates; see :meth:`register_field`."""

    def register_field(self, adata: AnnData) -> dict[str, Any]:
        """Schema, digests and extra state, plain types only."""
        digests = condition_digests(self.schema, adata, self.size_factor_key)
        return {"schema": self.schema.to_dict(), "digests": digests, **self.extra}

    def transfer_field(
        self, state_registry: dict, adata_target: AnnData, **kwargs: Any
    ) -> dict[str, Any]:
        """Register another object under the schema of the first."""
        schema = ConditionSchema.from_dict(state_registry["schema"])
        digests = condition_digests(schema, adata_target, self.size_factor_key)
        return {**state_registry, "digests": digests}

    def get_summary_stats(self, state_registry: dict) -> dict[str, int]:
        """How many conditions there are."""
        return {"n_conditions": len(self.schema.condition_keys)}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table | None:
        """Nothing beyond the summary."""
        return None

    def get_data_registry(self) -> dict:
        """Nothing is stored in the AnnData for loaders to read."""
        return {}


def condition_digests(
    schema: ConditionSchema, adata: AnnData, size_factor_key: str | None
) -> dict[str, str]:
    """Digest of each condition and the size factors as the model reads them, by key."""
    codes = encode_cells(schema, adata)
    keys = [*schema.categorical_keys, *schema.continuous_keys]
    blocks = {key: codes[:, [i]] for i, key in enumerate(keys)}
    start = len(keys)
    if schema.embedding_key is not None:
        blocks[schema.embedding_key] = codes[:, start : start + schema.layout.n_embedding]
        start += schema.layout.n_embedding
    blocks |= {key: codes[:, [start + i]] for i, key in enumerate(schema.nuisance_keys)}
    if size_factor_key is not None:
        blocks[size_factor_key] = pd.to_numeric(adata.obs[size_factor_key]).to_numpy(np.float64)
    return {
        key: hashlib.sha256(np.ascontiguousarray(block).tobytes()).hexdigest()
        for key, block in blocks.items()
    }


def check_unchanged(
    schema: ConditionSchema,
    digests: dict[str, str],
    adata: AnnData,
    size_factor_key: str | None,
    method: str,
) -> None:
    """Refuse cells whose conditions were edited after setup."""
    remedy = f"Run {method} again and create a new model, or restore the values."
    try:
        now = condition_digests(schema, adata, size_factor_key)
    except (CovariateError, KeyError) as error:
        what = f"Conditions changed since {method}: {error}"
        raise CovariateError(f"{what} {remedy}") from error
    changed = [key for key in now if now[key] != digests[key]]
    if changed:
        raise CovariateError(f"{name_some(changed)} changed since {method}. {remedy}")


def encode_cells(
    schema: ConditionSchema, adata: AnnData, *, unseen: Literal["error", "null"] = "error"
) -> np.ndarray:
    """Encoded conditions of an AnnData's cells, ``(n_obs, width)``, range not checked."""
    table, embedding = schema.parse(adata, argument="adata")
    if missing := schema.missing(table, embedding):
        raise CovariateError(
            f"The cells lack {name_some(missing, 20)}. The model requires "
            f"{name_some(schema.condition_keys, 20)} of every cell, under these names in obs"
            + (f" (in obsm: {schema.embedding_key!r})." if schema.embedding_key else ".")
        )
    with warnings.catch_warnings():
        # Setup has warned of what these say.
        warnings.simplefilter("ignore", DataQualityWarning)
        return schema.encode(table, embedding, unseen=unseen, on_extrapolation="ignore")
