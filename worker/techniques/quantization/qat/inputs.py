"""Rounding of what comes into layers: ranges from samples, one grid for all layers that read the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from app.contract.errors import InvalidSpec
from app.contract.qat import Qat
from worker.context import Context
from worker.techniques.pruning.samples import calibration
from worker.techniques.quantization.calibration import CALIBRATION_BATCH
from worker.techniques.quantization.qat.lsq import FakeInput
from worker.techniques.quantization.static import ranges_math
from worker.techniques.quantization.static.observing import BINS, LEAST_RANGE, range_of
from worker.techniques.quantization.static.ranges_math import Histogram, Range, counted

ATTRIBUTE = "fake_input"  # of a layer
HIGH = ranges_math.LEVELS - 1


def ranges(
    step: Qat, context: Context, layers: Mapping[str, nn.Module], tied: Sequence[Sequence[str]] = ()
) -> dict[tuple[str, ...], Range]:
    """Of each tensor that comes into layers the range, by the names of all layers that read it.

    Layers that are `tied` have one range, since a file knows them by the weight that they share. Layers that no sample
    comes through are left out. Raises InvalidSpec where what comes in is not finite.
    """
    limits = _limits(step, context, layers)
    sharing = [[name for name in names if name in limits] for names in tied]
    together = _groups(list(limits), [*_readers(step, context, layers), *filter(None, sharing)])
    spans = [Range(min(limits[name].low for name in own), max(limits[name].high for name in own)) for own in together]
    place = {name: index for index, own in enumerate(together) for name in own}
    counts = [np.zeros(BINS, np.int64) for _ in together]

    def count(name: str, given: Tensor) -> None:
        own = spans[place[name]]
        if own.high - own.low > LEAST_RANGE:
            counts[place[name]] += counted(given.float().cpu().numpy(), own.low, own.high, BINS)

    if step.calibration.method != "minmax":
        _through(step, context, layers, count)
    return {
        tuple(own): range_of(Histogram(span.low, span.high, counted_), step.calibration)
        for own, span, counted_ in zip(together, spans, counts, strict=True)
    }


def fake_inputs(step: Qat, found: Mapping[tuple[str, ...], Range]) -> dict[str, FakeInput]:
    """The rounding of each layer's input, by the layer's name; the same object for all that read one tensor.

    What was zero with all samples says nothing of the step to begin with, and is left as it is.
    """
    made: dict[str, FakeInput] = {}
    for names, own in found.items():
        if own.high - own.low <= LEAST_RANGE:
            continue
        width = (own.high - own.low) / HIGH
        zero = round(-own.low / width)
        fixed = step.steps == "fixed"
        shared = FakeInput(torch.tensor([width]), torch.tensor([float(zero)]), 0, HIGH, fixed=fixed)
        made |= dict.fromkeys(names, shared)
    return made


def learned(made: Mapping[str, FakeInput]) -> dict[str, Range]:
    """The ranges that the grids have come to span."""
    found = {}
    for name, own in made.items():
        step, zero = float(own.log_step.detach().exp()), float(own.zero)
        found[name] = Range.around_zero((own.low - zero) * step, (own.high - zero) * step)
    return found


@contextmanager
def rounding(layers: Mapping[str, nn.Module], made: Mapping[str, FakeInput]) -> Iterator[None]:
    """Within it the layers round what comes in; copies of them, too, each with the grids of its own copy."""
    hooks = []
    for name, own in made.items():
        layers[name].add_module(ATTRIBUTE, own)
        hooks.append(layers[name].register_forward_pre_hook(_round))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name in made:
            del layers[name]._modules[ATTRIBUTE]


def _round(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(layer, ATTRIBUTE)(given[0]), *given[1:])


def _limits(step: Qat, context: Context, layers: Mapping[str, nn.Module]) -> dict[str, Range]:
    found: dict[str, Range] = {}

    def look(name: str, given: Tensor) -> None:
        if not given.isfinite().all():
            raise InvalidSpec(f"With the calibration samples what comes into {name!r} is not finite.")
        before = found.get(name, Range(0.0, 0.0))
        found[name] = Range(min(before.low, float(given.min())), max(before.high, float(given.max())))

    _through(step, context, layers, look)
    return found


def _readers(step: Qat, context: Context, layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """The layers that read the same tensor, of each tensor; seen with one sample, since all have to be kept."""
    seen: list[tuple[Tensor, list[str]]] = []

    def look(name: str, given: Tensor) -> None:
        known = next((names for tensor, names in seen if tensor is given), None)
        if known is None:
            seen.append((given, [name]))
        else:
            known.append(name)

    alone = step.calibration.model_copy(update={"samples": 1})
    _through(step.model_copy(update={"calibration": alone}), context, layers, look)
    return [names for _, names in seen]


def _through(step: Qat, context: Context, layers: Mapping[str, nn.Module], look: Callable[[str, Tensor], None]) -> None:
    """Calibration samples, with `look` at what comes into each layer."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, given: look(name, given[0])

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    module = context.model.module.eval()
    try:
        with torch.no_grad():
            for batch in calibration(context, CALIBRATION_BATCH, step.calibration.samples, "qat looks at inputs"):
                module(*batch.inputs)
    finally:
        for own in hooks:
            own.remove()


def _groups(names: Sequence[str], readers: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names in groups: two are in one if both are among the same `readers`, directly or by way of others."""
    group = {name: [name] for name in names}
    for one in readers:
        for name in one[1:]:
            mine, other = group[one[0]], group[name]
            if mine is not other:
                mine.extend(other)
                group.update(dict.fromkeys(other, mine))
    return list({id(own): own for own in group.values()}.values())
