"""The model that a tool is given."""

from __future__ import annotations

from exprgen.models import GenerativeModel

__all__ = ["check_model"]


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
