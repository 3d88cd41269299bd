"""Networks: condition features, encoder and decoder."""

from exprgen.nn._conditions import ConditionFeatures
from exprgen.nn._mlp import Decoder, Encoder, hidden_stack

__all__ = ["ConditionFeatures", "Decoder", "Encoder", "hidden_stack"]
