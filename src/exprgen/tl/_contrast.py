r"""What tells the cells at hand from cells that a model draws.

A classifier learns to tell drawn cells from the calibration cells and those to be judged, which it
sees as one class, so that its score treats both alike and their ranks stay exact
:cite:p:`marandon2024`. If a model is good, all that is left to be learned is what some of the
judged cells have and neither drawn nor calibration cells do. Unlike a likelihood it finds the
*direction* in which cells are new, if there are several of a kind.

It is a logistic regression, strongly shrunk, on principal components of log-normalised counts (of
continuous values, of the values) and their squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from exprgen._matrix import as_reader

if TYPE_CHECKING:
    from anndata import AnnData

    from exprgen.models import GenerativeModel

__all__ = ["contrast"]

_N_DRAWN, _N_COMPONENTS, _INVERSE_SHRINKAGE = 3000, 30, 0.01


def contrast(
    model: GenerativeModel, query: AnnData, reference: AnnData, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log odds of not being drawn, of query ``(m,)`` and calibration cells ``(n,)``.

    The model's cells are drawn for conditions as they occur in training; for the calibration
    cells' where the model keeps none, which is with an embedding.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    conditions, n_each = None, _N_DRAWN
    if model.schema.embedding_key is not None:
        conditions, n_each = reference, -(-_N_DRAWN // reference.n_obs)
    drawn = model.sample(
        conditions, n_obs=n_each, on_extrapolation="ignore", progress_bar=False, seed=seed
    )
    parts = [_values(model, cells) for cells in (drawn, query, reference)]
    values = sparse.vstack(parts, format="csr")
    if model.needs_counts:
        totals = np.maximum(np.asarray(values.sum(1)).ravel(), 0.5)
        values = (sparse.diags(np.median(totals) / totals) @ values).log1p()
    n_components = min(_N_COMPONENTS, values.shape[1] - 1)
    components = TruncatedSVD(n_components, random_state=seed % 2**32).fit_transform(values)
    components = StandardScaler().fit_transform(components)
    features = StandardScaler().fit_transform(np.hstack([components, components**2]))
    is_drawn = np.arange(len(features)) < drawn.n_obs
    classifier = LogisticRegression(C=_INVERSE_SHRINKAGE, class_weight="balanced", max_iter=1000)
    odds = classifier.fit(features, ~is_drawn).decision_function(features)[drawn.n_obs :]
    return odds[: query.n_obs], odds[query.n_obs :]


def _values(model: GenerativeModel, cells: AnnData) -> sparse.csr_matrix:
    """The modelled layer, genes in the model's order."""
    layer = model._setup_args["layer"]
    ordered = cells[:, model.var_names]
    matrix = ordered.X if layer is None else ordered.layers[layer]
    return as_reader(matrix).block(0, cells.n_obs)
