"""What lies within a float graph as samples go through it: ranges of its tensors, and what comes into its products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto

from app.contract.calibration import Calibration
from app.contract.errors import ExportFailed
from worker.loading.onnx_session import open_session
from worker.techniques.quantization.calibration import Feed, Samples
from worker.techniques.quantization.static import ranges_math
from worker.techniques.quantization.static.ranges_math import Histogram, Range, counted

BINS = 4096
NOTHING = np.zeros(0, np.int64)  # the counts of who needs none
LEAST_RANGE = 1e-30  # in a narrower one float32 has no bins
HELD = 1 << 28  # bytes that one pass over the samples is to hold
_LEAST_NOISE = 1e-12
_Item = TypeVar("_Item")


class Observed:
    """A float graph whose inner tensors can be asked for."""

    def __init__(self, source: ModelProto, samples: Samples) -> None:
        self._proto = ModelProto.FromString(source.SerializeToString())
        self.outputs = [value.name for value in source.graph.output]
        self.samples = samples
        self.tensors = floating(source)
        self._known = {value.name: value for value in (*source.graph.value_info, *source.graph.output)}
        constants = {tensor.name for tensor in source.graph.initializer}
        self._inputs = {value.name for value in source.graph.input} - constants
        self._open: tuple[list[str], ort.InferenceSession] | None = None

    def watch(self, names: Sequence[str]) -> Iterator[Feed]:
        """The named tensors of every batch."""
        asked = [name for name in names if name not in self._inputs]
        for feed in self.samples:
            yield self._run(asked, feed) | {name: feed[name] for name in names if name in self._inputs}

    def _run(self, names: list[str], feed: Feed) -> Feed:
        """These alone are outputs of the session: the runtime holds every output until the end, asked for or not."""
        if not names:
            return {}
        if self._open is None or self._open[0] != names:
            self._open = None  # never two
            del self._proto.graph.output[:]
            self._proto.graph.output.extend(self._known[name] for name in names)
            self._open = names, _session(self._proto)
        return dict(zip(names, self._open[1].run(names, feed), strict=True))

    def ranges(self, names: Iterable[str], ways: Sequence[Calibration]) -> list[dict[str, Range]]:
        """What 8 bits are to be spread over in each tensor, found in each of the ways.

        Raises ExportFailed where a tensor holds what is no number.
        """
        found: list[dict[str, Range]] = [{} for _ in ways]
        wanted = sorted(set(names) & self.tensors)
        sizes = self.sizes(wanted)
        for group in grouped(wanted, lambda name: sizes[name]):
            limits = self._limits(group)
            counts = self._histograms(limits) if any(way.method != "minmax" for way in ways) else {}
            for ranges, way in zip(found, ways, strict=True):
                for name, pair in limits.items():
                    ranges[name] = range_of(counts.get(name, Histogram(*pair, NOTHING)), way)
        return found

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """The bytes of these tensors in a batch, from a single sample where the graph takes one."""
        first = next(iter(self.samples))
        asked = [name for name in names if name not in self._inputs]
        try:
            taken = {name: value[:1] if value.ndim else value for name, value in first.items()}
            found = self._run(asked, taken)
            times = max(len(value) for value in first.values() if value.ndim)
        except Exception:  # of the runtime, whose errors share no class
            taken, times = first, 1
            found = self._run(asked, taken)
        return {name: times * (found | taken)[name].nbytes for name in names}

    def _limits(self, names: list[str]) -> dict[str, tuple[float, float]]:
        found = dict.fromkeys(names, (0.0, 0.0))
        for tensors in self.watch(names):
            for name, values in tensors.items():
                finite = values if np.isfinite(values).all() else values[np.isfinite(values)]
                if np.isnan(values).any():
                    raise ExportFailed(f"With the calibration samples {name!r} becomes what is no number (NaN).")
                if finite.size:
                    low, high = found[name]
                    found[name] = min(low, float(finite.min())), max(high, float(finite.max()))
        return found

    def _histograms(self, limits: dict[str, tuple[float, float]]) -> dict[str, Histogram]:
        found = {name: np.zeros(BINS, np.int64) for name in limits}
        for tensors in self.watch(list(limits)):
            for name, values in tensors.items():
                low, high = limits[name]
                if high - low > LEAST_RANGE:
                    found[name] += counted(values, low, high, BINS)
        return {name: Histogram(*limits[name], counts) for name, counts in found.items()}


def range_of(histogram: Histogram, calibration: Calibration) -> Range:
    """What 8 bits are to be spread over."""
    if calibration.method == "minmax":
        return histogram.whole
    if calibration.method == "percentile":
        return ranges_math.percentile(histogram, calibration.percentile)
    return ranges_math.entropy(histogram) if calibration.method == "entropy" else ranges_math.least_squares(histogram)


def noise_db(observed: Observed, quantized: ModelProto) -> float:
    """Signal to noise in what a quantized graph gives for the samples, in decibels; each output counts alike.

    Minus infinity where it gives what is no number, or infinite, and the float graph does not.
    """
    session = _session(quantized)
    power, noise = np.zeros(len(observed.outputs)), np.zeros(len(observed.outputs))
    for feed, exact in zip(observed.samples, observed.watch(observed.outputs), strict=True):
        for place, (name, got) in enumerate(zip(observed.outputs, session.run(observed.outputs, feed), strict=True)):
            if np.issubdtype(got.dtype, np.floating):
                finite = np.isfinite(exact[name])  # what a mask has set to infinity says nothing
                signal = exact[name][finite].astype(np.float64)
                power[place] += np.square(signal).sum()
                noise[place] += np.square(np.nan_to_num(got[finite], nan=np.inf) - signal).sum()
    if not np.isfinite(noise).all():
        return -np.inf
    shares = noise[power > 0] / power[power > 0]
    return float(-10 * np.log10(max(shares.mean(), _LEAST_NOISE))) if shares.size else 0.0


def _session(proto: ModelProto) -> ort.InferenceSession:
    return open_session(proto.SerializeToString(), torch.get_num_threads())


def grouped(items: Iterable[_Item], cost: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """In their order, as many at a time as together cost no more than HELD, or one."""
    group: list[_Item] = []
    spent = 0
    for item in items:
        own = cost(item)
        if group and spent + own > HELD:
            yield group
            group, spent = [], 0
        group.append(item)
        spent += own
    if group:
        yield group


def floating(proto: ModelProto) -> set[str]:
    """The float32 tensors of a graph whose shapes were inferred, without its constants."""
    constant = {tensor.name for tensor in proto.graph.initializer}
    made = {name for node in proto.graph.node for name in node.output} | {value.name for value in proto.graph.input}
    values = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    known = {one.name for one in values if one.type.tensor_type.elem_type == TensorProto.FLOAT}
    return known & made - constant
