"""Milliseconds of a training step's likelihood, beside scvi-tools' on the same numbers.

Forward and backward through the decoder's last layer and the log-probability, for 128 cells and
2,000 genes with 10 % of the counts not 0 and 128 hidden units, on one thread. A dispersion per
cell is linear in 20 further numbers. Compare within one run only.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from scvi.distributions import NegativeBinomial as ScviNegativeBinomial

from exprgen.likelihoods import ContaminatedNegativeBinomial, NegativeBinomial

if TYPE_CHECKING:
    from collections.abc import Callable

N_CELLS, N_GENES, N_HIDDEN, N_STATE, N_STEPS = 128, 2000, 128, 20, 100


def main() -> None:
    """Print a line per likelihood."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(N_GENES, N_HIDDEN)).requires_grad_()
    hidden = torch.randn(N_CELLS, N_HIDDEN, requires_grad=True)
    state = torch.randn(N_CELLS, N_STATE, requires_grad=True)
    further = torch.zeros(N_GENES, N_STATE, requires_grad=True)
    counts = torch.poisson(torch.full((N_CELLS, N_GENES), 0.105))
    plain = NegativeBinomial(N_GENES)
    contaminated = ContaminatedNegativeBinomial(N_GENES)
    by_cell = ContaminatedNegativeBinomial(N_GENES, dispersion="gene-cell")

    def with_dispersion(location: torch.Tensor) -> torch.Tensor:
        return by_cell.log_prob(counts, location, (state @ further.T)[:, None])

    def scvi(location: torch.Tensor) -> torch.Tensor:
        theta = plain.log_dispersion.exp()
        return ScviNegativeBinomial(mu=location.exp(), theta=theta).log_prob(counts)

    losses: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "decoder alone": lambda location: location,
        "negative binomial": lambda location: plain.log_prob(counts, location),
        "... contaminated": lambda location: contaminated.log_prob(counts, location),
        "... and a dispersion per cell": with_dispersion,
        "scvi-tools' negative binomial": scvi,
    }
    for name, loss in losses.items():
        for step in range(N_STEPS + 5):
            if step == 5:
                start = time.process_time()
            location = (hidden @ weight.T).log_softmax(-1) + 7
            loss(location).sum().backward()
        print(f"{name:30} {1e3 * (time.process_time() - start) / N_STEPS:5.1f} ms")


if __name__ == "__main__":
    main()
