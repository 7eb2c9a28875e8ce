"""Layers that read units which are gone are fitted again, so that they give what they gave with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor, nn

from app.contract.facts import calibration_split
from app.contract.widths import TakesUnits
from worker.constraints import owners, stored
from worker.context import Context
from worker.data.batch import Inputs
from worker.structure.narrowing import Entries
from worker.techniques.pruning.inputs import channels, columns, matrix, takes_columns, unmatrix
from worker.techniques.pruning.samples import calibration
from worker.techniques.pruning.walk import Reached, stages
from worker.techniques.pruning.weights import PrunableWeight, has_inputs_first, prunable
from worker.techniques.structure.reconstruction_math import Moments, nearest
from worker.techniques.structure.statistics import Found, Statistics

WHY = "Layers are fitted to their outputs for data"
BATCH = 8
HELD_OUT = 5  # of so many batches the second is for what is fitted to be tried on
ROWS = 16_384  # products that a layer is fitted to, or four for each of its columns where these are more

Seen = Callable[[nn.Module, int, Tensor, Tensor], None]
"""Takes a layer, the number of the batch, what comes into the layer and what it gives."""


class Renewal:
    """What a step's networks become without units that went: layers are fitted again, if it asks for that, and
    statistics of batch norms found."""

    def __init__(self, step: TakesUnits, context: Context) -> None:
        self._reconstruction = Reconstruction(context, step.samples) if step.reconstructs else None
        self._statistics = Statistics(context, step.samples)

    def of(self, made: nn.Module, entries: Entries) -> Found:
        """Puts it into a narrower copy of the context's network, `entries` being what it has of its parameters, and
        gives it by names in a state dict."""
        found = self._reconstruction.of(made, entries) if self._reconstruction is not None else {}
        return found | self._statistics.of(made)


def reconstructed(found: Found) -> int:
    """How many layers of what is given here were fitted again."""
    return sum(name.rpartition(".")[2] == "weight" for name in found)


class Reconstruction:
    """Fits layers one behind the other: each gets what those before it, as they are by then, make of the samples, and
    is fitted to what the whole network's layer gives for them (He, Zhang & Sun 2017, who fit convolutions so)."""

    def __init__(self, context: Context, samples: int) -> None:
        self._whole = context.model.module
        self._batches: list[Inputs] = []
        if context.feed is not None and calibration_split(context.feed.data.facts) is not None:
            self._batches = [batch.inputs for batch in calibration(context, BATCH, samples, WHY)]

    def of(self, made: nn.Module, entries: Entries) -> Found:
        """Fits the layers of a narrower copy, `entries` being what it has of the whole network's parameters, and gives
        their new weights and biases by their names in a state dict."""
        weights = [own for own in prunable(made) if takes_columns(own.owner) and _has_its_own(made, own)]
        if len(self._batches) < 2 or not any(_lost_inputs(own, entries) for own in weights):
            return {}
        made.eval()
        self._whole.eval()
        waves = _waves(made, self._batches[0], weights)
        order = [own for wave in waves for own in wave]
        found: Found = {}
        for before, now in zip(
            stages(self._whole, self._batches, [self._whole.get_submodule(own.layer) for own in order]),
            stages(made, self._batches, [own.owner for own in order]),
            strict=True,
        ):
            for wave in waves:
                own = [one for one in wave if one.owner in now.layers and _lost_inputs(one, entries)]
                if own:
                    moments = self._moments(own, before.run, now.run, entries)
                    for one in own:
                        found |= _fit(one, *moments[one.layer])
        return found

    def _moments(
        self, wave: Sequence[PrunableWeight], before: Callable[[], None], now: Callable[[], None], entries: Entries
    ) -> dict[str, tuple[Moments, Moments]]:
        """By layer, of some that read the same: of what they read now and gave before, and that of held out samples."""
        names = {self._whole.get_submodule(own.layer): own for own in wave}
        gave: dict[str, list[Tensor]] = {own.layer: [] for own in wave}
        first = wave[0]
        rows = ceil(max(ROWS, 4 * matrix(first, first.value()).shape[1]) / len(self._batches))

        def gives(layer: nn.Module, number: int, _: Tensor, output: Tensor) -> None:
            own = names[layer]
            output = channels(layer, output)
            stay = entries.get((own.name, int(has_inputs_first(layer))))
            output = output if stay is None else output.index_select(1, stay.to(output.device))
            gave[own.layer].append(_some(output, rows, number))

        with seeing(list(names), gives):
            before()
        moments = {own.layer: (Moments(), Moments()) for own in wave}

        def reads(layer: nn.Module, number: int, given: Tensor, _: Tensor) -> None:
            x = _some(columns(layer, given), rows, number)
            for own in wave:
                moments[own.layer][number % HELD_OUT == 1].see(x, gave[own.layer][number])

        with seeing([first.owner], reads):
            now()
        return moments


def _fit(one: PrunableWeight, seen: Moments, held_out: Moments) -> Found:
    """Puts what is fitted into the layer, and gives it; nothing where the layer is nearer as it is."""
    bias = one.owner._parameters.get("bias")
    now = matrix(one, one.value()), None if bias is None else bias.detach()
    found = nearest(seen, held_out, now)
    if found is None:
        return {}
    weight, offset = found
    told = {one.name: unmatrix(one, weight)} | ({} if offset is None else {f"{one.layer}.bias": offset})
    with torch.no_grad():
        for name, values in told.items():
            getattr(one.owner, name.rpartition(".")[2]).copy_(values)
    return told


def _has_its_own(module: nn.Module, own: PrunableWeight) -> bool:
    """Whether no other layer computes with its weight."""
    return len(list(owners(module, stored(own.owner, own.attribute)))) == 1


def _lost_inputs(own: PrunableWeight, entries: Entries) -> bool:
    return (own.name, 1 - has_inputs_first(own.owner)) in entries


def _waves(module: nn.Module, batch: Inputs, weights: Sequence[PrunableWeight]) -> list[list[PrunableWeight]]:
    """In the order in which the network calls them, those together that follow each other and read the same; none that
    it calls more than once, or never."""
    by_layer = {own.owner: own for own in weights}
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls.append((layer, given[0]))

    hooks = [layer.register_forward_pre_hook(note) for layer in by_layer]
    try:
        with torch.no_grad():
            module(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    counts = Counter(layer for layer, _ in calls)
    waves: list[list[PrunableWeight]] = []
    last = None
    for layer, given in calls:
        if counts[layer] > 1:
            continue
        if given is last:
            waves[-1].append(by_layer[layer])
        else:
            waves.append([by_layer[layer]])
        last = given
    return waves


@contextmanager
def seeing(layers: Sequence[nn.Module], seen: Seen) -> Iterator[None]:
    """Within it a pass ends as soon as it has come through all of the layers."""
    counts = dict.fromkeys(layers, 0)

    def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        seen(layer, counts[layer], given[0], output)
        counts[layer] += 1
        if len(set(counts.values())) == 1:
            raise Reached

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _some(rows: Tensor, count: int, number: int) -> Tensor:
    """So many rows of a batch, the same each time that they are asked for."""
    if len(rows) <= count:
        return rows.detach()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))
    return rows.detach()[order[:count].to(rows.device)]
