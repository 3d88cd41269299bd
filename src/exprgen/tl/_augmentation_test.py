r"""Do synthetic cells teach a classifier anything that the real ones did not?

Three training sets: the real cells (*none*); these and copies of the cells of rare groups
(*duplicates*), which gives rare groups the same weight and no new information; these and synthetic
cells, as many (*synthetic*). The same classifier is trained on each and labels the same cells,
which neither it nor the generator has seen. Only what synthetic cells gain over *duplicates* is a
merit of the generator.

The three are compared on the same test cells, hence by a paired bootstrap: cells, or whole donors,
are drawn with replacement, and all F1 scores computed on each draw. The interval is about
other cells (donors) of this kind, for these training cells and this generator.
"""

from __future__ import annotations

import warnings
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from exprgen import _arguments, metrics
from exprgen._errors import DataQualityWarning, name_some
from exprgen._random import resolve_seed
from exprgen.models._cells import cell_keys
from exprgen.tl._augment import check_generator, real_cells, shortages, synthetic_like
from exprgen.tl._classifier import check_classifier, fit
from exprgen.tl._counts import gene_positions, read_counts
from exprgen.tl._halves import read, same_cells
from exprgen.tl._model import warn_if_donors_are_coded
from exprgen.tl._names import text_labels
from exprgen.tl._paired_bootstrap import compared, f1_of_draws, weights_of_units

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from exprgen.models import GenerativeModel
    from exprgen.tl._augment import Sizes
    from exprgen.tl._halves import Cells

__all__ = ["augmentation_test"]

_ARMS = ("none", "duplicates", "synthetic")
_MIN_UNITS = 5


def augmentation_test(
    train: AnnData | MuData,
    test: AnnData | MuData,
    model: GenerativeModel,
    *,
    groupby: str,
    n_obs: Sizes = "median",
    split_key: str | None = None,
    classifier: Any = None,
    n_repeats: int = 3,
    n_bootstrap: int = 1000,
    level: float = 0.95,
    progress_bar: bool = True,
    seed: int | None = None,
) -> pd.DataFrame:
    """Test whether :func:`exprgen.tl.augment` helps to label cells that nobody has seen.

    Parameters
    ----------
    train
        The real cells that would be augmented.
    test
        Real cells that neither the classifier nor the generator has seen.
    model
        The generator, trained on cells of ``train`` only: what others taught it, copies of cells
        of ``train`` cannot have.
    groupby
        Column of ``.obs``, a categorical condition of the model: what is to be predicted.
    n_obs
        As in :func:`exprgen.tl.augment`; of duplicates there are as many.
    split_key
        Column of ``.obs`` of both, donors say, whose labels in ``test`` are not in ``train``: the
        test is then about other donors. ``None``: about other cells.
    classifier
        An unfitted scikit-learn classifier; ``None`` is logistic regression on log1p of counts
        per ten thousand, which any other will be given as well. Its ``random_state``, if it has
        one that is ``None``, is set by ``seed``.
    n_repeats
        Draws of synthetic cells and of duplicates, over which F1 is averaged.
    n_bootstrap
        Draws of test cells or donors.
    level
        Of the intervals.
    progress_bar
        Whether to show one while sampling.
    seed
        The same seed gives the same numbers.

    Returns
    -------
    pandas.DataFrame
        One row per ``metric`` and ``comparison``. Metrics: ``"filled groups"``, the mean F1 of the
        groups that were filled; ``"macro"``, of all groups; and each filled group by itself.
        ``value``, ``baseline``, and their ``difference`` with ``lower``, ``upper`` and a two-sided
        ``p_value`` of the paired bootstrap.

        ``.attrs["verdict"]`` is ``"use"`` if synthetic cells are better than both duplicates and
        nothing on the filled groups, and not worse on all groups, by these intervals; else
        ``"do not use"``. ``.attrs["filled"]`` has the cells that each group was given.

    Raises
    ------
    TypeError
        If cells, the model or the classifier are something else.
    ValueError
        If test cells were seen, by name or by donor, if there are too few, or if no group is short
        of cells.

    Warns
    -----
    ReproducibilityWarning
        If donors are split by and the model's file was saved without their labels.
    DataQualityWarning
        If the model was trained on cells that are not in ``train``.
    """
    import pandas as pd

    check_generator(model, groupby)
    check_classifier(classifier)
    also = () if split_key is None else (split_key,)
    train = real_cells(model, train, "train", *also)
    test = real_cells(model, test, "test", *also)
    _arguments.check_positive_int(n_repeats, "n_repeats")
    _arguments.check_positive_int(n_bootstrap, "n_bootstrap", minimum=100)
    level = _arguments.check_number(level, "level", "(0, 1)")
    layer = model._setup_args["layer"]
    reference, asked = (
        cells[:, gene_positions(cells.var_names, model.var_names, name=name, exact=False)]
        for cells, name in ((train, "train"), (test, "test"))
    )
    known = read(reference, reference, groupby, layer, name="train")
    held = read(asked, reference, groupby, layer, name="test")
    if len(known.sizes) < 2:
        raise ValueError(
            f"obs[{groupby!r}] (groupby) of train has {len(known.sizes)} labels: a classifier "
            "needs two or more to tell apart."
        )
    unit = _units(train, test, known, held, model, split_key)
    missing = shortages(known.groups, n_obs)
    if not missing:
        raise ValueError(f"No group has fewer than n_obs={n_obs!r} cells: nothing to fill up.")
    groups = np.unique(held.groups)
    filled = [group for group in missing if group in groups]
    if not filled:
        raise ValueError(f"test has no cell of the groups to fill up: {name_some(missing)}.")
    seed = resolve_seed(seed)
    predicted: dict[str, list[np.ndarray]] = {arm: [] for arm in _ARMS}
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.repeat(group, n) for group, n in missing.items()])
    added = np.r_[known.groups, labels]
    for _ in range(n_repeats):
        copies = np.concatenate(
            [rng.choice(np.flatnonzero(known.groups == group), n) for group, n in missing.items()]
        )
        drawn = synthetic_like(
            train,
            model,
            known.groups,
            missing,
            seed=int(rng.integers(2**62)),
            progress_bar=progress_bar,
        )
        synthetic = metrics.log_cp10k(read_counts(drawn, layer, name="synthetic"))
        training = {
            "none": (known.values, known.groups),
            "duplicates": (sparse.vstack([known.values, known.values[copies]]), added),
            "synthetic": (sparse.vstack([known.values, synthetic]), added),
        }
        for arm in _ARMS:
            if arm == "none" and predicted[arm]:
                continue
            fitted = fit(classifier, *training[arm], seed)
            predicted[arm].append(np.asarray(fitted.predict(held.values)).astype(str))
    weights = weights_of_units(unit, n_bootstrap, rng)
    scores = {
        arm: np.mean(
            [f1_of_draws(p, held.groups, groups, unit, weights) for p in predicted[arm]], 0
        )
        for arm in _ARMS
    }
    at = {"filled groups": np.isin(groups, filled), "macro": np.ones(len(groups), bool)}
    at |= {f"F1 of {group}": groups == group for group in filled}
    rows = []
    for metric, columns in at.items():
        values = {arm: score[:, columns].mean(1) for arm, score in scores.items()}
        for baseline, arm in combinations(_ARMS, 2):
            rows.append(
                {"metric": metric, "comparison": f"{arm} - {baseline}"}
                | compared(values[arm], values[baseline], level)
            )
    table = pd.DataFrame(rows)
    table.attrs = {
        "verdict": _verdict(table),
        "filled": missing,
        "n_units": len(np.unique(unit)),
        "unit": split_key or "cells",
        "level": level,
        "n_repeats": n_repeats,
        "seed": seed,
    }
    return table


