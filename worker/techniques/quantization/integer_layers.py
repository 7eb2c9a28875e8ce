"""Layers of torch whose weights are stored as integers and become floats when they are used.

In the way that torch's compiler makes integer arithmetic of (`torch._inductor.fx_passes.quantization`): codes, a step
and a zero point an output, then torch's own operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from worker.loading.onnx_ops.integers import LIMITS, dequantize
from worker.loading.onnx_ops.origins import Origin
from worker.techniques.quantization.stored import StoredWeight

Compute = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A layer's output of its input, weight and bias."""


@dataclass(frozen=True)
class Codes:
    """Integers with a step and a zero point for each index of `axis`; one of each where the axis is None."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None

    def dequantized(self) -> Tensor:
        """The floats that they stand for."""
        dtype = self.values.dtype
        if self.axis is None:
            return dequantize(self.values, scale=float(self.scale), zero_point=int(self.zero_point), dtype=dtype)
        floats: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.values, self.scale, self.zero_point, self.axis, *LIMITS[dtype], dtype
        )
        return floats


def codes_of(weight: StoredWeight, origin: Origin) -> Codes:
    """A stored weight as the layer at the origin has it. Raises ValueError where that is only a part of it."""
    values = torch.from_numpy(np.array(weight.values))
    if weight.scale is None or origin.shape != tuple(values.shape):
        raise ValueError(f"{weight.name} is not used as a whole")
    scale = torch.from_numpy(np.array(weight.scale, np.float32))
    zero_point = torch.from_numpy(np.array(0 if weight.zero_point is None else weight.zero_point)).long()
    chosen = origin.select(values).contiguous()
    if scale.ndim == 0:
        return Codes(chosen, scale, zero_point, None)
    spread = origin.select(scale.expand(values.shape))  # elements of one step share their memory
    axis = next((own for own, stride in enumerate(spread.stride()) if stride and spread.shape[own] > 1), 0)
    along = tuple(slice(None) if own == axis else 0 for own in range(spread.ndim))
    zeros = origin.select(zero_point.expand(values.shape))
    return Codes(chosen, spread[along].contiguous(), zeros[along].contiguous(), axis)


class IntegerLayer(nn.Module):
    """A Linear layer or a convolution. Where one step is for all of the weight, each output has it."""

    def __init__(self, layer: nn.Module, codes: Codes) -> None:
        super().__init__()
        self._compute = _compute(layer)
        self._transposed = isinstance(layer, _ConvTransposeNd)
        outputs = codes.values.shape[0]
        self.axis = 0 if codes.axis is None else codes.axis
        self.register_buffer("weight", codes.values)
        self.register_buffer("scale", codes.scale if codes.scale.ndim else codes.scale.repeat(outputs))
        self.register_buffer("zero_point", codes.zero_point if codes.scale.ndim else codes.zero_point.repeat(outputs))
        self.bias = getattr(layer, "bias", None)

    def forward(self, inputs: Tensor) -> Tensor:
        codes: Tensor = self.weight  # type: ignore[assignment]
        if self._transposed:
            # torch's compiler (2.13) would take it for an ordinary convolution. A dimension more, and it does not see
            # one: it makes floats of the weight.
            codes = codes.unsqueeze(-1)
        weight = Codes(codes, self.scale, self.zero_point, self.axis).dequantized()  # type: ignore[arg-type]
        return self._compute(inputs, weight.squeeze(-1) if self._transposed else weight, self.bias)


class IntegerTable(nn.Module):
    """An Embedding: integers are looked up, and what was found becomes floats."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        if codes.axis is not None:
            raise ValueError("a table has a step for each row or column")
        self.register_buffer("weight", codes.values)
        self._scale, self._zero_point = float(codes.scale), int(codes.zero_point)

    def forward(self, rows: Tensor) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[assignment]
        found = functional.embedding(rows, weight)
        return dequantize(found, scale=self._scale, zero_point=self._zero_point, dtype=weight.dtype)


class IntegerConstant(nn.Module):
    """A constant that something else than a layer takes."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.axis = codes.axis
        for name in ("values", "scale", "zero_point"):
            self.register_buffer("weight" if name == "values" else name, getattr(codes, name))

    def forward(self) -> Tensor:
        return Codes(self.weight, self.scale, self.zero_point, self.axis).dequantized()  # type: ignore[arg-type]


def with_integers(layer: nn.Module, codes: Codes) -> nn.Module:
    """The layer with these codes in the place of its weight. Raises ValueError for a kind that has no such form."""
    return IntegerTable(codes) if isinstance(layer, nn.Embedding) else IntegerLayer(layer, codes)


def _compute(layer: nn.Module) -> Compute:
    match layer:
        case nn.Linear():
            return functional.linear
        case _ConvTransposeNd():
            places = len(layer.kernel_size)
            function = getattr(functional, f"conv_transpose{places}d")
            return partial(
                function,
                stride=layer.stride,
                padding=layer.padding,
                output_padding=layer.output_padding,
                groups=layer.groups,
                dilation=layer.dilation,
            )
        case _ConvNd():
            function = getattr(functional, f"conv{len(layer.kernel_size)}d")
            return partial(
                function, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
            )
    raise ValueError(f"{type(layer).__name__} has no form with integers")
