r"""The log fold change between two conditions, and what is not known of it.

With a fitted model the expected expression under a condition is known up to Monte Carlo error,
which any number of samples makes as small as one likes. A test of cells drawn under a against
cells drawn under b therefore measures the number of cells that were asked for: between two
conditions that do not differ at all it rejects more genes the more cells there are, down to
differences of a thousandth that training left behind (``benchmarks/effect.py``). What there is to
be unsure of lies elsewhere:

*parameters*: other seeds end elsewhere where the cells leave the weights open. Of K models with
fold changes of variance :math:`s^2`, one more model's lies about their mean with variance
:math:`s^2(1 + 1/K)`, a Student t of K - 1 degrees of freedom;

*donors*: n donors under a and n *others* under b differ by :math:`2\tau^2/n` where nothing else
does (:mod:`exprgen.spaces`), :math:`\tau^2` with the degrees of freedom of its estimate. Effects
of the *same* donors on both sides cancel.

The sum is taken as a t with the degrees of freedom of Welch and Satterthwaite
:cite:p:`satterthwaite1946`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from exprgen import _arguments, _validate
from exprgen._random import generator, resolve_seed
from exprgen.models import GenerativeModel
from exprgen.models._query import CELL, TABLE
from exprgen.tl._effect_law import columns_of, law_of_change
from exprgen.tl._ensemble import check_ensemble
from exprgen.tl._ranked import check_ranked_key, store_ranked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from exprgen.models._query import Query

__all__ = ["effect"]

_METHOD = "exprgen.effect"
_LIBRARY = 1e4
_N_PARTS = 10  # in which the draws are averaged, to see their error


def effect(
    model: GenerativeModel | Sequence[GenerativeModel],
    a: Mapping[str, Any] | pd.DataFrame,
    b: Mapping[str, Any] | pd.DataFrame,
    *,
    delta: float = 0.0,
    n_donors: int | None = None,
    level: float | None = 0.95,
    library: float | None = None,
    pseudocount: float = 0.1,
    n_samples: int = 2000,
    adata: AnnData | MuData | None = None,
    key_added: str | None = "effect",
    seed: int | None = None,
) -> pd.DataFrame:
    r"""Log2 fold change of expected expression under ``a`` over that under ``b``, per gene.

    What the interval holds is what is asked for: with a list of models, how much they differ;
    with ``n_donors``, how much that many donors differ from as many others. It never is how much
    *cells* differ, which their number makes vanish. One model without either has no source of
    uncertainty at all, and is refused unless ``level=None``.

    Neither knows what the training cells cannot tell: where a condition was seen in two donors,
    all seeds agree on what these two showed.

    Parameters
    ----------
    model
        A trained model, or several from different seeds (five or more: with two, intervals are
        wide) on the same cells.
    a, b
        The conditions that are compared, one row each, without a donor. A registered batch is
        averaged over unless it is given.
    delta
        Smallest absolute log2 fold change of interest.
    n_donors
        Donors on either side, others under ``a`` than under ``b``, in a study whose fold change is
        asked for; needs a model of counts with a ``donor_key``. How much they vary is the mean of
        what the models say. ``None``: the same donors.
    level
        Of the interval; ``None`` gives fold changes only.
    library
        Depth at which both sides are compared, on the scale of setup, up to 1e15; ``None`` is
        10,000. Models of counts only.
    pseudocount
        Added to both sides, in counts at that depth: below it there are no fold changes.
    n_samples
        Draws of the latent state per side and model.
    adata
        Where to write, in the layout of :func:`scanpy.tl.rank_genes_groups`: an object with the
        model's genes, no view; of a MuData its modelled modality. ``None`` nowhere.
    key_added
        Key of ``adata.uns``.
    seed
        The same seed gives the same numbers.

    Returns
    -------
    pandas.DataFrame
        One row per gene, by decreasing score: ``group``, what ``a`` is and ``b`` is not;
        ``names``; ``scores``, fold changes over their standard deviation; ``logfoldchanges`` (of
        continuous values their difference over log 2); ``pvals`` of the hypothesis that it is at
        most ``delta`` :cite:p:`mccarthy2009`, ``pvals_adj``; ``lower``, ``upper``; ``probability``
        of an absolute fold change above ``delta`` (1 for ``delta=0``); ``std`` and its terms
        ``std_parameter``, ``std_donor`` and ``std_sampling``, the Monte Carlo error, which of
        several models is in the first; ``mean_a``, ``mean_b``, at that depth. Without an interval
        what needs one is NaN, p-values among them, and scores are fold changes.

        Means are those of a donor without an effect, and of the signal: outliers, where the
        likelihood has them, are no part of it. ``predict(of="mean")`` has both.

    Raises
    ------
    ValueError
        If an interval is asked for and there is nothing that it could hold, if ``a`` and ``b``
        are the same, if the key is taken, or ``adata`` is a view.
    GeneMismatchError
        If ``adata`` lacks genes of the model.
    """
    given = [model] if isinstance(model, GenerativeModel) else model
    models = check_ensemble(given, minimum=1)
    delta = _arguments.check_number(delta, "delta")
    if level is not None:
        level = _arguments.check_number(level, "level", "(0, 1)")
    _arguments.check_number(pseudocount, "pseudocount", "(0, inf)")
    _arguments.check_positive_int(n_samples, "n_samples", minimum=_N_PARTS)
    _check_sources(models, n_donors, level)
    for one in models:
        one._check_has_depth(library=library)
    library = _LIBRARY if library is None else library
    library = _arguments.check_number(library, "library", f"(0, {_validate.LARGEST:g}]")
    home = None if adata is None else _home(models[0], adata, key_added)
    seed = resolve_seed(seed)
    group, reference = _names(models[0], a, b)
    under_a, under_b = (
        np.stack([_expected(one, side, library, n_samples, seed) for one in models])
        for side in (a, b)
    )
    change = _fold_change(models[0], under_a, under_b, pseudocount)
    means = under_a.mean(1), under_b.mean(1)
    law = law_of_change(models, change, means, n_donors, pseudocount)
    table = columns_of(law, delta, level)
    table = table.assign(mean_a=means[0].mean(0), mean_b=means[1].mean(0))
    table.insert(0, "names", models[0].var_names.to_numpy())
    table.insert(0, "group", group)
    table = table.sort_values("scores", ascending=False, kind="stable", ignore_index=True)
    if home is not None and key_added is not None:
        params = {
            "groupby": ", ".join(models[0].schema.condition_keys),
            "reference": reference,
            "method": _METHOD,
            "use_raw": False,
            "layer": models[0]._setup_args["layer"] or "",
            "corr_method": "benjamini-hochberg",
            "n_models": len(models),
            "n_donors": n_donors or 0,
            "delta": delta,
            "level": level or 0.0,
            "n_samples": n_samples,
            "seed": seed,
        }
        store_ranked(home, key_added, table, params)
    return table


def _home(model: GenerativeModel, adata: AnnData | MuData, key_added: str | None) -> AnnData:
    """Where results about the model's genes are written."""
    adata = model._home(adata)
    _validate.check_anndata(adata, method="effect(adata=...)")
    check_ranked_key(adata, key_added, _METHOD)
    _validate.align_genes(adata.var_names, model.var_names, quiet=True)
    return adata


