"""A model: what all verbs share, and the verbs by what they are about.

A :class:`GenerativeModel` is the AnnData side of an :class:`~exprgen.module.ExpressionModule`:
it validates, encodes, trains, generates, predicts, infers and saves. A concrete model only says
which module it is.
"""

from __future__ import annotations

from exprgen.models._generate import GenerateMixin
from exprgen.models._host import HostMixin
from exprgen.models._infer import InferMixin
from exprgen.models._predict import PredictMixin
from exprgen.models._save import SaveMixin
from exprgen.models._surprise import SurpriseMixin
from exprgen.models._train import TrainMixin

__all__ = ["GenerativeModel"]


class GenerativeModel(
    TrainMixin, GenerateMixin, PredictMixin, InferMixin, SurpriseMixin, SaveMixin, HostMixin
):
    """A conditional generative model p(x | c) of expression.

    Parameters
    ----------
    adata
        AnnData set up with :meth:`setup_anndata`, or MuData with :meth:`setup_mudata`.
    registry
        The registry of a saved model, instead of data.
    seed
        Of the initial weights and of training; ``None`` takes ``scvi.settings.seed``, or fresh
        entropy. It is kept as ``model.seed_``.
    """