def _units(
    train: AnnData,
    test: AnnData,
    known: Cells,
    held: Cells,
    model: GenerativeModel,
    split_key: str | None,
) -> np.ndarray:
    """Number of the cell, or donor, that each test cell stands for, ``(n_test,)``.

    Raises
    ------
    KeyError, ValueError
        If test cells are known to the classifier or the generator, or units are too few.

    Warns
    -----
    DataQualityWarning
        If the generator knows cells that the classifier does not.
    """
    both = same_cells(known, train.obs_names, held, test.obs_names)
    if both:
        raise ValueError(
            f"{len(both)} cells of test are in train: {name_some(both)}. Test on others."
        )
    trained = np.concatenate(list(model.cell_keys_.values()))
    seen = np.isin(cell_keys(test, model._reader(test)), trained).sum()
    if seen:
        raise ValueError(
            f"{seen} cells of test were in the training or validation of the model: what it draws "
            "may be copies of them. Train it without the test cells."
        )
    if split_key is None:
        unit = np.arange(len(held))
    else:
        trained = text_labels(train.obs, split_key, "split_key", "train.obs")
        labels = text_labels(test.obs, split_key, "split_key", "test.obs")
        if split_key == model.schema.donor_key and model.schema.donor is not None:
            known_donors = np.unique(labels[model.schema.donor.lookup(test.obs[split_key]) >= 0])
            if known_donors.size:
                raise ValueError(
                    f"The model was trained on donors of test: {name_some(known_donors)}. Train "
                    "it without them."
                )
            warn_if_donors_are_coded(model, "test", stacklevel=3)
        shared = np.intersect1d(labels, trained)
        if shared.size:
            raise ValueError(
                f"obs[{split_key!r}] (split_key) has labels in both train and test: "
                f"{name_some(shared)}. Hold them out whole."
            )
        unit = np.unique(labels, return_inverse=True)[1]
    n = len(np.unique(unit))
    if n < _MIN_UNITS:
        raise ValueError(
            f"test has {n} {split_key or 'cells'}: no interval can be had from fewer than "
            f"{_MIN_UNITS}. Hold out more" + (", or leave split_key out." if split_key else ".")
        )
    others = ~np.isin(trained, cell_keys(train, model._reader(train)))
    if others.any():
        warnings.warn(
            f"The model was trained on {others.sum()} cells (of {len(trained)}) that are not in "
            "train, by name and counts: what synthetic cells gain may be what these taught it, "
            "and were they renamed, they may be in test. Train it on cells of train only.",
            DataQualityWarning,
            stacklevel=3,
        )
    return unit


def _verdict(table: pd.DataFrame) -> str:
    """Use synthetic cells only if they help where they are added, and do no harm elsewhere."""
    by = table.set_index(["metric", "comparison"])
    gains = [by.loc[("filled groups", f"synthetic - {arm}"), "lower"] for arm in _ARMS[:2]]
    harm = by.loc[("macro", "synthetic - none"), "upper"]
    return "use" if min(gains) > 0 and harm >= 0 else "do not use"
