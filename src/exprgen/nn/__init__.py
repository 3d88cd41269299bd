"""Networks: condition features, encoder and decoder, denoiser."""

from exprgen.nn._conditions import ConditionFeatures
from exprgen.nn._denoiser import Denoiser
from exprgen.nn._mlp import Decoder, Encoder, hidden_stack

__all__ = ["ConditionFeatures", "Decoder", "Denoiser", "Encoder", "hidden_stack"]
