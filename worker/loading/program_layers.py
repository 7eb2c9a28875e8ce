"""Operators on weights as layers of torch.nn: what each rule makes of a node, and which of its arguments are weights.

A rule does not look at values. It says which module would compute what the node computes, and the names that the
module's own weights have; whether the program's weights carry these names is for `program_module` to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from worker.loading.program_graph import RANK
from worker.loading.program_nodes import arguments, is_plain, operator_name

Arguments = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A module in place of a node.

    `make` builds it on torch's default device; `key` tells two settings apart; `inputs` are the node's arguments that
    remain; `slots` are the nodes of its weights by the names that the module gives them, None where it has none.
    """

    kind: str
    key: tuple[Any, ...]
    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    slots: Mapping[str, fx.Node | None] = field(default_factory=dict)


class FeatureDropout(nn.Module):
    """Drops whole channels, or keeps mean and variance, as one of torch's functional dropouts does; off in eval."""

    def __init__(self, function: str, p: float) -> None:
        super().__init__()
        self.function = function
        self.p = p

    def forward(self, inputs: Tensor) -> Tensor:
        dropped: Tensor = getattr(torch, self.function)(inputs, self.p, self.training)
        return dropped


class Attention(nn.Module):
    """Scaled dot-product attention whose weights drop out in training."""

    def __init__(self, p: float, is_causal: bool, scale: float | None, enable_gqa: bool) -> None:
        super().__init__()
        self.p = p
        self.options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        p = self.p if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, p, **self.options)


class LSTM(nn.LSTM):
    """An LSTM that takes and gives its states one by one, as the operator does."""

    def forward(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        steps, (last_hidden, last_cell) = super().forward(inputs, (hidden, cell))
        return steps, last_hidden, last_cell


def layer_of(node: fx.Node, shapes: Mapping[str, Shape]) -> Layer | None:
    """The layer that a node is; `shapes` are those of all weights by name. None where it is none, or only partly.

    Raises KeyError, ValueError, AttributeError or the like where the arguments make no layer.
    """
    rule = _RULES.get(operator_name(node))
    return None if rule is None else rule(_Call(node, arguments(node), shapes))


@dataclass(frozen=True)
class _Call:
    node: fx.Node
    given: Arguments
    shapes: Mapping[str, Shape]

    def shape(self, name: str) -> Shape | None:
        """The shape of an argument that is a weight."""
        value = self.given[name]
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        return self.shapes[str(value.target)]

    def settings(self, *names: str) -> tuple[Any, ...] | None:
        """Arguments that are plain values, lists as tuples; None where one of them is computed."""
        values = [self.given[name] for name in names]
        if not all(map(is_plain, values)):
            return None
        return tuple(tuple(value) if isinstance(value, list | tuple) else value for value in values)

    def slots(self, *names: str) -> dict[str, fx.Node | None] | None:
        """The arguments that are weights or None; None where one of them is computed."""
        nodes = {name: self.given[name] for name in names}
        if any(node is not None and node.op != "get_attr" for node in nodes.values()):
            return None
        return nodes


def _linear(call: _Call) -> Layer | None:
    shape, slots = call.shape("weight"), call.slots("weight", "bias")
    if shape is None or slots is None or len(shape) != 2:
        return None
    bias = slots["bias"] is not None
    return Layer("Linear", (bias,), lambda: nn.Linear(shape[1], shape[0], bias=bias), (call.given["input"],), slots)


def _convolution(call: _Call) -> Layer | None:
    """conv1d … conv3d, their transposes, and the general form."""
    shape, slots = call.shape("weight"), call.slots("weight", "bias")
    settings = call.settings("stride", "padding", "dilation", "groups")
    if shape is None or slots is None or settings is None or not 3 <= len(shape) <= 5:
        return None
    dimensions = len(shape) - 2
    transposed = bool(call.given.get("transposed", operator_name(call.node).startswith("conv_transpose")))
    stride, padding, dilation = (_each(value, dimensions) for value in settings[:3])
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": settings[3]}
    options["bias"] = slots["bias"] is not None
    if transposed:
        extra = call.settings("output_padding")
        if extra is None:
            return None
        options["output_padding"] = _each(extra[0], dimensions)
    inside, outside = (shape[0], shape[1] * settings[3]) if transposed else (shape[1] * settings[3], shape[0])
    kind = f"Conv{'Transpose' if transposed else ''}{dimensions}d"
    make: type[nn.Module] = getattr(nn, kind)
    return Layer(
        kind,
        tuple(options.items()),
        lambda: make(inside, outside, shape[2:], **options),
        (call.given["input"],),
        slots,
    )


def _each(value: Any, dimensions: int) -> Any:
    """One number a dimension, where the operator takes one for all; the words "same" and "valid" as they are."""
    return value * dimensions if isinstance(value, tuple) and len(value) == 1 else value


def _embedding(call: _Call) -> Layer | None:
    shape, slots = call.shape("weight"), call.slots("weight")
    settings = call.settings("padding_idx", "scale_grad_by_freq")
    if shape is None or slots is None or settings is None or len(shape) != 2:
        return None
    padding = settings[0] if settings[0] >= 0 else None
    return Layer(
        "Embedding",
        (padding, settings[1]),
        lambda: nn.Embedding(*shape, padding_idx=padding, scale_grad_by_freq=settings[1]),
        (call.given["indices"],),
        slots,
    )


def _batch_norm(call: _Call) -> Layer | None:
    """Whatever mode it was exported in: the layer follows the mode of the model."""
    settings = call.settings("momentum", "eps")
    slots = call.slots("weight", "bias", "running_mean", "running_var")
    size = call.shape("weight") or call.shape("running_mean")
    rank = call.given["input"].meta.get(RANK)
    kinds = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}
    if settings is None or slots is None or size is None or rank not in kinds:
        return None
    instance = "use_input_stats" in call.given
    # In eval mode torch passes 0 where the momentum is None, the cumulative average.
    momentum = settings[0] or (0.1 if instance else None)
    affine, tracked = slots["weight"] is not None, slots["running_mean"] is not None
    kind = f"{'Instance' if instance else 'Batch'}Norm{kinds[rank]}"
    make: type[nn.Module] = getattr(nn, kind)

    def build() -> nn.Module:
        return make(size[0], settings[1], momentum, affine, tracked)

    return Layer(kind, (momentum, settings[1], affine, tracked), build, (call.given["input"],), slots)


