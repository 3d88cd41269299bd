"""The classifier two-sample test: can a classifier tell two samples of cells apart?

A classifier is trained to separate sample ``a`` from sample ``b`` and judged on cells it has not
seen. If both come from one distribution no classifier does better than chance, an area under the
ROC curve (AUC) of .5 :cite:p:`LopezPaz2017`. Compare samples of equal size and equal composition,
without duplicated cells: a duplicate in the training fold gives its twin away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from exprgen.metrics._checks import at_least, points

if TYPE_CHECKING:
    from exprgen.metrics._features import Matrix

__all__ = ["c2st_auc"]


def c2st_auc(
    a: Matrix,
    b: Matrix,
    *,
    classifier: Literal["random_forest", "logistic"] = "random_forest",
    n_folds: int = 5,
    seed: int = 0,
    n_jobs: int = 1,
) -> float:
    """Cross-validated AUC of a classifier that tells ``a`` from ``b``.

    Parameters
    ----------
    a, b
        Features, shapes ``(n_a, n_features)`` and ``(n_b, n_features)``.
    classifier
        ``"random_forest"`` (100 trees, at least 3 cells per leaf) sees shapes and interactions;
        ``"logistic"`` (L2, standardised features) sees shifts of means only.
    n_folds
        Stratified folds; the AUC is the mean over folds.
    seed
        Of the folds and of the forest.
    n_jobs
        Threads that grow the forest; the value does not depend on it.

    Returns
    -------
    float
        In [0, 1]. .5: indistinguishable (best); 1: told apart without error. Values somewhat
        below .5 are chance. An estimate, with a standard deviation over splits of about .03 at
        500 cells against 500, where a forest on 2,000 genes takes some 4 CPU seconds and a
        logistic regression .3.

    Raises
    ------
    ValueError
        Different numbers of features, fewer cells than folds in a sample, or values that are not
        finite.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    at_least("n_folds", n_folds, 2)
    a, b = points(a=a, b=b)
    if min(a.shape[0], b.shape[0]) < n_folds:
        raise ValueError(
            f"a and b have {a.shape[0]} and {b.shape[0]} cells, fewer than n_folds={n_folds}; "
            "compare more cells or lower n_folds."
        )
    if classifier == "random_forest":
        model = RandomForestClassifier(
            n_estimators=100, min_samples_leaf=3, n_jobs=n_jobs, random_state=seed
        )
    elif classifier == "logistic":
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    else:
        raise ValueError(f"classifier must be 'random_forest' or 'logistic', got {classifier!r}.")

    features = np.concatenate([a, b]).astype(np.float32)
    is_a = np.repeat([1, 0], [a.shape[0], b.shape[0]])
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    aucs = []
    for fit, held_out in folds.split(features, is_a):
        model.fit(features[fit], is_a[fit])
        aucs.append(roc_auc_score(is_a[held_out], model.predict_proba(features[held_out])[:, 1]))
    return float(np.mean(aucs))
