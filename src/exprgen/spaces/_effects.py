r"""Effects of labels on mean counts, from sums: where the decoder's offsets start.

With :math:`f_i` the one-hot labels of cell i and :math:`L_i` its total, a label k of gene g has

.. math::
    X_{kg} = \sum_i f_{ik}\, x_{ig}, \qquad
    M_{kg} = \rho_g \sum_i f_{ik}\, L_i\, e^{\sum_{j} f_{ij} W_{jg}},

observed counts and those expected from its other labels j. The log ratio :math:`d` of the two,
with variance :math:`v \approx 1/X + 1/M + 1/(\theta n)` in n cells, is shrunk as the positive-part
James-Stein estimator does, :math:`W = d\,(1 - 2v/d^2)_+`: effects that counting noise could make
are 0, those of marker genes stay as they are. Several conditions take turns, the batch last, as
iterative proportional fitting does, so that none is given what another explains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from exprgen.spaces._base import DataMoments

__all__ = ["label_effects"]

_N_SWEEPS = 3
# Cells of one label differ by more than counting: the inverse dispersion that is assumed of all.
_DISPERSION = 2.0
_SHRINKAGE = 2.0


def label_effects(moments: DataMoments, rho: Tensor, labels: list[slice]) -> Tensor:
    """Shrunken log fold changes of labels, ``(n_inputs, n_vars)``; 0 for all other inputs.

    Parameters
    ----------
    moments
        Sums over the training cells.
    rho
        Mean expression per unit of depth, ``(n_vars,)``.
    labels
        Columns of the inputs that are one-hot labels, one slice per condition.
    """
    effects = torch.zeros_like(moments.inputs_x)
    columns = [torch.arange(part.start, part.stop) for part in labels]
    if not columns:
        return effects
    # Cells with the same labels are alike: numbers and embeddings have no effects here.
    at = torch.cat(columns)
    kinds, kind = torch.unique(moments.inputs[:, at].double(), dim=0, return_inverse=True)
    depth, n_cells = (
        torch.zeros(len(kinds), dtype=torch.float64).index_add(0, kind, values)
        for values in (moments.library, torch.ones_like(moments.library))
    )
    every_kind = torch.zeros(len(kinds), len(effects), dtype=torch.float64)
    every_kind[:, at] = kinds
    for _ in range(_N_SWEEPS if len(labels) > 1 else 1):
        for part in labels:
            effects[part] = 0
            of_label = every_kind[:, part].T
            expected = rho * ((of_label * depth) @ (every_kind @ effects).exp())
            counts = moments.inputs_x[part], expected, (of_label @ n_cells)[:, None]
            effects[part] = _shrunken(*counts)
    return effects


def _shrunken(observed: Tensor, expected: Tensor, n_cells: Tensor) -> Tensor:
    """Log ratios of counts, those within their noise set to 0; ½ keeps zeros finite."""
    observed, expected = observed + 0.5, expected + 0.5
    ratio = (observed / expected).log()
    noise = 1 / observed + 1 / expected + 1 / (_DISPERSION * n_cells.clamp(min=1))
    return ratio * (1 - _SHRINKAGE * noise / ratio.square().clamp(min=1e-12)).clamp(min=0)
