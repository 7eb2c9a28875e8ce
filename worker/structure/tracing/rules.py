"""What each operator of torch says about the labels of what it takes: which go on, which are the same, which stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker.structure.tracing.classes import NONE
from worker.structure.tracing.labels import Labels, Weight, together
from worker.structure.tracing.products import addmm, baddbmm, bmm, convolution, embedding, mm
from worker.structure.tracing.tracer import Rule, Tracer, replaced, tensors

_MOVING = [
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "unsqueeze",
    "squeeze",
    "expand",
    "expand_as",
    "repeat",
    "slice",
    "select",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
    "chunk",
    "unbind",
    "cat",
    "stack",
    "clone",
    "detach",
    "alias",
    "index",
    "index_select",
    "gather",
    "roll",
    "flip",
    "pixel_shuffle",
    "pixel_unshuffle",
    "im2col",
    "unfold",
    "diagonal",
    "narrow",
]
_VIEWS = ("view", "_unsafe_view", "_reshape_alias")
_SPATIAL = [
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_avg_pool1d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "grid_sampler_2d",
]
_REDUCING = [
    "mean",
    "sum",
    "amax",
    "amin",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "linalg_vector_norm",
    "norm",
    "logsumexp",
    "any",
    "all",
    "nansum",
]
_SAME = [
    "as_strided_",
    "softmax",
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "_to_copy",
    "to",
    "contiguous",
    "native_dropout",
    "lift_fresh",
    "_conj",
]
_ALONG = [
    "max",
    "min",
    "argmax",
    "argmin",
    "cumsum",
    "cumprod",
    "sort",
    "topk",
    "median",
    "mode",
    "logcumsumexp",
]  # an order, not a set
_BATCH_NORMS = [
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
]
_LAYER_NORMS = ("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")


def unknown(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """An operator of which nothing is known: all that comes in stays."""
    tracer.freeze(*(tracer.of(one) for one in tensors((args, kwargs))))
    for one in tensors(out):
        tracer.give(one, None)


def moving(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The same numbers in another place: labels go where these do."""
    given = tensors((args, kwargs))
    if len(given) == 1 and isinstance(own := tracer.of(given[0]), Weight):
        moved = _moved_weight(tracer, own)
        if moved is not None and isinstance(out, Tensor):
            tracer.give(out, moved)
            return
    indices = tensors(args[1:]) if tracer.operator in ("index", "index_select", "gather") else []
    if any(tracer.of(one) is not None for one in indices):
        unknown(tracer, args, kwargs, out)
        return

    def labelled(one: Tensor) -> Tensor:
        if any(one is index for index in indices):
            return one
        labels = tracer.labels(one)
        return torch.zeros((), dtype=torch.int64).expand(one.shape) if labels is None else labels

    own_args = args[:2] if tracer.operator in _VIEWS else args
    operator = getattr(torch.ops.aten, "reshape" if tracer.operator in _VIEWS else tracer.operator)
    found = operator(*replaced(own_args, labelled), **replaced(kwargs, labelled))
    for one, labels in zip(_listed(out), _listed(found), strict=True):
        if tracer.operator in ("cat", "stack"):
            _joined(tracer, labels, args)
        tracer.give(one, labels)
        if len(labels.shape) != len(given[0].shape) or labels.shape != given[0].shape:
            tracer.layout.remember(labels)


