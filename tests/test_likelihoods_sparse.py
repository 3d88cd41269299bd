"""The parts of sparse log-probabilities, and their written-out gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special
from torch.nn.functional import softplus

from exprgen.likelihoods import ContaminatedNegativeBinomial, negative_binomial_log_prob
from exprgen.likelihoods._sparse import Nonzero, log_gamma, sum_at_zero


def counts_and_parameters(dispersion: str, dtype: torch.dtype = torch.float64):
    noise = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((5, 7), 0.8), generator=noise).to(dtype)
    log_mean = torch.randn(5, 7, generator=noise).to(dtype)
    shape = (7,) if dispersion == "gene" else (5, 7)
    log_theta = 2 * torch.randn(shape, generator=noise).to(dtype)
    return x, log_mean, log_theta


def test_nonzero_entries_are_those_of_the_matrix() -> None:
    x, log_mean, log_theta = counts_and_parameters("gene")
    nonzero = Nonzero.of(x)
    rows, genes = np.nonzero(x.numpy())
    np.testing.assert_array_equal(nonzero.rows, rows)
    np.testing.assert_array_equal(nonzero.genes, genes)
    np.testing.assert_array_equal(nonzero.counts, x.numpy()[rows, genes])
    np.testing.assert_array_equal(nonzero.of_gene_or_cell(log_mean), log_mean.numpy()[rows, genes])
    np.testing.assert_array_equal(nonzero.of_gene_or_cell(log_theta), log_theta.numpy()[genes])
    np.testing.assert_allclose(
        nonzero.add_to_rows(torch.zeros(5).double(), nonzero.counts), x.sum(1)
    )


def test_a_matrix_that_is_not_contiguous_is_read_in_its_own_order() -> None:
    x = counts_and_parameters("gene")[0]
    of_transposed = Nonzero.of(x.T.contiguous().T)
    np.testing.assert_array_equal(of_transposed.counts, Nonzero.of(x).counts)


def test_a_matrix_of_zeros_has_no_entries() -> None:
    x = torch.zeros(2, 3)
    value = negative_binomial_log_prob(x, torch.zeros(2, 3), torch.zeros(3))
    np.testing.assert_allclose(value, -3 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
def test_zeros_and_gradients(dispersion: str) -> None:
    x, log_mean, log_theta = counts_and_parameters(dispersion)
    expected = -(log_theta.exp() * softplus(log_mean - log_theta)).sum(-1)
    torch.testing.assert_close(sum_at_zero(log_mean, log_theta), expected)
    inputs = log_mean.requires_grad_(), log_theta.requires_grad_()
    assert torch.autograd.gradcheck(sum_at_zero, inputs)
    assert torch.autograd.gradcheck(lambda m, t: negative_binomial_log_prob(x, m, t), inputs)


@pytest.mark.parametrize("dispersion", ["gene", "gene-cell"])
def test_gradients_of_the_contaminated_likelihood(dispersion: str) -> None:
    x, log_mean, log_theta = counts_and_parameters(dispersion)
    likelihood = ContaminatedNegativeBinomial(7, dispersion=dispersion).double()

    def log_prob(log_mean: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
        if dispersion == "gene":
            likelihood.log_dispersion.data.copy_(log_theta)
            return likelihood.log_prob(x, log_mean)
        return likelihood.log_prob(x, log_mean, log_theta.unsqueeze(1))

    if dispersion == "gene-cell":
        inputs = log_mean.requires_grad_(), log_theta.requires_grad_()
        assert torch.autograd.gradcheck(log_prob, inputs)
    else:
        log_prob(log_mean, log_theta).sum().backward()
        step = 1e-6
        for gene in range(7):
            shift = torch.zeros(7).double()
            shift[gene] = step
            with torch.no_grad():
                up, down = (
                    log_prob(log_mean, log_theta + shift),
                    log_prob(log_mean, log_theta - shift),
                )
            slope = float((up - down).sum()) / (2 * step)
            assert float(likelihood.log_dispersion.grad[gene]) == pytest.approx(slope, abs=1e-5)


def test_log_gamma_and_its_gradient_over_ten_decades() -> None:
    y = torch.logspace(-4, 6, 400, dtype=torch.float64, requires_grad=True)
    value = log_gamma(y)
    np.testing.assert_allclose(value.detach(), special.gammaln(y.detach().numpy()), rtol=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), y)
    np.testing.assert_allclose(gradient, special.digamma(y.detach().numpy()), rtol=1e-7, atol=3e-9)


def test_extreme_parameters_stay_finite_in_single_precision() -> None:
    x = torch.tensor([[0.0, 1.0, 900.0]])
    for log_mean in (-30.0, 0.0, 12.0):
        for log_theta in (-12.0, 0.0, 20.0):
            m = torch.full((1, 3), log_mean, requires_grad=True)
            t = torch.full((3,), log_theta, requires_grad=True)
            value = negative_binomial_log_prob(x, m, t)
            value.sum().backward()
            assert torch.isfinite(value).all()
            assert torch.isfinite(m.grad).all()
            assert torch.isfinite(t.grad).all()
