r"""A space and a density, trained as one: the evidence lower bound and its importance weighting.

.. math::
    \log p(x|c) \ge \mathbb E_q \log \frac1K \sum_{k=1}^K
    \frac{p(x \mid y_k, c)\, p(y_k \mid c)}{q(y_k \mid x, c)}, \qquad y_k \sim q(y \mid x, c).

K = 1 is the evidence lower bound (ELBO) that training maximises :cite:p:`kingma2014`; the bound
tightens as K grows :cite:p:`burda2016`. The module knows tensors only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from scvi.module.base import BaseModuleClass, LossOutput, auto_move_data
from torch import Tensor

if TYPE_CHECKING:
    from exprgen.densities import ConditionalDensity
    from exprgen.likelihoods._gaussian import Gaussian
    from exprgen.spaces import Autoencoder, Decoded, Space

__all__ = ["ExpressionModule"]


class ExpressionModule(BaseModuleClass):
    """p(x | c) from a space and a conditional density of its y.

    Parameters
    ----------
    space
        Encodes expression to y and decodes y to a likelihood.
    density
        p(y | c).
    prior
        The density that the space is trained with, where that is another one.
    """

    def __init__(
        self, space: Space, density: ConditionalDensity, prior: ConditionalDensity | None = None
    ) -> None:
        super().__init__()
        self.space = space
        self.density = density
        self.prior = prior
        # Filled from the training split, once; kept with the weights.
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))

    @property
    def device(self) -> torch.device:
        """Where the module is; a buffer says it, for there may be no parameter."""
        return cast("Tensor", self.initialized).device

    @property
    def has_density_stage(self) -> bool:
        """Whether the density is trained by itself, after the autoencoder or without one."""
        if self.prior is not None:
            return True
        return not self.space.is_learned and any(True for _ in self.density.parameters())

    @property
    def autoencoder_prior(self) -> ConditionalDensity:
        """The density that the space is trained with; its means have a closed form."""
        return self.density if self.prior is None else self.prior

    # The four steps of scvi-tools' contract ------------------------------------------------

    def _get_inference_input(
        self, tensors: dict[str, Tensor], full_forward_pass: bool = True
    ) -> dict[str, Tensor]:
        return {key: tensors[key] for key in ("x", "c", "library")}

    @auto_move_data
    def inference(
        self, x: Tensor, c: Tensor, library: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Posterior of y and one draw of it, each ``(n_obs, n_dims)``."""
        mean, sd = self.space.encode(x, c, library)
        return {"mean": mean, "sd": sd, "y": self.space.draw(mean, sd, generator)}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"y": inference_outputs["y"], "c": tensors["c"]}

    @auto_move_data
    def generative(
        self, y: Tensor, c: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Decoded]:
        """Location of the likelihood, ``(n_obs, n_vars)``, and its further heads."""
        donors = self.space.donors
        effect = None if donors is None else donors(self.space.features.donor(c), generator)
        return {"decoded": self.space.decode(y, c, effect)}

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Tensor],
        generative_outputs: dict[str, Decoded],
        *,
        kl_weight: float = 1.0,
        beta: float = 1.0,
        n_obs_training: int = 1,
    ) -> LossOutput:
        """Negative ELBO, nats per cell; the KL terms weighted by ``kl_weight`` while warming up.

        ``beta`` multiplies the weight of the KL divergence of y, and of nothing else
        :cite:p:`higgins2017`.
        The priors of effects belong to the whole training set of ``n_obs_training`` cells.
        """
        features = self.space.density_features(tensors["c"])
        x, likelihood = tensors["x"], self.space.likelihood
        if not likelihood.is_count:
            # One value of a validation cell below all of training must not make epochs alike.
            x = torch.maximum(x, torch.as_tensor(likelihood.lower).to(x))
        reconstruction = -likelihood.log_prob(x, *generative_outputs["decoded"])
        kl = self.autoencoder_prior.kl(**inference_outputs, features=features)
        once = cast("Autoencoder", self.space).prior_cost(kl_weight) / n_obs_training
        loss = (reconstruction + kl_weight * beta * kl).mean() + once
        return LossOutput(loss=loss, reconstruction_loss=reconstruction, kl_local=kl)

    # What a trained module answers ---------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        c: Tensor,
        generator: torch.Generator,
        *,
        log_depth: Tensor | None = None,
        effect: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Decoded]:
        """Draw y and what the likelihood reads from p(· | c).

        Parameters
        ----------
        c
            Encoded conditions, ``(n_obs, width)``.
        generator
            CPU generator of all noise.
        log_depth
            Fixed log depth, ``(n_obs,)``; drawn jointly with z where ``None``.
        effect
            Donors' effects, ``(n_obs, n_vars)``.
        **options
            Of how the density draws.

        Returns
        -------
        y ``(n_obs, n_dims)`` and the decoder's output.

        Raises
        ------
        ValueError
            If depth is to be fixed where there is none.
        """
        last = None if log_depth is None else self.space.standardised_depth(log_depth, c)
        y = self.density.sample(self.space.density_features(c), generator, last, **options)
        if log_depth is None:
            y = self.space.within_reach(y, c)
            return y, self.space.decode(y, c, effect)
        return y, self.space.at_depth(self.space.decode(y, c, effect), log_depth)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        c: Tensor,
        library: Tensor,
        *,
        n_samples: int,
        generator: torch.Generator,
        given_depth: bool = False,
        interval: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Importance-weighted *bound* on log p(x | c), ``(n_obs,)``, nats per cell, in float64.

        Where depth is a size factor the density of depth is divided out: log p(x | depth, c).
        So it is with ``given_depth``, at the observed total, to compare with models that are
        defined given depth only. Donors enter at their posterior mean.

        With ``interval``, bounds ``(n_obs, n_vars)`` around continuous ``x``, it is the
        log-probability of lying between them.
        """
        space, features = self.space, self.space.density_features(c)
        mean, sd = space.encode(x, c, library)
        conditional = given_depth or (space.depth is not None and space.depth.observed)
        if conditional:
            mean[:, -1] = space.standardised_depth(library.clamp(min=0.5).log(), c)
            sd[:, -1] = 0
        effect = space.known_effect(c)
        total = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        for _ in range(n_samples):
            y = space.draw(mean, sd, generator)
            if interval is None:
                log_p = space.log_prob(x, y, c, effect)
            else:
                decoded = space.decode(y, c, effect).double()
                log_p = cast("Gaussian", space.likelihood).log_interval(*interval, *decoded)
            log_p = log_p + self.density.log_prob(y, features).double()
            total = torch.logaddexp(total, log_p - space.log_posterior(y, mean, sd))
        value = total - math.log(n_samples)
        if conditional:
            value = value - self.density.log_prob_last(mean[:, -1], features).double()
        return value

    @torch.no_grad()
    def latent_surprise(self, x: Tensor, c: Tensor, library: Tensor) -> Tensor:
        """Log q(z | x, c) / p(z | depth, c) at the posterior mean, ``(n_obs,)``, nats, float64.

        Under the prior that the space was trained with, for which it is *exact*.
        """
        space, features = self.space, self.space.density_features(c)
        mean, sd = space.encode(x, c, library)
        log_p = self.autoencoder_prior.log_prob(mean, features).double()
        if space.depth is not None:
            last = mean[:, -1]
            log_p = log_p - self.autoencoder_prior.log_prob_last(last, features).double()
        log_sd = sd[:, : space.n_latent].double().log().sum(-1)
        return -log_sd - 0.5 * space.n_latent * math.log(2 * math.pi) - log_p

    @torch.no_grad()
    def represent(self, x: Tensor, c: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sd of q(z | x, c), both ``(n_obs, n_latent)``."""
        return self.space.represent(x, c, library)
