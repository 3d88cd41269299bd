r"""A linear mean with donors as random effects, and how sure it is of itself.

.. math::
    y_{ig} = a_g + b_g \cdot x(c_i) + u_{d(i)g} + e_{ig}

with conditions encoded as for :class:`~exprgen.means.RidgeMean`, effects :math:`b` of variance
:math:`v \sigma_g^2` with one v for each column of conditions, donors' effects :math:`u \sim
\mathcal N(0, \tau_g^2)` and noise :math:`e \sim \mathcal N(0, \sigma_g^2)`: partial pooling
:cite:p:`gelman2007`. A donor of :math:`n_d` rows keeps the share :math:`n_d / (n_d + \sigma_g^2 /
\tau_g^2)` of its deviation; a new donor is expected at the population's mean
:math:`\mu(c) = a + b \cdot x(c)`, with variance :math:`\tau_g^2`. Both variances are moderated
over genes :cite:p:`smyth2004`, as few donors say little about one gene's :math:`\tau_g^2`.

What genes share is learned by SVI in Pyro :cite:p:`bingham2019`; given it, the posterior of all
else is in closed form, but for a sum over a grid of ratios :math:`\tau_g^2/\sigma_g^2`. A new
donor's expression has three terms of variance,

.. math::
    \underbrace{\mathrm{Var}(\mu(c) \mid \text{data})}_\text{parameters}
    + \underbrace{E(\tau_g^2 \mid \text{data})}_\text{donor}
    + \underbrace{E(\sigma_g^2 \mid \text{data})}_\text{noise}.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch

from exprgen._arguments import check_bool, check_positive_int
from exprgen._random import resolve_seed
from exprgen.means._base import Mean
from exprgen.means._checks import left_out_units
from exprgen.means._encoding import Encoding
from exprgen.means._hierarchical_rows import design, read
from exprgen.means._mixed import Hyperparameters, Posterior, grid
from exprgen.means._mixed_out import without_rows, without_units

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from exprgen.means._hierarchical_rows import Training

__all__ = ["DonorEffects", "HierarchicalMean"]


class DonorEffects(NamedTuple):
    """What is known of the donors of the training rows, in the units of ``y``."""

    donors: pd.Index
    """Their labels, ``(n_donors,)``; numbers if the mean was read from a file."""
    mean: np.ndarray
    """Posterior mean of their deviation from the population, ``(n_donors, n_vars)``."""
    sd: np.ndarray
    """Its posterior standard deviation, ``(n_donors, n_vars)``."""


class HierarchicalMean(Mean):
    """Linear mean with random effects of donors :cite:p:`gelman2007`; knows its own uncertainty.

    Predictions are of the population, as for a new donor. Donors are the ``groups`` that
    :meth:`fit` and :meth:`out_of_sample` are given, or a column of the table; without either,
    rows are independent and there are no effects. Weights are precisions: the noise variance of a
    row is that of its gene, divided by the row's weight.

    Parameters
    ----------
    donor_key
        Column of the table with the donor of each row, needed by :meth:`fit` and
        :meth:`out_of_sample` only; ``None`` for ``groups``.
    categorical_keys
        Columns that are labels; ``None`` for all that do not hold numbers.
    n_steps
        Steps of SVI, from 100 up; that they were too few is said in the log.
    progress_bar
        Whether fitting shows one.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of this form.
    """

    name = "hierarchical"

    def __init__(
        self,
        *,
        donor_key: str | None = None,
        categorical_keys: Sequence[str] | None = None,
        n_steps: int = 300,
        progress_bar: bool = False,
    ) -> None:
        if not isinstance(donor_key, str | None):
            raise TypeError(f"donor_key must be the name of a column or None, got {donor_key!r}.")
        self.donor_key = donor_key
        self.categorical_keys = categorical_keys
        self.n_steps = check_positive_int(n_steps, "n_steps", minimum=100)
        self.progress_bar = check_bool(progress_bar, "progress_bar")
        self._fitted: _Fitted | None = None

    def fit(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        weights: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        seed: int | None = None,
    ) -> Self:
        """Learn effects and variances; ``seed`` is not needed. See :meth:`Mean.fit`."""
        data = self._read(table, y, weights, groups)
        left_out_units(groups, data.rows.mass.numpy())
        hyper = self._learn(data)
        posterior = Posterior.of(data.sums, hyper)
        mean, variance = posterior.donors(data.sums, hyper.ratios)
        self._fitted = _Fitted(
            data.encoding,
            data.centre,
            data.scale,
            hyper,
            posterior,
            DonorEffects(
                data.donors,
                mean[: len(data.donors)].numpy() * data.scale,
                variance[: len(data.donors)].sqrt().numpy() * data.scale,
            ),
        )
        return self

    def predict(self, table: pd.DataFrame) -> np.ndarray:
        """Mean of the population, ``(n_obs, n_vars)``. See :meth:`Mean.predict`."""
        fitted = self._known()
        z = design(fitted.encoding, table)
        return fitted.centre + fitted.scale * (z @ fitted.posterior.mean()).numpy()

    def parameter_variance(self, table: pd.DataFrame) -> np.ndarray:
        """Posterior variance of :meth:`predict`, ``(n_obs, n_vars)``, squared units of ``y``.

        Of the population's mean; what a new donor adds is :attr:`donor_variance`. Residuals of
        :meth:`out_of_sample` contain it already.
        """
        fitted = self._known()
        z, at = torch.unique(design(fitted.encoding, table), dim=0, return_inverse=True)
        return fitted.scale**2 * fitted.posterior.variance(z)[at].numpy()

    @property
    def donor_variance(self) -> np.ndarray:
        """Expected variance between donors, ``(n_vars,)``, squared units of ``y``."""
        fitted = self._known()
        noise = fitted.posterior.weights * fitted.posterior.noise()
        return fitted.scale**2 * (fitted.hyper.ratios @ noise).numpy()

    @property
    def noise_variance(self) -> np.ndarray:
        """Expected variance of a row of weight 1, the mean weight, ``(n_vars,)``."""
        fitted = self._known()
        noise = fitted.posterior.weights * fitted.posterior.noise()
        return fitted.scale**2 * noise.sum(0).numpy()

    @property
    def donor_effects(self) -> DonorEffects:
        """What is known of each donor, shrunk towards the population's mean."""
        return self._known().effects

    def draw(self, table: pd.DataFrame, n_samples: int, *, seed: int | None = None) -> np.ndarray:
        """Draw population means from their posterior, ``(n_samples, n_obs, n_vars)``.

        All rows of one draw share its coefficients. Their variance over draws is
        :meth:`parameter_variance`.
        """
        fitted = self._known()
        check_positive_int(n_samples, "n_samples")
        z = design(fitted.encoding, table).numpy()
        rng = np.random.default_rng(resolve_seed(seed))
        posterior = fitted.posterior
        genes = np.arange(posterior.weights.shape[1])
        up_to = posterior.weights.cumsum(0).numpy()
        coefficients, error = posterior.coefficients.numpy(), posterior.error.numpy()
        roots = torch.linalg.cholesky(posterior.covariance).numpy()
        drawn = np.empty((n_samples, len(z), len(genes)))
        for i in range(n_samples):
            # The last sum may fall short of 1 by rounding.
            ratio = np.minimum((up_to < rng.random(len(genes))).sum(0), len(up_to) - 1)
            noise = np.sqrt(error[ratio, genes] / rng.chisquare(posterior.dof.item(), len(genes)))
            away = np.einsum("gij,gj->ig", roots[ratio], rng.normal(size=(len(genes), z.shape[1])))
            drawn[i] = z @ (coefficients[ratio, :, genes].T + noise * away)
        return fitted.centre + fitted.scale * drawn

    def out_of_sample(
        self,
        table: pd.DataFrame,
        y: np.ndarray,
        groups: np.ndarray | None = None,
        *,
        weights: np.ndarray | None = None,
        n_folds: int = 5,
        seed: int | None = None,
    ) -> np.ndarray:
        """Predict each row by the population's mean without it, or without its ``groups`` label.

        Exact given what all genes share (v, and the laws of both variances over genes), which is
        learned once, from all rows. See :meth:`Mean.out_of_sample`.
        """
        data = self._read(table, y, weights, groups)
        units = left_out_units(groups, data.rows.mass.numpy())
        hyper = self._learn(data)
        if units is None:
            predicted = without_rows(data.rows, data.sums, hyper)
        else:
            predicted = without_units(data.rows, units, data.sums, hyper)
        return data.centre + data.scale * predicted.numpy()

    def state(self) -> dict[str, Any]:
        """Scales and the posterior; donors lose their labels. See :meth:`Mean.state`."""
        if self._fitted is None:
            raise RuntimeError("HierarchicalMean has not been fitted; there is no state.")
        fitted = self._fitted
        return {
            "kind": self.name,
            "donor_key": self.donor_key,
            "n_steps": self.n_steps,
            "encoding": fitted.encoding.to_dict(),
            "centre": fitted.centre,
            "scale": fitted.scale,
            "hyper": {k: v.numpy() for k, v in fitted.hyper._asdict().items()},
            "posterior": {k: v.numpy() for k, v in fitted.posterior._asdict().items()},
            "donor_mean": fitted.effects.mean,
            "donor_sd": fitted.effects.sd,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Undo :meth:`state`; donors are numbers."""
        encoding = Encoding.from_dict(state["encoding"])
        mean = cls(
            donor_key=state["donor_key"],
            categorical_keys=encoding.schema.categorical_keys,
            n_steps=state["n_steps"],
        )
        hyper, posterior = (
            {key: torch.tensor(np.asarray(value)) for key, value in state[part].items()}
            for part in ("hyper", "posterior")
        )
        donors = pd.RangeIndex(len(state["donor_mean"]))
        mean._fitted = _Fitted(
            encoding,
            np.array(state["centre"]),
            np.array(state["scale"]),
            Hyperparameters(**hyper),
            Posterior(**posterior),
            DonorEffects(donors, np.array(state["donor_mean"]), np.array(state["donor_sd"])),
        )
        return mean

    def _known(self) -> _Fitted:
        if self._fitted is None:
            raise RuntimeError("HierarchicalMean has not been fitted: call fit(table, y) first.")
        return self._fitted

    def _read(self, *of_rows: Any) -> Training:
        return read(*of_rows, donor_key=self.donor_key, categorical_keys=self.categorical_keys)

    def _learn(self, data: Training) -> Hyperparameters:
        """What genes share, from those that vary."""
        from exprgen.means._svi import learn

        varies = data.scale > 0
        if not varies.any():
            varies[:] = True
        schema = data.encoding.schema
        widths = [*map(len, schema.labels), *(1 for _ in schema.quantities)]
        return learn(
            data.sums.of_genes(torch.from_numpy(varies)),
            torch.from_numpy(grid(data.sums.mass.numpy())),
            torch.from_numpy(np.repeat(np.arange(len(widths)), widths)),
            n_steps=self.n_steps,
            progress_bar=self.progress_bar,
        )


class _Fitted(NamedTuple):
    """What a fit leaves."""

    encoding: Encoding
    centre: np.ndarray
    scale: np.ndarray
    hyper: Hyperparameters
    posterior: Posterior
    effects: DonorEffects
