"""What can go wrong, by name, and the words messages are made of.

Every message says *what is wrong, where (key, first three names, count), how to fix it*. The
errors subclass the built-in a reader would catch without knowing this package, so that
``except ValueError`` works; all warnings are :class:`UserWarning`.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "CovariateError",
    "DataQualityWarning",
    "ExtrapolationWarning",
    "GeneMismatchError",
    "ReproducibilityWarning",
    "SetupError",
    "TrainingDivergedError",
    "TrainingStoppedWarning",
    "UnseenCategoryError",
    "UntrustedFileError",
    "closest",
    "name_some",
]


class SetupError(ValueError):
    """The data cannot be modelled as they are: counts, shape, names."""


class CovariateError(ValueError):
    """A condition, batch or donor has missing, infinite, mixed or otherwise unusable values."""


class UnseenCategoryError(CovariateError):
    """A label that the model was not trained on."""


class GeneMismatchError(ValueError):
    """The genes of the data and those of the model differ."""


class TrainingDivergedError(RuntimeError):
    """The loss stopped being finite; the last good weights are kept."""


class CheckpointError(RuntimeError):
    """A model file is damaged, of another class, or of a newer format."""


class UntrustedFileError(CheckpointError):
    """A model file holds something else than tensors and plain Python types."""


class ExtrapolationWarning(UserWarning):
    """Conditions, or values of cells, that lie outside what was trained on."""


class DataQualityWarning(UserWarning):
    """The data can be modelled, but probably are not what the user thinks."""


class TrainingStoppedWarning(UserWarning):
    """Training was interrupted, as by Ctrl-C, and has returned."""


class ReproducibilityWarning(UserWarning):
    """The same call may give other numbers elsewhere."""


def name_some(names: Iterable[object], n: int = 3) -> str:
    """Name the first ``n`` and count the rest: ``"'a', 'b', 'c' and 7 more"``."""
    names = [_plain(name) for name in names]
    rest = len(names) - n
    return ", ".join(map(repr, names[:n])) + (f" and {rest} more" if rest > 0 else "")


def closest(name: object, options: Iterable[object]) -> str:
    """Suggest the nearest option: ``" Did you mean 'x'?"``, or ``""`` if none is near."""
    by_text = {str(option).casefold(): option for option in options}
    match = get_close_matches(str(name).casefold(), by_text, n=1)
    return f" Did you mean {_plain(by_text[match[0]])!r}?" if match else ""


def _plain(value: object) -> object:
    """Unwrap a numpy scalar, whose repr would name its type."""
    return value.item() if isinstance(value, np.generic) else value
