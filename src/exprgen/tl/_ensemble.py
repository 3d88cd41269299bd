"""What several models of the same cells say together.

A model does not know how sure it is of its weights. Models that were trained on the same cells
from other seeds differ where the cells leave the weights open, and the mixture of their laws holds
that as a term of its variance :cite:p:`lakshminarayanan2017`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from exprgen._errors import DataQualityWarning, name_some
from exprgen.tl._model import check_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from exprgen.models import GenerativeModel

__all__ = ["check_ensemble", "predict_ensemble"]


def predict_ensemble(
    models: Sequence[GenerativeModel],
    conditions: pd.DataFrame | Mapping[str, Any] | AnnData | MuData | None = None,
    *,
    of: Literal["cell", "mean"] = "cell",
    n_cells: int | None = None,
    genes: Sequence[str] | None = None,
    library: float | np.ndarray | None = None,
    n_samples: int = 1000,
    quantiles: Sequence[float] = (0.05, 0.95),
    unseen: Literal["error", "null"] = "error",
    on_extrapolation: Literal["warn", "raise", "ignore"] = "warn",
    key_added: str = "exprgen",
    overwrite: bool = False,
    copy: bool = False,
    progress_bar: bool = True,
    seed: int | None = None,
) -> AnnData | MuData:
    r"""``predict`` by an ensemble: the law of a draw from any of the models, each as likely.

    By the law of total variance

    .. math::
        \mathrm{std}^2 = \tfrac1K \textstyle\sum_k (\text{decoder}_k + \text{latent}_k +
        \text{donor}_k) + \underbrace{\tfrac1K \textstyle\sum_k (m_k - \bar
        m)^2}_{\text{parameter}}

    over K models with means :math:`m_k`. The last term is ``{key}_std_parameter``. K models show
    (K - 1) / K of the variance that many would; Monte Carlo error of the means, which falls with
    ``n_samples``, is in it too.

    Parameters
    ----------
    models
        At least two trained models of one class, with the same genes and conditions, trained from
        different seeds. Of models that were loaded without their donors' labels, the number of
        donors must be the same.
    conditions, of, n_cells, genes, library, quantiles, unseen, on_extrapolation
        See :meth:`exprgen.NBVAE.predict`.
    n_samples
        Draws per distinct row of conditions and model.
    key_added, overwrite, copy, progress_bar, seed
        See :meth:`exprgen.NBVAE.predict`; the slots are the same, and ``{key}_std_parameter``.

    Returns
    -------
    The AnnData that carries the results: the same object, or a copy if it was a view.

    Raises
    ------
    TypeError, ValueError
        If these are not such models, or ``conditions`` name donors that not all of them know.

    Warns
    -----
    DataQualityWarning
        If they were trained on different cells, whose differences are then in the last term too.
    """
    models = check_ensemble(models)
    return models[0]._predict(
        models,
        conditions,
        of=of,
        n_cells=n_cells,
        genes=genes,
        library=library,
        n_samples=n_samples,
        quantiles=quantiles,
        unseen=unseen,
        on_extrapolation=on_extrapolation,
        key_added=key_added,
        overwrite=overwrite,
        copy=copy,
        progress_bar=progress_bar,
        seed=seed,
    )


def check_ensemble(
    models: Sequence[GenerativeModel], *, minimum: int = 2
) -> tuple[GenerativeModel, ...]:
    """Models that can be averaged.

    Raises
    ------
    TypeError, RuntimeError
        If one is no trained model.
    ValueError
        If they are too few, one of them occurs twice, or they differ in class, genes or
        conditions.

    Warns
    -----
    DataQualityWarning
        If they were trained on different cells.
    """
    if not isinstance(models, list | tuple):
        raise TypeError(f"models must be a list of models, got {type(models).__name__}.")
    for model in models:
        check_model(model)
    if len(models) < minimum:
        raise ValueError(f"models must hold at least {minimum} models, got {len(models)}.")
    first = models[0]
    if len({id(model) for model in models}) < len(models):
        raise ValueError("models holds one model twice, which would count as two that agree.")
    for model in models[1:]:
        if type(model) is not type(first):
            raise ValueError(
                f"models must be of one class, got {type(first).__name__} and "
                f"{type(model).__name__}."
            )
        if not model.var_names.equals(first.var_names):
            other = model.var_names.symmetric_difference(first.var_names)
            what = f" ({name_some(other)})" if len(other) else ", or their order,"
            raise ValueError(f"models must have the same genes; theirs differ{what}.")
        if _comparable(model, models) != _comparable(first, models):
            raise ValueError(
                "models must have the same conditions: columns, labels and ranges of all. Train "
                "them on the same cells with the same setup."
            )
        for what, theirs in _fixed(model).items():
            if (own := _fixed(first)[what]) != theirs:
                raise ValueError(f"models must have the same {what}; got {own!r} and {theirs!r}.")
    cells = [set(np.concatenate(list(model.cell_keys_.values())).tolist()) for model in models]
    if n_others := len(set.union(*cells) - set.intersection(*cells)):
        warnings.warn(
            f"models were trained on different cells: {n_others} of {len(set.union(*cells))} are "
            "unknown to some of them, in training or validation. What they differ by is not "
            "only what the same cells leave open. Train them on the same cells.",
            DataQualityWarning,
            stacklevel=3,
        )
    seeds = [model.seed_ for model in models]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"models must be trained from different seeds, theirs are {seeds}.")
    return tuple(models)


def _comparable(model: GenerativeModel, models: Sequence[GenerativeModel]) -> dict[str, Any]:
    """A model's conditions; without donors' labels where the files of some did not keep them."""
    coded = any(other.schema.has_coded_donors for other in models)
    return (model.schema.with_coded_donors() if coded else model.schema).to_dict()


def _fixed(model: GenerativeModel) -> dict[str, Any]:
    """What decides in which units a model speaks, and what its networks are."""
    said = {key: model._setup_args[key] for key in ("layer", "size_factor_key")}
    shape = model.init_params_["non_kwargs"]
    return said | {name: value for name, value in shape.items() if name != "seed"}
