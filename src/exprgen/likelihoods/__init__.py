"""Likelihoods of expression given the decoder's output."""

from exprgen.likelihoods._base import Dispersion, Likelihood, Start
from exprgen.likelihoods._gaussian import Gaussian, MixtureOfGaussians, PointMass
from exprgen.likelihoods._negative_binomial import (
    ContaminatedNegativeBinomial,
    NegativeBinomial,
    draw_negative_binomial,
    negative_binomial_log_prob,
)
from exprgen.likelihoods._poisson import Poisson
from exprgen.likelihoods._residual import ResidualLaw
from exprgen.likelihoods._zero_inflated import ZeroInflatedNegativeBinomial

__all__ = [
    "ContaminatedNegativeBinomial",
    "Dispersion",
    "Gaussian",
    "Likelihood",
    "MixtureOfGaussians",
    "NegativeBinomial",
    "PointMass",
    "Poisson",
    "ResidualLaw",
    "Start",
    "ZeroInflatedNegativeBinomial",
    "draw_negative_binomial",
    "negative_binomial_log_prob",
]
