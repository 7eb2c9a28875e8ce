"""Folding a batch norm into the layer beside it is what torch computes of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from worker.structure.fusing.fold_math import affine, before, behind, difference

LAYERS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (nn.Linear, (8, 6), {}),
    (nn.Conv1d, (8, 6, 3), {"padding": 1, "stride": 2}),
    (nn.Conv2d, (8, 12, 3), {"groups": 4, "padding": 1}),
    (nn.Conv2d, (8, 8, 3), {"groups": 8, "dilation": 2}),
    (nn.Conv3d, (8, 6, 2), {"groups": 2}),
    (nn.ConvTranspose1d, (8, 6, 3), {"stride": 2}),
    (nn.ConvTranspose2d, (8, 12, 3), {"groups": 4, "padding": 1}),
    (nn.ConvTranspose3d, (8, 6, 2), {"groups": 2}),
]


def norm_of(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, gain, bias = torch.randn(3, channels, dtype=torch.float64)
    return mean, torch.rand(channels, dtype=torch.float64) + 0.1, gain, bias


def layer_and_input(kind: Any, sizes: tuple[int, ...], options: dict[str, Any], bias: bool) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = kind(*sizes, bias=bias, **options).double().requires_grad_(False)
    axes = layer.weight.ndim - 2
    return layer, torch.randn(3, sizes[0], *[5] * axes, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "sizes", "options"), LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_what_lies_behind_a_layer(kind: Any, sizes: tuple[int, ...], options: Any, bias: bool, plain: bool) -> None:
    layer, x = layer_and_input(kind, sizes, options, bias)
    mean, variance, gain, shift = norm_of(sizes[1])
    own = (None, None) if plain else (gain, shift)
    wanted = F.batch_norm(layer(x), mean, variance, *own, eps=1e-3)
    folded = affine(mean, variance, *own, 1e-3)
    transposed = "Transpose" in kind.__name__
    weight, added = behind(layer.weight, layer.bias, folded, options.get("groups", 1), transposed=transposed)
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(added)
    assert torch.allclose(layer(x), wanted, atol=1e-12)


@pytest.mark.parametrize(("kind", "sizes", "options"), [one for one in LAYERS if "Transpose" not in one[0].__name__])
@pytest.mark.parametrize("bias", [True, False])
def test_what_lies_in_front_of_one_that_does_not_pad(kind: Any, sizes: Any, options: Any, bias: bool) -> None:
    options = {name: value for name, value in options.items() if name != "padding"}
    layer, x = layer_and_input(kind, sizes, options, bias)
    mean, variance, gain, shift = norm_of(sizes[0])
    wanted = layer(F.batch_norm(x, mean, variance, gain, shift, eps=1e-5))
    weight, added = before(
        layer.weight, layer.bias, affine(mean, variance, gain, shift, 1e-5), options.get("groups", 1)
    )
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(added)
    assert torch.allclose(layer(x), wanted, atol=1e-12)


def test_differences_are_shares_of_the_largest() -> None:
    one = torch.tensor([1.0, -4.0])
    assert difference(one + torch.tensor([0.0, 0.4]), one) == pytest.approx(0.1)
    assert difference(one[:1], one) == float("inf")
    assert difference(torch.tensor([float("nan"), 1.0]), one) != 0.0
