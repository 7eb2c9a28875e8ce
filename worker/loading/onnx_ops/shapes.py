"""What moves elements without computing with them: shapes, slices, gathers; and what makes tensors of sizes."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.loading.onnx_ops.build import read_tensor, torch_type
from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import MAX_HOST, Host, Number, Value, concat, ints, is_matrix, single, tensor, tensors
from worker.loading.onnx_ops.node import Node

# A range of so many plain numbers at most stays on the host.
MAX_HOST_RANGE = 64


def shape(a: Value, *, start: int, end: int | None) -> Host:
    """The sizes of a tensor."""
    sizes = tuple(a.shape) if isinstance(a, Tensor) else (len(a),) if isinstance(a, tuple) else ()
    return sizes[slice(start, end)]


def size(a: Value) -> Host:
    """How many elements a tensor has."""
    return a.numel() if isinstance(a, Tensor) else len(a) if isinstance(a, tuple) else 1


def reshape(a: Value, sizes: Value, *, allow_zero: bool) -> Value:
    """Size 0 keeps the dimension, -1 is what is left."""
    wanted = ints(sizes)
    if not isinstance(a, Tensor):
        return _reshape_host(a, wanted)
    if not allow_zero:
        wanted = tuple(a.shape[axis] if number == 0 else number for axis, number in enumerate(wanted))
    return a.reshape(wanted)


def _reshape_host(a: Host, wanted: tuple[int, ...]) -> Value:
    """A vector stays on the host, also as a matrix: exporters turn the pads of all axes round in that form."""
    numbers = concat(a) if is_matrix(a) else concat((a,))
    if wanted in ((-1,), (len(numbers),)):
        return numbers
    if wanted == () and len(numbers) == 1:
        return numbers[0]
    if len(wanted) == 2 and wanted[1] > 0 and wanted[0] in (-1, len(numbers) // wanted[1]):
        return tuple(numbers[i : i + wanted[1]] for i in range(0, len(numbers), wanted[1]))
    return tensor(a).reshape(wanted)


def flatten(a: Value, *, axis: int) -> Tensor:
    """Two dimensions: those before `axis`, and the others."""
    x = tensor(a)
    axis = axis + x.ndim if axis < 0 else axis
    if axis == 1:
        return torch.flatten(x, 1) if x.ndim > 1 else x.reshape(x.shape[0], 1)
    return x.reshape(prod(x.shape[:axis]), -1) if x.numel() else x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def transpose(a: Value, *, order: tuple[int, ...] | None) -> Value:
    if not isinstance(a, Tensor):
        return tuple(zip(*a, strict=True)) if is_matrix(a) else a
    return a.permute(order if order is not None else tuple(reversed(range(a.ndim))))


def squeeze(a: Value, axes: Value | None) -> Value:
    """Without dimensions of size 1."""
    if not isinstance(a, Tensor):
        return a[0] if isinstance(a, tuple) and len(a) == 1 else a
    if axes is None:
        return torch.squeeze(a)
    for axis in sorted((number % a.ndim for number in ints(axes)), reverse=True):
        if a.shape[axis] != 1:
            raise Unsupported(f"squeezes dimension {axis} of size {a.shape[axis]}")
        a = a.squeeze(axis)
    return a


def unsqueeze(a: Value, axes: Value) -> Value:
    """With dimensions of size 1 at these places of the result."""
    places = ints(axes)
    if not isinstance(a, Tensor):
        if not isinstance(a, tuple) and len(places) == 1:
            return (a,)
        a = tensor(a)
    rank = a.ndim + len(places)
    for axis in sorted(number % rank for number in places):
        a = a.unsqueeze(axis)
    return a


def concatenate(*values: Value, axis: int) -> Value:
    if not any(isinstance(value, Tensor) for value in values):
        return concat(values)  # type: ignore[arg-type]  # none is a tensor
    parts = tensors(values)
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in parts], dim=axis)


def split(a: Value, sizes: Value | None, *, axis: int, parts: int) -> tuple[Value, ...]:
    """Of the given sizes; without them in equal ones, of which the last may be smaller."""
    length = a.shape[axis] if isinstance(a, Tensor) else len(a) if isinstance(a, tuple) else 1
    wanted = ints(sizes) if sizes is not None else _equal_parts(length, parts)
    if isinstance(a, Tensor):
        return torch.split(a, list(wanted), dim=axis)
    numbers, start, found = concat((a,)), 0, []
    for width in wanted:
        found.append(numbers[start : start + width])
        start += width
    return tuple(found)


def _equal_parts(length: int, parts: int) -> tuple[int, ...]:
    width = -(-length // parts)
    return tuple(max(0, min(width, length - i * width)) for i in range(parts))


def expand(a: Value, sizes: Value) -> Tensor:
    """Broadcast with a shape, in which a size of 1 keeps what the tensor has."""
    x, wanted = tensor(a), ints(sizes)
    rank = max(x.ndim, len(wanted))
    own = (1,) * (rank - x.ndim) + tuple(x.shape)
    wanted = (1,) * (rank - len(wanted)) + wanted
    return x.expand(tuple(mine if size == 1 else size for mine, size in zip(own, wanted, strict=True)))


def tile(a: Value, repeats: Value) -> Value:
    times = ints(repeats)
    if not isinstance(a, Tensor):
        if isinstance(a, tuple) and len(times) == 1 and len(a) * times[0] <= MAX_HOST:
            return a * times[0]
        a = tensor(a)
    return a.repeat(times)


def constant_of_shape(sizes: Value, like: Tensor, *, value: Number, dtype: torch.dtype) -> Value:
    """A short vector of whole numbers is most often a shape, and stays on the host."""
    wanted = ints(sizes)
    if not dtype.is_floating_point and len(wanted) == 1 and isinstance(wanted[0], int) and wanted[0] <= MAX_HOST_RANGE:
        return (value,) * wanted[0]
    return torch.full(wanted, value, dtype=dtype, device=like.device)


def range_(start: Value, limit: Value, step: Value, like: Tensor) -> Tensor:
    """start, start + step, … below limit."""
    numbers = [value if not isinstance(value, tuple | Tensor) else single(value) for value in (start, limit, step)]
    floating = any(isinstance(number, float) for number in numbers)
    return torch.arange(*numbers, dtype=torch.float32 if floating else torch.int64, device=like.device)


def trilu(a: Value, k: Value | None, *, upper: bool) -> Tensor:
    diagonal = 0 if k is None else single(k)
    return torch.triu(tensor(a), diagonal) if upper else torch.tril(tensor(a), diagonal)


def eye_like(a: Tensor, *, k: int, dtype: torch.dtype | None) -> Tensor:
    rows, columns = a.shape
    line = torch.arange(rows, device=a.device)[:, None] + k == torch.arange(columns, device=a.device)[None]
    return line.to(dtype or a.dtype)


def depth_to_space(a: Tensor, *, block: int, mode: str) -> Tensor:
    """Channels to blocks of pixels; DCR and CRD order the channels differently."""
    if mode == "CRD":
        return functional.pixel_shuffle(a, block)
    n, c, h, w = a.shape
    return (
        a.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block)
    )


def space_to_depth(a: Tensor, *, block: int) -> Tensor:
    n, c, h, w = a.shape
    blocks = a.reshape(n, c, h // block, block, w // block, block)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)


# --- builders ---------------------------------------------------------------------------------------------------


def build_shape(node: Node) -> Any:
    """Of a constant the sizes are known, whatever becomes of it."""
    options = {"start": node.attribute("start", 0), "end": node.attribute("end")}
    constant = node.constant(0)
    return shape(constant.tensor, **options) if constant else node.host(shape, node.value(0), **options)


def build_size(node: Node) -> Any:
    constant = node.constant(0)
    return constant.tensor.numel() if constant else node.host(size, node.value(0))


def build_reshape(node: Node) -> Any:
    """In a file whose batch is 1, a shape that begins with 1 keeps the batch."""
    sizes: Any = node.value(1)
    first = (node.shape(0) or (0,))[0]
    batch = node.builder.fixed_batch and node.constant(0) is None and first in (1, None)
    if batch and isinstance(sizes, tuple) and sizes[:1] == (1,):
        sizes = (0, *sizes[1:])
    return node.call(reshape, node.value(0), sizes, allow_zero=bool(node.attribute("allowzero", 0)))


def build_flatten(node: Node) -> Any:
    return node.call(flatten, node.value(0), axis=node.attribute("axis", 1))


def build_transpose(node: Node) -> Any:
    return node.call(transpose, node.value(0), order=node.attribute("perm"))


def build_squeeze(node: Node) -> Any:
    return node.call(squeeze, node.value(0), node.ints("axes", 1))


def build_unsqueeze(node: Node) -> Any:
    return node.call(unsqueeze, node.value(0), node.ints("axes", 1))


def build_concat(node: Node) -> Any:
    return node.call(concatenate, *node.values(), axis=node.attribute("axis", 1))


def build_split(node: Node) -> Any:
    parts = len(node.proto.output)
    sizes = node.value(1) if node.has(1) else node.attribute("split")
    found = node.call(split, node.value(0), sizes, axis=node.attribute("axis", 0), parts=parts)
    return node.parts(found, parts)


def build_constant_of_shape(node: Node) -> Any:
    made = node.attribute("value")
    filler = torch.zeros(1) if made is None else read_tensor(made).reshape(-1)
    sizes: Any = node.value(0)
    options: dict[str, Any] = {"value": filler[0].item(), "dtype": filler.dtype}
    if isinstance(sizes, tuple) and len(sizes) == 1 and sizes[0] <= MAX_HOST_RANGE and not filler.is_floating_point():
        return constant_of_shape(sizes, filler, **options)
    return node.call(constant_of_shape, sizes, node.builder.anchor, **options)


def build_range(node: Node) -> Any:
    numbers = node.values()
    plain = [number for number in numbers if isinstance(number, int)]
    if len(plain) == len(numbers):
        line = range(*plain)
        if len(line) <= MAX_HOST_RANGE:
            return tuple(line)
    return node.call(range_, *numbers, node.builder.anchor)


def build_trilu(node: Node) -> Any:
    k = node.value(1) if node.has(1) else None
    return node.call(trilu, node.value(0), k, upper=bool(node.attribute("upper", 1)))


def build_eye_like(node: Node) -> Any:
    dtype = node.attribute("dtype")
    return node.call(eye_like, node.value(0), k=node.attribute("k", 0), dtype=dtype and torch_type(dtype))


def build_depth_to_space(node: Node) -> Any:
    options = {"block": node.attribute("blocksize"), "mode": node.attribute("mode", "DCR")}
    return node.call(depth_to_space, node.value(0), **options)


def build_space_to_depth(node: Node) -> Any:
    return node.call(space_to_depth, node.value(0), block=node.attribute("blocksize"))
