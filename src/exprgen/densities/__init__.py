"""Conditional densities p(y | c)."""

from exprgen.densities._base import ConditionalDensity
from exprgen.densities._centred import Centred
from exprgen.densities._flow import NormalizingFlow
from exprgen.densities._gaussian import Gaussian
from exprgen.densities._mixture import Mixture
from exprgen.densities._normal import StandardNormal
from exprgen.densities._path import Path

__all__ = [
    "Centred",
    "ConditionalDensity",
    "Gaussian",
    "Mixture",
    "NormalizingFlow",
    "Path",
    "StandardNormal",
]
