r"""Negative binomial likelihoods, without and with outliers.

The negative binomial with mean :math:`\mu` and inverse dispersion :math:`\theta` (variance
:math:`\mu + \mu^2/\theta`) is written in :math:`s = \log\mu - \log\theta`:

.. math::
    \log p(x) = -\theta\,\mathrm{softplus}(s) + x\,(s - \mathrm{softplus}(s))
                + \log\Gamma(x+\theta) - \log\Gamma(\theta) - \log\Gamma(x+1).

All but the first term vanish where the count is 0, so they are evaluated on the non-zero counts
only, about one in ten of a droplet experiment; the form is exact, and stays finite for any
:math:`\theta`.

Droplet data can hold isolated counts that no dispersion explains: a gene seen at most twice in any
cell, and 40 times in one. A negative binomial answers such a count with a tiny :math:`\theta`, and
then every other cell is drawn too dispersed. The *contaminated* negative binomial, after Tukey's
contaminated normal, replaces a small share of a gene's counts by geometric numbers from 1 up:

.. math::
    p(0) = (1-\varepsilon_g)\,\mathrm{NB}(0), \qquad
    p(x) = (1-\varepsilon_g)\,\mathrm{NB}(x) + \varepsilon_g\,(1-q)\,q^{x-1} \quad (x \ge 1),

with :math:`\varepsilon_g = \varepsilon\,(1 - e^{-\bar x_g})`: a gene has outliers in proportion to
how often it is detected at all in training (as a Poisson count of its mean would be). With one
rate for all genes rare ones would consist of outliers.

"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from exprgen.likelihoods._base import Dispersion, Likelihood, Start
from exprgen.likelihoods._sparse import Nonzero, log_gamma, sum_at_zero

__all__ = [
    "ContaminatedNegativeBinomial",
    "NegativeBinomial",
    "draw_negative_binomial",
    "negative_binomial_log_prob",
]

# Above this mean, inverting the distribution function term by term is slower than drawing a
# gamma and a Poisson number.
_INVERSION_MAX_MEAN = 16.0
# The recursion of the probabilities stops here; the far tail is inverted by scipy.
_INVERSION_MAX_COUNT = 63
# Larger means are no counts of molecules, and the largest draws would not fit an integer.
_LARGEST_LOG_MEAN = np.log(1e9)
# The inverse dispersion that genes start from, and what it weighs against a gene's own counts,
# as a sum of squared expected counts.
_PRIOR_DISPERSION, _PRIOR_EVIDENCE = 5.0, 50.0
# A cell's state changes the inverse dispersion of a gene by a factor of at most 20.
_LARGEST_CHANGE = 3.0
# Where outliers have a component of their own, the inverse dispersion of no gene starts below.
_SMALLEST_START = 2.0


def negative_binomial_log_prob(x: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """Log-probability of counts under negative binomials, summed over genes. *Exact.*

    Parameters
    ----------
    x
        Counts, ``(n_obs, n_vars)``, not negative.
    log_mean
        Natural logarithm of the means, ``(n_obs, n_vars)``.
    log_dispersion
        Natural logarithm of the inverse dispersions θ, ``(n_vars,)`` or ``(n_obs, n_vars)``.

    Returns
    -------
    ``(n_obs,)``, nats per cell, in the precision of the arguments: held-out likelihoods want
    float64, for in float32 the gamma terms lose digits at large θ.
    """
    nonzero = Nonzero.of(x)
    _, terms = _at_nonzero(nonzero, log_mean, log_dispersion)
    return nonzero.add_to_rows(sum_at_zero(log_mean, log_dispersion), terms)


def log_prob_at_zero(log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """Log-probability of a count of 0, in the shape that the arguments broadcast to."""
    return -log_dispersion.exp() * softplus(log_mean - log_dispersion)


def _at_nonzero(
    nonzero: Nonzero, log_mean: Tensor, log_dispersion: Tensor
) -> tuple[Tensor, Tensor]:
    """Log p(0) and log p(x) - log p(0) of the non-zero counts, each ``(n_nonzero,)``."""
    counts = nonzero.counts
    log_theta = nonzero.of_gene_or_cell(log_dispersion)
    theta, s = log_theta.exp(), nonzero.of_gene_or_cell(log_mean) - log_theta
    log1p_ratio = softplus(s)
    if log_dispersion.dim() == 1:  # evaluated once per gene
        log_gamma_theta = nonzero.of_gene_or_cell(log_gamma(log_dispersion.exp()))
    else:
        log_gamma_theta = log_gamma(theta)
    terms = counts * (s - log1p_ratio) + log_gamma(counts + theta) - log_gamma_theta
    return -theta * log1p_ratio, terms - torch.lgamma(counts + 1)


def check_drawable(log_mean: Tensor) -> None:
    """Refuse means above 1e9, or that are no numbers: draws would not be counts."""
    largest = float(log_mean.max()) if log_mean.numel() else 0.0
    if not largest <= _LARGEST_LOG_MEAN:
        raise ValueError(
            f"Means of up to exp({largest:.3g}) cannot be drawn as counts: the conditions are too "
            "far outside what training saw, or library or log_fold_change is too large."
        )


def draw_negative_binomial(
    log_mean: Tensor,
    log_dispersion: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Draw counts: inversion of the distribution function where the mean is small.

    Most genes of most cells are 0, which one uniform number and one exponential decide; the
    recursion ``p(k+1) = p(k) (k+θ)/(k+1) σ(s)`` then runs on the few that are left. Large means
    are drawn as Poisson numbers with gamma-distributed rates.

    Parameters
    ----------
    log_mean
        ``(n_obs, n_vars)``, on the CPU.
    log_dispersion
        ``(n_vars,)`` or ``(n_obs, n_vars)``.
    generator
        A CPU generator; the global one is not touched.

    Returns
    -------
    Counts ``(n_obs, n_vars)``, float32.

    Raises
    ------
    ValueError
        If a mean is above 1e9 or not a number.
    """
    check_drawable(log_mean)
    log_dispersion = log_dispersion.expand_as(log_mean)
    s = log_mean - log_dispersion
    log_p0 = log_prob_at_zero(log_mean, log_dispersion)
    counts = torch.zeros_like(log_mean, dtype=torch.float32)
    # Double precision: a float32 uniform number cannot reach quantiles beyond 1 - 6e-8.
    uniform = torch.rand(log_mean.shape, generator=generator, dtype=torch.float64)
    large = log_mean > np.log(_INVERSION_MAX_MEAN)
    todo = ((uniform > log_p0.exp()) & ~large).nonzero(as_tuple=True)
    counts[todo] = _invert(uniform[todo], s[todo].double(), log_dispersion[todo].double().exp())
    if large.any():
        theta = log_dispersion[large].double().exp()
        rate = torch._standard_gamma(theta, generator=generator) * s[large].double().exp()
        counts[large] = torch.poisson(rate, generator=generator).float()
    return counts


