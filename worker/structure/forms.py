"""What a layer may become in place of itself: modules of the right shapes, whose weights come later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from worker.structure.calls import computes_as
from worker.techniques.pruning.weights import is_transformers_conv1d

Form = Literal["svd", "tucker", "cp"]
Places = tuple[int, ...]
"""How many there are along each axis of what a convolution takes or gives; of other layers, how many in all."""
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Factors:
    """A layer as a product: of which form, and of which ranks. tucker has one for outputs and one for inputs."""

    form: Form
    ranks: tuple[int, ...]

    def parameters(self, layer: nn.Module) -> int:
        """Weights of the factors, without biases."""
        outputs, inputs, places = shape_of(layer)
        match self.form:
            case "svd":
                return self.ranks[0] * (outputs + inputs)
            case "tucker":
                out, into = self.ranks
                return outputs * out + out * into * prod(places) + into * inputs
            case "cp":
                return self.ranks[0] * (outputs + inputs + sum(places))

    def macs(self, layer: nn.Module, given: Places, made: Places) -> int:
        """For the places in front of the layer and behind it, by axis: a kernel of cp slides along one by one."""
        outputs, inputs, kernel = shape_of(layer)
        match self.form:
            case "svd":
                return self.ranks[0] * (inputs + outputs) * prod(made)
            case "tucker":
                out, into = self.ranks
                return into * inputs * prod(given) + (out * into * prod(kernel) + outputs * out) * prod(made)
            case "cp":
                along = (size * prod(made[: i + 1]) * prod(given[i + 1 :]) for i, size in enumerate(kernel))
                return self.ranks[0] * (inputs * prod(given) + sum(along) + outputs * prod(made))


def is_pointwise(layer: nn.Module) -> bool:
    """Whether the layer is one matrix: a linear layer, or a convolution of size 1 in which all inputs reach all
    outputs."""
    if isinstance(layer, Convolution):
        return computes_as(layer, *_CONVOLUTIONS) and layer.groups == 1 and prod(layer.kernel_size) == 1
    return computes_as(layer, nn.Linear) or is_transformers_conv1d(layer)


def is_spatial(layer: nn.Module) -> bool:
    """Whether the layer is a convolution of a larger size in which all inputs reach all outputs."""
    return (
        isinstance(layer, Convolution)
        and computes_as(layer, *_CONVOLUTIONS)
        and layer.groups == 1
        and prod(layer.kernel_size) > 1
    )


def kernel_of(layer: nn.Module) -> Tensor:
    """The weight with outputs first, [outputs, inputs, …], as float32 on the CPU."""
    weight: Any = layer.weight
    weight = weight.detach().float().cpu()
    return weight.T if is_transformers_conv1d(layer) else weight


def shape_of(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Outputs, inputs, and the size of the kernel."""
    weight: Any = layer.weight
    outputs, inputs, *places = weight.shape
    return (inputs, outputs, ()) if is_transformers_conv1d(layer) else (outputs, inputs, tuple(places))


def factored(layer: nn.Module, factors: Factors) -> nn.Sequential:
    """Modules in the place of the layer; the bias is there, the weights are not initialized."""
    with torch.device("cpu"):
        made = _linear(layer, factors) if not isinstance(layer, Convolution) else _convolution(layer, factors)
    weight: Any = layer.weight
    made.to(device=weight.device, dtype=weight.dtype).train(layer.training).requires_grad_(weight.requires_grad)
    bias: Tensor | None = getattr(layer, "bias", None)
    if bias is not None:
        with torch.no_grad():
            made[-1].get_parameter("bias").copy_(bias)
    return made


def fill(made: nn.Sequential, weights: Sequence[Tensor]) -> None:
    """Puts the factors in, first that which sees the input first; each in its module's shape."""
    with torch.no_grad():
        for module, weight in zip(made, weights, strict=True):
            parameter: Any = module.weight
            parameter.copy_(weight.reshape(parameter.shape))


def _linear(layer: nn.Module, factors: Factors) -> nn.Sequential:
    outputs, inputs, _ = shape_of(layer)
    (rank,) = factors.ranks
    bias = getattr(layer, "bias", None) is not None
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


def _convolution(layer: Convolution, factors: Factors) -> nn.Sequential:
    kind: Any = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
    outputs, inputs, places = shape_of(layer)
    bias = layer.bias is not None
    whole = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }
    match factors.form:
        case "svd":
            (rank,) = factors.ranks
            return nn.Sequential(
                kind(inputs, rank, 1, stride=layer.stride, padding=layer.padding, padding_mode=layer.padding_mode,
                     bias=False),
                kind(rank, outputs, 1, bias=bias),
            )  # fmt: skip
        case "tucker":
            out, into = factors.ranks
            return nn.Sequential(
                kind(inputs, into, 1, bias=False),
                kind(into, out, places, bias=False, **whole),
                kind(out, outputs, 1, bias=bias),
            )
        case "cp":
            (rank,) = factors.ranks
            along = [_along(kind, layer, rank, axis) for axis in range(len(places))]
            return nn.Sequential(kind(inputs, rank, 1, bias=False), *along, kind(rank, outputs, 1, bias=bias))


def _along(kind: Any, layer: Convolution, rank: int, axis: int) -> nn.Module:
    """A depthwise convolution along one axis of the layer's."""

    def only(values: Sequence[int], usual: int) -> tuple[int, ...]:
        return tuple(value if place == axis else usual for place, value in enumerate(values))

    padding = layer.padding if isinstance(layer.padding, str) else only(layer.padding, 0)
    made: nn.Module = kind(
        rank, rank, only(layer.kernel_size, 1), stride=only(layer.stride, 1), padding=padding,
        dilation=only(layer.dilation, 1), groups=rank, padding_mode=layer.padding_mode, bias=False,
    )  # fmt: skip
    return made
