"""Paths between noise and data: schedules, what networks predict on them, and how they train."""

from exprgen.schedules._schedule import (
    SCHEDULES,
    VE,
    VP,
    Coefficients,
    Cosine,
    Linear,
    Schedule,
    SubVP,
    schedule_of,
)
from exprgen.schedules._target import TARGETS, Prediction, Target, predict, regression_target
from exprgen.schedules._training import (
    TIMES,
    WEIGHTINGS,
    Times,
    Weighting,
    draw_times,
    weight_of,
)

__all__ = [
    "SCHEDULES",
    "TARGETS",
    "TIMES",
    "VE",
    "VP",
    "WEIGHTINGS",
    "Coefficients",
    "Cosine",
    "Linear",
    "Prediction",
    "Schedule",
    "SubVP",
    "Target",
    "Times",
    "Weighting",
    "draw_times",
    "predict",
    "regression_target",
    "schedule_of",
    "weight_of",
]
