"""Likelihoods of expression given its mean."""

from exprgen.likelihoods._base import Likelihood
from exprgen.likelihoods._negative_binomial import (
    ContaminatedNegativeBinomial,
    NegativeBinomial,
    draw_negative_binomial,
    negative_binomial_log_prob,
)

__all__ = [
    "ContaminatedNegativeBinomial",
    "Likelihood",
    "NegativeBinomial",
    "draw_negative_binomial",
    "negative_binomial_log_prob",
]
