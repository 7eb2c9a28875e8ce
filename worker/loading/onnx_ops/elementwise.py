"""Arithmetic, comparisons and activations: functions of values, tensors or host, that broadcast as ONNX does."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.loading.onnx_ops.build import torch_type
from worker.loading.onnx_ops.host import Value, cast, divide, elementwise, power, tensor, tensors
from worker.loading.onnx_ops.node import Node


def add(a: Value, b: Value) -> Value:
    return _binary(operator.add, torch.add, a, b)


def sub(a: Value, b: Value) -> Value:
    return _binary(operator.sub, torch.sub, a, b)


def mul(a: Value, b: Value) -> Value:
    return _binary(operator.mul, torch.mul, a, b)


def div(a: Value, b: Value) -> Value:
    """Whole numbers are divided towards zero."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return elementwise(divide, a, b)
    x, y = _operands(a, b)
    return torch.div(x, y, rounding_mode=None if _floating(x) or _floating(y) else "trunc")


def mod(a: Value, b: Value, *, fmod: bool) -> Value:
    """The remainder with the sign of b, or, with `fmod`, with that of a."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return elementwise(math.fmod if fmod else operator.mod, a, b)
    x, y = _operands(a, b)
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


def pow_(a: Value, b: Value) -> Value:
    """a ** b in the type of a."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return elementwise(power, a, b)
    x, y = _operands(a, b)
    return torch.pow(x, y).to(x.dtype)


def equal(a: Value, b: Value) -> Value:
    return _binary(operator.eq, torch.eq, a, b)


def greater(a: Value, b: Value) -> Value:
    return _binary(operator.gt, torch.gt, a, b)


def greater_or_equal(a: Value, b: Value) -> Value:
    return _binary(operator.ge, torch.ge, a, b)


def less(a: Value, b: Value) -> Value:
    return _binary(operator.lt, torch.lt, a, b)


def less_or_equal(a: Value, b: Value) -> Value:
    return _binary(operator.le, torch.le, a, b)


def and_(a: Value, b: Value) -> Value:
    return _binary(lambda x, y: x and y, torch.logical_and, a, b)


def or_(a: Value, b: Value) -> Value:
    return _binary(lambda x, y: x or y, torch.logical_or, a, b)


def xor(a: Value, b: Value) -> Value:
    return _binary(operator.xor, torch.logical_xor, a, b)


def not_(a: Value) -> Value:
    return torch.logical_not(a) if isinstance(a, Tensor) else elementwise(operator.not_, a)


def neg(a: Value) -> Value:
    return torch.neg(a) if isinstance(a, Tensor) else elementwise(operator.neg, a)


def absolute(a: Value) -> Value:
    return torch.abs(a) if isinstance(a, Tensor) else elementwise(abs, a)


def floor(a: Value) -> Value:
    return torch.floor(a) if isinstance(a, Tensor) else elementwise(lambda x: 1.0 * math.floor(x), a)


def ceil(a: Value) -> Value:
    return torch.ceil(a) if isinstance(a, Tensor) else elementwise(lambda x: 1.0 * math.ceil(x), a)


def sqrt(a: Value) -> Value:
    return torch.sqrt(a) if isinstance(a, Tensor) else elementwise(math.sqrt, a)


def reciprocal(a: Value) -> Value:
    return torch.reciprocal(a) if isinstance(a, Tensor) else elementwise(lambda x: 1 / x, a)


def round_(a: Value) -> Value:
    """To the nearest even."""
    return torch.round(a) if isinstance(a, Tensor) else elementwise(lambda x: float(round(x)), a)


def identity(a: Value) -> Value:
    return a


def cast_to(a: Value, dtype: torch.dtype) -> Value:
    """The value in another type; host values know whole numbers, floats and bool."""
    return a.to(dtype) if isinstance(a, Tensor) else cast(a, dtype)


def cast_like(a: Value, like: Value) -> Value:
    return cast_to(a, tensor(like).dtype)


def where(condition: Value, a: Value, b: Value) -> Value:
    """a where the condition holds, else b."""
    if not any(isinstance(value, Tensor) for value in (condition, a, b)):
        return elementwise(lambda holds, x, y: x if holds else y, condition, a, b)  # type: ignore[arg-type]
    held, x, y = tensors((condition, a, b))
    x, y = _same_type(x, y)
    return torch.where(held.to(torch.bool), x, y)


def maximum(*values: Value) -> Value:
    return _variadic(max, torch.maximum, values)


def minimum(*values: Value) -> Value:
    return _variadic(min, torch.minimum, values)


def total(*values: Value) -> Value:
    return _variadic(operator.add, torch.add, values)


def mean(*values: Value) -> Value:
    return div(total(*values), float(len(values)))


def clip(a: Value, low: Value | None = None, high: Value | None = None) -> Value:
    """Within [low, high]; where low is above high, high."""
    if isinstance(a, Tensor) and not isinstance(low, Tensor | tuple) and not isinstance(high, Tensor | tuple):
        return a if low is None and high is None else torch.clamp(a, low, high)
    if low is not None:
        a = maximum(a, low)
    return a if high is None else minimum(a, high)


