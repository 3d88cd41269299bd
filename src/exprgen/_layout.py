"""How encoded conditions are laid out: all that the torch side knows of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ConditionLayout"]


@dataclass(frozen=True)
class ConditionLayout:
    """Widths of ``labels | quantities | embedding | batch | donor``, in this order.

    Parameters
    ----------
    n_categories
        Number of labels of each categorical condition.
    n_continuous, n_embedding
        Number of continuous conditions; dimensions of the embedding.
    n_batch, n_donor
        Number of labels; 0 if there is no such column.
    """

    n_categories: tuple[int, ...] = ()
    n_continuous: int = 0
    n_embedding: int = 0
    n_batch: int = 0
    n_donor: int = 0

    @property
    def width(self) -> int:
        """Number of columns of the encoded matrix."""
        n_codes = len(self.n_categories) + (self.n_batch > 0) + (self.n_donor > 0)
        return n_codes + self.n_continuous + self.n_embedding

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for files."""
        return asdict(self) | {"n_categories": list(self.n_categories)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ConditionLayout:
        """Undo :meth:`to_dict`."""
        return cls(**{**state, "n_categories": tuple(state["n_categories"])})
