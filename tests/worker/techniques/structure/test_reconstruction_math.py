"""What is fitted is what NumPy's least squares finds, and no layer becomes worse on samples that are held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.techniques.structure.reconstruction_math import Affine, Products, error, fitted, nearest


def seen(x: Tensor, y: Tensor) -> Products:
    moments = Products()
    for rows, own in zip(x.split(70), y.split(70), strict=True):
        moments.see(rows, own)
    return moments


def data(rows: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 6, generator=generator) + 0.5
    truth = torch.arange(18.0).reshape(6, 3) / 10
    return x, x @ truth + 2 + 0.1 * torch.randn(rows, 3, generator=generator)


def start(*, bias: bool) -> Affine:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(3) if bias else None


@pytest.mark.parametrize("bias", [True, False])
def test_without_damping_it_is_the_least_squares_of_numpy(bias: bool) -> None:
    x, y = data()
    weight, offset = fitted(seen(x, y), start(bias=bias), 0.0)
    columns = np.hstack([x.numpy(), np.ones((len(x), 1))]) if bias else x.numpy()
    expected = np.linalg.lstsq(columns.astype(np.float64), y.numpy().astype(np.float64), rcond=None)[0]
    assert np.allclose(weight.numpy(), expected[:6].T, atol=1e-4)
    assert (offset is None) != bias
    if offset is not None:
        assert np.allclose(offset.numpy(), expected[6], atol=1e-4)


def test_damping_holds_it_to_what_it_was_as_rows_of_a_larger_problem_do() -> None:
    x, y = data()
    now = start(bias=False)
    weight, _ = fitted(seen(x, y), now, 0.1)
    ridge = np.sqrt(0.1 * np.mean(x.numpy() ** 2) * len(x))
    columns = np.vstack([x.numpy(), ridge * np.eye(6)])
    expected = np.linalg.lstsq(columns, np.vstack([y.numpy(), ridge * now[0].numpy().T]), rcond=None)[0]
    assert np.allclose(weight.numpy(), expected.T, atol=1e-4)


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    x, y = data()
    x[:, 2] = 0
    now = start(bias=True)
    weight, _ = fitted(seen(x, y), now, 0.01)
    assert torch.allclose(weight[:, 2], now[0][:, 2], atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_the_error_is_that_of_the_outputs(bias: bool) -> None:
    x, y = data()
    weight, offset = start(bias=bias)
    given = x @ weight.T + (0 if offset is None else offset)
    expected = float((y - given).square().sum(1).mean() - y.square().sum(1).mean())
    assert error(seen(x, y), (weight, offset)) == pytest.approx(expected, rel=1e-4)


def test_what_fits_better_on_held_out_samples_is_fitted_to_all() -> None:
    x, y = data(70)
    other, outputs = data(140)
    now = start(bias=True)
    found = nearest(seen(x, y), seen(other, outputs), now)
    assert found is not None
    both = seen(torch.cat([x, other]), torch.cat([y, outputs]))
    assert error(both, found) == pytest.approx(error(both, fitted(both, now, 0.0)), abs=1e-2)


def test_a_layer_that_is_right_stays_as_it_is() -> None:
    """Few samples, and outputs of which chance is the largest part."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 40, generator=generator)
    x = torch.randn(30, 40, generator=generator)
    held = torch.randn(500, 40, generator=generator)
    y, outputs = (own @ weight.T + torch.randn(len(own), 3, generator=generator) for own in (x, held))
    assert nearest(seen(x, y), seen(held, outputs), (weight, None)) is None


def test_what_is_not_finite_is_not_fitted() -> None:
    x, y = data()
    x[3, 3] = torch.inf
    assert nearest(seen(x, y), seen(*data(70)), start(bias=True)) is None
