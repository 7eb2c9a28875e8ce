"""Changed weights put back into an ONNX file: the same graph, names and opset, other numbers.

A weight that a node takes straight from a tensor of the file, perhaps turned round or cut to pieces on the way, is
written there. Where that tensor serves something else as well, or the weight was computed of several, the node gets a
tensor of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from onnx import GraphProto, ModelProto, TensorProto
from torch import Tensor

from app.contract.errors import ExportFailed
from worker.loading.onnx_constants import drop_unused, free_name, held_tensors, set_values, used_names
from worker.loading.onnx_graph import Imported
from worker.loading.onnx_ops.build import read_tensor
from worker.loading.onnx_ops.origins import Origin, positions
from worker.vetting.onnx import graphs


def write_weights(proto: ModelProto, imported: Imported, state: Mapping[str, Tensor]) -> ModelProto:
    """A copy of the file's graph with the weights of `state`, a state dict of the imported module (or of a copy).

    Raises ExportFailed where a weight has another shape than the file's.
    """
    changed = ModelProto()
    changed.CopyFrom(proto)
    sources = _Sources(changed.graph)
    used_before = used_names(changed.graph)
    for place, group in groupby(sorted(imported.origins, key=_place), key=_place):
        origins = list(group)
        values = _taken(sources, origins, changed.graph.node[place[0]].input[place[1]], state)
        if values is None:
            continue
        origin = origins[0]
        if origin.source is None or origin.source in imported.pinned or not sources.write(origin, values):
            _rewire(changed.graph, place, values, sources.data_type(origin.source))
    sources.store()
    drop_unused(changed.graph, used_before)
    return changed


class _Sources:
    """The tensors of the file, read where they are asked for, and what was written to them."""

    def __init__(self, graph: GraphProto) -> None:
        self._protos = dict(held_tensors(graph))
        self._values: dict[str, Tensor] = {}
        self._written: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """The present values, in float32."""
        if name not in self._values:
            self._values[name] = read_tensor(self._protos[name])
        return self._values[name]

    def data_type(self, name: str | None) -> int:
        return TensorProto.FLOAT if name is None else self._protos[name].data_type

    def write(self, origin: Origin, values: Tensor) -> bool:
        """Whether the elements that a node takes could be given these values: none had others written to it before."""
        assert origin.source is not None
        source = self.read(origin.source)
        written = self._written.setdefault(origin.source, torch.zeros(source.shape, dtype=torch.bool))
        own, taken = origin.view(source), origin.view(written)
        if bool((taken & (own != values)).any()):
            return False
        own.copy_(values)
        taken.fill_(True)
        return True

    def store(self) -> None:
        """Puts what was written into the file."""
        for name in self._written:
            set_values(self._protos[name], self._values[name].numpy())


def _place(origin: Origin) -> tuple[int, int]:
    return origin.node, origin.position


def _taken(sources: _Sources, origins: Sequence[Origin], name: str, state: Mapping[str, Tensor]) -> Tensor | None:
    """What a node is to take now, put together of the parameters that were made of it; None where nothing changed."""
    first = origins[0]
    before = first.computed if first.source is None else first.view(sources.read(first.source))
    assert before is not None
    values = before.clone(memory_format=torch.contiguous_format)
    for origin in origins:
        weight = state[origin.path].detach().cpu().float()
        where = positions(origin)
        if where.shape != weight.shape:
            raise ExportFailed(
                f"{origin.path} has the shape {list(weight.shape)} and the file's tensor {name!r} gives "
                f"{list(where.shape)}: a graph can only get other numbers."
            )
        values.view(-1)[where.reshape(-1)] = weight.reshape(-1)
    return None if torch.equal(values, before) else values


def _rewire(graph: GraphProto, place: tuple[int, int], values: Tensor, data_type: int) -> None:
    """Gives a node a tensor of its own in place of the one that it took."""
    index, position = place
    node = graph.node[index]
    taken = {name for part in graphs(graph) for inner in part.node for name in (*inner.input, *inner.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    name = free_name(f"{node.input[position]}_changed", taken)
    tensor = TensorProto(name=name, data_type=data_type, dims=list(values.shape))
    set_values(tensor, values.numpy())
    graph.initializer.append(tensor)
    node.input[position] = name
