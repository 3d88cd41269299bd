"""How well synthetic cells stand in for real ones: arrays in, floats out.

Every function takes arrays or SciPy sparse matrices of shape ``(n_obs, n_vars)`` and knows nothing
of AnnData; :func:`exprgen.tl.evaluate` applies them with splits, repeats and a real-vs-real
control. Each docstring says what the value is when real cells are compared with real cells, since
few of these measures reach their ideal even then.
"""

from __future__ import annotations

from exprgen.metrics._calibration import coverage
from exprgen.metrics._classifier import c2st_auc
from exprgen.metrics._features import QUALITY_FEATURES, log_cp10k, pooled_pcs, quality_features
from exprgen.metrics._moments import (
    gene_correlation_agreement,
    mean_correlation,
    variance_ratio,
    zero_fraction_difference,
)

__all__ = [
    "QUALITY_FEATURES",
    "c2st_auc",
    "coverage",
    "gene_correlation_agreement",
    "log_cp10k",
    "mean_correlation",
    "pooled_pcs",
    "quality_features",
    "variance_ratio",
    "zero_fraction_difference",
]
