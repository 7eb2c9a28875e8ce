"""Matrix products. One with a constant matrix is a Linear layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from worker.loading.onnx_ops.build import Constant
from worker.loading.onnx_ops.elementwise import add
from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import Value, tensor, tensors
from worker.loading.onnx_ops.node import Node
from worker.loading.onnx_ops.origins import transposed, whole

_EQUATION = re.compile(r"[A-Za-z ,.]+(->[A-Za-z .]*)?")


def matmul(a: Value, b: Value) -> Tensor:
    x, y = tensors((a, b))
    return torch.matmul(x, y)


def gemm(a: Tensor, b: Tensor, c: Value | None, *, alpha: float, beta: float, turns: tuple[bool, bool]) -> Tensor:
    """alpha * A' B' + beta * C, either transposed first."""
    x, y = (matrix.t() if turned else matrix for matrix, turned in zip((a, b), turns, strict=True))
    product = alpha * (x @ y)
    return product if c is None else product + beta * tensor(c, product)


def scaled(a: Tensor, *, by: float) -> Tensor:
    return a * by


def plus(a: Tensor, b: Value) -> Tensor:
    return a + tensor(b, a)


def einsum(*values: Value, equation: str) -> Tensor:
    return torch.einsum(equation, *tensors(values))


# --- builders ---------------------------------------------------------------------------------------------------


def build_matmul(node: Node) -> Any:
    weight = node.constant(1)
    if weight is None or weight.tensor.ndim != 2 or node.constant(0) is not None or not _floating(weight):
        return node.call(matmul, node.tensor(0), node.tensor(1))
    path, output = _linear(node, weight.tensor.t(), node.value(0), bias=False)
    node.assign(path, "weight", 1, transposed)
    return output


def build_add(node: Node) -> Any:
    """A constant added to a product or convolution that nothing else reads is the layer's bias."""
    for position in (0, 1):
        path = _bare_layer(node, position)
        bias = node.constant(1 - position)
        if path is not None and bias is not None and _is_bias(node, position, bias.tensor, path):
            node.assign(path, "bias", 1 - position, torch.flatten)
            return node.value(position)
    return node.call(add, *node.values())


def _bare_layer(node: Node, position: int) -> str | None:
    """The path of the layer without bias whose output the input is, if nothing else reads it."""
    value = node.value(position)
    if not isinstance(value, fx.Node) or value.op != "call_module" or node.builder.uses[node.proto.input[position]] > 1:
        return None
    layer = node.builder.root.get_submodule(str(value.target))
    return str(value.target) if isinstance(layer, nn.Linear | _ConvNd) and layer.bias is None else None


def _is_bias(node: Node, position: int, values: Tensor, path: str) -> bool:
    """One number an output, standing along the outputs' dimension."""
    layer = node.builder.root.get_submodule(path)
    if not values.is_floating_point():
        return False
    if isinstance(layer, nn.Linear):
        known = node.shape(position)
        raises = values.ndim > (1 if known is None else max(1, len(known)))
        return not raises and values.ndim > 0 and _one_each(values, layer.out_features)
    assert isinstance(layer, _ConvNd)
    spatial = len(layer.kernel_size)
    own = tuple(values.shape)
    return own in (
        (layer.out_channels, *(1,) * spatial),
        (1, layer.out_channels, *(1,) * spatial),
    )


def build_gemm(node: Node) -> Any:
    """A Linear layer where B is constant; a factor alpha stays arithmetic."""
    alpha, beta = (float(node.attribute(name, 1.0)) for name in ("alpha", "beta"))
    turns = tuple(bool(node.attribute(name, 0)) for name in ("transA", "transB"))
    weight, bias = node.constant(1), node.constant(2)
    if weight is None or turns[0] or node.constant(0) is not None:
        third = node.tensor(2) if node.has(2) else None
        return node.call(gemm, node.tensor(0), node.tensor(1), third, alpha=alpha, beta=beta, turns=turns)
    matrix = weight.tensor if turns[1] else weight.tensor.t()
    fused = bias is not None and alpha == beta == 1 and _one_each(bias.tensor, len(matrix))
    path, output = _linear(node, matrix, node.value(0), bias=fused)
    node.assign(path, "weight", 1, whole if turns[1] else transposed)
    if fused:
        node.assign(path, "bias", 2, torch.flatten)
        return output
    if alpha != 1:
        output = node.call(scaled, output, by=alpha)
    if not node.has(2):
        return output
    return node.call(plus, output, node.tensor(2) if beta == 1 else node.call(scaled, node.tensor(2), by=beta))


def build_fused_matmul(node: Node) -> Any:
    """ONNX Runtime's: a product of transposed operands with a factor."""
    if node.attribute("transBatchA", 0) or node.attribute("transBatchB", 0):
        raise Unsupported("transposes batches")
    sides = [node.tensor(0), node.tensor(1)]
    for i, name in enumerate(("transA", "transB")):
        if node.attribute(name, 0):
            sides[i] = node.call(torch.transpose, sides[i], -1, -2)
    return node.call(scaled, node.call(matmul, *sides), by=float(node.attribute("alpha", 1.0)))


def build_einsum(node: Node) -> Any:
    equation = node.attribute("equation", "")
    if not _EQUATION.fullmatch(equation) or len(equation) > 200:
        raise Unsupported(f"has the equation {equation[:50]!r}")
    inputs = [node.tensor(position) for position in range(len(node.proto.input))]
    return node.call(einsum, *inputs, equation=equation)


def _linear(node: Node, matrix: Tensor, argument: Any, *, bias: bool) -> tuple[str, Any]:
    """A Linear of that matrix [out, in], whose weights the caller assigns."""
    features = tuple(matrix.shape)
    with torch.device("meta"):
        layer = nn.Linear(features[1], features[0], bias=bias)
    return node.layer(layer, 1, argument)


def _one_each(bias: Tensor, count: int) -> bool:
    """Whether it is one number an output, and not one a row."""
    return bias.numel() == count and (bias.ndim == 0 or bias.shape[-1] == count)


def _floating(constant: Constant) -> bool:
    return constant.tensor.is_floating_point()
