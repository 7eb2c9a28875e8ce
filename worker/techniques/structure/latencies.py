"""How long a network takes in ONNX Runtime on this machine, and how much of that each of its layers does."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from worker.constraints import baked
from worker.context import Context
from worker.evaluation.latency import measure_in_turns
from worker.export.onnx import export_onnx
from worker.loading.onnx_session import GraphSession
from worker.structure.calls import example_on

BUDGET_S = 1.0  # of measuring two networks beside each other
RUNS = 9  # in which layers are timed


class Runtime:
    """The network as it stands when this is made, in ONNX Runtime, for one sample; others are held against it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._inputs = tuple(own.cpu() for own in context.model.example(1))
        self._first = self._session(baked(context.model.module))
        self.seconds = self._measured({"first": self._first})["first"]

    def of(self, module: nn.Module) -> float:
        """Seconds of another network, from a measurement in turns with the first: what slows the machine for a while
        slows both."""
        taken = self._measured({"first": self._first, "other": self._session(module)})
        return self.seconds * taken["other"] / taken["first"]

    def _session(self, module: nn.Module) -> GraphSession:
        model = replace(self._context.model, graph=None)
        names = [own.name for own in model.facts.inputs]
        with TemporaryDirectory(dir=self._context.scratch) as folder:
            path = export_onnx(module, model, Path(folder) / "model.onnx")
            return GraphSession(path, names, torch.get_num_threads())

    def _measured(self, sessions: Mapping[str, GraphSession]) -> dict[str, float]:
        calls = {name: functools.partial(own, self._inputs) for name, own in sessions.items()}
        found = measure_in_turns(calls, batch_size=1, threads=torch.get_num_threads(), budget_s=BUDGET_S)
        return {name: own.median_s for name, own in found.items()}


def layer_shares(context: Context) -> dict[str, float]:
    """Of the time of a pass, how much each layer with weights takes, by the layer's name: measured on this machine, the
    median over runs."""
    module = context.model.module
    inputs = example_on(module, context.model, 1)
    layers = {name: layer for name, layer in module.named_modules() if name and _holds(layer)}
    taken: dict[str, list[float]] = defaultdict(list)
    begun: dict[str, float] = {}
    this: dict[str, float] = {}

    def before(name: str) -> Any:
        def hook(*_: object) -> None:
            begun[name] = time.perf_counter()

        return hook

    def behind(name: str) -> Any:
        def hook(*_: object) -> None:
            this[name] = this.get(name, 0.0) + time.perf_counter() - begun[name]

        return hook

    hooks = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    hooks += [layer.register_forward_hook(behind(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            module.eval()(*inputs)
            for _ in range(RUNS):
                this.clear()
                start = time.perf_counter()
                module(*inputs)
                whole = time.perf_counter() - start
                for name, own in this.items():
                    taken[name].append(own / whole)
    finally:
        for one in hooks:
            one.remove()
    return {name: statistics.median(own) for name, own in taken.items()}


def _holds(layer: nn.Module) -> bool:
    return any(own.ndim > 1 for own in layer.parameters(recurse=False))
