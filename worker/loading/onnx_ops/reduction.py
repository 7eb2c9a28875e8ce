"""Sums, means, maxima and sorting along axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worker.loading.onnx_ops.host import Value, ints, single, tensor
from worker.loading.onnx_ops.node import Node

_FUNCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda a, axes, keep: a.sum(axes, keepdim=keep).to(a.dtype),
    "ReduceMean": lambda a, axes, keep: (
        a.mean(axes, keepdim=keep) if a.is_floating_point() else a.float().mean(axes, keepdim=keep).to(a.dtype)
    ),
    "ReduceMax": lambda a, axes, keep: a.amax(axes, keepdim=keep),
    "ReduceMin": lambda a, axes, keep: a.amin(axes, keepdim=keep),
    "ReduceL1": lambda a, axes, keep: a.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda a, axes, keep: a.square().sum(axes, keepdim=keep).sqrt(),
    "ReduceSumSquare": lambda a, axes, keep: a.square().sum(axes, keepdim=keep),
    "ReduceLogSum": lambda a, axes, keep: a.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda a, axes, keep: a.logsumexp(axes, keepdim=keep),
}


def reduce(a: Value, axes: Value | None, *, kind: str, keep: bool, nothing: bool) -> Value:
    """Over the axes; over all where none are given, or over none where `nothing` says so."""
    if not isinstance(a, Tensor) and kind == "ReduceProd" and isinstance(a, tuple):
        return (math.prod(a),) if keep else math.prod(a)
    x = tensor(a)
    along = sorted(axis % x.ndim for axis in ints(axes)) if axes is not None else []
    if not along:
        if nothing:
            return x
        along = list(range(x.ndim))
    if kind != "ReduceProd":
        return _FUNCTIONS[kind](x, along, keep)
    for axis in reversed(along):
        x = x.prod(axis, keepdim=keep).to(x.dtype)
    return x


def extreme_place(a: Tensor, *, axis: int, keep: bool, largest: bool, last: bool) -> Tensor:
    """Where the largest or smallest element is; of equal ones the first, or the last."""
    x = torch.flip(a, (axis,)) if last else a
    places = x.argmax(axis, keepdim=keep) if largest else x.argmin(axis, keepdim=keep)
    return a.shape[axis] - 1 - places if last else places


def top(a: Tensor, count: Value, *, axis: int, largest: bool, ordered: bool) -> tuple[Tensor, Tensor]:
    """The largest or smallest elements along an axis, and where they are."""
    values, places = torch.topk(a, single(count), dim=axis, largest=largest, sorted=ordered)
    return values, places


# --- builders ---------------------------------------------------------------------------------------------------


def build_reduce(node: Node) -> Any:
    """Axes are an attribute until opset 12 (ReduceSum) or 17 (the others), an input after."""
    return node.call(
        reduce,
        node.value(0),
        node.ints("axes", 1),
        kind=node.op,
        keep=bool(node.attribute("keepdims", 1)),
        nothing=bool(node.attribute("noop_with_empty_axes", 0)),
    )


def build_extreme_place(node: Node) -> Any:
    return node.call(
        extreme_place,
        node.tensor(0),
        axis=node.attribute("axis", 0),
        keep=bool(node.attribute("keepdims", 1)),
        largest=node.op == "ArgMax",
        last=bool(node.attribute("select_last_index", 0)),
    )


def build_top(node: Node) -> Any:
    count = node.value(1) if node.has(1) else node.attribute("k")
    found = node.call(
        top,
        node.tensor(0),
        count,
        axis=node.attribute("axis", -1),
        largest=bool(node.attribute("largest", 1)),
        ordered=bool(node.attribute("sorted", 1)),
    )
    return node.parts(found, 2)
