"""Any network as a graph that shares its layers: the one form in which ways that part and meet again are seen."""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from app.contract.errors import Unsupported
from worker.constraints import baked
from worker.export.program import save_program
from worker.loading.layers import Parallel, Residual
from worker.loading.program import read_module
from worker.model import Model
from worker.structure.blocks import passed, same, varied
from worker.structure.calls import device_of
from worker.structure.connections.cutting import Cut
from worker.structure.connections.rewording import WAYS, Way


@dataclass(frozen=True)
class Graph:
    """A network's graph, and, where it is an architecture's, what the ways that meet in it are called there: by the
    node where they meet and the operand, the layer's name and the way's. Others cannot go."""

    module: fx.GraphModule
    ways: Mapping[Cut, tuple[str, Way]] | None = None


def graph_of(model: Model) -> Graph:
    """Of a program or an ONNX graph it is the network itself, of an architecture one around its layers, of any other
    code a program with copies of its weights.

    Raises ExportFailed for code that torch does not export, Unsupported where the program computes something else.
    """
    module = model.module
    if isinstance(module, fx.GraphModule):
        return Graph(module)
    if isinstance(module, nn.Sequential):
        return _of_architecture(module)
    return Graph(as_program(model, module))


def as_program(model: Model, module: nn.Module) -> fx.GraphModule:
    """What code computes in eval mode, with the names and values of its weights: a module that can be trained.

    Raises as `graph_of` does.
    """
    device = device_of(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.pt2"
        save_program(baked(module).cpu(), model, path)
        program = read_module(path, Path(folder)).to(device).eval()
    inputs = varied(model)
    if not same(passed(program, inputs), passed(module, inputs)):
        raise Unsupported("The network as a program of torch computes something else than its code does.")
    return program


def _of_architecture(module: nn.Sequential) -> Graph:
    tracer = _Tracer()
    graph = tracer.trace(module)
    return Graph(fx.GraphModule(module, graph).train(module.training), tracer.ways)


class _Tracer(fx.Tracer):
    """Through what holds layers, and around the layers themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: dict[Cut, tuple[str, Way]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of torch, and those of ours that compute by themselves."""
        return not isinstance(m, nn.Sequential | nn.ModuleList | Residual | Parallel)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What meets in ours is added in pairs, each of which is remembered."""
        path = self.path_of_module(m)
        if isinstance(m, Residual):
            return self._added(path, {way: getattr(m, way)(*args) for way in WAYS})
        if isinstance(m, Parallel) and m.join == "add":
            return self._added(path, {place: branch(*args) for place, branch in enumerate(m.branches)})
        return super().call_module(m, forward, args, kwargs)

    def _added(self, path: str, outputs: Mapping[Any, fx.Proxy]) -> fx.Proxy:
        (first, total), *others = outputs.items()
        for number, (way, output) in enumerate(others):
            total = operator.add(total, output)
            self.ways[total.node.name, 1] = path, way
            if number == 0:
                self.ways[total.node.name, 0] = path, first
        return total


def graph_module(module: nn.Module, model: Model) -> nn.Module:
    """What edits of a graph are made on: of code, its program."""
    if isinstance(module, fx.GraphModule | nn.Sequential):
        return module
    with torch.no_grad():
        return as_program(model, module)
