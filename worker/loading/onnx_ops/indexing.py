"""What picks, places and pads elements by their positions: slices, gathers, scatters and tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.loading.onnx_ops.build import Constant
from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import MAX_HOST, Value, concat, ints, is_matrix, single, tensor, tensors
from worker.loading.onnx_ops.node import Node


def slice_(a: Value, starts: Value, ends: Value, axes: Value | None, steps: Value | None) -> Value:
    """As Python slices, one an axis; a step may be negative."""
    first, last = ints(starts), ints(ends)
    along = ints(axes) if axes is not None else tuple(range(len(first)))
    by = ints(steps) if steps is not None else (1,) * len(first)
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        a = _slice_one(a, start, end, axis, step)
    return a


def _slice_one(a: Value, start: int, end: int, axis: int, step: int) -> Value:
    if not isinstance(a, Tensor):
        chosen = _python_slice(start, end, step)
        if is_matrix(a):
            return a[chosen] if axis == 0 else tuple(row[chosen] for row in a)
        return concat((a,))[chosen]
    axis = axis % a.ndim
    if step < 0:
        length = a.shape[axis]
        places = range(length)[_python_slice(start, end, step)]
        return a.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=a.device))
    return a[(slice(None),) * axis + (slice(start, end, step),)]


def _python_slice(start: int, end: int, step: int) -> slice:
    """ONNX writes "to the very beginning" of a backward slice as a large negative number."""
    return slice(start, None if step < 0 and end < -MAX_HOST else end, step)


def gather(a: Value, indices: Value, *, axis: int) -> Value:
    """Elements along an axis; negative indices count from the end."""
    if not isinstance(a, Tensor):
        if isinstance(indices, Tensor):
            a = tensor(a, indices)
        else:
            numbers = concat((a,))
            return tuple(numbers[i] for i in ints(indices)) if isinstance(indices, tuple) else numbers[single(indices)]
    axis = axis % a.ndim
    if not isinstance(indices, Tensor):
        if isinstance(indices, tuple):
            length = a.shape[axis]
            places = torch.tensor([i if i >= 0 else i + length for i in ints(indices)], device=a.device)
            return a.index_select(axis, places)
        return a.select(axis, single(indices))
    flat = a.index_select(axis, indices.reshape(-1).to(torch.int64))
    return flat.reshape(*a.shape[:axis], *indices.shape, *a.shape[axis + 1 :])


def gather_elements(a: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    return torch.gather(a, axis, _counted(indices, a.shape[axis]))


def gather_nd(a: Value, indices: Value) -> Tensor:
    """Slices of `a` that the last dimension of `indices` points to."""
    x, places = tensors((a, indices))
    return x[tuple(places[..., i] for i in range(places.shape[-1]))]


def scatter_elements(a: Tensor, indices: Value, updates: Value, *, axis: int, reduction: str) -> Tensor:
    x, places, new = tensors((a, indices, updates))
    places = _counted(places, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, new)
    modes = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, places, new, modes[reduction], include_self=True)


def scatter_nd(a: Value, indices: Value, updates: Value, *, reduction: str) -> Tensor:
    """`a` with `updates` at the places that the last dimension of `indices` points to."""
    x, places, new = tensors((a, indices, updates))
    where = tuple(places[..., i] for i in range(places.shape[-1]))
    return x.index_put(where, new.to(x.dtype), accumulate=reduction == "add")


def one_hot(indices: Value, depth: Value, values: Value, *, axis: int) -> Tensor:
    """Off and on values, on where the index along the new axis is the given one."""
    places, pair = tensors((indices, values))
    count = single(depth)
    axis = axis if axis >= 0 else axis + places.ndim + 1
    wanted = places.to(torch.int64).unsqueeze(axis)
    wanted = torch.where(wanted < 0, wanted + count, wanted)
    numbers = torch.arange(count, device=places.device).reshape(-1, *(1,) * (places.ndim - axis))
    return torch.where(wanted == numbers, pair[1], pair[0])


def pad(a: Value, pads: Value, value: Value | None, axes: Value | None, *, mode: str) -> Tensor:
    """Begin pads of every axis, then end pads; negative ones crop."""
    x, widths = tensor(a), ints(pads)
    along = tuple(axis % x.ndim for axis in ints(axes)) if axes is not None else tuple(range(x.ndim))
    half = len(widths) // 2
    before, after = dict(zip(along, widths[:half], strict=True)), dict(zip(along, widths[half:], strict=True))
    if mode == "constant":
        number = 0 if value is None else value if not isinstance(value, tuple) else value[0]
        if isinstance(number, Tensor):
            raise Unsupported("pads with a value that is computed")
        order = [width for axis in reversed(range(x.ndim)) for width in (before.get(axis, 0), after.get(axis, 0))]
        return functional.pad(x, order, value=number)
    for axis in range(x.ndim):
        x = _pad_by_index(x, axis, before.get(axis, 0), after.get(axis, 0), mode)
    return x


def _pad_by_index(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Along one axis: where each element comes from."""
    if before == 0 and after == 0:
        return x
    length = x.shape[axis]
    places = torch.arange(-before, length + after, device=x.device)
    if mode == "edge":
        places = places.clamp(0, length - 1)
    elif mode == "wrap":
        places = places.remainder(length)
    elif mode == "reflect":
        period = 2 * (length - 1) or 1
        places = places.remainder(period)
        places = torch.where(places < length, places, period - places)
    else:
        raise Unsupported(f"pads in mode {mode!r}")
    return x.index_select(axis, places)


