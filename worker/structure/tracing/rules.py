"""What each operator of torch says about the labels of what it takes: which go on, which are the same, which stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from worker.structure.tracing.classes import NONE
from worker.structure.tracing.labels import Labels, Weight, together
from worker.structure.tracing.movement import MOVING, glu, listed, moving, padding
from worker.structure.tracing.norms import BATCH_NORMS, LAYER_NORMS, batch_norm, group_norm, layer_norm, weight_norm
from worker.structure.tracing.products import addmm, baddbmm, bmm, convolution, embedding, mm
from worker.structure.tracing.reductions import ALONG, REDUCING, along, reducing
from worker.structure.tracing.tracer import Rule, Tracer, tensors, unknown

_SPATIAL = (
    "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_max_pool1d", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "upsample_trilinear3d", "_upsample_bilinear2d_aa", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "grid_sampler_2d",
)  # fmt: skip
_SAME = (
    "as_strided_", "softmax", "_softmax", "_log_softmax", "_safe_softmax", "_to_copy", "to", "contiguous",
    "native_dropout", "lift_fresh", "_conj",
)  # fmt: skip


def same(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A tensor of the first's shape, each place of which belongs to the same channel."""
    first, carried = out if isinstance(out, Tensor) else out[0], tracer.of(args[0])
    if carried is not None and tuple(carried.shape) != tuple(first.shape):
        unknown(tracer, args, kwargs, out)
        return
    tracer.give(first, carried)


def pointwise(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Operands are broadcast to one shape, and what meets at one place is of one channel."""
    given = [one for one in tensors((args, kwargs)) if one.ndim]
    if not isinstance(out, Tensor):
        unknown(tracer, args, kwargs, out)
        return
    weights = [own for one in given if isinstance(own := tracer.of(one), Weight)]
    if len(weights) == len(given) == 1:
        tracer.give(out, weights[0])
        return
    found: Labels | None = None
    for one in given:
        own = tracer.of(one)
        if isinstance(own, Tensor):
            found = _met(tracer, found, own.expand(out.shape))
    if found is None and weights:  # nothing but parameters and numbers
        found = tracer.layout.activation(weights.pop(), tracer.why).expand(out.shape)
    if found is None:
        tracer.give(out, None)
        return
    for weight in weights:
        tracer.layout.tie(weight, found, tracer.why)
    for one in given:
        if tracer.of(one) is None:
            _fixed(tracer, found, one)
    tracer.give(out, found)


def _met(tracer: Tracer, found: Labels | None, own: Labels) -> Labels:
    if found is None:
        return own
    shape = found.shape
    found, own = together(found, own)
    tracer.classes.unite(found.reshape(-1), own.reshape(-1))
    for one, other in ((found, own), (own, found)):
        alone = (one != NONE) & (other == NONE)
        # What lies at the same places along a dimension of size 1 was broadcast, and says nothing.
        if bool(alone.any()) and _reaches(tracer, one, other):
            tracer.classes.freeze(one[alone], tracer.why)
    return torch.where(found != NONE, found, own).expand(shape)


def _reaches(tracer: Tracer, one: Labels, other: Labels) -> bool:
    """Whether the other is no broadcast along what the first varies along."""
    return any(other.stride(dim) != 0 for dim in tracer.layout.varying(one))


def _fixed(tracer: Tracer, labels: Labels, one: Tensor) -> None:
    """A tensor without labels has a size of its own along the dimensions that it has."""
    for back, size in enumerate(reversed(one.shape), 1):
        dim = labels.ndim - back
        if size > 1 and dim in tracer.layout.varying(labels):
            tracer.layout.merge_or_freeze(labels, dim, tracer.why)


def spatial(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What computes within each channel, [batch, channels, …]."""
    labels = tracer.labels(args[0])
    first = listed(out)[0]
    if labels is None:
        return
    inside = [dim for dim in tracer.layout.varying(labels) if labels.shape[dim] != first.shape[dim] or dim > 1]
    if inside:
        unknown(tracer, args, kwargs, out)
        return
    for dim in range(2, labels.ndim):
        labels = labels.narrow(dim, 0, 1)
    tracer.give(first, labels.expand(first.shape))


def copying(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Into a tensor: into its labels, which share memory as its views do."""
    into, labels = tracer.of(args[0]), tracer.labels(args[1])
    if isinstance(into, Tensor) and labels is not None and labels.shape == into.shape:
        into.copy_(torch.where(labels != NONE, labels, into))
        tracer.freeze(into)
        return
    unknown(tracer, args, kwargs, out)


def filling(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """New tensors, of which only the shape is another's: that is no constant then."""
    carried = tracer.of(args[0])
    tracer.give(out, carried if isinstance(carried, Tensor) and out.shape == args[0].shape else None)


RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    **dict.fromkeys(MOVING, moving),
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(REDUCING, reducing),
    **dict.fromkeys(ALONG, along),
    **dict.fromkeys(BATCH_NORMS, batch_norm),
    **dict.fromkeys(LAYER_NORMS, layer_norm),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like"), filling),
    "constant_pad_nd": padding,
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    "copy_": copying,
    "_prelu_kernel": pointwise,
    "glu": glu,
    "mm": mm,
    "addmm": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "convolution": convolution,
    "convolution_overrideable": convolution,
    "embedding": embedding,
}