def _layer_norm(call: _Call) -> Layer | None:
    slots, settings = call.slots("weight", "bias"), call.settings("normalized_shape", "eps")
    if call.shape("weight") is None or slots is None or settings is None:
        return None
    bias = slots["bias"] is not None
    return Layer(
        "LayerNorm",
        (*settings, bias),
        lambda: nn.LayerNorm(settings[0], settings[1], bias=bias),
        (call.given["input"],),
        slots,
    )


def _rms_norm(call: _Call) -> Layer | None:
    slots, settings = call.slots("weight"), call.settings("normalized_shape", "eps")
    if call.shape("weight") is None or slots is None or settings is None:
        return None
    return Layer("RMSNorm", settings, lambda: nn.RMSNorm(*settings), (call.given["input"],), slots)


def _group_norm(call: _Call) -> Layer | None:
    shape, slots, settings = call.shape("weight"), call.slots("weight", "bias"), call.settings("num_groups", "eps")
    if shape is None or slots is None or settings is None:
        return None
    if slots["bias"] is None:
        return None
    return Layer(
        "GroupNorm",
        settings,
        lambda: nn.GroupNorm(settings[0], shape[0], settings[1]),
        (call.given["input"],),
        slots,
    )


def _prelu(call: _Call) -> Layer | None:
    shape, slots = call.shape("weight"), call.slots("weight")
    if shape is None or slots is None or len(shape) != 1:
        return None
    return Layer("PReLU", (), lambda: nn.PReLU(shape[0]), (call.given["self"],), slots)


def _recurrent(call: _Call) -> Layer | None:
    """lstm.input, gru.input, rnn_tanh.input and rnn_relu.input; not the forms on packed sequences."""
    name = operator_name(call.node)
    weights = call.given.get("params")
    settings = call.settings("has_biases", "num_layers", "dropout", "bidirectional", "batch_first")
    if "input" not in call.given or settings is None or not weights or any(w.op != "get_attr" for w in weights):
        return None
    bias, layers, dropout, bidirectional, batch_first = settings
    first, second = (call.shapes[str(weight.target)] for weight in weights[:2])
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    hidden = first[0] // gates
    options = {"bias": bias, "batch_first": batch_first, "dropout": dropout, "bidirectional": bidirectional}
    if name == "lstm" and second[1] != hidden:
        options["proj_size"] = second[1]
    if name.startswith("rnn_"):
        options["nonlinearity"] = name.removeprefix("rnn_")
    make: Callable[..., nn.RNNBase] = {"lstm": LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    with torch.device("meta"):
        names = make(first[1], hidden, layers, **options)._flat_weights_names
    if len(names) != len(weights):
        return None
    states = call.given["hx"]
    return Layer(
        name,
        (layers, *options.items()),
        lambda: make(first[1], hidden, layers, **options),
        (call.given["input"], *(states if isinstance(states, Sequence) else (states,))),
        dict(zip(names, weights, strict=True)),
    )


def _dropout(call: _Call) -> Layer | None:
    settings = call.settings("p")
    if settings is None:
        return None
    name, p = operator_name(call.node), settings[0]
    inputs = (call.given["input"] if "input" in call.given else call.given["self"],)
    if name.startswith("dropout"):
        inplace = name.endswith("_")
        return Layer("Dropout", (p, inplace), lambda: nn.Dropout(p, inplace), inputs)
    return Layer("FeatureDropout", (name, p), lambda: FeatureDropout(name, p), inputs)


def _attention(call: _Call) -> Layer | None:
    """Only where weights drop out: otherwise the operator does."""
    settings = call.settings("dropout_p", "is_causal", "scale", "enable_gqa")
    if settings is None or settings[0] == 0:
        return None
    inputs = tuple(call.given[name] for name in ("query", "key", "value", "attn_mask"))
    return Layer("Attention", settings, lambda: Attention(*settings), inputs)


_RULES: dict[str, Callable[[_Call], Layer | None]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "embedding": _embedding,
    "batch_norm": _batch_norm,
    "instance_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("dropout", "dropout_", "feature_dropout", "feature_dropout_"), _dropout),
    **dict.fromkeys(("alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"), _dropout),
    "scaled_dot_product_attention": _attention,
}
