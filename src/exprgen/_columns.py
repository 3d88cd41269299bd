"""What labels and quantities, the two sorts of condition columns, have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from exprgen._errors import CovariateError, name_some

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import pandas as pd

__all__ = ["Column", "refuse_values"]


@dataclass(frozen=True)
class Column:
    """What setup learned of a column: plain scalars and tuples of them."""

    key: str

    def to_dict(self) -> dict[str, Any]:
        """Plain types that survive JSON, for files."""
        state = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in state.items()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in state.items()
        }
        return cls(**fields)


def refuse_values(index: pd.Index, bad: np.ndarray, where: str, what: str, remedy: str) -> None:
    """Raise if any value is bad.

    Raises
    ------
    CovariateError
        Naming the column (``where``), the number of bad values and the first cells.
    """
    if n := int(bad.sum()):
        raise CovariateError(
            f"{where} has {n} {what}{'s' if n > 1 else ''} "
            f"(cells {name_some(index[bad])}).{remedy}"
        )
