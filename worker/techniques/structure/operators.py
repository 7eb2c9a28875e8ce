"""How long layers take in ONNX Runtime on this machine, each as a graph of its own and for one sample.

torch's own times say little here: what a call costs in it is several times what one costs in the runtime, so that small
layers seem all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from worker.context import Context
from worker.export.onnx import OPSET
from worker.loading.onnx_session import open_session
from worker.structure.calls import computes_as, example_on
from worker.techniques.pruning.weights import is_transformers_conv1d

RUNS = 15
WARM_UP = 3
VALUE = 0.01  # of weights and inputs: what new memory holds may be numbers that a processor is slow with
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Shape = tuple[int, ...]


def has_operator(layer: nn.Module) -> bool:
    """Whether a layer is one matrix or convolution, of all channels or of each alone, whose weight is
    not computed."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return False
    if computes_as(layer, nn.Linear) or is_transformers_conv1d(layer):
        return True
    if not isinstance(layer, CONVOLUTIONS) or not computes_as(layer, *CONVOLUTIONS):
        return False
    return layer.groups in (1, layer.in_channels)


def shapes_given(context: Context, layers: Mapping[str, nn.Module]) -> dict[str, list[Shape]]:
    """By the name of each layer, for each of its calls in a pass of one sample, the shape of what comes in; of a
    convolution with a batch, which it may do without in torch."""
    module, found = context.model.module.eval(), {name: list[Shape]() for name in layers}

    def see(name: str) -> Any:
        def hook(layer: Any, given: tuple[Any, ...]) -> None:
            if given:
                single = isinstance(layer, CONVOLUTIONS) and given[0].ndim == len(layer.kernel_size) + 1
                found[name].append((1,) * single + tuple(given[0].shape))

        return hook

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            module(*example_on(module, context.model, 1))
    finally:
        for own in hooks:
            own.remove()
    return found


class Clock:
    """Times chains of layers on so many threads; without what a call of the runtime itself takes."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._known: dict[Any, float] = {}
        self._call = self._taken((), (1, 1))

    def seconds(self, chain: Sequence[Any], given: Shape) -> float:
        """For an input of a shape the median of a few runs; layers that look alike are timed once."""
        key = given, *((repr(layer), tuple(layer.weight.shape)) for layer in chain)
        if key not in self._known:
            self._known[key] = max(0.0, self._taken(chain, given) - self._call)
        return self._known[key]

    def _taken(self, chain: Sequence[nn.Module], given: Shape) -> float:
        session = open_session(_graph(chain, given), self._threads)
        inputs = {"x0": np.full(given, VALUE, np.float32)}
        taken = []
        for _ in range(WARM_UP + RUNS):
            start = time.perf_counter()
            session.run(None, inputs)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[WARM_UP:])


def _graph(chain: Sequence[nn.Module], given: Shape) -> bytes:
    """A model of one layer behind the other; of none, that gives what it is given. Batch and shapes are fixed."""
    nodes, weights = [], []
    for place, layer in enumerate(chain):
        names = (f"x{place}", f"w{place}", f"b{place}", f"x{place + 1}")
        made, held = _convolution(layer, names) if isinstance(layer, CONVOLUTIONS) else _matrix(layer, names)
        nodes += made
        weights += held
    if not nodes:
        nodes.append(helper.make_node("Identity", ["x0"], ["x1"]))
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return bytes(model.SerializeToString())


Parts = tuple[list[Any], list[Any]]
"""Nodes, and tensors that they read."""


def _matrix(layer: Any, names: Sequence[str]) -> Parts:
    """As torch's exporter writes it."""
    given, weight, bias, made = names
    shape = tuple(layer.weight.shape)
    inputs, outputs = shape if is_transformers_conv1d(layer) else shape[::-1]
    held = [_tensor((inputs, outputs), weight)]
    if getattr(layer, "bias", None) is None:
        return [helper.make_node("MatMul", [given, weight], [made])], held
    nodes = [
        helper.make_node("MatMul", [given, weight], [f"{made}.product"]),
        helper.make_node("Add", [f"{made}.product", bias], [made]),
    ]
    return nodes, [*held, _tensor((outputs,), bias)]


def _convolution(layer: Any, names: Sequence[str]) -> Parts:
    """Whatever its padding is filled with, zeros here."""
    given, weight, bias, made = names
    held = [_tensor(tuple(layer.weight.shape), weight)]
    if layer.bias is not None:
        held.append(_tensor(tuple(layer.bias.shape), bias))
    node = helper.make_node(
        "Conv",
        [given, *(one.name for one in held)],
        [made],
        strides=layer.stride,
        dilations=layer.dilation,
        group=layer.groups,
        pads=[*_pads(layer, 0), *_pads(layer, 1)],
    )
    return [node], held


def _pads(layer: Any, side: int) -> Iterator[int]:
    """In front of each axis, or behind it."""
    if layer.padding == "same":
        for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True):
            whole = dilation * (size - 1)
            yield whole // 2 if side == 0 else whole - whole // 2
    else:
        yield from ([0] * len(layer.kernel_size) if layer.padding == "valid" else layer.padding)


def _tensor(shape: Shape, name: str) -> Any:
    return numpy_helper.from_array(np.full(shape, VALUE, np.float32), name)
