"""What a network becomes without units that went, before any training: as near to the whole one as samples make it."""

from __future__ import annotations

import copy

from torch import nn

from app.contract.widths import TakesUnits
from worker.context import Context
from worker.data.batch import Batch
from worker.structure.narrowing import Entries
from worker.techniques.pruning.samples import has_samples
from worker.techniques.pruning.sensitivity import drift_on, prepared
from worker.techniques.structure.reconstruction import Reconstruction
from worker.techniques.structure.statistics import Found, Statistics

WHY = "Layers are fitted to their outputs for data"
BATCH = 8
HELD_OUT = 5  # of so many batches the second is for what is fitted to be tried on


class Renewal:
    """Layers are fitted again, if a step asks for that, and statistics of batch norms found. Of what can be done, with
    layers fitted or as they are, and fitted ones in front of norms that keep their statistics, what is best is that
    whose outputs on held out samples are nearest to the whole network's."""

    def __init__(self, step: TakesUnits, context: Context) -> None:
        self._statistics = Statistics(context, step.samples)
        self._reconstruction: Reconstruction | None = None
        batches = _batches(context, step.samples) if step.reconstructs else []
        if len(batches) > 1:  # one is held out
            held_out = batches[1::HELD_OUT]
            seen = [own for number, own in enumerate(batches) if number % HELD_OUT != 1]
            whole = context.model.module
            inputs = ([batch.inputs for batch in own] for own in (seen, held_out))
            self._reconstruction = Reconstruction(whole, *inputs)
            self._far = drift_on(context, held_out)

    def of(self, made: nn.Module, entries: Entries) -> Found:
        """Puts it into a narrower copy of the context's network, `entries` being what it has of its parameters, and
        gives it by names in a state dict."""
        if self._reconstruction is None:
            return self._statistics.of(made)
        plain = copy.deepcopy(made)
        fitted = self._reconstruction.of(made, entries)
        if not fitted:
            return self._statistics.of(made)
        statistics = self._statistics.of(plain)
        ways = [(plain, statistics), (made, fitted)]
        if statistics:
            renewed = copy.deepcopy(made)
            ways.append((renewed, fitted | self._statistics.of(renewed)))
        best, found = min(ways, key=lambda way: self._far(way[0].eval()))
        made.load_state_dict(best.state_dict())
        return found


def fitted_layers(found: Found) -> int:
    """How many layers of what a renewal gives were fitted again."""
    return sum(name.rpartition(".")[2] == "weight" for name in found)


def _batches(context: Context, samples: int) -> list[Batch]:
    return prepared(context, BATCH, samples, WHY) if has_samples(context) else []
