"""Are synthetic cells of use where real ones would be?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exprgen.metrics._checks import group_labels, points

if TYPE_CHECKING:
    from exprgen.metrics._features import Matrix

__all__ = ["train_on_synthetic_f1"]


def train_on_synthetic_f1(
    synthetic: Matrix,
    labels_synthetic: np.ndarray,
    test: Matrix,
    labels_test: np.ndarray,
    *,
    seed: int = 0,
) -> float:
    """Macro F1, on real cells, of a classifier trained on synthetic ones :cite:p:`esteban2017`.

    Parameters
    ----------
    synthetic, test
        Features on one scale, shapes ``(n_synthetic, n_features)`` and ``(n_test, n_features)``.
    labels_synthetic, labels_test
        What is to be predicted, cell types say; shapes ``(n_synthetic,)`` and ``(n_test,)``.
    seed
        Of the classifier: logistic regression (L2) on the features as they are. Standardised,
        genes seen in a few cells would weigh as much as markers, and real cells teach it less.

    Returns
    -------
    float
        In [0, 1], higher is better: F1 averaged over the labels of ``test``; a label that
        ``synthetic`` lacks counts 0. Read it beside the same with real training cells in the
        place of synthetic ones, as many of them.

    Raises
    ------
    ValueError
        Different features, no cells, values that are not finite, or labels that are
        missing or do not fit.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    synthetic, test = points(synthetic=synthetic, test=test)
    labels_synthetic, labels_test = group_labels(
        labels_synthetic=(labels_synthetic, len(synthetic)),
        labels_test=(labels_test, len(test)),
        optional=False,
    )
    known, fit_to = np.unique(labels_synthetic.astype(str), return_inverse=True)
    if len(known) == 1:
        predicted = np.full(len(test), known[0])
    else:
        model = LogisticRegression(max_iter=1000, random_state=seed)
        predicted = known[model.fit(synthetic, fit_to).predict(test)]
    truth = labels_test.astype(str)
    return float(
        f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0)
    )
