"""Mixed precision: bits for each layer by how far the outputs move where it alone is rounded.

Layers are measured one by one and one width at a time, as ZeroQ (Cai et al. 2020) does, with weights rounded by the
step's algorithm: the Kullback-Leibler divergence of what is predicted, or the squared error of values (HAWQ, Dong et
al. 2019, takes the curvature for it). Of all choices those that no other is both smaller and better than are found
(`knapsack_math`); `max_size` names one of them, which is held against equal bits everywhere, and for
`max_accuracy_drop` they are searched, the network rounded for each that is tried and judged on the validation split.
For `max_latency` a choice costs not its bytes but the time that its products take (`product_times`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.contract.errors import InvalidSpec
from app.contract.mixed import MOST_TRIED, Mixed
from app.contract.spec import ExportFormat
from app.contract.weight_only import FewBits
from worker.context import Context, Wanted
from worker.evaluation.judging import Judge
from worker.model import Model
from worker.techniques.base import Details
from worker.techniques.compression.attempt import restore, snapshot
from worker.techniques.knapsack_math import Frontier, frontier
from worker.techniques.pruning.inputs import matrix, takes_columns
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.sensitivity import drift, looked_at, measuring
from worker.techniques.pruning.weights import PrunableWeight, matches, prunable
from worker.techniques.quantization import weight_only
from worker.techniques.quantization.groups import group_of
from worker.techniques.quantization.mixed_math import Costs, stored_bytes
from worker.techniques.quantization.product_times import NANO, is_product, times_of
from worker.techniques.quantization.weight_only import Row

WHY = "Method mixed measures the layers on data"
CLOSE = 1.01  # times the bytes of what was found not to hold, and fewer are not sought
ROUNDED_OTHERWISE: tuple[ExportFormat, ...] = ("onnx",)  # whose operator rounds activations to 8 bits too
ZERO_BITS = 32  # of a zero point that is no whole number
ROUNDING = 0.1  # of the step's progress: what follows the measurement


@dataclass(frozen=True)
class Layer:
    """A weight, and the bytes that it takes."""

    weight: PrunableWeight
    size: Costs


def applies(step: Mixed, model: Model) -> str | None:
    """None, or why no weight of the model is for it, or why they cannot be as small. Raises InvalidSpec as weight_only
    does."""
    reason = weight_only.applies(step, model)
    layers = [] if reason is not None else layers_of(step, model)
    if layers and step.max_latency is not None and not any(is_product(layer.weight.owner) for layer in layers):
        return "max_latency is for Linear layers: for others ONNX Runtime has no operator of few bits. There are none."
    if reason is not None or step.max_size is None:
        return reason
    floats = sum(layer.size.floats for layer in layers)
    least = sum(layer.size.least(step.floats) for layer in layers)
    if least <= step.max_size * floats:
        return None
    return (
        f"With {min(step.bits)} bits everywhere the weights take {least / floats:.4f} of their bytes as floats "
        f"({least:,} of {floats:,}, steps and zero points included), which is more than the max_size of "
        f"{step.max_size}. Allow fewer bits, larger groups, or a larger max_size."
    )


def layers_of(step: Mixed, model: Model) -> list[Layer]:
    """The weights that the step is for, in the network's order."""
    found = []
    for weight in weight_only.chosen(step, model.module):
        outputs, columns = matrix(weight, weight.value()).shape
        group = group_of(step, weight.owner, columns)
        size = model.stored.get(weight.name, torch.float32).itemsize
        sizes = (stored_bytes(outputs, columns, bits, group, zero_bits(step, bits), size) for bits in step.bits)
        found.append(Layer(weight, Costs(tuple(sizes), outputs * columns * size)))
    return found


def zero_bits(step: FewBits, bits: int) -> int:
    """What a zero point takes: none, as much as a code, or a float where it is no whole number."""
    return ZERO_BITS if step.moves_zeros else 0 if step.symmetric else bits


def quantize_mixed(step: Mixed, context: Context) -> Details:
    """Moves weights to grids of as many bits as their layers need. Masks hold: a pruned weight is the code of zero.

    Raises DatasetMismatch without data to measure with or to judge by, InvalidSpec where what comes into a layer, or
    out of the network, is no number.
    """
    return _Search(step, context).run()


