"""Factors against the formula and against trying every exponent by hand; the error against activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.techniques.quantization.awq_math import best_factors, factors, output_error
from worker.techniques.quantization.grid_math import whole_range


def inputs() -> Tensor:
    """[channels, products], a few channels far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(32, 400, generator=generator)
    return given * torch.logspace(-1, 1.5, 32)[torch.randperm(32, generator=generator)].unsqueeze(1)


def rounded(weight: Tensor) -> Tensor:
    return whole_range(weight, 3, symmetric=False).rounded(weight)


@pytest.mark.parametrize("exponent", [0.0, 0.3, 1.0])
def test_factors_are_powers_of_the_size(exponent: float) -> None:
    given = inputs()
    found = factors(given @ given.T, exponent)
    size = np.sqrt((given.double().numpy() ** 2).sum(1)) ** exponent
    np.testing.assert_allclose(found, size / np.sqrt(size.max() * size.min()), rtol=1e-5)
    assert exponent or torch.equal(found, torch.ones(32))


def test_a_channel_of_zeros_gets_a_factor_all_the_same() -> None:
    given = inputs()
    given[3] = 0.0
    assert bool((factors(given @ given.T, 0.5) > 0).all())


def test_the_error_is_that_of_the_outputs() -> None:
    given, change = inputs(), torch.randn(6, 32)
    expected = float(((change @ given).double() ** 2).sum())
    assert output_error(change, given @ given.T) == pytest.approx(expected, rel=1e-4)


def test_the_best_exponent_is_found_and_helps() -> None:
    given = inputs()
    moments = given @ given.T
    torch.manual_seed(1)
    weights = [torch.randn(16, 32), torch.randn(8, 32)]
    found, exponent = best_factors(weights, moments, lambda _, scaled: rounded(scaled))

    def loss(own: Tensor) -> float:
        return sum(float((((rounded(w * own) / own - w) @ given).double() ** 2).sum()) for w in weights)

    tried = [loss(factors(moments, step / 20)) for step in range(20)]
    assert torch.equal(found, factors(moments, exponent))
    assert loss(found) < 1.02 * min(tried)
    assert loss(found) < 0.8 * loss(torch.ones(32))


def test_where_all_channels_carry_the_same_nothing_is_moved() -> None:
    weights = [torch.randn(16, 32)]
    found, _ = best_factors(weights, torch.eye(32), lambda _, scaled: rounded(scaled))
    assert torch.equal(found, torch.ones(32))
