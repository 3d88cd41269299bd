"""Tools that compare real and synthetic cells, and hand them on to scanpy together."""

from __future__ import annotations

from exprgen.tl._concat import concat
from exprgen.tl._evaluate import evaluate
from exprgen.tl._report import METRICS

__all__ = ["METRICS", "concat", "evaluate"]
