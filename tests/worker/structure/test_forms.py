"""Products in the place of layers: the same outputs where nothing is left out, and the costs that they say."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker.evaluation.macs import module_macs
from worker.structure.forms import Factors, factored, fill, is_pointwise, is_spatial, kernel_of
from worker.techniques.structure import factor_math

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(10, 6), (10,)),
    "linear over steps, no bias": (lambda: nn.Linear(10, 6, bias=False), (4, 10)),
    "gpt2's": (lambda: Conv1D(6, 10), (4, 10)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1, stride=2), (8, 7, 7)),
    "pointwise, padded": (lambda: nn.Conv2d(8, 6, 1, padding=1, padding_mode="reflect"), (8, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2), (6, 15)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (6, 12, 9)),
    "conv2d that reflects": (lambda: nn.Conv2d(6, 8, (3, 5), padding=(1, 2), padding_mode="reflect"), (6, 8, 9)),
    "conv2d, same": (lambda: nn.Conv2d(6, 8, 3, padding="same", bias=False), (6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 5, 3, stride=(1, 2, 1), padding=1), (4, 5, 6, 5)),
}


def forms(layer: nn.Module) -> list[Factors]:
    """Of ranks that leave nothing out, or nothing much."""
    kernel = kernel_of(layer)
    outputs, inputs, *places = kernel.shape
    if is_pointwise(layer):
        return [Factors("svd", (min(outputs, inputs),))]
    most = kernel.numel() // max(outputs, inputs, *places)
    return [Factors("tucker", (outputs, inputs)), Factors("cp", (most,))]


def filled(layer: nn.Module, factors: Factors) -> nn.Sequential:
    kernel = kernel_of(layer)
    metric = factor_math.plain(kernel)
    made = factored(layer, factors)
    weights: list[Tensor]
    match factors.form:
        case "svd":
            weights = list(factor_math.spectrum(kernel.flatten(1), metric).factors(*factors.ranks))[::-1]
        case "tucker":
            weights = list(factor_math.tucker(factor_math.modes(kernel, metric), metric, *factors.ranks))[::-1]
        case "cp":
            out, into, *along = factor_math.cp(kernel, metric, *factors.ranks, seed=0)[0]
            weights = [into.T, *(one.T for one in along), out]
    fill(made, weights)
    return made


@pytest.mark.parametrize("name", LAYERS)
def test_a_product_of_full_ranks_gives_what_the_layer_gave(name: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().eval()
    if isinstance(layer, Conv1D):
        nn.init.normal_(layer.bias)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        expected = layer(x)
        for factors in forms(layer):
            made = filled(layer, factors)(x)
            tolerance = 1e-5 if factors.form != "cp" else 0.02  # alternating least squares ends near
            assert torch.allclose(made, expected, atol=tolerance, rtol=1e-4), factors.form


@pytest.mark.parametrize("name", LAYERS)
def test_costs_are_those_that_are_counted(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().eval(), torch.randn(1, *shape)
    axes = kernel_of(layer).ndim - 2
    output = layer(x)
    given, made = (tuple(own.shape[2:]) if axes else (prod(own.shape[:-1]),) for own in (x, output))
    for factors in [Factors("svd", (3,))] if is_pointwise(layer) else [Factors("tucker", (3, 2)), Factors("cp", (4,))]:
        product = factored(layer, factors)
        weights = sum(own.numel() for key, own in product.named_parameters() if key.endswith("weight"))
        assert factors.parameters(layer) == weights
        assert factors.macs(layer, given, made) == module_macs(product, (x,))


def test_what_has_no_form() -> None:
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.Embedding(4, 4), nn.LSTM(4, 4)):
        assert not is_pointwise(layer)
        assert not is_spatial(layer)


def test_a_product_takes_over_what_the_layer_was() -> None:
    layer = nn.Linear(8, 4).to(torch.bfloat16).requires_grad_(False).eval()
    made = factored(layer, Factors("svd", (2,)))
    assert not made.training
    assert all(own.dtype == torch.bfloat16 and not own.requires_grad for own in made.parameters())
    assert torch.equal(made[1].bias, layer.bias)
