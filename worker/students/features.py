"""What each layer of the allow-list makes of the features it sees, for networks that are to be made narrower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor, nn

from worker.students.widths import Axis, Edit, Run, Slice, Widths

Handler: TypeAlias = "Callable[[Widths, str, nn.Module, Axis, Shapes], Axis]"
Shapes: TypeAlias = "Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]"
"""The shapes of what goes into each layer and of what it gives, by its name."""


def linear(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """The features are the last axis: of anything but rows and sequences, something else is."""
    assert isinstance(layer, nn.Linear)
    shape = shapes[name][0]
    if len(shape) > 3:
        widths.keep_whole(axis)
        return None
    axis = widths.seen(axis, shape, last=True)
    return _weighted(widths, name, layer, axis, (1, 0), ("in_features", "out_features"), last=True)


def convolution(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """Plain ones make features of their own; depthwise ones keep those they see; others stay as they are."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    axis = widths.seen(axis, shapes[name][0], last=False)
    arguments = ("in_channels", "out_channels")
    if layer.groups == 1:
        dims = (0, 1) if layer.transposed else (1, 0)
        return _weighted(widths, name, layer, axis, dims, arguments, last=False)
    if layer.groups == layer.in_channels == layer.out_channels:
        widths.slices += [Slice(f"{name}.weight", 0, axis), *_bias(name, layer, axis)]
        widths.edits += [Edit(name, argument, axis) for argument in (*arguments, "groups")]
        return axis
    widths.keep_whole(axis)
    return None


def batch_norm(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """Each feature is judged by itself, also by instance norms."""
    axis = widths.seen(axis, shapes[name][0], last=False)
    return _normed(widths, name, axis, "num_features")


def layer_norm(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """The last axis is judged as a whole; with more axes than that, everything stays."""
    assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
    if len(layer.normalized_shape) > 1 or len(shapes[name][0]) > 3:
        widths.keep_whole(axis)
        return None
    return _normed(widths, name, widths.seen(axis, shapes[name][0], last=True), "normalized_shape")


def embedding(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """The features of a token."""
    assert isinstance(layer, nn.Embedding)
    out = widths.new(layer.embedding_dim, last=True)
    widths.slices.append(Slice(f"{name}.weight", 1, out, scores=True))
    widths.edits.append(Edit(name, "embedding_dim", out))
    return out


def recurrent(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """One group of hidden features for all layers and directions, which torch keeps equally wide."""
    assert isinstance(layer, nn.RNNBase)
    if layer.proj_size:
        widths.keep_whole(axis)
        return None
    axis = widths.seen(axis, shapes[name][0], last=True)
    (hidden,) = widths.new(layer.hidden_size, last=True)
    gates = (hidden,) * (4 if isinstance(layer, nn.LSTM) else 3)
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    out = (hidden,) * len(directions)
    for depth in range(layer.num_layers):
        for end in (f"l{depth}{direction}" for direction in directions):
            widths.slices += [
                Slice(f"{name}.weight_ih_{end}", 0, gates, scores=True),
                Slice(f"{name}.weight_ih_{end}", 1, axis if depth == 0 else out),
                Slice(f"{name}.weight_hh_{end}", 0, gates, scores=True),
                Slice(f"{name}.weight_hh_{end}", 1, (hidden,)),
                Slice(f"{name}.bias_ih_{end}", 0, gates),
                Slice(f"{name}.bias_hh_{end}", 0, gates),
            ]
    widths.edits += [Edit(name, "input_size", axis), Edit(name, "hidden_size", (hidden,))]
    return out


def encoder_layer(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """The inner features alone: those between the layers are divided among the heads."""
    assert isinstance(layer, nn.TransformerEncoderLayer)
    widths.keep_whole(axis)
    inner = widths.new(layer.linear1.out_features, last=True)
    widths.slices += [
        Slice(f"{name}.linear1.weight", 0, inner, scores=True),
        Slice(f"{name}.linear1.bias", 0, inner),
        Slice(f"{name}.linear2.weight", 1, inner, scores=True),
    ]
    widths.edits.append(Edit(name, "dim_feedforward", inner))
    return None


def flatten(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """Channels become runs of their positions; the features of a sequence come once a step."""
    assert isinstance(layer, nn.Flatten)
    before, after = shapes[name]
    if axis is None or before == after:
        return axis
    if layer.start_dim != 1 or len(after) != 2:
        widths.keep_whole(axis)
        return None
    length = sum(map(widths.length, axis))
    if all(run.last for run in axis):
        return axis * (after[1] // length)
    return tuple(Run(run.group, run.repeat * (after[1] // length)) for run in axis)


def pooling(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """What works on the positions of maps; on a sequence it would work on the features."""
    return widths.seen(axis, shapes[name][0], last=False)


def transparent(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """What works on each number by itself."""
    return axis


def unknown(widths: Widths, name: str, layer: nn.Module, axis: Axis, shapes: Shapes) -> Axis:
    """What is not known to treat features alike sees all of them."""
    widths.keep_whole(axis)
    return None


def _normed(widths: Widths, name: str, axis: Axis, argument: str) -> Axis:
    widths.slices += [Slice(f"{name}.{entry}", 0, axis) for entry in ("weight", "bias", "running_mean", "running_var")]
    widths.edits.append(Edit(name, argument, axis))
    return axis


def _weighted(
    widths: Widths,
    name: str,
    layer: nn.Module,
    axis: Axis,
    dims: tuple[int, int],
    arguments: tuple[str, str],
    *,
    last: bool,
) -> Axis:
    """`dims` and `arguments` are those of what goes in and of what comes out."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    out = widths.new(weight.shape[dims[1]], last=last)
    widths.slices += [Slice(f"{name}.weight", dims[0], axis), Slice(f"{name}.weight", dims[1], out, scores=True)]
    widths.slices += _bias(name, layer, out)
    widths.edits += [Edit(name, arguments[0], axis), Edit(name, arguments[1], out)]
    return out


def _bias(name: str, layer: nn.Module, axis: Axis) -> list[Slice]:
    return [Slice(f"{name}.bias", 0, axis)] if getattr(layer, "bias", None) is not None else []


_EACH_NUMBER = (
    *("ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh", "LogSigmoid"),
    *("Softsign", "Identity", "LeakyReLU", "ELU", "CELU", "GELU", "Hardtanh", "Softplus"),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout"),
)
_POSITIONS = (
    *(f"{kind}Pool{n}d" for kind in ("Max", "Avg", "LP", "AdaptiveAvg", "AdaptiveMax") for n in (1, 2, 3)),
    *(f"{kind}Pad{n}d" for kind in ("Zero", "Reflection", "Replication", "Circular", "Constant") for n in (1, 2, 3)),
    "Upsample",
)

HANDLERS: dict[str, Handler] = {
    "Linear": linear,
    **{f"Conv{kind}{n}d": convolution for kind in ("", "Transpose") for n in (1, 2, 3)},
    **{f"{kind}{n}d": batch_norm for kind in ("BatchNorm", "InstanceNorm") for n in (1, 2, 3)},
    **dict.fromkeys(("LayerNorm", "RMSNorm"), layer_norm),
    "Embedding": embedding,
    "LSTM": recurrent,
    "GRU": recurrent,
    "TransformerEncoderLayer": encoder_layer,
    "Flatten": flatten,
    **dict.fromkeys(_EACH_NUMBER, transparent),
    **dict.fromkeys(_POSITIONS, pooling),
}
