"""Integers in the place of floats: ONNX Runtime's quantizer puts Q and DQ around operators, with ranges and steps that
were found here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from app.contract.calibration import Calibration
from app.contract.errors import ExportFailed
from app.contract.spec import Quantize
from worker.techniques.base import Details
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.graph import constants, replace_constant
from worker.techniques.quantization.static.clipping import reaches_past
from worker.techniques.quantization.static.equalization import equalize
from worker.techniques.quantization.static.learned import NOTHING_LEARNED, Learned
from worker.techniques.quantization.static.observing import Observed, noise_db
from worker.techniques.quantization.static.ranges_math import Range
from worker.techniques.quantization.static.rounding import Rounded, round_weights
from worker.techniques.quantization.static.smoothing import Row, smooth

Method = Literal["minmax", "percentile", "entropy", "mse"]

ACTIVATIONS = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
# What `auto` tries: a model whose activations have no outliers is best off with all of their range.
TRIED: tuple[Method, ...] = ("minmax", "percentile", "mse")
# In a transformer what products give goes into sums that stay floats, and can reach far in a few channels.
FLOAT_OUTPUTS = ("MatMul", "Gemm")
# By which factors have to better the whole: of smoothing, whose multiplications cost time, and of equalization.
WORTH_DB, ANY_DB = 0.5, 0.0

Way = Callable[[ModelProto], tuple[list[Row], list[str]]]
"""Moves factors in a graph, in place: what was done, and the names of the multiplications that it took."""


@dataclass(frozen=True)
class Plan:
    """What of a graph becomes integers: all of the operators `ops` but the nodes `kept`; the type of activations;
    whether weights keep within 7 bits; whether what products give stays floating point."""

    kept: Collection[str]
    ops: Collection[str]
    activations: Literal["uint8", "int8"]
    reduced: bool
    float_outputs: bool

    @property
    def bits(self) -> int:
        return 7 if self.reduced else 8

    def nodes(self, proto: ModelProto) -> list[str]:
        """The names of those that become integers."""
        return [node.name for node in proto.graph.node if node.op_type in self.ops and node.name not in self.kept]

    def tensors(self, proto: ModelProto) -> set[str]:
        """What they read and give."""
        nodes = set(self.nodes(proto))
        return {name for node in proto.graph.node if node.name in nodes for name in (*node.input, *node.output)}


@dataclass(frozen=True)
class Found:
    """All that a QDQ graph is made of: the float graph with weights on their grids, the file that it was before, what
    of it becomes integers, ranges, rounded weights, and what is to be told."""

    proto: ModelProto
    floats: Path
    plan: Plan
    step: Quantize
    ranges: Mapping[str, Range]
    rounded: Mapping[str, Rounded]
    details: Details

    def made(self, kept: Collection[str] = ()) -> ModelProto:
        """The QDQ graph in which the nodes `kept` stay floating point, besides those that do so in any case, and have
        the weights and biases that they had."""
        plan = replace(self.plan, kept=[*self.plan.kept, *kept])
        proto = _restored(self.proto, onnx.load(self.floats), kept) if kept else self.proto
        return _with_integers(proto, self.step, plan, self.ranges, self.rounded)


def quantize_static(
    source: Path, floats: Path, step: Quantize, samples: Samples, plan: Plan, learned: Learned = NOTHING_LEARNED
) -> Found:
    """What the QDQ form of the prepared float graph `source` is made of. What it rounds is written to `floats`: the
    same graph, but that factors may have moved from channels into weights. Steps and ranges that a training has
    `learned` are taken as they are.

    Raises ExportFailed where calibration samples lead to what is no number, in floats or in integers.
    """
    proto = onnx.load(source)
    proto, plan, details = _with_factors(proto, step, samples, plan)
    onnx.save_model(proto, str(floats))
    observed = Observed(proto, samples)
    methods = TRIED if step.calibration.method == "auto" else (step.calibration.method,)
    tried = [step.calibration.model_copy(update={"method": method}) for method in methods]
    fixed = learned.ranges_in(proto.graph)
    ranges = [own | fixed for own in observed.ranges(plan.tensors(proto), tried)]
    rounded = learned.steps_in(proto.graph, plan.nodes(proto))
    rounded |= _rounded(proto, observed, step, plan, rounded)
    made = [_with_integers(proto, step, plan, own, rounded) for own in ranges]
    noise = [noise_db(observed, one) for one in made]
    best = max(range(len(made)), key=noise.__getitem__)
    if noise[best] == -np.inf:
        raise ExportFailed(
            "In 8 bits the model gives what is no number, or is infinite, for the calibration samples. Name the layers "
            "in front of logarithms, roots and divisions in exclude, or use method dynamic."
        )
    details["calibrations"] = [
        {"method": method, "sqnr_db": found if np.isfinite(found) else None}
        for method, found in zip(methods, noise, strict=True)
    ]
    details["calibration_method"] = methods[best]
    return Found(proto, floats, plan, step, ranges[best], rounded, details)


def _restored(proto: ModelProto, before: ModelProto, nodes: Collection[str]) -> ModelProto:
    """A copy in which these nodes, and the constants that they read, are as they were."""
    found, wanted = ModelProto.FromString(proto.SerializeToString()), set(nodes)
    exact = {node.name: node for node in before.graph.node if node.name in wanted}
    names = {name for node in exact.values() for name in node.input}
    for node in found.graph.node:
        if node.name in exact:
            node.CopyFrom(exact[node.name])
    for name, value in constants(before.graph, names).items():
        if value.dtype == np.float32:
            replace_constant(found.graph, name, value)
    return found


def _with_factors(proto: ModelProto, step: Quantize, samples: Samples, plan: Plan) -> tuple[ModelProto, Plan, Details]:
    """The graph with factors moved between layers, and the plan for it. What was moved, by the name of the way, which
    is nothing where it is not worth it: judged by what the graph gives when all is rounded to the nearest."""
    details: Details = {}
    noise: float | None = None
    for name, way, worth in _ways(step, samples, plan):
        other = ModelProto.FromString(proto.SerializeToString())
        rows, spent = way(other)
        details[name] = []
        if not rows:
            continue
        own = replace(plan, kept=[*plan.kept, *spent])
        before = _nearest_db(proto, step, samples, plan) if noise is None else noise
        noise = _nearest_db(other, step, samples, own)
        if noise > before + worth:
            proto, plan, details[name] = other, own, rows
        else:
            noise = before
    return proto, plan, details


def _ways(step: Quantize, samples: Samples, plan: Plan) -> Iterator[tuple[str, Way, float]]:
    """Those that are asked for: what each is called, what it does, and what it has to be worth in decibels."""
    if step.equalize:
        yield "equalized", lambda proto: (equalize(proto, plan.nodes(proto)), []), ANY_DB
    if step.smooth:
        yield "smoothed", lambda proto: smooth(proto, Observed(proto, samples), plan.nodes(proto), plan.bits), WORTH_DB


def _nearest_db(proto: ModelProto, step: Quantize, samples: Samples, plan: Plan) -> float:
    """Signal to noise of what the graph gives when all is rounded to the nearest."""
    observed = Observed(proto, samples)
    ranges = observed.ranges(plan.tensors(proto), [Calibration(method="minmax")])
    own = ModelProto.FromString(proto.SerializeToString())
    plain = step.model_copy(update={"rounding": "nearest", "bias_correction": False})
    return noise_db(observed, _with_integers(own, step, plan, ranges[0], _rounded(own, observed, plain, plan)))


def _rounded(
    proto: ModelProto, observed: Observed, step: Quantize, plan: Plan, settled: Collection[str] = ()
) -> dict[str, Rounded]:
    """Rounds weights in place but those that are settled; with one step a weight that is left to the quantizer."""
    if not step.per_channel:
        return {}
    left = {node.name for node in proto.graph.node if set(settled).isdisjoint(node.input)}
    nodes = left.intersection(plan.nodes(proto))
    adaptive = step.rounding == "adaptive"
    return round_weights(proto, observed, nodes, plan.bits, adaptive=adaptive, correct=step.bias_correction)


def _with_integers(
    proto: ModelProto, step: Quantize, plan: Plan, ranges: Mapping[str, Range], rounded: Mapping[str, Rounded]
) -> ModelProto:
    quantizer = QDQQuantizer(
        onnx.ModelProto.FromString(proto.SerializeToString()),
        step.per_channel,
        plan.reduced,
        QuantType.QInt8,
        ACTIVATIONS[plan.activations],
        _tensors(ranges),
        [],
        list(plan.kept),
        list(plan.ops),
        {
            "WeightSymmetric": True,
            "ActivationSymmetric": False,
            "TensorQuantOverrides": _overrides(rounded),
            "OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUTS) if plan.float_outputs else [],
            "QDQKeepRemovableActivations": reaches_past(proto.graph, ranges),
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    made: ModelProto = quantizer.model.model
    return made


def _tensors(ranges: Mapping[str, Range]) -> TensorsData:
    limits = {
        name: TensorData(lowest=np.float32(own.low), highest=np.float32(own.high)) for name, own in ranges.items()
    }
    return TensorsData(CalibrationMethod.MinMax, limits)


def _overrides(rounded: Mapping[str, Rounded]) -> dict[str, Sequence[dict[str, Any]]]:
    """The steps of every output, as the quantizer takes them."""
    return {
        name: [{"scale": scale, "zero_point": 0, "axis": own.axis} for scale in own.steps]
        for name, own in rounded.items()
    }
