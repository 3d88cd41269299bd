r"""The rival: scvi-tools' SCVI with negative binomial counts, all else as it comes.

SCVI is unconditional, and takes depth as data. To generate cells of a type and to give them a
likelihood, it needs three things that it lacks:

- *The type.* ``cell_type`` is a categorical covariate: the decoder sees it, the encoder does not
  (its default). So the decoder, hence the prior's cells, can depend on the type.
- *A depth.* Prior cells take the total of a random training cell of their type. For likelihoods,
  :math:`p(\ell \mid c)` is a mixture of up to three Gaussians of log totals per type, fitted on
  the training cells.
- *A posterior of depth*, for importance sampling. With x the counts, L their total,
  :math:`\rho, \theta` the decoder's at z, :math:`\mu = L\rho` and
  :math:`I = \sum \mu\theta/(\mu+\theta)`, one Newton step from :math:`\log L`:

.. math::
    q(\ell \mid x, z) = N\Big(\log L + \frac{\sum (x-\mu)\,\theta/(\theta+\mu)}{I+1},\;
    \frac{1.1^2}{I+1}\Big).

Then :math:`\log \hat p_K = \log \frac1K \sum_k NB(x; e^{\ell_k}\rho(z_k, c), \theta)\,
N(z_k; 0, I)\, p(\ell_k|c) / q(z_k|x)\, q(\ell_k|x, z_k)`, whose expectation is a lower bound of
log p(x|c). "Given depth" leaves the factors of :math:`\ell` out and sets it to :math:`\log L`;
this is SCVI's own ``get_marginal_ll``, in float64. ``check_likelihood.py`` tests both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import Normal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DepthDensity",
    "codes",
    "fit",
    "importance_bound",
    "log_likelihood",
    "posterior_cells",
    "prior_cells",
    "setup",
]

# A Gaussian of log totals is never narrower than this, and rests on that many cells.
_MINIMUM_SD, _CELLS_PER_GAUSSIAN = 0.05, 20


def setup(adata: ad.AnnData, *, covariate: str | None = None, batch: str | None = None) -> None:
    """Register ``layers["counts"]``."""
    scvi.model.SCVI.setup_anndata(
        adata,
        layer="counts",
        batch_key=batch,
        categorical_covariate_keys=None if covariate is None else [covariate],
    )


def fit(adata: ad.AnnData, *, seed: int, max_epochs: int | None = None) -> scvi.model.SCVI:
    """SCVI(gene_likelihood="nb") trained with its defaults; registered by :func:`setup`."""
    scvi.settings.seed = seed
    model = scvi.model.SCVI(adata, gene_likelihood="nb")
    model.train(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False)
    return model


def codes(model: scvi.model.SCVI, labels: pd.Series) -> np.ndarray:
    """Code of each cell's covariate, ``(n_obs, 1)``."""
    registry = model.adata_manager.get_state_registry("extra_categorical_covs")
    levels = pd.Index(registry.mappings[registry.field_keys[0]])
    return levels.get_indexer(labels.astype(str))[:, None]


@torch.no_grad()
def prior_cells(
    model: scvi.model.SCVI, labels: pd.Series, totals: np.ndarray, *, seed: int
) -> ad.AnnData:
    """Cells decoded from z ~ N(0, I), one for each label, at the given totals ``(n_obs,)``."""
    torch.manual_seed(seed)
    code = torch.from_numpy(codes(model, labels))
    log_total = torch.from_numpy(np.log(totals)).float()[:, None]
    blocks = []
    for part in torch.arange(len(labels)).split(512):
        z = torch.randn(len(part), model.module.n_latent)
        batch = torch.zeros(len(part), 1)
        drawn = model.module.generative(z, log_total[part], batch, cat_covs=code[part])["px"]
        blocks.append(sp.csr_matrix(drawn.sample().numpy()))
    return _cells(sp.vstack(blocks, format="csr"), labels, model)


def posterior_cells(
    model: scvi.model.SCVI, labels: pd.Series, rows: np.ndarray, *, seed: int
) -> ad.AnnData:
    """``posterior_predictive_sample`` of training cells: each gives one draw at its own total."""
    torch.manual_seed(seed)
    counts = model.posterior_predictive_sample(indices=rows)
    return _cells(counts.to_scipy_sparse().tocsr(), labels.iloc[rows], model)


def _cells(counts: sp.csr_matrix, labels: pd.Series, model: scvi.model.SCVI) -> ad.AnnData:
    obs = pd.DataFrame({labels.name: labels.to_numpy()}, index=np.arange(len(labels)).astype(str))
    var = pd.DataFrame(index=model.adata.var_names)
    return ad.AnnData(counts, obs=obs, var=var, layers={"counts": counts.copy()})


