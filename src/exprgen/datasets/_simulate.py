r"""Simulators whose conditional distribution p(x | c) is known, to test models against.

Both draw the count of gene :math:`g` in cell :math:`i` from a negative binomial,

.. math:: x_{ig} \sim \mathrm{NB}(\mu_{ig} = d_i \rho_{ig},\ \theta_g), \qquad
          \operatorname{Var} x = \mu + \mu^2 / \theta, \qquad \log d_i \sim N(m, s^2),

where :math:`d` is the cell's depth and the proportions :math:`\rho_i` sum to one. They differ in
the proportions:

:func:`simulate_nb`
    :math:`\rho_i = \rho(c_i)`, one profile per group. Given depth, genes are independent, so
    :func:`nb_log_likelihood` has p(x | c) exactly (a one-dimensional integral over depth).
:func:`simulate_latent`
    :math:`\rho_i = \operatorname{softmax}(a + W z_i + b_{\text{batch}} + u_{\text{donor}})` with a
    low-dimensional :math:`z_i` from a Gaussian mixture per cell type, shifted by
    :math:`\log(1 + \text{dose})`; donor effects :math:`u \sim N(0, \sigma_u^2)` are shared by all
    cells of a donor. Genes are correlated within a type, as in tissue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["nb_log_likelihood", "simulate_latent", "simulate_nb"]


class _Depth(NamedTuple):
    """Mean and standard deviation of log depth (log counts per cell)."""

    mean: float
    sd: float


def simulate_nb(
    n_obs: int = 1000,
    *,
    n_vars: int = 100,
    n_types: int = 3,
    log_depth: tuple[float, float] = (7.0, 0.4),
    dispersion: tuple[float, float] = (0.5, 5.0),
    effect_sd: float = 1.0,
    seed: int = 0,
) -> AnnData:
    """Cells of a few types; genes are independent negative binomials given type and depth.

    Parameters
    ----------
    n_obs, n_vars, n_types
        Numbers of cells, genes and cell types (types are equally likely).
    log_depth
        Mean and standard deviation of log depth; ``sd=0`` gives every cell the same depth.
    dispersion
        Range of the genes' inverse dispersions theta (log-uniform).
    effect_sd
        Standard deviation over genes of a type's log fold change.
    seed
        The same seed gives the same cells; the truth is the same for any ``n_obs``.

    Returns
    -------
    AnnData
        Counts in ``.X`` and ``.layers["counts"]`` (CSR float32, ``(n_obs, n_vars)``).
        ``.obs``: ``cell_type``, ``depth`` (the true depth, counts). Truth: ``.var["theta"]``,
        ``.varm["proportion"]`` (genes by types), ``.uns["truth"]`` (the other parameters).

    Raises
    ------
    ValueError
        A size below 1, or a standard deviation or dispersion out of range.
    """
    _check_sizes({"n_obs": n_obs, "n_vars": n_vars, "n_types": n_types})
    depth = _check_laws(log_depth, dispersion, {"effect_sd": effect_sd})
    rng = np.random.default_rng(seed)
    theta = _log_uniform(rng, dispersion, n_vars)
    base = rng.normal(0, 1.5, n_vars)
    proportion = _softmax(base + rng.normal(0, effect_sd, (n_types, n_vars)))

    types = rng.integers(n_types, size=n_obs)
    cell_depth = np.exp(rng.normal(depth.mean, depth.sd, n_obs))
    counts = _draw(rng, cell_depth[:, None] * proportion[types], theta)
    adata = _assemble(counts, {"cell_type": _labels("type", types, n_types)}, cell_depth, theta)
    adata.varm["proportion"] = _by_type(proportion, adata)
    adata.uns["truth"] = {"log_depth_mean": depth.mean, "log_depth_sd": depth.sd}
    return adata


def nb_log_likelihood(adata: AnnData, *, n_nodes: int = 2001) -> np.ndarray:
    r"""Exact log p(x | cell type) of every cell of a :func:`simulate_nb` data set.

    :math:`\log \int N(\ell; m, s^2) \prod_g \mathrm{NB}(x_g; e^\ell \rho_g, \theta_g)\, d\ell` by
    the trapezoidal rule on ``n_nodes`` points over ± 8 standard deviations, which for a smooth
    integrand that vanishes at both ends is exact to rounding.

    Parameters
    ----------
    adata
        From :func:`simulate_nb`, or any AnnData that carries its truth (cells may be others:
        ``.layers["counts"]`` and ``.obs["cell_type"]`` are read).
    n_nodes
        Points of the rule.

    Returns
    -------
    numpy.ndarray
        Nats per cell, shape ``(n_obs,)``, float64.
    """
    from scipy.special import gammaln, logsumexp

    truth = adata.uns["truth"]
    mean, sd = truth["log_depth_mean"], truth["log_depth_sd"]
    unit = np.linspace(-8, 8, n_nodes) if sd > 0 else np.zeros(1)
    log_weight = -0.5 * unit**2
    log_weight -= logsumexp(log_weight)
    theta = adata.var["theta"].to_numpy()

    x = adata.layers["counts"].astype(np.float64)
    labels = adata.obs["cell_type"].to_numpy()
    out = np.empty(adata.n_obs)
    for name in adata.varm["proportion"].columns:
        rows = np.flatnonzero(labels == name)
        mu = np.exp(mean + sd * unit)[:, None] * adata.varm["proportion"][name].to_numpy()
        at_zero = -(theta * np.log1p(mu / theta)).sum(axis=1)
        per_count = np.log(mu) - np.log(mu + theta)
        xs = x[rows].toarray()
        constant = (gammaln(xs + theta) - gammaln(theta) - gammaln(xs + 1)).sum(axis=1)
        out[rows] = constant + logsumexp(xs @ per_count.T + at_zero + log_weight, axis=1)
    return out


def simulate_latent(
    n_obs: int = 1000,
    *,
    n_vars: int = 200,
    n_types: int = 4,
    n_latent: int = 4,
    n_components: int = 1,
    n_batches: int = 1,
    n_donors: int = 1,
    doses: Sequence[float] = (),
    batch_sd: float = 0.3,
    donor_sd: float = 0.3,
    latent_sd: float = 0.5,
    log_depth: tuple[float, float] = (7.0, 0.4),
    dispersion: tuple[float, float] = (0.5, 5.0),
    seed: int = 0,
) -> AnnData:
    """Cells with a low-dimensional state, and optionally batches, donors and doses.

    Parameters
    ----------
    n_obs, n_vars, n_types, n_latent
        Numbers of cells, genes, cell types and latent dimensions.
    n_components
        Gaussian components per cell type (equally likely); 2 makes a type bimodal.
    n_batches, n_donors
        Numbers of batches and donors, crossed with the types; 1 has no effect.
    doses
        Doses given to the cells (equally likely); empty for none. The latent mean moves by
        ``log1p(dose)`` times ``uns["truth"]["dose_shift"]``.
    batch_sd, donor_sd
        Standard deviation over genes of a batch's and a donor's log fold change.
    latent_sd
        Standard deviation of the state within a component; components lie about 2 apart.
    log_depth
        Mean and standard deviation of log depth.
    dispersion
        Range of the genes' inverse dispersions theta (log-uniform).
    seed
        The same seed gives the same cells; the truth is the same for any ``n_obs``.

    Returns
    -------
    AnnData
        Counts in ``.X`` and ``.layers["counts"]`` (CSR float32, ``(n_obs, n_vars)``).
        ``.obs``: ``cell_type``, ``batch``, ``donor``, ``depth``, and ``dose`` if asked for.
        Truth: ``.obsm["latent"]`` ``(n_obs, n_latent)``; ``.var["theta"]``, ``.var["intercept"]``;
        ``.varm["loading"]`` ``(n_vars, n_latent)``, ``.varm["batch_effect"]`` and
        ``.varm["donor_effect"]`` (log scale, genes by levels); ``.uns["truth"]`` with
        ``component_mean`` ``(n_types, n_components, n_latent)``, the standard deviations,
        ``dose_shift`` and the depth's law.

    Raises
    ------
    ValueError
        A size below 1, a negative dose, or a standard deviation or dispersion out of range.
    """
    _check_sizes(
        {
            "n_obs": n_obs,
            "n_vars": n_vars,
            "n_types": n_types,
            "n_latent": n_latent,
            "n_components": n_components,
            "n_batches": n_batches,
            "n_donors": n_donors,
        }
    )
    deviations = {"batch_sd": batch_sd, "donor_sd": donor_sd, "latent_sd": latent_sd}
    depth = _check_laws(log_depth, dispersion, deviations)
    levels = np.asarray(doses, dtype=np.float64)
    if not np.all(np.isfinite(levels) & (levels >= 0)):
        raise ValueError(f"doses must be finite and not negative, got {list(doses)}.")

    rng = np.random.default_rng(seed)
    theta = _log_uniform(rng, dispersion, n_vars)
    intercept = rng.normal(0, 1.5, n_vars)
    loading = rng.normal(0, 1 / np.sqrt(n_latent), (n_vars, n_latent))
    component_mean = rng.normal(0, 2, (n_types, n_components, n_latent))
    dose_shift = rng.normal(0, 1, n_latent)
    batch_effect = rng.normal(0, batch_sd, (n_batches, n_vars)) * (n_batches > 1)
    donor_effect = rng.normal(0, donor_sd, (n_donors, n_vars)) * (n_donors > 1)

    types = rng.integers(n_types, size=n_obs)
    component = rng.integers(n_components, size=n_obs)
    batch = rng.integers(n_batches, size=n_obs)
    donor = rng.integers(n_donors, size=n_obs)
    dose = rng.choice(levels, size=n_obs) if levels.size else np.zeros(n_obs)
    cell_depth = np.exp(rng.normal(depth.mean, depth.sd, n_obs))
    z = component_mean[types, component] + np.log1p(dose)[:, None] * dose_shift
    z += rng.normal(0, latent_sd, z.shape)
    logits = intercept + z @ loading.T + batch_effect[batch] + donor_effect[donor]
    counts = _draw(rng, cell_depth[:, None] * _softmax(logits), theta)

    obs = {
        "cell_type": _labels("type", types, n_types),
        "batch": _labels("batch", batch, n_batches),
        "donor": _labels("donor", donor, n_donors),
    }
    adata = _assemble(counts, obs | ({"dose": dose} if levels.size else {}), cell_depth, theta)
    adata.obsm["latent"] = z
    adata.var["intercept"] = intercept
    adata.varm["loading"] = loading
    adata.varm["batch_effect"] = batch_effect.T
    adata.varm["donor_effect"] = donor_effect.T
    adata.uns["truth"] = {
        "component_mean": component_mean,
        "dose_shift": dose_shift,
        "latent_sd": latent_sd,
        "batch_sd": batch_sd,
        "donor_sd": donor_sd,
        "log_depth_mean": depth.mean,
        "log_depth_sd": depth.sd,
    }
    return adata


def _check_sizes(sizes: dict[str, object]) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def _check_laws(
    log_depth: tuple[float, float], dispersion: tuple[float, float], deviations: dict[str, float]
) -> _Depth:
    depth = _Depth(*map(float, log_depth))
    for name, value in {**deviations, "the standard deviation in log_depth": depth.sd}.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value!r}.")
    if not 0 < dispersion[0] <= dispersion[1]:
        raise ValueError(f"dispersion must be (low, high) with 0 < low <= high, got {dispersion}.")
    return depth


def _log_uniform(rng: np.random.Generator, bounds: tuple[float, float], size: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]), size))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _draw(rng: np.random.Generator, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Negative binomial counts as a gamma-Poisson mixture, which stays exact at tiny means."""
    return rng.poisson(rng.gamma(theta, mean / theta))


def _labels(prefix: str, codes: np.ndarray, n_levels: int) -> object:
    import pandas as pd

    return pd.Categorical.from_codes(codes, [f"{prefix}_{k}" for k in range(n_levels)])


def _by_type(proportion: np.ndarray, adata: AnnData) -> object:
    import pandas as pd

    categories = adata.obs["cell_type"].cat.categories
    return pd.DataFrame(proportion.T, index=adata.var_names, columns=list(categories))


def _assemble(
    counts: np.ndarray, obs: dict[str, object], depth: np.ndarray, theta: np.ndarray
) -> AnnData:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    n_obs, n_vars = counts.shape
    matrix = csr_matrix(counts, dtype=np.float32)
    return AnnData(
        X=matrix,
        obs=pd.DataFrame({**obs, "depth": depth}, index=[f"cell_{i}" for i in range(n_obs)]),
        var=pd.DataFrame({"theta": theta}, index=[f"gene_{g}" for g in range(n_vars)]),
        layers={"counts": matrix.copy()},
    )