def _check_sources(
    models: Sequence[GenerativeModel], n_donors: int | None, level: float | None
) -> None:
    """Refuse an interval that holds nothing, and donors of whom nothing is known."""
    if n_donors is not None:
        _arguments.check_positive_int(n_donors, "n_donors")
        if models[0].module.space.donors is None or not models[0].needs_counts:
            raise ValueError(
                f"n_donors={n_donors} needs a model of counts that was set up with "
                f"donor_key=...; this {type(models[0]).__name__} does not know how donors differ."
            )
    elif len(models) == 1 and level is not None:
        raise ValueError(
            "One model gives a fold change, and no interval: its expectations are known up to "
            "Monte Carlo error. Give a list of models trained from different seeds; or n_donors=, "
            "for how much donors differ; or level=None, for the fold changes alone."
        )


def _names(
    model: GenerativeModel,
    a: Mapping[str, Any] | pd.DataFrame,
    b: Mapping[str, Any] | pd.DataFrame,
) -> tuple[str, str]:
    """What the one is and the other is not, and the reverse."""
    values: list[dict[str, str]] = []
    for name, side in (("a", a), ("b", b)):
        table, embedding = model.schema.parse(side, argument=name)
        if len(table) != 1:
            raise ValueError(f"{name} must be one row of conditions, got {len(table)}.")
        if model.schema.donor_key in table:
            raise ValueError(
                f"{name} names a donor, {model.schema.donor_key!r}: leave it out. Effects of the "
                "same donors cancel; n_donors= is for different ones."
            )
        row = {key: str(table[key].iloc[0]) for key in table}
        if embedding is not None:
            row[str(model.schema.embedding_key)] = np.array2string(embedding[0], threshold=4)
        values.append(row)
    keys = dict.fromkeys([*values[0], *values[1]])
    differ = [key for key in keys if values[0].get(key) != values[1].get(key)]
    if not differ:
        raise ValueError(f"a and b are the same conditions: {values[0]}.")
    group, reference = (", ".join(side.get(key, "any") for key in differ) for side in values)
    return group, reference


@torch.no_grad()
def _expected(
    model: GenerativeModel, side: Any, library: float, n_samples: int, seed: int
) -> np.ndarray:
    """Expected values without outliers at one depth, of parts of the draws ``(n_parts, n_vars)``.

    Both sides have the same noise, much of which cancels.
    """
    query: Query = model._ask(side, draw_batch=False, rng=np.random.default_rng([seed, TABLE]))
    noise = generator(seed, CELL, 0)
    y, c, decoded = model._drawn(query, 0, None, n_samples, noise, seed)
    space = model.module.space
    log_depth = space.log_depth(y, c)
    if log_depth is not None:
        shift = float(np.log(library)) - log_depth
        decoded = decoded._replace(location=decoded.location + shift[:, None])
    values = space.likelihood.signal(*decoded).double().cpu()
    return np.stack([part.mean(0).numpy() for part in values.tensor_split(_N_PARTS)])


def _fold_change(
    model: GenerativeModel, a: np.ndarray, b: np.ndarray, pseudocount: float
) -> np.ndarray:
    """Log2 fold changes, in the shape of ``a``."""
    if not model.needs_counts:
        return (a - b) / np.log(2)
    return np.log2((a + pseudocount) / (b + pseudocount))
