"""float8 e4m3 against the table of its values, written out by hand from its definition."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from worker.techniques.quantization.float8_math import nearest, row_scales

# Exponents are biased by 7; exponent 0 is of subnormals, and the last code of exponent 15 is no number.
SUBNORMAL = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
NORMAL = [(1 + m / 8) * 2.0 ** (e - 7) for e, m in itertools.product(range(1, 16), range(8)) if (e, m) != (15, 7)]
TABLE = SUBNORMAL + NORMAL


def by_hand(value: float) -> float:
    """The nearest of the table; of two as near the one whose code is even."""
    code = min(range(len(TABLE)), key=lambda code: (abs(TABLE[code] - abs(value)), code % 2))
    return math.copysign(TABLE[code], value)


def test_the_table_is_that_of_the_format() -> None:
    assert (len(TABLE), TABLE[-1], TABLE[1], TABLE[8]) == (127, 448.0, 2.0**-9, 2.0**-6)
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert codes.tolist() == TABLE


@pytest.mark.parametrize("scale", [1.0, 0.25, 3e-3])
def test_values_go_to_the_nearest_and_ties_to_even(scale: float) -> None:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(TABLE)]
    random = np.random.default_rng(0).normal(0, 30, 300).tolist()
    values = torch.tensor([*TABLE, *middles, *random, *(-value for value in middles)])
    found = nearest(values[None] * scale, torch.tensor([[scale]]), torch.float32)[0]
    expected = torch.tensor([by_hand(value) for value in (values * scale / scale).tolist()])
    assert torch.equal(found, expected * torch.tensor(scale))


def test_what_is_beyond_the_range_is_the_largest() -> None:
    rows = torch.tensor([[1e5, -470.0, 448.0]])
    assert nearest(rows, torch.ones(1, 1), torch.float32).tolist() == [[448.0, -448.0, 448.0]]


def test_numpy_says_the_same() -> None:
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) * 0.1
    scales = row_scales(rows, torch.float32)
    assert np.array_equal(scales.numpy()[:, 0], np.abs(rows.numpy()).max(1) / np.float32(448))
    codes = (rows.numpy() / scales.numpy()).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(nearest(rows, scales, torch.float32).numpy(), codes.astype(np.float32) * scales.numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_of_the_dtype_and_never_vanish(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-6, -1e-7], [3.3, 1.0]])
    scales = row_scales(rows, dtype)
    assert torch.equal(scales, scales.to(dtype).float())
    assert bool((scales >= torch.finfo(dtype).tiny).all())
    assert bool((scales > 0).all())
    found = nearest(rows, scales, dtype)
    assert torch.equal(found[0], rows[0])
    assert torch.equal(found, found.to(dtype).float())
    assert bool(((found - rows)[1:].abs() <= rows[1:].abs().amax(1, keepdim=True) / 16).all())