@dataclass(frozen=True)
class DepthDensity:
    """p(l | c): Gaussian mixtures of log totals, all tensors ``(n_types, 3)`` float64."""

    log_weight: Tensor
    mean: Tensor
    sd: Tensor

    @classmethod
    def fit(cls, totals: np.ndarray, code: np.ndarray, *, seed: int) -> DepthDensity:
        """Fit one mixture to the training cells of each type; few cells get fewer Gaussians."""
        n_types = int(code.max()) + 1
        weight, mean, sd = np.zeros((n_types, 3)), np.zeros((n_types, 3)), np.ones((n_types, 3))
        for k in range(n_types):
            log_total = np.log(totals[code.ravel() == k])[:, None]
            n = int(np.clip(len(log_total) // _CELLS_PER_GAUSSIAN, 1, 3))
            mixture = GaussianMixture(n, n_init=3, reg_covar=_MINIMUM_SD**2, random_state=seed)
            mixture.fit(log_total)
            weight[k, :n], mean[k, :n] = mixture.weights_, mixture.means_[:, 0]
            sd[k, :n] = np.sqrt(mixture.covariances_[:, 0, 0])
        with np.errstate(divide="ignore"):  # an absent Gaussian has weight 0
            return cls(*map(torch.from_numpy, (np.log(weight), mean, sd)))

    def log_prob(self, log_depth: Tensor, code: Tensor) -> Tensor:
        """Log density at ``log_depth`` ``(n_obs,)`` for types ``code`` ``(n_obs,)``."""
        each = Normal(self.mean[code], self.sd[code]).log_prob(log_depth[:, None])
        return (self.log_weight[code] + each).logsumexp(1)


@torch.no_grad()
def log_likelihood(
    model: scvi.model.SCVI,
    adata: ad.AnnData,
    covariate: str,
    depth: DepthDensity | None,
    *,
    n_samples: int,
    seed: int,
    block: int = 256,
) -> np.ndarray:
    """log p(x | c) of new cells, joint with depth or (``None``) given it: bound, nats per cell."""
    module = copy.deepcopy(model.module).double().eval()
    noise = torch.Generator().manual_seed(seed)
    code = torch.from_numpy(codes(model, adata.obs[covariate]))
    values = []
    for part in torch.arange(adata.n_obs).split(block):
        x = torch.from_numpy(adata.layers["counts"][part.numpy()].toarray()).double()
        c, batch = code[part], torch.zeros(len(part), 1)
        posterior = module.inference(x, batch, cat_covs=c)["qz"]

        def decode(z: Tensor, c: Tensor = c, batch: Tensor = batch) -> tuple[Tensor, Tensor]:
            px = module.generative(z, torch.zeros(len(z), 1), batch, cat_covs=c)["px"]
            return px.scale, px.theta

        def prior(log_depth: Tensor, c: Tensor = c) -> Tensor:
            return depth.log_prob(log_depth, c[:, 0])

        prior_depth = None if depth is None else prior
        bound = importance_bound(
            x, posterior, decode, prior_depth, n_samples=n_samples, generator=noise
        )
        values.append(bound)
    return torch.cat(values).numpy()


def importance_bound(
    x: Tensor,
    posterior: Normal,
    decode: Callable[[Tensor], tuple[Tensor, Tensor]],
    log_prior_depth: Callable[[Tensor], Tensor] | None,
    *,
    n_samples: int,
    generator: torch.Generator,
) -> Tensor:
    """Importance-weighted bound on log p(x), ``(n_obs,)`` nats, float64; see the module's top.

    Parameters
    ----------
    x
        Counts, ``(n_obs, n_vars)``.
    posterior
        q(z | x), ``(n_obs, n_latent)``; the prior of z is N(0, I).
    decode
        From z to the composition ``(n_obs, n_vars)`` and the dispersion.
    log_prior_depth
        log p(l | c) at ``(n_obs,)`` log depths; ``None`` fixes l at the log total.
    n_samples, generator
        Importance samples per cell, and their noise.
    """
    mean, sd = posterior.loc, posterior.scale
    log_total = x.sum(1).clamp(min=0.5).log()
    terms = []
    for _ in range(n_samples):
        z = mean + sd * torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        rho, theta = decode(z)
        weight = (Normal(0.0, 1.0).log_prob(z) - posterior.log_prob(z)).sum(1)
        log_depth = log_total
        if log_prior_depth is not None:
            proposal = _depth_proposal(x, log_total, rho, theta)
            log_depth = proposal.loc + proposal.scale * torch.randn(
                log_total.shape, generator=generator, dtype=mean.dtype
            )
            weight = weight + log_prior_depth(log_depth) - proposal.log_prob(log_depth)
        terms.append(weight + log_nb(x, log_depth.exp()[:, None] * rho, theta).sum(1))
    return torch.stack(terms).logsumexp(0) - np.log(n_samples)


def _depth_proposal(x: Tensor, log_total: Tensor, rho: Tensor, theta: Tensor) -> Normal:
    mu = log_total.exp()[:, None] * rho
    shrink = theta / (theta + mu)
    precision = (mu * shrink).sum(1) + 1
    return Normal(log_total + ((x - mu) * shrink).sum(1) / precision, 1.1 / precision.sqrt())


def log_nb(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Log probability of counts, elementwise, by mean and inverse dispersion."""
    return (
        torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
        - theta * torch.log1p(mu / theta)
        + torch.xlogy(x, mu / (mu + theta))
    )