def _invert(uniform: Tensor, s: Tensor, theta: Tensor) -> Tensor:
    """Smallest count whose distribution function reaches ``uniform``; all float64, ``(n,)``."""
    counts = torch.zeros_like(uniform, dtype=torch.float32)
    success = torch.sigmoid(s)
    probability = torch.exp(-theta * softplus(s))
    cumulative = probability.clone()
    index = torch.arange(len(uniform))
    for k in range(1, _INVERSION_MAX_COUNT + 1):
        probability = probability * success * ((k - 1 + theta) / k)
        cumulative = cumulative + probability
        found = uniform <= cumulative
        counts[index[found]] = k
        rest = ~found
        index, uniform, theta = index[rest], uniform[rest], theta[rest]
        success, probability, cumulative = success[rest], probability[rest], cumulative[rest]
        if len(index) == 0:
            return counts
    tail = stats.nbinom.ppf(uniform.numpy(), theta.numpy(), 1 - success.numpy())
    counts[index] = torch.from_numpy(tail).float()
    return counts


class NegativeBinomial(Likelihood):
    """Negative binomial counts; location = log mean.

    Parameters
    ----------
    n_vars
        Number of genes.
    dispersion
        ``"gene"``: one inverse dispersion θ per gene. ``"gene-cell"``: the first further head of
        the decoder is added to log θ, which then differs between conditions and states.
    """

    is_count = True
    lower = 0.0

    def __init__(self, n_vars: int, *, dispersion: Dispersion = "gene") -> None:
        super().__init__()
        self._has_dispersion_head = dispersion == "gene-cell"
        self.n_heads = 1 + self._has_dispersion_head
        self.log_dispersion = nn.Parameter(torch.zeros(n_vars))

    def _log_theta(self, location: Tensor, extra: Tensor | None) -> Tensor:
        """Log θ of each gene, or of each cell and gene, in the precision of ``location``."""
        log_dispersion = self.log_dispersion.to(location.dtype)
        if extra is None or not self._has_dispersion_head:
            return log_dispersion
        # Far out in the latent space a linear head would say that θ is 0.
        return log_dispersion + extra[:, 0].clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE)

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """Dispersions by the method of moments, Σ((x - Lρ)² - Lρ) = Σ L²ρ²/θ.

        Where counts are too few to tell they are shrunk to a common value. They include
        differences between cells that the latent state will explain: θ grows from there.
        """
        excess = start.residual - start.expected + _PRIOR_EVIDENCE / _PRIOR_DISPERSION
        overdispersion = excess / (start.expected_square + _PRIOR_EVIDENCE)
        self.log_dispersion.copy_(-overdispersion.clamp(1e-2, 1e2).log())

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Exact; nats per cell, in the precision of ``location``."""
        return negative_binomial_log_prob(
            x.to(location.dtype), location, self._log_theta(location, extra)
        )

    def draw(
        self, location: Tensor, generator: torch.Generator, extra: Tensor | None = None
    ) -> Tensor:
        """Integer counts as float32, on the CPU."""
        log_dispersion = self._log_theta(location, extra).detach()
        return draw_negative_binomial(location.cpu(), log_dispersion.cpu(), generator)

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``exp(location)``, in counts."""
        return location.exp()

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``μ + μ²/θ``, in counts squared."""
        mean = location.exp()
        return mean + mean.square() * (-self._log_theta(location, extra)).exp()


class ContaminatedNegativeBinomial(NegativeBinomial):
    """Negative binomial counts, some of which are outliers; location = log mean without them.

    Parameters
    ----------
    n_vars, dispersion
        See :class:`~exprgen.likelihoods.NegativeBinomial`.
    """

    detection: Tensor

    def __init__(self, n_vars: int, *, dispersion: Dispersion = "gene") -> None:
        super().__init__(n_vars, dispersion=dispersion)
        self.outlier_logit = nn.Parameter(torch.tensor(-6.0))
        self.decay_logit = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("detection", torch.ones(n_vars))

    @property
    def outlier_rate(self) -> Tensor:
        """Share of each gene's counts that are outliers, ``(n_vars,)``."""
        return torch.sigmoid(self.outlier_logit) * self.detection

    @property
    def outlier_mean(self) -> Tensor:
        """Mean of an outlier, in counts."""
        return 1 / torch.sigmoid(-self.decay_logit)

    @property
    def background(self) -> Tensor:  # type: ignore[override]
        """Outliers per count, times their mean, ``(n_vars,)``."""
        return self.outlier_rate * self.outlier_mean

    @torch.no_grad()
    def initialize(self, start: Start) -> None:
        """As without outliers, but θ at least 2; and how often genes are detected.

        A few outliers make the moments of a rare gene those of a θ near 0, from where it would
        take most of the training to come back.
        """
        super().initialize(start)
        self.log_dispersion.clamp_(min=np.log(_SMALLEST_START))
        self.detection.copy_(-torch.expm1(-start.expected / start.n_obs))

    def log_prob(self, x: Tensor, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Exact; nats per cell, in the precision of ``location``."""
        dtype = location.dtype
        log_dispersion = self._log_theta(location, extra)
        rate, decay = self.outlier_rate.to(dtype), self.decay_logit.to(dtype)
        nonzero = Nonzero.of(x.to(dtype))
        log_zero, terms = _at_nonzero(nonzero, location, log_dispersion)
        geometric = logsigmoid(-decay) + (nonzero.counts - 1) * logsigmoid(decay)
        # With 1 - ε taken out of the sum over all genes, the odds of ε are left.
        log_odds = nonzero.of_gene_or_cell(torch.logit(rate))
        terms = torch.logaddexp(log_zero + terms, log_odds + geometric) - log_zero
        at_zero = sum_at_zero(location, log_dispersion) + torch.log1p(-rate).sum()
        return nonzero.add_to_rows(at_zero, terms)

    def draw(
        self, location: Tensor, generator: torch.Generator, extra: Tensor | None = None
    ) -> Tensor:
        """Integer counts as float32, on the CPU."""
        counts = super().draw(location, generator, extra)
        rate = self.outlier_rate.detach().cpu()
        outliers = (torch.rand(counts.shape, generator=generator) < rate).nonzero(as_tuple=True)
        uniform = torch.rand(len(outliers[0]), generator=generator, dtype=torch.float64)
        log_decay = logsigmoid(self.decay_logit.detach().double()).cpu()
        counts[outliers] = 1 + torch.floor(torch.log1p(-uniform) / log_decay).float()
        return counts

    def mean(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``(1 - ε) μ + ε m`` with m the mean of an outlier, in counts."""
        return (1 - self.outlier_rate) * location.exp() + self.background

    def signal(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """``exp(location)``, in counts."""
        return location.exp()

    def variance(self, location: Tensor, extra: Tensor | None = None) -> Tensor:
        """Of the mixture, in counts squared: within its two parts, and between them."""
        rate, outlier = self.outlier_rate, self.outlier_mean
        # A geometric number from 1 up with mean m has variance m (m - 1).
        within = (1 - rate) * super().variance(location, extra) + rate * outlier * (outlier - 1)
        return within + rate * (1 - rate) * (location.exp() - outlier).square()
