"""Is the rival's likelihood computed rightly? A toy with a known answer, and SCVI's own number.

Run ``python benchmarks/check_likelihood.py`` (half a minute). It stops at the first failure.

1. One latent dimension, two genes: p(x) by quadrature over z and l. It must sum to 1 over the
   support (the joint likelihood is a proper one), and the importance-weighted bound must reach it.
2. A small SCVI: "given depth" must equal its ``get_marginal_ll``.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from _common import prepare, say
from _scvi import DepthDensity, fit, importance_bound, log_likelihood, log_nb, setup
from scipy.stats import nbinom
from torch import Tensor
from torch.distributions import Normal

from exprgen.datasets import pbmc68k_reduced


def check(name: str, got: float, expected: float, tolerance: float) -> None:
    """Stop unless the two agree."""
    ok = abs(got - expected) <= tolerance
    say(f"{name}: {got:.4f}, expected {expected:.4f} ± {tolerance:g}: {'ok' if ok else 'WRONG'}")
    if not ok:
        raise SystemExit(1)


def toy() -> None:
    """Bound against quadrature, and quadrature against 1."""
    theta = torch.tensor([2.0, 5.0], dtype=torch.float64)
    direction = torch.tensor([0.8, -0.8], dtype=torch.float64)
    depth = DepthDensity(*torch.tensor([[[0.4, 0.6]], [[1.5, 2.3]], [[0.4, 0.2]]]).double())
    depth = DepthDensity(depth.log_weight.log(), depth.mean, depth.sd)

    def decode(z: Tensor) -> tuple[Tensor, Tensor]:
        return (z * direction).softmax(-1), theta

    def prior_depth(log_depth: Tensor) -> Tensor:
        return depth.log_prob(log_depth, torch.zeros(len(log_depth), dtype=torch.long))

    z, z_step = np.linspace(-6, 6, 61, retstep=True)
    log_depth, depth_step = np.linspace(-1, 4, 101, retstep=True)
    z, log_depth = (torch.from_numpy(a.ravel()) for a in np.meshgrid(z, log_depth))
    log_weight = Normal(0, 1).log_prob(z) + prior_depth(log_depth) + np.log(z_step * depth_step)
    mu = log_depth.exp()[:, None] * decode(z[:, None])[0]
    each = torch.arange(121).double()
    # log NB of every count of each gene at every grid point, (n_counts, n_grid, 2)
    table = log_nb(each[:, None, None], mu, theta)
    check("scipy's NB", float(table[7, 50, 1]), _scipy_nb(7, mu[50, 1], theta[1]), 1e-9)
    joint = torch.einsum("ag,bg->ab", (table[..., 0] + log_weight).exp(), table[..., 1].exp())
    check("sum of p(x)", float(joint.sum()), 1.0, 1e-3)

    # The average of exp(bound) is p(x) whatever K; averages of the bound rise to log p(x).
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 6.0], [12.0, 2.0]]).double()
    exact = joint[x[:, 0].long(), x[:, 1].long()].log()
    noise, n_runs = torch.Generator().manual_seed(0), 40_000
    rows = x.repeat_interleave(n_runs, 0)
    posterior = Normal(
        torch.zeros(len(rows), 1).double(), torch.full((len(rows), 1), 1.2).double()
    )
    for k in (1, 5):
        bound = importance_bound(
            rows, posterior, decode, prior_depth, n_samples=k, generator=noise
        ).reshape(len(x), n_runs)
        relative = (bound - exact[:, None]).exp()
        error = relative.std(1) / n_runs**0.5
        for counts, got, sd in zip(x.int().tolist(), relative.mean(1), error, strict=True):
            check(f"K={k}: p̂(x) / p(x) at {counts}", float(got), 1.0, round(4 * float(sd), 4))
        say(f"K={k}: bound - log p(x): {[round(v, 3) for v in (bound.mean(1) - exact).tolist()]}")


def _scipy_nb(x: int, mu: Tensor, theta: Tensor) -> float:
    return float(nbinom.logpmf(x, float(theta), float(theta / (theta + mu))))


def own_number() -> None:
    """Given depth, against scvi-tools."""
    adata = pbmc68k_reduced()
    adata = adata[:, :100].copy()
    adata = adata[adata.layers["counts"].sum(1).A1 > 5].copy()
    setup(adata, covariate="cell_type")
    model = fit(adata, seed=0, max_epochs=20)
    n_samples = 200
    ours = log_likelihood(model, adata, "cell_type", None, n_samples=n_samples, seed=0)
    # return_mean=True would weigh the cells of the smaller last batch more.
    theirs = model.get_marginal_ll(n_mc_samples=n_samples, return_mean=False).numpy()
    error = (ours - theirs).std() / len(ours) ** 0.5
    check("given depth, against get_marginal_ll", ours.mean(), theirs.mean(), 4 * error)
    totals = adata.layers["counts"].sum(1).A1
    code = adata.obs["cell_type"].cat.codes.to_numpy()
    depth = DepthDensity.fit(totals, code, seed=0)
    joint = log_likelihood(model, adata, "cell_type", depth, n_samples=n_samples, seed=0).mean()
    say(f"joint with depth: {joint:.4f}")


if __name__ == "__main__":
    prepare(argparse.Namespace(out=None, quick=True))
    toy()
    own_number()
