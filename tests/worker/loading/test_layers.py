"""Layers without weights, built from their JSON: against NumPy and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.contract.architecture import Architecture
from worker.loading.layers import build

Array = NDArray[np.float32]


def run(inputs: Array, **layer: Any) -> Array:
    architecture = Architecture.model_validate({"layers": [layer]})
    outputs: Array = build(architecture.layers)(torch.from_numpy(inputs)).numpy()
    return outputs


def noise(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("Zero", "constant", {}),
        ("Constant", "constant", {"constant_values": 2.5}),
        ("Reflection", "reflect", {}),
        ("Replication", "edge", {}),
        ("Circular", "wrap", {}),
    ],
)
def test_padding_is_that_of_numpy(axes: int, kind: str, mode: Any, options: dict[str, float]) -> None:
    inputs = noise(2, 3, *(4, 5, 6)[:axes])
    widths = [(1, 2), (0, 3), (2, 1)][:axes]
    flat = [width for pair in reversed(widths) for width in pair]  # torch begins with the last axis
    value = {"value": 2.5} if kind == "Constant" else {}
    wanted = np.pad(inputs, [(0, 0), (0, 0), *widths], mode=mode, **options)
    np.testing.assert_array_equal(run(inputs, type=f"{kind}Pad{axes}d", padding=flat, **value), wanted)


def test_one_width_pads_every_side() -> None:
    assert run(noise(1, 1, 2, 2), type="ZeroPad2d", padding=3).shape == (1, 1, 8, 8)


def test_pooling_by_a_norm() -> None:
    inputs = noise(2, 3, 8)
    pairs = np.abs(inputs.reshape(2, 3, 4, 2)).astype(np.float64)
    for norm in (1.0, 2.0):
        wanted = (pairs**norm).sum(-1) ** (1 / norm)
        got = run(np.abs(inputs), type="LPPool1d", norm_type=norm, kernel_size=2)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    squares = noise(1, 2, 4, 6)
    wanted = np.sqrt((squares.reshape(1, 2, 2, 2, 3, 2).astype(np.float64) ** 2).sum((3, 5)))
    got = run(squares, type="LPPool2d", norm_type=2.0, kernel_size=2)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_upsampling_repeats_or_interpolates() -> None:
    inputs = noise(1, 2, 3, 4)
    nearest = run(inputs, type="Upsample", scale_factor=2)
    np.testing.assert_array_equal(nearest, inputs.repeat(2, axis=2).repeat(2, axis=3))
    row = np.array([[[0.0, 1.0, 2.0]]], np.float32)
    linear = run(row, type="Upsample", size=5, mode="linear", align_corners=True)
    np.testing.assert_allclose(linear[0, 0], [0, 0.5, 1, 1.5, 2])
    assert run(inputs, type="Upsample", size=[5, 7], mode="bilinear").shape == (1, 2, 5, 7)


def test_channels_become_pixels_and_back() -> None:
    inputs = noise(1, 8, 2, 3)
    pixels = run(inputs, type="PixelShuffle", upscale_factor=2)
    wanted = inputs.reshape(1, 2, 2, 2, 2, 3).transpose(0, 1, 4, 2, 5, 3).reshape(1, 2, 4, 6)
    np.testing.assert_array_equal(pixels, wanted)
    np.testing.assert_array_equal(run(pixels, type="PixelUnshuffle", downscale_factor=2), inputs)
