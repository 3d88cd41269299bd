"""Pictures of real beside synthetic cells, and of predictions beside what was observed.

The functions only read what is in the AnnData (or report) they are given. All take ``axes=`` (a
single panel: ``ax=``), ``show=`` and ``return_fig=`` and return the axes.
"""

from __future__ import annotations

from exprgen.pl._calibration import calibration, pit
from exprgen.pl._embedding import embedding
from exprgen.pl._evaluation import evaluation
from exprgen.pl._history import history
from exprgen.pl._intervals import intervals
from exprgen.pl._latent_variance import latent_variance
from exprgen.pl._moments import moments
from exprgen.pl._outliers import outliers
from exprgen.pl._uncertainty import uncertainty

__all__ = [
    "calibration",
    "embedding",
    "evaluation",
    "history",
    "intervals",
    "latent_variance",
    "moments",
    "outliers",
    "pit",
    "uncertainty",
]
