"""The encoder and decoder networks: layers of linear, LayerNorm, SiLU, dropout.

LayerNorm, because a batch of one cell must train and processes must agree on every buffer. The
two matrices that grow with the number of genes, first of the encoder and last of the decoder, have
most of the weights: a normal prior, which the training set pays once, keeps a few hundred cells
from teaching them noise, and gives way as cells grow in number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "Encoder", "Offset", "hidden_stack"]

# Half of all effects are smaller than this under their prior, in units of the decoder's output:
# natural logarithms of counts, or standard deviations of continuous values.
_TYPICAL_EFFECT = 0.25


def hidden_stack(n_in: int, n_hidden: int, n_layers: int, dropout: float) -> nn.Sequential:
    """``n_layers`` times linear -> LayerNorm -> SiLU -> dropout."""
    layers: list[nn.Module] = []
    for width in [n_in] + [n_hidden] * (n_layers - 1):
        layers += [nn.Linear(width, n_hidden), nn.LayerNorm(n_hidden), nn.SiLU()]
        layers += [nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def _normal_cost(weight: Tensor) -> Tensor:
    """Negative log-prior of weights with variance 1 / n_in, up to a constant, nats."""
    return 0.5 * weight.shape[1] * weight.square().sum()


class Encoder(nn.Module):
    """Expression and conditions -> mean and standard deviation of z, and further numbers.

    Parameters
    ----------
    n_vars, n_features, n_latent
        Genes, condition features, dimensions of z.
    n_corrections
        Further numbers per cell, which start at 0: what a closed-form posterior is corrected by.
    n_hidden, n_layers, dropout
        Shape of the hidden layers.
    """

    def __init__(
        self,
        n_vars: int,
        n_features: int,
        n_latent: int,
        *,
        n_hidden: int,
        n_layers: int,
        dropout: float,
        n_corrections: int = 0,
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.hidden = hidden_stack(n_vars + n_features, n_hidden, n_layers, dropout)
        self.latent = nn.Linear(n_hidden, 2 * n_latent)
        self.n_corrections = n_corrections
        if n_corrections:
            self.depth = nn.Linear(n_hidden, n_corrections)
            nn.init.zeros_(self.depth.weight)
            nn.init.zeros_(self.depth.bias)

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z's mean and sd, ``(n_obs, n_latent)``, and ``(n_obs, n_corrections)``.

        ``x`` is expression on a scale that networks read, ``(n_obs, n_vars)``.
        """
        h = self.hidden(torch.cat([x, features], dim=1))
        mean, log_sd = self.latent(h).chunk(2, dim=1)
        correction = self.depth(h) if self.n_corrections else h[:, :0]
        return mean, log_sd.clamp(-8, 4).exp(), correction

    def cost(self) -> Tensor:
        """Negative log-prior of the weights that read the genes, nats; paid once."""
        return _normal_cost(self.hidden.get_parameter("0.weight"))


class Offset(nn.Linear):
    """Effects of conditions and batch on each gene, ``(n_vars, n_inputs)``; they start at 0.

    Their prior is a Cauchy law :cite:p:`zhu2019`: small effects, which are mostly noise, are
    shrunk, while those of marker genes are left as they are.
    """

    def __init__(self, n_inputs: int, n_vars: int) -> None:
        super().__init__(n_inputs, n_vars, bias=False)
        nn.init.zeros_(self.weight)

    def cost(self) -> Tensor:
        """Negative log-prior of all effects up to a constant, nats; paid once."""
        return (self.weight / _TYPICAL_EFFECT).square().log1p().sum()


class Decoder(nn.Module):
    """z, conditions and batch -> one number per gene, or several.

    Conditions and batch enter twice, before the hidden layers and as an offset per gene: the
    second lets every label start from its own mean profile, so that the few cells of a rare one
    need not teach the network its marker genes.

    Parameters
    ----------
    n_latent, n_inputs, n_vars
        Dimensions of z, of condition features and batch together, and genes.
    n_hidden, n_layers, dropout
        Shape of the hidden layers.
    n_heads
        Numbers per gene. All but the first are linear in z, conditions and batch, which is cheaper
        than a second output layer and generalises better, and start at 0, so that a model starts
        where that with one head does.
    """

    def __init__(
        self,
        n_latent: int,
        n_inputs: int,
        n_vars: int,
        *,
        n_hidden: int,
        n_layers: int,
        dropout: float,
        n_heads: int = 1,
    ) -> None:
        super().__init__()
        self.hidden = hidden_stack(n_latent + n_inputs, n_hidden, n_layers, dropout)
        self.output = nn.Linear(n_hidden, n_vars)
        self.offset = Offset(n_inputs, n_vars)
        self.extra: nn.Sequential | None = None
        if n_heads > 1:
            linear = nn.Linear(n_latent + n_inputs, (n_heads - 1) * n_vars)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.extra = nn.Sequential(linear, nn.Unflatten(1, (n_heads - 1, n_vars)))

    def forward(self, z: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the first head, ``(n_obs, n_vars)``, and ``(n_obs, n_heads - 1, n_vars)``."""
        state = torch.cat([z, inputs], dim=1)
        first = self.output(self.hidden(state)) + self.offset(inputs)
        return first, None if self.extra is None else self.extra(state)

    def cost(self) -> Tensor:
        """Negative log-prior of effects and of the weights that write the genes; paid once."""
        return self.offset.cost() + _normal_cost(self.output.weight)
