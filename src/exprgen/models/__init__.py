"""Models: scvi-tools' interface around spaces and densities."""

from exprgen.models._base import GenerativeModel
from exprgen.models._hybrid import HybridResidualModel
from exprgen.models._path_presets import ExprDiffusion, ExprFlow
from exprgen.models._presets import NBVAE, ZINBVAE, CondVAE

__all__ = [
    "NBVAE",
    "ZINBVAE",
    "CondVAE",
    "ExprDiffusion",
    "ExprFlow",
    "GenerativeModel",
    "HybridResidualModel",
]
