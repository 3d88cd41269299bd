"""The encoder and decoder networks: layers of linear, LayerNorm, SiLU, dropout.

LayerNorm, because a batch of one cell must train and processes must agree on every buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "Encoder", "hidden_stack"]


def hidden_stack(n_in: int, n_hidden: int, n_layers: int, dropout: float) -> nn.Sequential:
    """``n_layers`` times linear -> LayerNorm -> SiLU -> dropout."""
    layers: list[nn.Module] = []
    for width in [n_in] + [n_hidden] * (n_layers - 1):
        layers += [nn.Linear(width, n_hidden), nn.LayerNorm(n_hidden), nn.SiLU()]
        layers += [nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Expression and conditions -> mean and standard deviation of z, and a correction of depth.

    Parameters
    ----------
    n_vars, n_features, n_latent
        Genes, condition features, dimensions of z.
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
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.hidden = hidden_stack(n_vars + n_features, n_hidden, n_layers, dropout)
        self.latent = nn.Linear(n_hidden, 2 * n_latent)
        # Starts at 0: the depth posterior starts at its closed form.
        self.depth = nn.Linear(n_hidden, 2)
        nn.init.zeros_(self.depth.weight)
        nn.init.zeros_(self.depth.bias)

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z's mean and sd, ``(n_obs, n_latent)``, and the correction, ``(n_obs, 2)``."""
        h = self.hidden(torch.cat([torch.log1p(x), features], dim=1))
        mean, log_sd = self.latent(h).chunk(2, dim=1)
        return mean, log_sd.clamp(-8, 4).exp(), self.depth(h)


class Decoder(nn.Module):
    """z, conditions and batch -> one number per gene.

    Conditions and batch enter twice, before the hidden layers and as an offset per gene: the
    second lets every label start from its own mean profile.

    Parameters
    ----------
    n_latent, n_inputs, n_vars
        Dimensions of z, of condition features and batch together, and genes.
    n_hidden, n_layers, dropout
        Shape of the hidden layers.
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
    ) -> None:
        super().__init__()
        self.hidden = hidden_stack(n_latent + n_inputs, n_hidden, n_layers, dropout)
        self.output = nn.Linear(n_hidden + n_inputs, n_vars)
        with torch.no_grad():
            self.output.weight[:, n_hidden:] = 0

    def forward(self, z: Tensor, inputs: Tensor) -> Tensor:
        """Return ``(n_obs, n_vars)``."""
        h = self.hidden(torch.cat([z, inputs], dim=1))
        return self.output(torch.cat([h, inputs], dim=1))
