"""Tools around predictions and synthetic cells: comparison with real ones, calibration, scanpy."""

from __future__ import annotations

from exprgen.tl._concat import concat
from exprgen.tl._conformal import conformalize
from exprgen.tl._evaluate import evaluate
from exprgen.tl._outliers import outliers
from exprgen.tl._report import METRICS
from exprgen.tl._tail_pvalues import tail_pvalues

__all__ = ["METRICS", "concat", "conformalize", "evaluate", "outliers", "tail_pvalues"]