class _Search:
    """One step: its layers, what they mind, and the roundings that were tried."""

    def __init__(self, step: Mixed, context: Context) -> None:
        self._step, self._context = step, context
        self._layers = layers_of(step, context.model)
        self._before = snapshot(context.model.module)
        self._judge = Judge(context, "max_accuracy_drop")
        self._rows: dict[str, Row] = {}
        self._how: Details = {}
        self._tried: dict[int, float] = {}
        self._wanted = -math.inf
        self._in_floats = -math.inf
        self._drop = step.max_accuracy_drop
        # Floats are what is left where no codes hold a metric, and so one of the points that are searched.
        self._widths: tuple[int | None, ...] = (*step.bits, None) if step.floats else step.bits
        wanted = step.measured_on(context.model.facts.parameters, len(self._layers))
        self._samples = looked_at(context, wanted, WHY)
        self._bytes = [layer.size for layer in self._layers]
        self._costs = self._bytes if step.max_latency is None else self._times(step.max_latency)
        self._losses = self._measured()
        self._frontier = self._all_choices()

    def run(self) -> Details:
        details: Details = {"method": self._step.method, "algorithm": self._step.algorithm}
        details["symmetric"] = self._step.symmetric
        if (share := self._step.max_size or self._step.max_latency) is not None:
            bits, told = self._within(math.floor(share * sum(cost.floats for cost in self._costs)))
            details |= told
        else:
            assert self._drop is not None
            details |= self._held(self._drop)
            bits = {name: int(row["bits"] or 0) for name, row in self._rows.items()}
        self._context.progress(1.0)
        return details | self._how | self._shares(bits) | self._told(bits)

    # ---------------------------------------------------------------------------------------------------- the choices

    def _measured(self) -> list[list[float]]:
        """By how much the outputs diverge: for each layer, in each of the step's bits."""
        weights = [layer.weight for layer in self._layers]
        found: dict[str, list[float]] = {}

        def measure() -> list[list[float]]:
            with measuring(self._context, weights, self._samples, WHY) as curve:

                def take(weight: PrunableWeight, values: Iterable[Tensor]) -> None:
                    found[weight.name] = curve(weight, values)
                    self._context.progress((1 - ROUNDING) * len(found) / len(weights))

                weight_only.alone(self._step, self._step.bits, self._context, weights, take)
            return [found[weight.name] for weight in weights]

        losses = self._context.ranks.told(measure)
        if not any(math.isfinite(loss) for own in losses for loss in own):
            raise InvalidSpec(
                "Method mixed measures how far the outputs move, and for the calibration samples the network gives "
                "what is no number. Take such samples out of the data, or use method weight_only."
            )
        return losses

    def _times(self, limit: float) -> list[Costs]:
        """Nanoseconds, in the step's bits. Raises InvalidSpec where no choice comes within the limit."""
        context, weights = self._context, [layer.weight for layer in self._layers]
        sample = next(iter(calibration(context, 1, 1, WHY))).inputs
        found = context.ranks.told(
            lambda: times_of(self._step, self._step.bits, context.model.module, weights, sample, context.scratch)
        )
        floats = sum(cost.floats for cost in found)
        if not floats:
            raise InvalidSpec("max_latency: a sample reaches none of the Linear layers. Limit max_size instead.")
        least = sum(cost.least(self._step.floats) for cost in found)
        if least > math.floor(limit * floats):
            raise InvalidSpec(
                f"The fastest choice of bits takes {least / floats:.3f} of the time of floats ({least / NANO:.6f} s of "
                f"{floats / NANO:.6f} s for one sample on this worker), which is more than the max_latency of {limit}. "
                "Allow more bits to choose from, other groups, or a larger max_latency."
            )
        return found

    def _all_choices(self) -> Frontier:
        options = []
        for cost, losses in zip(self._costs, self._losses, strict=True):
            # What is no number has broken the network, and is worth nothing that is saved.
            worth = (loss if math.isfinite(loss) else math.inf for loss in losses)
            own = list(zip(cost.bits, worth, strict=True))
            options.append([*own, (cost.floats, 0.0)] if self._step.floats else own)
        return frontier(options)

    @property
    def _floats(self) -> int:
        return sum(size.floats for size in self._bytes)

    def _bits(self, point: int) -> dict[str, int]:
        """Of each weight at a point of the frontier; of floats none."""
        widths = [self._widths[option] for option in self._frontier.choice(point)]
        pairs = zip(self._layers, widths, strict=True)
        return {layer.weight.name: bits for layer, bits in pairs if bits is not None}

    def _round(self, bits: dict[str, int]) -> None:
        """The network as it was before the step, with its weights in so many bits."""
        module = self._context.model.module
        restore(module, self._before, self._context.device)
        for name in self._rows:
            del self._context.grids[name]
        self._rows = {}
        self._how = weight_only.round_weights(self._step, bits, self._context, self._rows)

    # --------------------------------------------------------------------------------- what bytes, or time, allow

    def _within(self, limit: int) -> tuple[dict[str, int], Details]:
        """Rounds to the best choice within so many bytes or nanoseconds: that losses add up is not sure, so that it is
        held against the most bits that all layers can have alike."""
        point = self._frontier.within(limit)
        assert point is not None  # `applies`, or `_times`, has seen that there is one
        choices = [self._bits(point)]
        alike = [bits for place, bits in enumerate(self._step.bits) if self._alike(place) <= limit]
        if alike:
            choices.append(dict.fromkeys((layer.weight.name for layer in self._layers), max(alike)))
        moved = drift(self._context, self._samples, WHY)
        found = []
        for bits in choices:
            self._round(bits)
            found.append(moved())
        best = min(range(len(choices)), key=lambda place: (math.isnan(found[place]), found[place]))
        if best != len(choices) - 1:
            self._round(choices[best])
        told: list[Row] = [
            self._spent(bits) | {"divergence": own if math.isfinite(own) else None, "alike": int(place > 0)}
            for place, (bits, own) in enumerate(zip(choices, found, strict=True))
        ]
        return choices[best], {"searched": told}

    def _alike(self, place: int) -> int:
        """The bytes, or the time, of one of the step's bits everywhere."""
        return sum(cost.bits[place] for cost in self._costs)

    # ---------------------------------------------------------------------------------------- what the metric allows

    def _held(self, drop: float) -> Details:
        """Rounds to the fewest bytes that hold the metric; leaves floats where none do."""
        self._in_floats = self._judge.module(self._context.model.module)
        self._wanted = self._judge.wanted(drop)
        self._context.wanted = Wanted(self._wanted, ROUNDED_OTHERWISE)
        point = self._fewest()
        self._round({} if point is None else self._bits(point))
        found = self._judge.module(self._context.model.module)  # once more, on what is delivered
        return {
            "wanted_validation_metric": self._judge.shown(self._wanted),
            "validation_metric_in_floats": self._judge.shown(self._in_floats),
            "validation_metric": self._judge.shown(found),
            "held": found >= self._wanted,
            "searched": [
                {
                    "bytes": int(self._frontier.sizes[tried]),
                    "size": int(self._frontier.sizes[tried]) / self._floats,
                    "validation_metric": self._judge.shown(metric),
                    "holds": int(metric >= self._wanted),
                }
                for tried, metric in self._tried.items()
            ],
        }

    def _fewest(self) -> int | None:
        """The smallest point that was found to hold, by halving what lies between one that does not and one that does.

        The metric goes up and down by chance: another one, smaller still, may hold too.
        """
        low, high = 0, len(self._frontier) - 1
        if not self._holds(high):
            return None
        if high == low or self._holds(low):
            return low
        sizes = self._frontier.sizes
        while high - low > 1 and sizes[high] > CLOSE * sizes[low] and len(self._tried) < MOST_TRIED:
            middle = int(np.searchsorted(sizes, math.sqrt(float(sizes[low]) * float(sizes[high]))))
            middle = min(max(middle, low + 1), high - 1)
            low, high = (low, middle) if self._holds(middle) else (middle, high)
        return high

    def _holds(self, point: int) -> bool:
        if bits := self._bits(point):
            self._round(bits)
            self._tried[point] = self._judge.module(self._context.model.module)
        else:
            self._tried[point] = self._in_floats
        self._context.progress(1 - ROUNDING + ROUNDING * len(self._tried) / (MOST_TRIED + 1))
        return self._tried[point] >= self._wanted

    # ------------------------------------------------------------------------------------------------- what is told

    def _total(self, bits: dict[str, int], costs: Sequence[Costs]) -> int:
        total = 0
        for layer, cost in zip(self._layers, costs, strict=True):
            own: dict[int | None, int] = dict(zip(self._step.bits, cost.bits, strict=True))
            total += own.get(bits.get(layer.weight.name), cost.floats)
        return total

    def _spent(self, bits: dict[str, int]) -> Row:
        """The bytes of a choice, and its seconds where these are limited."""
        found: Row = {"bytes": self._total(bits, self._bytes)}
        return found if self._step.max_latency is None else found | {"seconds": self._total(bits, self._costs) / NANO}

    def _shares(self, bits: dict[str, int]) -> Details:
        """The same, beside floats."""
        size = self._total(bits, self._bytes)
        found: Details = {**self._spent(bits), "bytes_as_floats": self._floats, "size": size / self._floats}
        if self._step.max_latency is None:
            return found
        taken, floats = self._total(bits, self._costs), sum(cost.floats for cost in self._costs)
        return found | {"seconds_as_floats": floats / NANO, "latency": taken / floats}

    def _told(self, bits: dict[str, int]) -> Details:
        minded: dict[str, Row] = {
            layer.weight.name: {
                f"sensitivity_{width}": loss if math.isfinite(loss) else None
                for width, loss in zip(self._step.bits, losses, strict=True)
            }
            for layer, losses in zip(self._layers, self._losses, strict=True)
        }
        names = [layer.weight.name for layer in self._layers]
        left: list[Any] = [
            {"name": weight.name, "weights": weight.value().numel(), "why": self._why(weight)}
            | minded.get(weight.name, {})
            for weight in prunable(self._context.model.module)
            if weight.name not in bits
        ]
        return {
            "sensitivity_samples": self._samples,
            "layers": [self._rows[name] | minded[name] for name in names if name in bits],
            "layers_left_in_float": left,
        }

    def _why(self, weight: PrunableWeight) -> str:
        if any(matches(weight, pattern) for pattern in self._step.exclude):
            return "excluded"
        if not takes_columns(weight.owner):
            return "no Linear, Conv1d or Conv2d layer of one group"
        if self._drop is not None and not self._rows:
            return "no bits held the metric"
        if self._step.max_latency is None:
            return "its bytes are better spent here than in other layers"
        names = [layer.weight.name for layer in self._layers]
        cost = self._costs[names.index(weight.name)]
        if not cost.floats:
            return "no product that a sample reaches: bits save no time"
        return "no bits are faster" if min(cost.bits) >= cost.floats else "the limit leaves time for floats here"
