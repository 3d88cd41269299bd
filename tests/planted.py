"""Synthetic cells with one known fault each, made of real (or simulated) ones."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from sklearn.model_selection import train_test_split

GROUP = "cell_type"


def thirds(adata, seed=0):
    """Training cells, held-out cells, and other real cells, alike in their types."""
    labels = adata.obs[GROUP].astype(str).to_numpy()
    rows = np.arange(adata.n_obs)
    train, rest = train_test_split(rows, test_size=2 / 3, stratify=labels, random_state=seed)
    test, other = train_test_split(
        rest, test_size=0.5, stratify=labels[rest], random_state=seed + 1
    )
    return [adata[np.sort(part)].copy() for part in (train, test, other)]


def _changed(adata, change):
    """New counts, type by type."""
    counts = adata.layers["counts"].toarray().astype(float)
    labels = adata.obs[GROUP].to_numpy()
    for label in adata.obs[GROUP].unique():
        rows = np.flatnonzero(labels == label)
        counts[rows] = change(counts[rows])
    cells = adata.copy()
    cells.layers["counts"] = sparse.csr_matrix(counts.astype(np.float32))
    return cells


def shuffled_genes(adata, seed=0):
    """Every gene permuted within its type: marginals kept, cells destroyed."""
    rng = np.random.default_rng(seed)
    return _changed(adata, lambda x: rng.permuted(x, axis=0))


def means(adata):
    """What a regression would give: the type's mean, in whole counts."""
    return _changed(adata, lambda x: np.repeat(np.round(x.mean(axis=0))[None], len(x), axis=0))


def half_the_variance(adata):
    """Log values drawn towards the type's mean by 1/sqrt(2); rounded to whole counts."""

    def shrink(x):
        total = np.maximum(x.sum(axis=1, keepdims=True), 1)
        values = np.log1p(1e4 * x / total)
        values = values.mean(axis=0) + (values - values.mean(axis=0)) / np.sqrt(2)
        return np.round(np.expm1(values) * total / 1e4)

    return _changed(adata, shrink)


def without_type(adata, label):
    """A type forgotten."""
    return adata[adata.obs[GROUP] != label].copy()


def all_faults(train, other):
    """Real cells, and cells with each of the faults."""
    return {
        "real": other,
        "shuffled genes": shuffled_genes(other),
        "means": means(other),
        "half the variance": half_the_variance(other),
        "a type missing": without_type(other, other.obs[GROUP].value_counts().index[1]),
        "copies": train,
    }
