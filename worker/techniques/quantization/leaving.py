"""Layers that stay floating point in an int8 file, so that it holds the metric: those that hurt most, and no more.

How much a layer hurts is measured: the noise in the outputs of a file in which it alone is int8, against the float file
(as NNCF ranks layers in its quantization with accuracy control). In that order layers are left, and the fewest with
which the file holds the metric are found by halving; each try is a file that was written and loaded again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import GraphProto

from worker.data.batch import Inputs
from worker.objectives.base import Forward
from worker.techniques.base import Details
from worker.techniques.quantization.stored import weight_inputs

Make = Callable[[Collection[str], Path], None]
"""Writes the int8 file in which the named nodes stay floating point."""
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True)
class Limit:
    """What an int8 file has to hold: `judge` gives the metric of what runs a file, higher is better, `open` what runs
    it; `samples` tell what a layer does to the outputs. `shown` gives a metric in its own sign."""

    wanted: float
    judge: Callable[[Forward], float]
    shown: Callable[[float], float]
    open: Callable[[Path], Callable[[Inputs], np.ndarray]]
    samples: Callable[[], Iterable[Inputs]]

    def metric(self, file: Path) -> float:
        return self.judge(self.open(file))

    def noise(self, file: Path, exact: Callable[[Inputs], np.ndarray]) -> float:
        """Noise over signal in what a file gives for the samples beside what floats give, a batch at a time: outputs of
        sequences are large."""
        mine = self.open(file)
        noise = power = 0.0
        for inputs in self.samples():
            wanted = exact(inputs).astype(np.float64)
            power += float(np.square(wanted).sum())
            noise += float(np.square(np.nan_to_num(mine(inputs), nan=np.inf) - wanted).sum())
        return noise / power if power else noise


@dataclass(frozen=True)
class Candidate:
    """What can stay floating point: a weight, by its layer's name, or a product of two activations, by its own; and
    the names of the nodes."""

    name: str
    nodes: tuple[str, ...]
    weight: bool = True


def candidates(
    graph: GraphProto, ops: Collection[str], kept: Collection[str], *, products: bool = True
) -> list[Candidate]:
    """Each weight that operators `ops` read, and, unless those of activations stay floats in any case, each product."""
    found: dict[str, list[str]] = {}
    for node, weight in weight_inputs(graph):
        if node.op_type in ops and node.name not in kept:
            found.setdefault(weight.removesuffix(".weight"), []).append(node.name)
    others = {*kept, *(node.name for node, _ in weight_inputs(graph))}
    of_activations = (
        node.name
        for node in graph.node
        if products and node.op_type in ops and node.op_type in PRODUCTS and node.name not in others
    )
    return [
        *(Candidate(name, tuple(nodes)) for name, nodes in found.items()),
        *(Candidate(name, (name,), weight=False) for name in of_activations),
    ]


def leave(
    layers: Sequence[Candidate], make: Make, limit: Limit, floats: Path, target: Path
) -> tuple[list[str], Details]:
    """Writes the int8 file that holds the limit to `target`; the nodes that stay floating point in it, and what was
    tried. Where no file holds it all of them stay so. `floats` is the float file."""
    tried: dict[int, float] = {}
    order: list[Candidate] = []
    noise: dict[Candidate, float] = {}

    def left(count: int) -> list[str]:
        return [node for layer in order[:count] for node in layer.nodes]

    def holds(count: int) -> bool:
        make(left(count), target)
        tried[count] = limit.metric(target)
        return tried[count] >= limit.wanted

    count = 0
    if not holds(0):
        exact = limit.open(floats)
        for layer in layers:  # alone
            make([node for other in layers if other is not layer for node in other.nodes], target)
            noise[layer] = limit.noise(target, exact)
        order = sorted(layers, key=lambda layer: -noise[layer])
        count = _fewest(len(order), holds)
        make(left(count), target)
    metric = limit.metric(target)
    return left(count), {
        "wanted_validation_metric": limit.shown(limit.wanted),
        "validation_metric_all_int8": limit.shown(tried[0]),
        "validation_metric": limit.shown(metric),
        "held": metric >= limit.wanted,
        "layers_int8": sum(layer.weight for layer in layers) - sum(layer.weight for layer in order[:count]),
        "layers_left_in_float": [
            {"name": layer.name, "noise": noise[layer] if np.isfinite(noise[layer]) else None}
            for layer in order[:count]
        ],
        "searched": [
            {"left_in_float": number, "validation_metric": limit.shown(own), "holds": int(own >= limit.wanted)}
            for number, own in tried.items()
        ],
    }


def _fewest(most: int, holds: Callable[[int], bool]) -> int:
    """The least number from 1 on that was found to hold, 0 being known not to; all of them where they do not either."""
    low, high = 0, most
    if most == 0 or not holds(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
