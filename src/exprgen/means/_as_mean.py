"""From what a user may name as the mean to a predictor; and from files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from exprgen._errors import CheckpointError, closest, name_some
from exprgen.means._base import Mean
from exprgen.means._fixed import CallableMean, PrecomputedMean, TorchMean
from exprgen.means._groups import GroupMeans
from exprgen.means._hierarchical import HierarchicalMean
from exprgen.means._ridge import RidgeMean
from exprgen.means._sklearn import SklearnMean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from exprgen.means._fixed import OutOfSample

__all__ = ["as_mean", "from_state"]

BUILT_IN: dict[str, type[GroupMeans | RidgeMean | HierarchicalMean]] = {
    "ridge": RidgeMean,
    "group": GroupMeans,
    "hierarchical": HierarchicalMean,
}


def as_mean(
    mean: Any,
    *,
    layers: Mapping[str, Any] | None = None,
    out_of_sample: OutOfSample = None,
    categorical_keys: Sequence[str] | None = None,
) -> Mean:
    """Make a predictor of what stands for one.

    Parameters
    ----------
    mean
        ``"ridge"``; ``"group"``; ``"hierarchical"``; the name of a layer that holds out-of-sample
        predictions; a scikit-learn regressor, fitted or not; a trained ``torch.nn.Module``; a
        callable on the table of conditions; or a :class:`~exprgen.means.Mean`, which is returned
        as it is.
    layers
        Arrays ``(n_obs, n_vars)`` by name: where layers are looked up.
    out_of_sample
        For predictors that come fitted: their out-of-sample predictions of the training cells, an
        array ``(n_obs, n_vars)`` or the name of a layer; or ``"predict"`` if they never saw these
        cells.
    categorical_keys
        Columns of the table that are labels; ``None`` for all that do not hold numbers.

    Raises
    ------
    TypeError, ValueError
        If ``mean`` is nothing of this kind, or ``out_of_sample`` does not go with it.
    KeyError
        If there is no such layer.
    """
    layers = {} if layers is None else layers
    if isinstance(out_of_sample, str) and out_of_sample != "predict":
        if out_of_sample not in layers:
            raise KeyError(
                f"out_of_sample={out_of_sample!r} is not among the layers, which are: "
                f"{_names(layers)}; 'predict' says that the predictor never saw these cells."
                f"{closest(out_of_sample, [*_known(layers), 'predict'])}"
            )
        out_of_sample = layers[out_of_sample]
    if isinstance(mean, type):
        raise TypeError(f"mean must be an object, not a class. Did you mean {mean.__name__}()?")
    if isinstance(mean, torch.nn.Module):
        return TorchMean(mean, out_of_sample=out_of_sample)
    if hasattr(mean, "fit") and hasattr(mean, "predict") and not isinstance(mean, Mean):
        return SklearnMean(mean, categorical_keys=categorical_keys, out_of_sample=out_of_sample)
    if callable(mean):
        return CallableMean(mean, out_of_sample=out_of_sample)
    if out_of_sample is not None:
        raise ValueError(
            f"out_of_sample is for predictors that come fitted; mean={mean!r} makes its own."
            if isinstance(mean, str)
            else f"out_of_sample goes with the predictor itself: {type(mean).__name__}(..., "
            "out_of_sample=...)."
        )
    if isinstance(mean, Mean):
        return mean
    if not isinstance(mean, str):
        raise TypeError(
            "mean must be 'ridge', 'group', 'hierarchical', the name of a layer, a scikit-learn "
            "regressor, a torch.nn.Module, a callable on the table of conditions or a Mean; got "
            f"{type(mean).__name__}."
        )
    if mean in BUILT_IN:
        return BUILT_IN[mean](categorical_keys=categorical_keys)
    if mean in layers:
        return PrecomputedMean(layers[mean], name=mean)
    raise KeyError(
        f"mean={mean!r} is none of {name_some(BUILT_IN)}, and no layer; layers are: "
        f"{_names(layers)}.{closest(mean, [*BUILT_IN, *_known(layers)])}"
    )


def from_state(state: Mapping[str, Any]) -> Mean:
    """Undo :meth:`Mean.state`.

    Raises
    ------
    CheckpointError
        If the state is of no known predictor.
    """
    kinds = {**BUILT_IN, "precomputed": PrecomputedMean, "sklearn": SklearnMean}
    kind = state.get("kind")
    if kind not in kinds:
        raise CheckpointError(
            f"The file holds a mean of kind {kind!r}; known are {name_some(kinds)}."
        )
    return kinds[kind].from_state(state)


def _known(layers: Mapping[Any, Any]) -> list[str]:
    return [key for key in layers if key is not None]  # anndata 0.13 lists X as None


def _names(layers: Mapping[str, Any]) -> str:
    return name_some(_known(layers), 20) or "none"
