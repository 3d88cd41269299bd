"""Spaces: how expression x and what a density models, y, correspond."""

from exprgen.spaces._depth import Depth
from exprgen.spaces._donor import DonorEffect
from exprgen.spaces._latent import DataMoments, LatentSpace

__all__ = ["DataMoments", "Depth", "DonorEffect", "LatentSpace"]
