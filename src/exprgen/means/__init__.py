r"""Mean predictors :math:`\mu(c)` of expression, and what they predict of cells they never saw.

A supervised predictor fits its training cells better than new ones. A distribution around it that
is learned from the residuals of its own training cells is too narrow; it has to be learned from
**out-of-sample** residuals,

.. math::
    r_i = y_i - \mu_{-F(i)}(c_i),

where :math:`\mu_{-F(i)}` never saw cell i nor any cell of its fold :math:`F(i)`: the cell alone,
its donor, or one of K parts (cross-fitting :cite:p:`chernozhukov2018`). A new donor is only stood
in for by folds that hold donors whole.

Every predictor is a :class:`Mean`, and reads a table of the raw columns of conditions.
:class:`GroupMeans`, :class:`RidgeMean` and :class:`HierarchicalMean`, which knows donors and how
sure it is of itself, leave out rows and groups in closed form. :class:`SklearnMean` is fitted once
per fold. One that comes fitted (:class:`TorchMean`,
:class:`CallableMean`, a fitted scikit-learn regressor, :class:`PrecomputedMean`) is never
refitted: its out-of-sample predictions have to be given. :func:`as_mean` makes one of what a user
names.
"""

from exprgen.means._as_mean import as_mean, from_state
from exprgen.means._base import Mean
from exprgen.means._encoding import Encoding
from exprgen.means._fixed import CallableMean, FixedMean, PrecomputedMean, TorchMean
from exprgen.means._groups import GroupMeans
from exprgen.means._hierarchical import DonorEffects, HierarchicalMean
from exprgen.means._ridge import RidgeMean
from exprgen.means._sklearn import SklearnMean

__all__ = [
    "CallableMean",
    "DonorEffects",
    "Encoding",
    "FixedMean",
    "GroupMeans",
    "HierarchicalMean",
    "Mean",
    "PrecomputedMean",
    "RidgeMean",
    "SklearnMean",
    "TorchMean",
    "as_mean",
    "from_state",
]
