"""Conditional generative models of gene expression for scanpy users.

``import exprgen`` is cheap and changes nothing: a name is imported when it is first used, and the
first model pays for scvi-tools.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exprgen import datasets, means, metrics, pl, tl
    from exprgen.models import (
        NBVAE,
        ZINBVAE,
        CondVAE,
        ExprDiffusion,
        ExprFlow,
        HybridResidualModel,
    )

__all__ = [
    "NBVAE",
    "ZINBVAE",
    "CondVAE",
    "ExprDiffusion",
    "ExprFlow",
    "HybridResidualModel",
    "datasets",
    "means",
    "metrics",
    "pl",
    "tl",
]
__version__ = version("exprgen")

_MODELS = ("NBVAE", "ZINBVAE", "CondVAE", "ExprDiffusion", "ExprFlow", "HybridResidualModel")


def __getattr__(name: str) -> Any:
    if name in _MODELS:
        return getattr(import_module("exprgen.models"), name)
    if name in __all__:
        return import_module(f"exprgen.{name}")
    raise AttributeError(f"module 'exprgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
