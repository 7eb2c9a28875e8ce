"""QuantizeLinear and DequantizeLinear of activations, as the operators that torch's compiler knows.

No part of the table of uploads: quantized graphs are refused there. These are for graphs that were quantized here.
"""

from __future__ import annotations

from typing import Any

import torch

# Registers torch.ops.quantized_decomposed.
import torch.ao.quantization.fx._decomposed
from torch import Tensor

from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.node import Node
from worker.loading.onnx_ops.table import TABLE, Build

LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def quantize(a: Tensor, *, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """clamp(round(a / scale) + zero_point), halves to even."""
    quantized: Tensor = torch.ops.quantized_decomposed.quantize_per_tensor(a, scale, zero_point, *LIMITS[dtype], dtype)
    return quantized


def dequantize(a: Tensor, *, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """(a - zero_point) * scale."""
    values: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(a, scale, zero_point, *LIMITS[dtype], dtype)
    return values


def build_quantize(node: Node) -> Any:
    return node.call(quantize, node.tensor(0), **_grid(node))


def build_dequantize(node: Node) -> Any:
    return node.call(dequantize, node.tensor(0), **_grid(node))


def _grid(node: Node) -> dict[str, Any]:
    """Step, zero point and type, one for the whole tensor. Raises Unsupported."""
    scale, zero_point = node.constant(1), node.constant(2)
    if scale is None or zero_point is None or scale.tensor.numel() != 1 or zero_point.tensor.dtype not in LIMITS:
        raise Unsupported("has no one step of 8 bits for a whole tensor")
    return {"scale": float(scale.tensor), "zero_point": int(zero_point.tensor), "dtype": zero_point.tensor.dtype}


QUANTIZED_TABLE: dict[str, Build] = {
    **TABLE,
    "QuantizeLinear": build_quantize,
    "DequantizeLinear": build_dequantize,
}
