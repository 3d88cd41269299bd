"""Couplings: the least cost there is, and no noise that gives its condition away."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import ot
import pytest
import torch

from exprgen.couplings import COUPLINGS, independent, labels_and_numbers, optimal_transport


def _draw(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y, noise = (torch.randn(n, d, generator=generator) for _ in range(2))
    return y + 1, noise


def _none(n):
    return torch.zeros(n, 0)


def _cost(y, noise):
    return float((y - noise).square().sum())


def _rows_of(matched, noise):
    """The row of the noise that each matched row is."""
    same = (matched[:, None] == noise[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def test_its_cost_is_the_least_of_all_permutations():
    y, noise = _draw(6, 2)
    matched = optimal_transport(y, noise, torch.zeros(6), _none(6))
    least = min(_cost(y, noise[list(order)]) for order in permutations(range(6)))
    assert _cost(y, matched) == pytest.approx(least, rel=1e-6)
    assert least < 0.9 * _cost(y, noise)


def test_its_cost_is_that_of_the_plan_and_no_match_crosses_labels():
    y, noise = _draw(120, 5)
    labels = torch.randint(4, (120,), generator=torch.Generator().manual_seed(1))
    matched = optimal_transport(y, noise, labels, _none(120))
    rows = _rows_of(matched, noise)
    assert torch.equal(rows.sort()[0], torch.arange(120))
    assert torch.equal(labels[rows], labels)
    for label in range(4):
        its = labels == label
        distances = torch.cdist(y[its].double(), noise[its].double()).square().numpy()
        plan_cost = ot.emd2([], [], distances) * int(its.sum())
        assert _cost(y[its], matched[its]) == pytest.approx(plan_cost, rel=1e-5)
    free = optimal_transport(y, noise, torch.zeros(120), _none(120))
    assert _cost(y, free) < _cost(y, matched) < _cost(y, noise)


def test_a_row_alone_keeps_its_noise_and_independent_changes_nothing():
    y, noise = _draw(20, 3)
    assert torch.equal(optimal_transport(y, noise, torch.arange(20), _none(20)), noise)
    assert torch.equal(independent(y, noise, torch.zeros(20), _none(20)), noise)
    assert optimal_transport(y[:0], noise[:0], torch.zeros(0), _none(0)).shape == (0, 3)
    assert set(COUPLINGS) == {"independent", "optimal_transport"}


def test_noise_nearly_forgets_a_number_that_y_depends_on():
    """Without the penalty the noise is a stand-in for the number, and draws given it are wrong."""
    generator = torch.Generator().manual_seed(0)
    numbers, with_penalty, without, costs = [], [], [], []
    for _ in range(8):
        number = torch.randn(256, 1, generator=generator)
        y = 0.6 * number + 0.8 * torch.randn(256, 10, generator=generator)
        noise = torch.randn(256, 10, generator=generator)
        numbers.append(number)
        with_penalty.append(optimal_transport(y, noise, torch.zeros(256), number))
        without.append(optimal_transport(y, noise, torch.zeros(256), _none(256)))
        costs.append([_cost(y, noise), _cost(y, with_penalty[-1])])

    def correlation(noises):
        both = torch.cat([torch.cat(numbers), torch.cat(noises)], 1)
        return torch.corrcoef(both.T)[0, 1:].mean()

    assert correlation(without) > 0.2
    assert abs(correlation(with_penalty)) < 0.03
    before, after = np.mean(costs, axis=0)
    assert after < 0.65 * before


def test_labels_are_the_columns_of_zeros_and_ones():
    features = torch.tensor(
        [[1, 1, 0, 0.3], [1, 0, 1, 0.3], [1, 1, 0, -2.0], [1, 1, 0, 0.3]], dtype=torch.float32
    )
    labels, numbers = labels_and_numbers(features)
    assert labels[0] == labels[2] == labels[3] != labels[1]
    assert torch.equal(numbers, features[:, 3:])
    assert labels_and_numbers(features[:, :1])[1].shape == (4, 0)