def _counted(indices: Tensor, length: int) -> Tensor:
    """Negative indices count from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + length, indices)


# --- builders ---------------------------------------------------------------------------------------------------


def build_slice(node: Node) -> Any:
    """Attributes before opset 10, inputs after."""
    if node.since < 10:
        options = [node.attribute(name) for name in ("starts", "ends", "axes")]
        return node.call(slice_, node.value(0), *options, None)
    options = [node.value(position) if node.has(position) else None for position in (1, 2, 3, 4)]
    return node.call(slice_, node.value(0), *options)


def build_gather(node: Node) -> Any:
    """Rows of a constant table are an embedding."""
    axis = node.attribute("axis", 0)
    table, indices = node.constant(0), node.value(1)
    if (
        table is None
        or isinstance(indices, Constant | int | tuple)
        or table.tensor.ndim != 2
        or axis % 2
        or not node.builder.is_weight(table)
    ):
        return node.call(gather, node.value(0), indices, axis=axis)
    rows, width = table.tensor.shape
    with torch.device("meta"):
        layer = torch.nn.Embedding(rows, width)
    path, output = node.layer(layer, 0, node.call(whole_indices, indices))
    node.assign(path, "weight", 0)
    return output


def whole_indices(indices: Value) -> Tensor:
    """Indices as a table takes them."""
    return tensor(indices).to(torch.int64)


def build_gather_elements(node: Node) -> Any:
    return node.call(gather_elements, node.tensor(0), node.tensor(1), axis=node.attribute("axis", 0))


def build_gather_nd(node: Node) -> Any:
    if node.attribute("batch_dims", 0):
        raise Unsupported("gathers along batch dimensions")
    return node.call(gather_nd, *node.values())


def build_scatter_elements(node: Node) -> Any:
    options = {"axis": node.attribute("axis", 0), "reduction": node.attribute("reduction", "none")}
    return node.call(scatter_elements, *node.values(), **options)


def build_scatter_nd(node: Node) -> Any:
    reduction = node.attribute("reduction", "none")
    if reduction not in ("none", "add"):
        raise Unsupported(f"scatters with reduction {reduction!r}")
    return node.call(scatter_nd, *node.values(), reduction=reduction)


def build_one_hot(node: Node) -> Any:
    return node.call(one_hot, *node.values(), axis=node.attribute("axis", -1))


def build_pad(node: Node) -> Any:
    """Attributes before opset 11, inputs after."""
    mode = node.attribute("mode", "constant")
    if node.since < 11:
        return node.call(pad, node.value(0), node.attribute("pads"), node.attribute("value", 0.0), None, mode=mode)
    options = [node.value(position) if node.has(position) else None for position in (1, 2, 3)]
    return node.call(pad, node.value(0), *options, mode=mode)
