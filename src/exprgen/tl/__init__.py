"""Tools around predictions and synthetic cells: comparison with real ones, calibration, scanpy."""

from __future__ import annotations

from exprgen.tl._augment import augment
from exprgen.tl._augmentation_test import augmentation_test
from exprgen.tl._compare import compare_likelihoods
from exprgen.tl._concat import concat
from exprgen.tl._conformal import conformalize
from exprgen.tl._effect import effect
from exprgen.tl._ensemble import predict_ensemble
from exprgen.tl._evaluate import evaluate
from exprgen.tl._nof1 import nof1_de
from exprgen.tl._outliers import outliers
from exprgen.tl._report import METRICS
from exprgen.tl._tail_pvalues import tail_pvalues

__all__ = [
    "METRICS",
    "augment",
    "augmentation_test",
    "compare_likelihoods",
    "concat",
    "conformalize",
    "effect",
    "evaluate",
    "nof1_de",
    "outliers",
    "predict_ensemble",
    "tail_pvalues",
]
