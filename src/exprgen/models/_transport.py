r"""What a cell's y means under other conditions: a shift, or the response of its nearest kin.

With :math:`\mu(c) = E[z \mid c]`, a cell at :math:`z = \mu(c) + \delta` moves to
:math:`\mu(c') + \delta`: it keeps its place relative to its condition's mean, and is decoded
under c′. Where the labels of c′ were never seen together, neither :math:`\mu(c')` nor the decoder
was taught how these cells respond, and what networks say is little more than the average response
of all the others. The response is then borrowed from *stand-ins*: label combinations s that share
the labels that change, and were seen both before (c_s) and after the change (c_s′),

.. math::
    T\rho'(z) = T\rho\big(\mu(c) + \delta, c\big) + \sum_s w_s\,\big[
    T\rho\big(\mu(c_s') + \delta, c_s'\big) - T\rho\big(\mu(c_s) + \delta, c_s\big)\big],

a difference in differences on the scale T of :meth:`~exprgen.spaces.Autoencoder.to_effects`. A
combination that was seen, as its own stand-in with weight 1, gives the shift above.

Kin respond alike: weights are those of inverse-distance interpolation :cite:p:`shepard1968`,
:math:`w_s \propto d_s^{-4}`, with :math:`d_s` the root-mean-square difference of
:math:`T\rho(\mu(c), c)` between the cell's own combination and s before the change. With a near
relative this is its response, with none the average one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from exprgen.densities import Path
from exprgen.spaces import Decoded, GeneSpace, ResidualSpace

if TYPE_CHECKING:
    from collections.abc import Callable

    from exprgen.module import ExpressionModule
    from exprgen.spaces import Autoencoder

__all__ = ["decoder_under", "stand_ins"]

# Of the squared distances.
_POWER = 2
# Further relatives would weigh little, and each costs two runs of the decoder per draw.
_MOST_STAND_INS = 4


def stand_ins(seen: np.ndarray, old: np.ndarray, new: np.ndarray) -> list[np.ndarray]:
    """Label combinations that show what changing ``old`` to ``new`` does.

    Parameters
    ----------
    seen
        Codes of the combinations in training, ``(n_seen, n_labels)``.
    old, new
        One combination each, ``(n_labels,)``.

    Returns
    -------
    Combinations seen with the labels of ``old`` that change and, in their place, with those of
    ``new``. None where ``new`` was seen itself.
    """
    known = {tuple(row) for row in seen.tolist()}
    if tuple(new.tolist()) in known:
        return []
    changed = old != new
    before = [np.array(row) for row in sorted(known) if (np.array(row) == old)[changed].all()]
    return [row for row in before if tuple(np.where(changed, new, row).tolist()) in known]


def decoder_under(
    module: ExpressionModule, x: Tensor, c: Tensor, new_c: Tensor, seen: np.ndarray
) -> Callable[[Tensor, Tensor | None], Decoded]:
    """What y and log depth of cells with conditions c mean under others.

    Parameters
    ----------
    module
        Of a trained model.
    x
        Cells' expression, ``(n_obs, n_vars)``.
    c, new_c
        Their encoded conditions and others, ``(n_obs, width)``.
    seen
        As for :func:`stand_ins`.

    Returns
    -------
    Function of y ``(n_obs, n_dims)`` and the log depth ``(n_obs,)``, if there is one.
    """
    space, density = module.space, module.density
    old, new = space.density_features(c), space.density_features(new_c)
    if isinstance(space, GeneSpace) and isinstance(density, Path):
        # The path knows no means; what it makes of labels not seen together is the network's.
        return lambda y, _: space.decode(density.transport(y, old, new), new_c)
    if isinstance(space, ResidualSpace):
        # The predictor says what changes; a cell keeps its place in the law of its residuals.
        held = space.held(x, c, new_c)
        return lambda y, _: held
    latent, effect = cast("Autoencoder", space), space.known_effect(new_c)
    prior = module.autoencoder_prior
    shift = prior.mean(new) - prior.mean(old)
    # What a predictor says of combinations never seen is in its mean.
    relatives = [] if space.mean is not None else _relatives(module, c, new_c, seen)

    def decode(y: Tensor, log_depth: Tensor | None) -> Decoded:
        decoded = latent.decode_at((y + shift)[:, : latent.n_latent], log_depth, new_c, effect)
        for relative in relatives:
            rows = relative.rows
            own_depth = None if log_depth is None else log_depth[rows]
            own_effect = None if effect is None else effect[rows]
            borrowed = relative.decode(latent, y[rows], c[rows])
            moved = latent.moved(borrowed, own_depth, own_effect)
            decoded.location[rows] = moved.location
            if decoded.extra is not None and moved.extra is not None:
                decoded.extra[rows] = moved.extra
        return decoded

    return decode


class _Response(NamedTuple):
    """Conditions of a stand-in before and after, with its weight and what moves y there."""

    weight: Tensor
    before: Tensor
    after: Tensor
    to_before: Tensor
    to_after: Tensor


class _Relatives(NamedTuple):
    """Cells of one combination, and those whose response they borrow."""

    rows: Tensor
    responses: list[_Response]

    def decode(self, space: Autoencoder, y: Tensor, c: Tensor) -> Decoded:
        """What the likelihood reads per unit of depth, given the y of these cells."""

        def decoded(y: Tensor, c: Tensor) -> Decoded:
            return space.decode_at(y[:, : space.n_latent], None, c)

        own = decoded(y, c)
        location, extra = space.to_effects(own.location), own.extra
        for weight, before, after, to_before, to_after in self.responses:
            first, second = decoded(y + to_before, before), decoded(y + to_after, after)
            difference = space.to_effects(second.location) - space.to_effects(first.location)
            location = location + weight[:, None] * difference
            if extra is not None and first.extra is not None and second.extra is not None:
                extra = extra + weight[:, None, None] * (second.extra - first.extra)
        return Decoded(space.from_effects(location), extra)


def _relatives(
    module: ExpressionModule, c: Tensor, new_c: Tensor, seen: np.ndarray
) -> list[_Relatives]:
    """The cells that go to combinations never seen, and whose responses stand in for theirs."""
    n_labels = seen.shape[1]
    space, prior = cast("Autoencoder", module.space), module.autoencoder_prior
    pairs = torch.cat([c[:, :n_labels], new_c[:, :n_labels]], 1).cpu().numpy().astype(np.int64)
    kinds, kind = np.unique(pairs, axis=0, return_inverse=True)

    def mean(c: Tensor) -> Tensor:
        return prior.mean(space.density_features(c))

    def profile(c: Tensor) -> Tensor:
        decoded = space.decode_at(mean(c)[:, : space.n_latent], None, c)
        return space.to_effects(decoded.location)

    result = []
    for number, labels in enumerate(kinds):
        old, new = labels[:n_labels], labels[n_labels:]
        found = stand_ins(seen, old, new)
        if not found:
            continue
        rows = torch.from_numpy(np.flatnonzero(kind.ravel() == number)).to(c.device)
        own, asked = c[rows], new_c[rows]
        before, after = [], []
        for row in found:
            # Numbers, batch and donor are the cell's own.
            codes = torch.from_numpy(np.stack([row, np.where(old != new, new, row)])).to(c)
            before.append(torch.cat([codes[:1].expand(len(rows), -1), own[:, n_labels:]], 1))
            after.append(torch.cat([codes[1:].expand(len(rows), -1), asked[:, n_labels:]], 1))
        at = profile(own)
        distance = torch.stack([(profile(one) - at).square().mean(1) for one in before])
        weights = _weights(distance)
        nearest = weights.mean(1).argsort(descending=True)[:_MOST_STAND_INS].tolist()
        weights = weights / weights[nearest].sum(0)
        centre = mean(own)
        result.append(
            _Relatives(
                rows,
                [
                    _Response(
                        weights[s],
                        before[s],
                        after[s],
                        mean(before[s]) - centre,
                        mean(after[s]) - centre,
                    )
                    for s in nearest
                ],
            )
        )
    return result


def _weights(distance: Tensor) -> Tensor:
    """Weights ``(n_stand_ins, n_obs)`` from squared distances; they add up to 1."""
    # Relative to the least, so that no power overflows; two at distance 0 share.
    least = distance.min(0).values.clamp(min=1e-8)
    closeness = (distance.clamp(min=1e-8) / least) ** -_POWER
    return closeness / closeness.sum(0)
