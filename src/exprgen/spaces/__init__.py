"""Spaces: how expression x and what a density models, y, correspond."""

from exprgen.spaces._base import Autoencoder, DataMoments, Decoded, Space
from exprgen.spaces._continuous import ContinuousLatentSpace
from exprgen.spaces._depth import Depth
from exprgen.spaces._donor import AdditiveDonorEffect, DonorEffect
from exprgen.spaces._gene import GeneSpace
from exprgen.spaces._latent import LatentSpace
from exprgen.spaces._mean import KnownMean
from exprgen.spaces._residual import ResidualSpace

__all__ = [
    "AdditiveDonorEffect",
    "Autoencoder",
    "ContinuousLatentSpace",
    "DataMoments",
    "Decoded",
    "Depth",
    "DonorEffect",
    "GeneSpace",
    "KnownMean",
    "LatentSpace",
    "ResidualSpace",
    "Space",
]
