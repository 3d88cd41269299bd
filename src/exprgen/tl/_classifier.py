"""The classifier that a tool is given, or logistic regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from scipy import sparse

__all__ = ["check_classifier", "fit"]


def check_classifier(classifier: Any) -> None:
    """Refuse what scikit-learn could not copy, train and ask for labels.

    Raises
    ------
    TypeError
        If it is no classifier, or the class of one.
    """
    from sklearn.base import BaseEstimator, is_classifier

    if classifier is not None and not (
        isinstance(classifier, BaseEstimator) and is_classifier(classifier)
    ):
        raise TypeError(
            "classifier must be an unfitted scikit-learn classifier, such as "
            f"RandomForestClassifier(), or None, got {classifier!r}."
        )


def fit(classifier: Any, values: sparse.csr_matrix, labels: np.ndarray, seed: int) -> Any:
    """A classifier trained from the start, from ``seed`` where it was given none."""
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression

    fresh = LogisticRegression(max_iter=1000) if classifier is None else clone(classifier)
    unseeded = [
        name
        for name, value in fresh.get_params().items()
        if name.split("__")[-1] == "random_state" and value is None
    ]
    return fresh.set_params(**dict.fromkeys(unseeded, seed % 2**32)).fit(values, labels)
