"""Operators that normalize, with a factor and a bias for each channel."""

from __future__ import annotations

from typing import Any

from worker.structure.tracing.classes import NONE
from worker.structure.tracing.labels import Labels, Weight
from worker.structure.tracing.movement import listed
from worker.structure.tracing.tracer import Tracer, unknown

BATCH_NORMS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm",
)  # fmt: skip
LAYER_NORMS = ("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")


def batch_norm(tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """[batch, channels, …] with a number a channel of everything else."""
    labels = tracer.labels(args[0])
    for one in args[1:5]:
        weight = tracer.of(one)
        if isinstance(weight, Weight):
            _tie_channels(tracer, weight, labels)
    tracer.give(listed(out)[0], labels)


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
    tracer.give(listed(out)[0], labels)


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
    tracer.give(listed(out)[0], labels)


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


def _tie_channels(tracer: Tracer, weight: Weight, labels: Labels | None) -> None:
    if labels is None:
        tracer.freeze(weight)
        return
    channels = tracer.layout.only(labels, 1, tracer.why)
    tracer.classes.unite(weight.dims[0], channels)
    tracer.classes.freeze(weight.dims[0][channels == NONE], tracer.why)