def padding(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Along channels what is put there is none; elsewhere it is of the channel that it is put to."""
    labels = tracer.labels(args[0])
    if labels is None:
        return
    varying = tracer.layout.varying(labels)
    for back in range(len(args[1]) // 2):
        dim = labels.ndim - 1 - back
        if dim not in varying:
            shape = list(labels.shape)
            shape[dim] = out.shape[dim]
            labels = labels.narrow(dim, 0, 1).expand(shape)
            continue
        before, behind = args[1][2 * back : 2 * back + 2]
        pad = [0, 0] * back + [before, behind]
        labels = torch.constant_pad_nd(labels, pad, NONE)
    tracer.give(out, labels)


def _joined(tracer: Tracer, labels: Labels, args: tuple[Any, ...]) -> None:
    """Tensors in a row are all as long as each other along other dimensions."""
    dim = (args[1] if len(args) > 1 else 0) % labels.ndim
    if any(own != dim for own in tracer.layout.varying(labels)):
        tracer.layout.merge(labels, dim)


def _listed(value: Any) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _moved_weight(tracer: Tracer, weight: Weight) -> Weight | None:
    """A parameter seen otherwise, dimension by dimension; None where that is more than this can say."""
    dims, given = weight.dims, tracer.given
    match tracer.operator:
        case "t" | "numpy_T" | "mT":
            return Weight((*dims[:-2], *dims[-2:][::-1]))
        case "transpose":
            order = list(range(len(dims)))
            one, other = (given[name] % len(dims) for name in ("dim0", "dim1"))
            order[one], order[other] = order[other], order[one]
            return Weight(tuple(dims[place] for place in order))
        case "permute":
            return Weight(tuple(dims[place] for place in given["dims"]))
        case "detach" | "alias" | "clone":
            return weight
        case "unsqueeze":
            place = given["dim"] % (len(dims) + 1)
            return Weight((*dims[:place], torch.zeros(1, dtype=torch.int64), *dims[place:]))
        case "slice":
            dim = given["dim"] % len(dims)
            own = dims[dim][given["start"] : given["end"] : given["step"]]
            return Weight((*dims[:dim], own, *dims[dim + 1 :]))
    return None


def same(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A tensor of the first's shape, each place of which belongs to the same channel."""
    first = out if isinstance(out, Tensor) else out[0]
    tracer.give(first, tracer.of(args[0]))


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


def reducing(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Over some dimensions, or all: what channels are left, behind a dimension of channels none."""
    labels = tracer.labels(args[0])
    if labels is None:
        return
    asked = tracer.given.get("dim")
    dims = [asked] if isinstance(asked, int) else list(asked or range(labels.ndim))
    over = {dim % labels.ndim for dim in dims}
    varying = tracer.layout.varying(labels)
    if len(varying) > 1 and over & set(varying):
        tracer.layout.keep_outermost(labels)
        varying = tracer.layout.varying(labels)
    for one in _listed(out):
        if over & set(varying):
            tracer.give(one, None)
            continue
        kept = labels
        for dim in sorted(over, reverse=True):
            kept = kept.narrow(dim, 0, 1) if one.ndim == labels.ndim else kept.select(dim, 0)
        tracer.give(one, kept if kept.shape == one.shape else None)


def along(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What looks at an order along a dimension, which has to stay."""
    labels = tracer.labels(args[0])
    dim = tracer.given.get("dim")
    if labels is None or dim is None or dim % labels.ndim in tracer.layout.varying(labels):
        unknown(tracer, args, kwargs, out)
        return
    for one in _listed(out):
        if one.shape == labels.shape:
            tracer.give(one, labels)
        elif one.ndim == labels.ndim:
            tracer.give(one, labels.narrow(dim, 0, 1).expand(one.shape))
        else:
            tracer.give(one, labels.select(dim, 0))


def spatial(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What computes within each channel, [batch, channels, …]."""
    labels = tracer.labels(args[0])
    first = _listed(out)[0]
    if labels is None:
        return
    inside = [dim for dim in tracer.layout.varying(labels) if labels.shape[dim] != first.shape[dim] or dim > 1]
    if inside:
        unknown(tracer, args, kwargs, out)
        return
    for dim in range(2, labels.ndim):
        labels = labels.narrow(dim, 0, 1)
    tracer.give(first, labels.expand(first.shape))


def batch_norm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """[batch, channels, …] with a number a channel of everything else."""
    labels = tracer.labels(args[0])
    for one in args[1:5]:
        weight = tracer.of(one)
        if isinstance(weight, Weight):
            _tie_channels(tracer, weight, labels)
    tracer.give(_listed(out)[0], labels)


def _tie_channels(tracer: Tracer, weight: Weight, labels: Labels | None) -> None:
    if labels is None:
        tracer.freeze(weight)
        return
    channels = tracer.layout.only(labels, 1, tracer.why)
    tracer.classes.unite(weight.dims[0], channels)
    tracer.classes.freeze(weight.dims[0][channels == NONE], tracer.why)


def layer_norm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Over the last dimensions, with numbers for each of their places."""
    labels = tracer.labels(args[0])
    for one in args[2:4]:
        weight = tracer.of(one)
        if isinstance(weight, Weight):
            if labels is None:
                tracer.freeze(weight)
            else:
                tracer.layout.tie(weight, labels, tracer.why)
    tracer.give(_listed(out)[0], labels)


def group_norm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The number of groups stays, and of all of them the same channel goes; unless each is one channel."""
    labels = tracer.labels(args[0])
    groups = args[6]
    for weight in (tracer.of(one) for one in args[1:3]):
        if isinstance(weight, Weight):
            _tie_channels(tracer, weight, labels)
    if labels is not None:
        channels = tracer.layout.only(labels, 1, tracer.why)
        if len(channels) > groups:
            tracer.layout.merge(channels.reshape(groups, -1), 0)
    tracer.give(_listed(out)[0], labels)


def weight_norm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A direction in the weight's shape, and a length along one of its dimensions."""
    direction, length = (tracer.of(one) for one in args[:2])
    if not isinstance(direction, Weight) or not isinstance(length, Weight):
        unknown(tracer, args, kwargs, out)
        return
    for own, other in zip(direction.dims, length.dims, strict=True):
        if len(own) == len(other):
            tracer.classes.unite(own, other)
    tracer.give(out[0], direction)


def copying(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Into a tensor: into its labels, which share memory as its views do."""
    into, labels = tracer.of(args[0]), tracer.labels(args[1])
    if isinstance(into, Tensor) and labels is not None and labels.shape == into.shape:
        pointwise_fill = torch.where(labels != NONE, labels, into)
        into.copy_(pointwise_fill)
        tracer.freeze(into)
        return
    unknown(tracer, args, kwargs, out)


def filling(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """New tensors, of which only the shape is another's: that is no constant then."""
    carried = tracer.of(args[0])
    tracer.give(out, carried if isinstance(carried, Tensor) and out.shape == args[0].shape else None)


RULES: dict[str, Rule] = {
    "pointwise": pointwise,
    **dict.fromkeys(_MOVING, moving),
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(_REDUCING, reducing),
    **dict.fromkeys(_ALONG, along),
    **dict.fromkeys(_BATCH_NORMS, batch_norm),
    **dict.fromkeys(_LAYER_NORMS, layer_norm),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like"), filling),
    "constant_pad_nd": padding,
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    "copy_": copying,
    "mm": mm,
    "addmm": addmm,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "convolution": convolution,
    "convolution_overrideable": convolution,
    "embedding": embedding,
}
