"""Whether a network that was rewritten gives what it gave: for several batches, and lengths where these are open."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from app.contract.facts import calibration_split
from worker.data.batch import Inputs
from worker.data.feed import Feed
from worker.model import Model
from worker.structure.blocks import passed, varied
from worker.structure.calls import device_of
from worker.structure.fusing.fold_math import difference

CLOSE = 1e-5  # of the largest output
MOST_DOUBLED = 50_000_000  # parameters of a network that is compared in float64, in two copies


def looked_at(model: Model) -> list[Inputs]:
    """Inputs of two batch sizes, and, where sizes are open, with each another; where the module lies."""
    device = device_of(model.module)
    found = [varied(model), tuple(own.to(device) for own in model.example(3, seed=1))]
    for length in (model.example_length // 2 + 1, 2 * model.example_length):
        if all(size is not None for tensor in model.facts.inputs for size in tensor.shape):
            break
        inputs = tuple(own.to(device) for own in _uneven(model, length))
        try:
            passed(model.module, inputs)
        except Exception:  # noqa: S112 - networks fail on sizes that they are not for, in errors of any class
            continue
        found.append(inputs)
        break
    return found


def samples_of(feed: Feed | None, count: int) -> list[Inputs]:
    """A few of the job's data on the CPU, where it has some."""
    split = None if feed is None else calibration_split(feed.data.facts)
    if feed is None or split is None:
        return []
    return [batch.inputs for batch in feed.batches(split, count, limit=count)]


def _uneven(model: Model, length: int) -> Inputs:
    """Of so many places, and one more in each further open dimension."""
    made = []
    for facts, own in zip(model.facts.inputs, model.example(2, seed=2, length=length), strict=True):
        for place, axis in enumerate(axis for axis, size in enumerate(facts.shape, 1) if size is None):
            if place:
                own = torch.cat([own, own.narrow(axis, 0, place)], axis)
        made.append(own)
    return tuple(made)


class Judge:
    """Holds what a network gives, in float64 where it can compute so.

    `rounding` is how far the network itself, in float32, is from that: weights that were rounded anew differ as much.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Inputs]) -> None:
        self._inputs = inputs
        self._double = sum(own.numel() for own in module.parameters()) <= MOST_DOUBLED
        plain = [passed(module, one) for one in self._inputs]
        try:
            self._wanted = self._given(module)
        except Exception:  # some networks say float32 in their code; errors are of every class
            self._double = False
            self._wanted = plain
        self.rounding = self._apart(plain)

    @property
    def most(self) -> float:
        """By how much outputs may differ."""
        return max(CLOSE, self.rounding)

    def gap(self, module: nn.Module) -> float:
        """The largest difference of outputs, as a share of the largest."""
        return self._apart(self._given(module))

    def _apart(self, given: Sequence[Tensor]) -> float:
        return max(difference(own, wanted) for own, wanted in zip(given, self._wanted, strict=True))

    def _given(self, module: nn.Module) -> list[Tensor]:
        if not self._double:
            return [passed(module, one) for one in self._inputs]
        module = copy.deepcopy(module).double()
        return [
            passed(module, tuple(own.double() if own.is_floating_point() else own for own in one))
            for one in self._inputs
        ]
