"""Spaces: how expression x and what a density models, y, correspond."""

from exprgen.spaces._base import DataMoments, Decoded, Space
from exprgen.spaces._continuous import ContinuousLatentSpace
from exprgen.spaces._depth import Depth
from exprgen.spaces._donor import AdditiveDonorEffect, DonorEffect
from exprgen.spaces._latent import LatentSpace

__all__ = [
    "AdditiveDonorEffect",
    "ContinuousLatentSpace",
    "DataMoments",
    "Decoded",
    "Depth",
    "DonorEffect",
    "LatentSpace",
    "Space",
]
