r"""A linear mixed model for many genes: what it reads of the rows, and its posterior.

For row i of donor d and gene g, with inputs :math:`z_i = [1, x_i]` and weights :math:`w_i`,

.. math::
    y_{ig} = z_i \beta_g + u_{dg} + e_{ig}, \qquad
    e_{ig} \sim \mathcal N(0, \sigma_g^2 / w_i), \quad
    u_{dg} \sim \mathcal N(0, \lambda_g \sigma_g^2), \quad
    \beta_{jg} \sim \mathcal N(0, v_j \sigma_g^2),

with a flat prior on the intercept, :math:`\sigma_g^2` scaled inverse chi-squared
:math:`(d_0, s_0^2)` over genes as limma has it :cite:p:`smyth2004`, and the ratio of variances
:math:`\lambda_g` one of K values with prior weights :math:`\pi_k`, the same for all genes.

Given :math:`\lambda`, all is in closed form. With :math:`\rho_d = \lambda / (1 + \lambda n_d)` and
donor d's sums :math:`n_d = \sum w_i`, :math:`s_d = \sum w_i z_i`, :math:`t_d = \sum w_i y_i`,
Woodbury's identity takes the donors out :cite:p:`searle1992`:

.. math::
    S = Z^\top W Z - \sum_d \rho_d s_d s_d^\top + \mathrm{diag}(0, 1/v), \quad
    R = Z^\top W Y - \sum_d \rho_d s_d t_d^\top, \quad
    \hat\beta = S^{-1} R,

:math:`\beta_g \mid \sigma_g \sim \mathcal N(\hat\beta_g, \sigma_g^2 S^{-1})` and
:math:`u_d \mid \beta, \sigma \sim \mathcal N(\rho_d (t_d - s_d^\top \beta), \sigma^2 \rho_d)`: a
donor of few rows is shrunk to 0. With :math:`Q = Y^\top W Y - \sum_d \rho_d t_d^2 - R^\top
\hat\beta` the evidence of n rows is, up to a constant,

.. math::
    \log p(y \mid \lambda) = -\tfrac12 \log|S| - \tfrac12 \sum_j \log v_j
    - \tfrac12 \sum_d \log(1 + \lambda n_d)
    + \log\frac{\Gamma(\nu/2)\,(d_0 s_0^2)^{d_0/2}}{\Gamma(d_0/2)}
    - \tfrac\nu2 \log(d_0 s_0^2 + Q),

:math:`\nu = d_0 + n - 1`. S does not depend on the gene, so K matrices of the size of the
conditions serve all genes, and the posterior is a mixture over the K ratios. Rows are read once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Collapsed",
    "Hyperparameters",
    "Posterior",
    "Rows",
    "Sums",
    "blocks",
    "evidence",
    "given_coefficients",
    "grid",
]

# Numbers per block of what is computed for each ratio, row and gene.
_BLOCK = 4_000_000
# Most ratios; beyond some hundred donors their distance exceeds what the donors could tell apart.
_MOST_RATIOS = 80


class Hyperparameters(NamedTuple):
    """What genes have in common; float64."""

    prior_variance: Tensor  # v_j in units of the noise variance, (n_inputs,)
    ratios: Tensor  # λ_k, (K,)
    log_weights: Tensor  # log π_k, (K,)
    noise_dof: Tensor  # d_0, scalar
    noise_scale: Tensor  # s_0², scalar


class Rows(NamedTuple):
    """Rows as tensors, float64; the donors as codes."""

    z: Tensor  # (n, 1 + n_inputs)
    y: Tensor  # (n, n_vars)
    mass: Tensor  # (n,)
    donor: Tensor  # (n,)

    def take(self, at: slice | Tensor) -> Rows:
        """Some of the rows."""
        return Rows(*(part[at] for part in self))


@dataclass(frozen=True)
class Sums:
    """All that a fit reads of the rows; sums of parts can be taken away."""

    n: int
    gram: Tensor  # Z'WZ
    cross: Tensor  # Z'WY
    squares: Tensor  # diagonal of Y'WY, (n_vars,)
    mass: Tensor  # n_d, (n_donors,)
    z: Tensor  # s_d, (n_donors, 1 + n_inputs)
    y: Tensor  # t_d, (n_donors, n_vars)

    @classmethod
    def of(cls, rows: Rows, n_donors: int) -> Self:
        """Add up rows."""
        mass = rows.mass[:, None]
        z, y = mass * rows.z, mass * rows.y

        def by_donor(values: Tensor) -> Tensor:
            return values.new_zeros(n_donors, values.shape[1]).index_add_(0, rows.donor, values)

        return cls(
            n=int((rows.mass > 0).sum()),
            gram=rows.z.T @ z,
            cross=rows.z.T @ y,
            squares=(rows.y * y).sum(0),
            mass=by_donor(mass).squeeze(1),
            z=by_donor(z),
            y=by_donor(y),
        )

    def __sub__(self, other: Sums) -> Sums:
        """The sums without those of some of the rows."""
        return Sums(*(getattr(self, key) - getattr(other, key) for key in self.__annotations__))

    def of_genes(self, at: Tensor) -> Sums:
        """The sums of some of the genes."""
        return replace(self, cross=self.cross[:, at], squares=self.squares[at], y=self.y[:, at])


class Collapsed(NamedTuple):
    """Sums with the donors taken out, for each of K ratios."""

    gram: Tensor  # S without the prior, (K, 1 + n_inputs, 1 + n_inputs)
    cross: Tensor  # R, (K, 1 + n_inputs, n_vars)
    squares: Tensor  # (K, n_vars)
    log_det: Tensor  # Σ log(1 + λ n_d), (K,)
    n: int

    @classmethod
    def of(cls, sums: Sums, ratios: Tensor) -> Self:
        """Take out the donors for each ratio."""
        rho = given_coefficients(ratios, sums)
        weighted = rho[:, :, None] * sums.z
        return cls(
            gram=sums.gram - weighted.mT @ sums.z,
            cross=sums.cross - weighted.mT @ sums.y,
            squares=sums.squares - rho @ sums.y.square(),
            log_det=torch.log1p(ratios[:, None] * sums.mass).sum(1),
            n=sums.n,
        )


def grid(mass: np.ndarray) -> np.ndarray:
    """Ratios of variances λ, from none to speak of to nothing else, ``(K,)``.

    Parameters
    ----------
    mass
        Weight of each donor, ``(n_donors,)``; with a single one there are no effects: λ is 0.

    Notes
    -----
    λ from 0.01/n to 100, n the mean weight of a donor: below, the effects are lost in the noise of
    a donor's mean. Steps are as wide as what D donors say of log λ, whose standard deviation is
    √(2/(D - 1)) at best; sums over such a grid are as good as integrals.
    """
    if len(mass) < 2:
        return np.zeros(1)
    low, high = np.log(0.01 / max(mass.mean(), 1.0)), np.log(100.0)
    step = min(0.5, np.sqrt(2 / (len(mass) - 1)))
    return np.exp(np.linspace(low, high, min(int((high - low) / step) + 2, _MOST_RATIOS)))


def evidence(collapsed: Collapsed, hyper: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """What the rows say of each ratio, and S.

    Returns
    -------
    Log evidence, ``(K, n_vars)``, up to a constant; :math:`d_0 s_0^2 + Q`, ``(K, n_vars)``; the
    Cholesky factor of S, ``(K, 1 + n_inputs, 1 + n_inputs)``.
    """
    precision = torch.cat([hyper.prior_variance.new_zeros(1), 1 / hyper.prior_variance])
    factor = torch.linalg.cholesky(collapsed.gram + torch.diag(precision))
    half = torch.linalg.solve_triangular(factor, collapsed.cross, upper=False)
    prior_error = hyper.noise_dof * hyper.noise_scale
    error = prior_error + (collapsed.squares - half.square().sum(1)).clamp(min=0)
    dof = hyper.noise_dof + collapsed.n - 1
    of_ratio = -factor.diagonal(dim1=1, dim2=2).log().sum(1) - collapsed.log_det / 2
    constant = (
        torch.lgamma(dof / 2)
        - torch.lgamma(hyper.noise_dof / 2)
        + hyper.noise_dof / 2 * prior_error.log()
        - hyper.prior_variance.log().sum() / 2
    )
    return of_ratio[:, None] + constant - dof / 2 * error.log(), error, factor


class Posterior(NamedTuple):
    """A mixture over K ratios of Gaussians given the noise; float64."""

    weights: Tensor  # (K, n_vars)
    coefficients: Tensor  # (K, 1 + n_inputs, n_vars)
    covariance: Tensor  # S⁻¹, (K, 1 + n_inputs, 1 + n_inputs)
    error: Tensor  # d_0 s_0² + Q, (K, n_vars)
    dof: Tensor  # ν, scalar

    @classmethod
    def of(cls, sums: Sums, hyper: Hyperparameters) -> Self:
        """The posterior given what genes have in common."""
        collapsed = Collapsed.of(sums, hyper.ratios)
        log_evidence, error, factor = evidence(collapsed, hyper)
        return cls(
            weights=torch.softmax(hyper.log_weights[:, None] + log_evidence, 0),
            coefficients=torch.cholesky_solve(collapsed.cross, factor),
            covariance=torch.cholesky_inverse(factor),
            error=error,
            dof=hyper.noise_dof + sums.n - 1,
        )

    def noise(self) -> Tensor:
        """Expected noise variance for each ratio, ``(K, n_vars)``."""
        return self.error / (self.dof - 2)

    def mean(self) -> Tensor:
        """Expected coefficients, ``(1 + n_inputs, n_vars)``."""
        return (self.weights[:, None] * self.coefficients).sum(0)

    def variance(self, z: Tensor) -> Tensor:
        """Variance of z β, ``(n, n_vars)``."""
        found = torch.empty(len(z), self.weights.shape[1], dtype=z.dtype)
        for at in blocks(len(z), self.weights.numel()):
            spread = ((z[at] @ self.covariance) * z[at]).sum(2)
            found[at] = self._mix(z[at] @ self.coefficients, spread)[1]
        return found

    def donors(self, sums: Sums, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the donors' effects, each ``(n_donors, n_vars)``."""
        rho = given_coefficients(ratios, sums)
        mean, variance = torch.empty_like(sums.y), torch.empty_like(sums.y)
        for at in blocks(len(sums.y), self.weights.numel()):
            z, share = sums.z[at], rho[:, at]
            spread = share + share.square() * ((z @ self.covariance) * z).sum(2)
            away = sums.y[at] - z @ self.coefficients
            mean[at], variance[at] = self._mix(share[:, :, None] * away, spread)
        return mean, variance

    def _mix(self, means: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of the mixture; means ``(K, n, n_vars)``, variances over noise ``(K, n)``."""
        weights = self.weights[:, None]
        mean = (weights * means).sum(0)
        within = torch.einsum("kg,kn->ng", self.weights * self.noise(), spread)
        return mean, within + (weights * (means - mean).square()).sum(0)


def blocks(n: int, width: int) -> Iterator[slice]:
    """Parts of n rows, so that ``width`` numbers for each of them are not too many at a time."""
    size = max(_BLOCK // max(width, 1), 1)
    return (slice(start, start + size) for start in range(0, n, size))


def given_coefficients(ratios: Tensor, sums: Sums) -> Tensor:
    """Variance of a donor's effect given the coefficients, over the noise, ``(K, n_donors)``."""
    return ratios[:, None] / (1 + ratios[:, None] * sums.mass)
