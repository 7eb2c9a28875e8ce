"""Operators that move numbers: labels go where these do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker.structure.tracing.classes import NONE
from worker.structure.tracing.labels import Labels, Weight
from worker.structure.tracing.tracer import Tracer, replaced, tensors, unknown

MOVING = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "numpy_T", "mT",
    "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "slice", "select", "split", "split_with_sizes",
    "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "chunk", "unbind", "cat", "stack", "clone",
    "detach", "alias", "index", "index_select", "gather", "roll", "flip", "pixel_shuffle", "pixel_unshuffle",
    "im2col", "unfold", "diagonal", "narrow",
    "transpose_", "t_", "squeeze_", "unsqueeze_", "swapaxes_",
)  # fmt: skip
_VIEWS = ("view", "_unsafe_view", "_reshape_alias")


def moving(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The same numbers in another place: labels go where these do."""
    given = tensors((args, kwargs))
    if len(given) == 1 and isinstance(own := tracer.of(given[0]), Weight):
        moved = _moved_weight(tracer, own)
        if moved is not None and isinstance(out, Tensor):
            tracer.give(out, moved)
            return
    operator = tracer.operator.removesuffix("_")  # in place or not
    indices = tensors(args[1:]) if tracer.operator in ("index", "index_select", "gather") else []
    if any(tracer.of(one) is not None for one in indices):
        unknown(tracer, args, kwargs, out)
        return

    def labelled(one: Tensor) -> Tensor:
        if any(one is index for index in indices):
            return one.cpu()
        labels = tracer.labels(one)
        return torch.zeros((), dtype=torch.int64).expand(one.shape) if labels is None else labels

    own_args = args[:2] if tracer.operator in _VIEWS else args
    move = getattr(torch.ops.aten, "reshape" if operator in _VIEWS else operator)
    try:
        found = move(*replaced(own_args, labelled), **replaced(kwargs, labelled))
    except (NotImplementedError, RuntimeError):  # some operators are for floats alone
        unknown(tracer, args, kwargs, out)
        return
    for one, labels in zip(listed(out), listed(found), strict=True):
        if tracer.operator in ("cat", "stack"):
            _joined(tracer, labels, args)
        tracer.give(one, labels)
        if labels.shape != given[0].shape:
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


def glu(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Two halves, of which one gates the other."""
    labels = tracer.labels(args[0])
    if labels is not None:
        first, second = labels.chunk(2, tracer.given["dim"])
        tracer.classes.unite(first.reshape(-1), second.reshape(-1))
        tracer.give(out, first)


def _joined(tracer: Tracer, labels: Labels, args: tuple[Any, ...]) -> None:
    """Tensors in a row are all as long as each other along other dimensions."""
    dim = (args[1] if len(args) > 1 else 0) % labels.ndim
    if any(own != dim for own in tracer.layout.varying(labels)):
        tracer.layout.merge(labels, dim)


def _moved_weight(tracer: Tracer, weight: Weight) -> Weight | None:
    """A parameter seen otherwise, dimension by dimension; None where that is more than this can say."""
    dims, given = weight.dims, tracer.given
    match tracer.operator.removesuffix("_"):
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


def listed(value: Any) -> Sequence[Tensor]:
    """What an operator gives, as a row."""
    return [value] if isinstance(value, Tensor) else list(value)
