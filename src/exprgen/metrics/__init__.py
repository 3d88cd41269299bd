"""How well synthetic cells stand in for real ones: arrays in, floats out.

Every function takes arrays or SciPy sparse matrices of shape ``(n_obs, n_vars)`` and knows nothing
of AnnData; :func:`exprgen.tl.evaluate` applies them with splits, repeats and a real-vs-real
control. Each docstring says what the value is when real cells are compared with real cells, since
few of these measures reach their ideal even then.
"""

from __future__ import annotations

from exprgen.metrics._calibration import coverage, crps, interval_score, pit, sharpness
from exprgen.metrics._classifier import c2st_auc
from exprgen.metrics._conformal import conformal_rank, conformal_threshold
from exprgen.metrics._differential import (
    de_overlap,
    fold_change_rank_correlation,
    fold_change_slope,
    fold_change_slopes,
    log_fold_changes,
)
from exprgen.metrics._distances import (
    MMDTest,
    energy_distance,
    median_distance,
    mmd,
    mmd_test,
    sliced_wasserstein,
    wasserstein,
)
from exprgen.metrics._downstream import train_on_synthetic_f1
from exprgen.metrics._features import QUALITY_FEATURES, log_cp10k, pooled_pcs, quality_features
from exprgen.metrics._memorisation import (
    Memorisation,
    membership_auc,
    memorisation,
    nearest_neighbour_ratio,
)
from exprgen.metrics._moments import (
    MomentAgreement,
    gene_correlation_agreement,
    log_total_ratio,
    mean_correlation,
    moment_agreement,
    variance_ratio,
    zero_fraction_difference,
)
from exprgen.metrics._neighbours import PRDC, local_mixing, precision_recall_density_coverage

__all__ = [
    # what cells are compared in
    "QUALITY_FEATURES",
    "log_cp10k",
    "pooled_pcs",
    "quality_features",
    # whole distributions
    "c2st_auc",
    "energy_distance",
    "MMDTest",
    "median_distance",
    "mmd",
    "mmd_test",
    "sliced_wasserstein",
    "wasserstein",
    "PRDC",
    "local_mixing",
    "precision_recall_density_coverage",
    # genes
    "MomentAgreement",
    "gene_correlation_agreement",
    "log_total_ratio",
    "mean_correlation",
    "moment_agreement",
    "variance_ratio",
    "zero_fraction_difference",
    # differences between groups
    "de_overlap",
    "fold_change_rank_correlation",
    "fold_change_slope",
    "fold_change_slopes",
    "log_fold_changes",
    # uncertainty
    "conformal_rank",
    "conformal_threshold",
    "coverage",
    "crps",
    "interval_score",
    "pit",
    "sharpness",
    # privacy and use
    "Memorisation",
    "membership_auc",
    "memorisation",
    "nearest_neighbour_ratio",
    "train_on_synthetic_f1",
]
