"""The model that a tool is given."""

from __future__ import annotations

import warnings

from exprgen._errors import ReproducibilityWarning
from exprgen.models import GenerativeModel

__all__ = ["check_model", "warn_if_donors_are_coded"]


def check_model(model: object) -> None:
    """Refuse what is no trained model.

    Raises
    ------
    TypeError
        If it is something else.
    RuntimeError
        If it is not trained.
    """
    if not isinstance(model, GenerativeModel):
        raise TypeError(f"model must be a trained model of exprgen, got {type(model).__name__}.")
    model._check_trained()


def warn_if_donors_are_coded(model: GenerativeModel, cells: str, stacklevel: int) -> None:
    """Say that other cells of a training donor would not be recognised among ``cells``.

    Warns
    -----
    ReproducibilityWarning
        If the model's file was saved without its donors' labels.
    """
    if model.schema.has_coded_donors:
        warnings.warn(
            f"This model was saved without its donors' labels. No cell of {cells} was in its "
            "training, but whether others of the same donors were cannot be told: the result "
            "would not be one for new donors. Save with donor_labels=True to have it checked.",
            ReproducibilityWarning,
            stacklevel=stacklevel + 1,
        )
