"""LSTM, GRU and RNN: torch's layers, whose gates stand in another order.

ONNX keeps weights [directions, gates * hidden, in], recurrent weights likewise and the biases of both in one row
[directions, 2 * gates * hidden]; torch has each of these for itself. ONNX gives [steps, directions, batch, hidden].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.host import Value
from worker.loading.onnx_ops.node import Node

# For each of torch's gates (LSTM i f g o, GRU r z n), which of ONNX's it is (i o f c; z r h).
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}
_KINDS: dict[str, Callable[..., nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


def gates(rows: Tensor, *, direction: int, order: tuple[int, ...], half: int | None) -> Tensor:
    """Of one direction, in torch's order; `half` chooses the first or second half of the biases."""
    own = rows[direction]
    if half is not None:
        own = own.chunk(2)[half]
    blocks = own.chunk(len(order))
    return torch.cat([blocks[gate] for gate in order])


def steps_first(a: Tensor) -> Tensor:
    """[batch, steps, …] and [steps, batch, …] into each other."""
    return a.transpose(0, 1)


def backwards(a: Tensor) -> Tensor:
    return torch.flip(a, (0,))


def by_direction(a: Tensor, *, directions: int) -> Tensor:
    """[steps, batch, directions * hidden] -> [steps, directions, batch, hidden]."""
    steps, batch, width = a.shape
    return a.reshape(steps, batch, directions, width // directions).transpose(1, 2)


# --- builder ----------------------------------------------------------------------------------------------------


def build_recurrent(node: Node) -> Any:
    order = _GATES[node.op]
    _refuse(node)
    weight, recurrent, bias = (node.constant(position) for position in (1, 2, 3))
    if weight is None or recurrent is None or (node.has(3) and bias is None):
        raise Unsupported("has weights that are computed")
    directions, rows, width = weight.tensor.shape
    direction = node.attribute("direction", "forward")
    if directions != (2 if direction == "bidirectional" else 1):
        raise Unsupported(f"has weights for {directions} directions and runs {direction}")
    options: dict[str, Any] = {"bias": bias is not None, "bidirectional": directions == 2}
    if node.op == "RNN":
        options["nonlinearity"] = _nonlinearity(node, directions)
    layer = _KINDS[node.op](width, rows // len(order), **options)
    path, outputs = _run(node, layer, direction)
    for index in range(directions):
        suffix = "_reverse" if index else ""
        chosen = functools.partial(gates, direction=index, order=order)
        node.assign(path, f"weight_ih_l0{suffix}", 1, functools.partial(chosen, half=None))
        node.assign(path, f"weight_hh_l0{suffix}", 2, functools.partial(chosen, half=None))
        if bias is not None:
            node.assign(path, f"bias_ih_l0{suffix}", 3, functools.partial(chosen, half=0))
            node.assign(path, f"bias_hh_l0{suffix}", 3, functools.partial(chosen, half=1))
    layer._init_flat_weights()
    return outputs


def _refuse(node: Node) -> None:
    """Raises Unsupported for what torch's layers do not do."""
    names = tuple(name.lower() for name in node.attribute("activations") or ())
    usual = _ACTIVATIONS.get(node.op, ())
    if node.op != "RNN" and names not in ((), usual, usual * 2):
        raise Unsupported(f"has the activations {', '.join(names)[:80]}")
    if node.attribute("clip") is not None or node.attribute("input_forget", 0):
        raise Unsupported("clips its gates or couples them")
    if node.op == "GRU" and not node.attribute("linear_before_reset", 0):
        raise Unsupported("applies its reset gate before the product (linear_before_reset = 0)")
    if node.op == "LSTM" and node.has(7) and not _zeros(node, 7):
        raise Unsupported("has peepholes")
    if node.has(4):
        lengths, shape = node.constant(4), node.shape(0)
        steps = None if shape is None else shape[1 if node.attribute("layout", 0) else 0]
        if lengths is None or steps is None or bool((lengths.tensor != steps).any()):
            raise Unsupported("takes sequences of several lengths (sequence_lens)")


def _nonlinearity(node: Node, directions: int) -> str:
    names = {name.lower() for name in node.attribute("activations") or ("Tanh",)}
    if len(names) != 1 or not names <= {"tanh", "relu"}:
        raise Unsupported(f"has the activations {', '.join(sorted(names))[:80]}")
    return names.pop()


def _run(node: Node, layer: nn.RNNBase, direction: str) -> tuple[str, list[Any]]:
    """The layer's path, and Y, Y_h and for an LSTM Y_c."""
    batch_first = bool(node.attribute("layout", 0))
    argument: Any = node.value(0)
    if batch_first:
        argument = node.call(steps_first, argument)
    if direction == "reverse":
        argument = node.call(backwards, argument)
    states = [_state(node, position, batch_first) for position in ((5, 6) if node.op == "LSTM" else (5,))]
    initial: tuple[Any, ...] = ()
    if any(state is not None for state in states):
        if None in states:
            raise Unsupported("starts from one state of two")
        initial = (tuple(states) if node.op == "LSTM" else states[0],)
    path, result = node.layer(layer, 1, argument, *initial)
    sequence, last = node.parts(result, 2)
    finals = node.parts(last, 2) if node.op == "LSTM" else [last]
    if direction == "reverse":
        sequence = node.call(backwards, sequence)
    sequence = node.call(by_direction, sequence, directions=2 if layer.bidirectional else 1)
    if batch_first:  # [batch, steps, directions, hidden], and [batch, directions, hidden]
        sequence = node.call(torch.permute, sequence, (2, 0, 1, 3))
        finals = [node.call(steps_first, final) for final in finals]
    return path, [sequence, *finals]


def _state(node: Node, position: int, batch_first: bool) -> Any:
    """An initial state; None for zeros, with which torch starts anyway, in any batch."""
    if not node.has(position) or _zeros(node, position):
        return None
    state = node.tensor(position)
    return node.call(steps_first, state) if batch_first else state


def _zeros(node: Node, position: int) -> bool:
    """Whether an input is known to hold nothing but zeros, be it for a batch that is open."""
    constant = node.constant(position)
    if constant is not None:
        return not bool(constant.tensor.any())
    value: Value | Any = node.value(position)
    return is_zeros(value)


def is_zeros(value: Any) -> bool:
    """Whether a node of the graph makes zeros: ConstantOfShape, or what only moves such."""
    while isinstance(value, torch.fx.Node) and value.op == "call_function":
        if value.kwargs.get("value") == 0 and getattr(value.target, "__name__", "") == "constant_of_shape":
            return True
        if getattr(value.target, "__name__", "") not in ("expand", "reshape", "unsqueeze", "squeeze", "cast_to"):
            return False
        value = value.args[0]
    return False