def isinf(a: Tensor, *, negative: bool, positive: bool) -> Tensor:
    found = torch.isinf(a)
    return found & ~(a < 0 if not negative else a > 0 if not positive else torch.zeros_like(found))


def leaky_relu(a: Tensor, *, alpha: float) -> Tensor:
    return functional.leaky_relu(a, alpha)


def elu(a: Tensor, *, alpha: float) -> Tensor:
    return functional.elu(a, alpha)


def celu(a: Tensor, *, alpha: float) -> Tensor:
    return functional.celu(a, alpha)


def selu(a: Tensor, *, alpha: float, gamma: float) -> Tensor:
    return gamma * functional.elu(a, alpha)


def thresholded_relu(a: Tensor, *, alpha: float) -> Tensor:
    return torch.where(a > alpha, a, torch.zeros_like(a))


def hard_sigmoid(a: Tensor, *, alpha: float, beta: float) -> Tensor:
    return torch.clamp(alpha * a + beta, 0, 1)


def gelu(a: Tensor, *, approximate: str) -> Tensor:
    return functional.gelu(a, approximate=approximate)


def quick_gelu(a: Tensor, *, alpha: float) -> Tensor:
    return a * torch.sigmoid(alpha * a)


def bias_gelu(a: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(a + bias)


def fast_gelu(a: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(a if bias is None else a + bias, approximate="tanh")


def prelu(a: Tensor, slope: Tensor) -> Tensor:
    return torch.clamp(a, min=0) + slope * torch.clamp(a, max=0)


def cumsum(a: Tensor, axis: int, *, exclusive: bool, reverse: bool) -> Tensor:
    """Running sums along an axis."""
    if reverse:
        a = torch.flip(a, (axis,))
    sums = torch.cumsum(a, axis).to(a.dtype)
    if exclusive:
        sums = sums - a
    return torch.flip(sums, (axis,)) if reverse else sums


# --- builders ---------------------------------------------------------------------------------------------------


def build_cast(node: Node) -> Any:
    return node.call(cast_to, node.value(0), torch_type(node.attribute("to")))


def build_mod(node: Node) -> Any:
    return node.call(mod, *node.values(), fmod=bool(node.attribute("fmod", 0)))


def build_clip(node: Node) -> Any:
    """Limits are attributes before opset 11, inputs after."""
    limits = []
    for position, name in ((1, "min"), (2, "max")):
        limits.append(node.value(position) if node.has(position) else node.attribute(name))
    return node.call(clip, node.value(0), *limits)


def build_isinf(node: Node) -> Any:
    negative, positive = (bool(node.attribute(f"detect_{side}", 1)) for side in ("negative", "positive"))
    return node.call(isinf, node.value(0), negative=negative, positive=positive)


def build_gelu(node: Node) -> Any:
    return node.call(gelu, node.value(0), approximate=node.attribute("approximate", "none"))


def build_prelu(node: Node) -> Any:
    """A layer where the slope is one number or one a channel; else arithmetic."""
    slope = node.constant(1)
    shape = None if slope is None else tuple(slope.tensor.shape)
    if shape is None or not (prod(shape) == 1 or (len(shape) == node.rank(0) - 1 and prod(shape) == shape[0])):
        return node.call(prelu, node.value(0), node.tensor(1))
    path, output = node.layer(torch.nn.PReLU(prod(shape)), 1, node.value(0))
    node.assign(path, "weight", 1, torch.flatten)
    return output


def build_cumsum(node: Node) -> Any:
    options = {name: bool(node.attribute(name, 0)) for name in ("exclusive", "reverse")}
    return node.call(cumsum, node.value(0), node.known(1, "axis"), **options)


def activation(function: Callable[..., Tensor], **defaults: float) -> Callable[[Node], Any]:
    """A builder of a function of one tensor whose options are float attributes."""

    def build(node: Node) -> Any:
        options = {name: float(node.attribute(name, default)) for name, default in defaults.items()}
        return node.call(function, node.value(0), **options)

    return build


def _binary(host: Callable[..., Any], function: Callable[..., Tensor], a: Value, b: Value) -> Value:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return elementwise(host, a, b)
    return function(*_operands(a, b))


def _operands(a: Value, b: Value) -> tuple[Tensor, Any]:
    """The first as a tensor, which torch wants; a single number behind it stays one and takes on the tensor's type."""
    if isinstance(a, Tensor) and not isinstance(b, tuple):
        return a, b
    x, y = tensors((a, b))
    return x, y


def _variadic(host: Callable[..., Any], function: Callable[..., Tensor], values: tuple[Value, ...]) -> Value:
    result = values[0]
    for value in values[1:]:
        if isinstance(result, Tensor) or isinstance(value, Tensor):
            x, y = tensors((result, value))
            result = function(*_same_type(x, y))
        else:
            result = elementwise(host, result, value)
    return result


def _same_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type: a whole host number beside floats becomes one."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _floating(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)
