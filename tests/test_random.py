"""Seeds mean what they say, and nobody else's random numbers are used up."""

from __future__ import annotations

import random

import numpy as np
import pytest
import scvi
import torch

from exprgen._random import generator, isolated, resolve_seed


def _next_numbers():
    return torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()


def _states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_a_generator_depends_on_its_whole_key_alone():
    keys = [(0,), (0, 0), (0, 1), (1, 0), (10,), (1, 0, 0), (2**40, 3)]
    draws = [torch.rand(4, generator=generator(*key)).tolist() for key in keys]
    assert len({tuple(d) for d in draws}) == len(keys)
    torch.manual_seed(5)
    assert [torch.rand(4, generator=generator(*key)).tolist() for key in keys] == draws


def test_generators_of_neighbouring_keys_are_uncorrelated():
    """Blocks are numbered 0, 1, 2 …: their noise must not resemble each other's."""
    draws = torch.stack([torch.randn(20_000, generator=generator(0, k)) for k in range(20)])
    correlation = torch.corrcoef(draws) - torch.eye(20)
    assert correlation.abs().max() < 4.5 / np.sqrt(20_000)


def test_isolated_seeds_inside_and_restores_outside():
    with isolated(3):
        first = _next_numbers()
    before = _states()
    with isolated(3):
        again = _next_numbers()
    assert _states() == before
    assert first == again
    with isolated(4):
        assert _next_numbers() != first


def test_isolated_restores_after_an_error():
    before = _states()

    def fail():
        with isolated(0):
            _next_numbers()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert _states() == before


def test_a_missing_seed_is_the_hosts_or_fresh(monkeypatch):
    monkeypatch.setattr(type(scvi.settings), "seed", 7, raising=False)
    assert resolve_seed(None) == 7
    assert resolve_seed(3) == 3
    monkeypatch.setattr(type(scvi.settings), "seed", None)
    before = _states()
    drawn = {resolve_seed(None) for _ in range(20)}
    assert len(drawn) == 20
    assert all(type(seed) is int and seed >= 0 for seed in drawn)
    assert _states() == before


@pytest.mark.parametrize(
    ("seed", "error"),
    [(True, TypeError), (1.0, TypeError), ("1", TypeError), (-1, ValueError), (2**63, ValueError)],
)
def test_what_is_no_seed_is_refused(seed, error):
    with pytest.raises(error, match="seed must"):
        resolve_seed(seed)


def test_numpy_integers_are_seeds():
    seed = resolve_seed(np.int64(5))
    assert (seed, type(seed)) == (5, int)


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_large_seeds_work_everywhere(seed):
    assert resolve_seed(seed) == seed
    with isolated(seed):
        _next_numbers()
    torch.rand(1, generator=generator(seed, 1))
