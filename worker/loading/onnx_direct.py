"""An ONNX graph that ONNX Runtime runs as it is: its weights can be pruned and quantized, and nothing is trained.

The weights of the graph, and of the graphs in it, are parameters here, so that techniques find them; to run the module
is to run the graph with the weights as they stand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from app.contract.facts import LayerFacts, OutputKind
from worker.loading.heads import to_logits
from worker.loading.onnx_constants import Place, find_weights, held_tensors, plain_weights, set_values
from worker.loading.onnx_ops.build import read_tensor
from worker.loading.onnx_ops.names import Names
from worker.loading.onnx_session import GraphSession
from worker.model import WeightHolder
from worker.vetting.onnx import graphs


class DirectModule(nn.Module):
    """`module(*inputs)` gives the logits of the graph's first output, by ONNX Runtime on the CPU.

    Every weight is a `WeightHolder` of its own, with the values that the graph is run with.
    """

    def __init__(self, proto: ModelProto, inputs: tuple[str, ...], kind: OutputKind, *, single: bool) -> None:
        super().__init__()
        self._single = single
        self._proto = proto
        self._inputs = inputs
        self._kind: OutputKind = kind
        self.places: dict[str, Place] = {}
        self._running: tuple[list[tuple[Tensor, int]], GraphSession] | None = None
        names = Names()
        for weight in find_weights(proto):
            name = names.layer(weight.place[1]).replace(".", "_")
            values = nn.Parameter(read_tensor(weight.tensor), requires_grad=False)
            self.add_module(name, WeightHolder(values, weight.kind, weight.inputs_first))
            self.places[name] = weight.place

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = self._session()(inputs)
        return torch.from_numpy(to_logits(self._kind, outputs)).to(inputs[0].device)

    def feed(self, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
        """Inputs by name, in the types that the graph declares."""
        return self._session().feed(inputs)

    def holders(self) -> Iterator[tuple[str, WeightHolder]]:
        """The weights by the names of their layers."""
        for name, layer in self.named_children():
            assert isinstance(layer, WeightHolder)
            yield name, layer

    def layers(self) -> tuple[LayerFacts, ...]:
        """What the facts say of the weights."""
        return tuple(
            LayerFacts(name=name, type=layer.kind, shape=tuple(layer.weight.shape), parameters=layer.weight.numel())
            for name, layer in self.holders()
        )

    def graph(self) -> ModelProto:
        """A copy of the file's graph with the weights as they stand."""
        changed = ModelProto()
        changed.CopyFrom(self._proto)
        held = [dict(held_tensors(graph)) for graph in graphs(changed.graph)]
        for name, layer in self.holders():
            number, own = self.places[name]
            values = layer.weight.detach().cpu().float()
            if not torch.equal(read_tensor(held[number][own]), values):
                set_values(held[number][own], values.numpy())
        return changed

    def plain_graph(self) -> ModelProto:
        """The same with the weights of the main graph under their names here, as a quantizer finds them."""
        changed = self.graph()
        names = {own: f"{name}.weight" for name, (number, own) in self.places.items() if number == 0}
        plain_weights(changed.graph, names)
        return changed

    def __deepcopy__(self, memo: dict[int, Any]) -> DirectModule:
        """The file's graph is shared, since it never changes; a session cannot be copied."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for key, value in (self.__dict__ | {"_running": None}).items():
            copied.__dict__[key] = value if key == "_proto" else copy.deepcopy(value, memo)
        return copied

    def _session(self) -> GraphSession:
        """The session of the present weights, made anew where one changed."""
        present = [(tensor, tensor._version) for tensor in (*self.parameters(), *self.buffers())]
        if self._running is None or not _same(self._running[0], present):
            content = self.graph().SerializeToString()
            self._running = present, GraphSession(content, self._inputs, torch.get_num_threads(), single=self._single)
        return self._running[1]


def _same(before: list[tuple[Tensor, int]], now: list[tuple[Tensor, int]]) -> bool:
    """The same tensors, none of them written to."""
    return len(before) == len(now) and all(
        a is b and old == new for (a, old), (b, new) in zip(before, now, strict=True)
    )
