"""What products say about labels: along what is summed both sides are the same; each side gives its other ones on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from worker.structure.tracing.classes import NONE
from worker.structure.tracing.labels import Carried, Labels, Weight, spread
from worker.structure.tracing.tracer import Tracer


def mm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """[m, k] x [k, n]."""
    tracer.give(out, _product(tracer, tracer.of(args[0]), tracer.of(args[1]), args[0], args[1], out))


bmm = mm


def addmm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """The same, and a bias for each of n."""
    bias, left, right = args[:3]
    labels = _product(tracer, tracer.of(left), tracer.of(right), left, right, out)
    _bias(tracer, tracer.of(bias), labels)
    tracer.give(out, labels)


baddbmm = addmm


def _bias(tracer: Tracer, bias: Carried, labels: Labels | None) -> None:
    if isinstance(bias, Weight):
        if labels is None:
            tracer.freeze(bias)
        else:
            tracer.layout.tie(bias, labels, tracer.why)
    elif bias is not None:
        if labels is not None and bias.shape == labels.shape:
            tracer.classes.unite(bias.reshape(-1), labels.reshape(-1))
        tracer.freeze(bias, labels)


def _product(tracer: Tracer, left: Carried, right: Carried, one: Tensor, other: Tensor, out: Tensor) -> Labels | None:
    """Of matrices, or batches of them. What has no labels along what is summed is of a size that stays."""
    summed = one.ndim - 1, other.ndim - 2
    sides = []
    for carried, over in ((left, summed[0]), (right, summed[1])):
        if isinstance(carried, Tensor):
            tracer.layout.keep_outermost(carried)
        sides.append(_Side(tracer, carried, over))
    a, b = sides
    if a.summed is not None and b.summed is not None:
        tracer.classes.unite(a.summed, b.summed)
        tracer.classes.freeze(a.summed[b.summed == NONE], tracer.why)
        tracer.classes.freeze(b.summed[a.summed == NONE], tracer.why)
    else:
        for own in (a.summed, b.summed):
            if own is not None:
                tracer.classes.freeze(own, tracer.why)
    return _given(tracer, a, b, out)


class _Side:
    """What one operand has along the summed dimension, `summed`, along that which it gives on, `given`, and along the
    batch."""

    def __init__(self, tracer: Tracer, carried: Carried, over: int) -> None:
        self.summed: Tensor | None = None
        self.given: Tensor | None = None
        self.batch: Tensor | None = None
        self.is_weight = isinstance(carried, Weight)
        if carried is None:
            return
        rank = len(carried.shape)
        on = rank - 1 if over == rank - 2 else rank - 2
        if isinstance(carried, Weight):
            self.summed, self.given = carried.dims[over], carried.dims[on]
            if rank == 3 and len(carried.dims[0]) > 1:
                tracer.classes.freeze(carried.dims[0], tracer.why)
            return
        varying = tracer.layout.varying(carried)
        for dim in varying:
            own = tracer.layout.along(carried, dim)
            if dim == over:
                self.summed = own
            elif dim == on:
                self.given = own
            else:
                self.batch = own


def _given(tracer: Tracer, a: _Side, b: _Side, out: Tensor) -> Labels | None:
    """What lies along one dimension of the product: the batch's, or what an activation brings, or a weight makes. What
    would lie along another one stays."""
    sides = [(own, dim) for own, dim in ((a, out.ndim - 2), (b, out.ndim - 1)) if own.given is not None]
    brought = [one for one in sides if not one[0].is_weight] or sides
    kept, dim, made = None, 0, False
    if a.batch is not None or b.batch is not None:
        kept = _batch(tracer, a.batch, b.batch)
    elif len(brought) == 1:
        side, dim = brought[0]
        kept, made = side.given, side.is_weight
    for own, _ in sides:
        if own.given is not None and own.given is not kept:
            tracer.classes.freeze(own.given, tracer.why)
    if kept is None:
        return None
    if made:
        tracer.trace.made.append(kept)
    return spread(kept, dim, out.shape)


def _batch(tracer: Tracer, one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Both have as many: where one is no row of channels, the other has to stay."""
    if one is not None and other is not None:
        tracer.classes.unite(one, other)
        return one
    kept = other if one is None else one
    if kept is not None:
        tracer.classes.freeze(kept, tracer.why)
    return kept


def convolution(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """[batch, channels, …], in groups or not, transposed or not."""
    given, kernel, bias, _, _, _, transposed, _, groups = args[:9]
    labels, weight = tracer.labels(given), tracer.of(kernel)
    if not isinstance(weight, Weight):
        tracer.freeze(labels, weight, tracer.of(bias))
        tracer.give(out, None)
        return
    for dim in weight.dims[2:]:
        tracer.classes.freeze(dim, tracer.why)
    channels = torch.zeros(given.shape[1], dtype=torch.int64)
    if labels is not None:
        channels = tracer.layout.only(labels, 1, tracer.why)
    made = _grouped(tracer, weight, channels, groups, transposed)
    if isinstance(own := tracer.of(bias), Weight):
        tracer.classes.unite(own.dims[0], made)
    tracer.trace.made.append(made)
    tracer.give(out, spread(made, 1, out.shape))


def _grouped(tracer: Tracer, weight: Weight, channels: Tensor, groups: int, transposed: bool) -> Tensor:
    """The labels of what a convolution gives. In groups the same goes of each of them, but where every channel is a
    group of its own: there an output goes with its input."""
    first, second = weight.dims[:2]
    inputs, outputs = (first, second) if transposed else (second, first)
    if groups == 1:
        _read(tracer, inputs, channels)
        return outputs
    coming = channels.reshape(groups, -1)
    if transposed:
        _read(tracer, inputs, channels)
        going = outputs.repeat(groups)
    else:
        going = outputs
        if coming.shape[1] > 1:
            for own in coming:
                _read(tracer, inputs, own)
        else:
            tracer.classes.freeze(inputs, tracer.why)
    if coming.shape[1] == 1 and not transposed:
        _read(tracer, going, coming.expand(-1, len(going) // groups).reshape(-1))
        return going
    tracer.layout.merge(coming, 0)
    tracer.layout.merge(going.reshape(groups, -1), 0)
    return going


def _read(tracer: Tracer, inputs: Tensor, channels: Tensor) -> None:
    tracer.classes.unite(inputs, channels)
    tracer.classes.freeze(inputs[channels == NONE], tracer.why)


def embedding(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A row of the table for each index."""
    weight = tracer.of(args[0])
    if not isinstance(weight, Weight):
        tracer.freeze(weight)
        tracer.give(out, None)
        return
    tracer.classes.freeze(weight.dims[0], "it is looked up in")
    tracer.trace.made.append(weight.dims[1])
    tracer.give(out, spread(weight.dims[1], out.ndim - 1, out.shape))
