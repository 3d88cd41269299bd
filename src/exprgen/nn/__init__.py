"""Networks: condition features, encoder and decoder, denoisers; normal scores of genes."""

from exprgen.nn._conditions import ConditionFeatures
from exprgen.nn._denoiser import Denoiser
from exprgen.nn._gene_denoiser import GeneDenoiser
from exprgen.nn._mlp import Decoder, Encoder, hidden_stack
from exprgen.nn._scores import NormalScores, normal_density

__all__ = [
    "ConditionFeatures",
    "Decoder",
    "Denoiser",
    "Encoder",
    "GeneDenoiser",
    "NormalScores",
    "hidden_stack",
    "normal_density",
]
