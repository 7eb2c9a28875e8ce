"""Layers that read units which are gone are fitted again, so that they give what they gave with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from worker.constraints import owners, stored
from worker.data.batch import Inputs
from worker.structure.narrowing import Entries
from worker.techniques.pruning.inputs import channels, columns, matrix, takes_columns, unmatrix
from worker.techniques.pruning.walk import Reached, stages
from worker.techniques.pruning.weights import PrunableWeight, has_inputs_first, prunable
from worker.techniques.structure.reconstruction_math import Products, nearest
from worker.techniques.structure.statistics import Found

ROWS = 16_384  # products that a layer is fitted to, or four for each of its columns where these are more
MOST_HELD = 1 << 30  # bytes of outputs that a layer is fitted to, and of sums of products: larger layers stay
TOLERANCE = 1e-3  # of outputs, relative to the largest: sums in another order
GEOMETRY = ("kernel_size", "stride", "dilation", "padding", "padding_mode")

Seen = Callable[[nn.Module, int, Tensor, Tensor], None]
"""Takes a layer, the number of the batch, what comes into the layer and what it gives."""


class Reconstruction:
    """Fits layers one behind the other: each gets what those before it, as they are by then, make of the samples, and
    is fitted to what the whole network's layer gives for them (He, Zhang & Sun 2017, who fit convolutions so). The
    batches of `held_out` are what a layer has to be nearer for."""

    def __init__(self, whole: nn.Module, batches: Sequence[Inputs], held_out: Sequence[Inputs]) -> None:
        self._whole = whole
        self._batches, self._seen = [*batches, *held_out], len(batches)

    def of(self, made: nn.Module, entries: Entries) -> Found:
        """Fits the layers of a narrower copy, `entries` being what it has of the whole network's parameters, and gives
        their new weights and biases by their names in a state dict."""
        made.eval()
        self._whole.eval()
        weights = {own.owner: own for own in prunable(made) if takes_columns(own.owner)}
        if not any(_lost_inputs(own, entries) for own in weights.values()):
            return {}
        theirs = {layer: self._whole.get_submodule(own.layer) for layer, own in weights.items()}
        plain = {layer for layer, _ in plain_calls(self._whole, self._batches[0], list(theirs.values()))}
        calls = plain_calls(made, self._batches[0], list(weights))
        calls = [(layer, given) for layer, given in calls if theirs[layer] in plain]
        waves = _waves([(weights[layer], given) for layer, given in calls if _can_be(made, weights[layer], entries)])
        found: Found = {}
        for before, now in zip(
            stages(self._whole, self._batches, [theirs[layer] for layer, _ in calls]),
            stages(made, self._batches, [layer for layer, _ in calls]),
            strict=True,
        ):
            for wave in waves:
                if wave[0].owner in now.layers:
                    found |= self._fit(wave, before.run, now.run, entries)
        return found

    def _fit(
        self, wave: Sequence[PrunableWeight], before: Callable[[], None], now: Callable[[], None], entries: Entries
    ) -> Found:
        """Some layers that read the same; none that is called for other samples than the whole network's is."""
        rows = ceil(max(ROWS, 4 * matrix(wave[0], wave[0].value()).shape[1]) / len(self._batches))
        gave = self._given(wave, before, entries, rows)
        sums = {own.layer: (Products(), Products()) for own in wave}
        unlike: set[str] = set()

        def reads(layer: nn.Module, number: int, given: Tensor, _: Tensor) -> None:
            x = _some(columns(layer, given), rows, number)
            for own in wave:
                told = gave[own.layer]
                if number >= len(told) or len(told[number]) != len(x):
                    unlike.add(own.layer)
                else:
                    sums[own.layer][number >= self._seen].see(x, told[number])

        with seeing([wave[0].owner], reads):
            now()
        found: Found = {}
        for own in wave:
            if own.layer not in unlike and all(one.count for one in sums[own.layer]):
                found |= _fitted(own, *sums[own.layer])
        return found

    def _given(
        self, wave: Sequence[PrunableWeight], run: Callable[[], None], entries: Entries, rows: int
    ) -> dict[str, list[Tensor]]:
        """By layer and batch, of what the whole network's layers give the outputs that stay."""
        names = {self._whole.get_submodule(own.layer): own for own in wave}
        found: dict[str, list[Tensor]] = {own.layer: [] for own in wave}

        def gives(layer: nn.Module, number: int, _: Tensor, output: Tensor) -> None:
            own = names[layer]
            outputs = _some(channels(layer, output), rows, number)
            stay = entries.get((own.name, int(has_inputs_first(layer))))
            # A copy: what comes behind may compute in place.
            found[own.layer].append(outputs.clone() if stay is None else outputs[:, stay.to(outputs.device)])

        with seeing(list(names), gives):
            run()
        return found


def _fitted(one: PrunableWeight, seen: Products, held_out: Products) -> Found:
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


def _waves(calls: Sequence[tuple[PrunableWeight, Tensor]]) -> list[list[PrunableWeight]]:
    """Layers that follow each other and read the same in the same way, together."""
    waves: list[list[PrunableWeight]] = []
    last: tuple[Any, ...] = ()
    for own, given in calls:
        reads = id(given), *(getattr(own.owner, name, None) for name in GEOMETRY)
        if reads == last:
            waves[-1].append(own)
        else:
            waves.append([own])
        last = reads
    return waves


def _can_be(module: nn.Module, own: PrunableWeight, entries: Entries) -> bool:
    """Whether a layer lost inputs, no other computes with its weight, and sums of its products can be held."""
    alone = len(list(owners(module, stored(own.owner, own.attribute)))) == 1
    return alone and _lost_inputs(own, entries) and _fits(own)


def _lost_inputs(own: PrunableWeight, entries: Entries) -> bool:
    return (own.name, 1 - has_inputs_first(own.owner)) in entries


def _fits(own: PrunableWeight) -> bool:
    outputs, inputs = matrix(own, own.value()).shape
    return max(4 * max(ROWS, 4 * inputs) * outputs, 8 * inputs * max(inputs, outputs)) <= MOST_HELD


def plain_calls(module: nn.Module, batch: Inputs, layers: Sequence[nn.Module]) -> list[tuple[nn.Module, Tensor]]:
    """Those that the network calls once, in that order, with what comes in; none whose outputs are not the product
    of its weight with what comes in: some compute in ways of their own, or are called by name."""
    found: list[tuple[nn.Module, Tensor]] = []
    calls = Counter[nn.Module]()

    def note(layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        calls[layer] += 1
        if given and _is_product(layer, given[0], output):
            found.append((layer, given[0]))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            module(*batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer, given) for layer, given in found if calls[layer] == 1]


def _is_product(layer: nn.Module, given: Any, output: Any) -> bool:
    if not isinstance(given, Tensor) or not isinstance(output, Tensor):
        return False
    if isinstance(layer, _ConvNd) and given.ndim != len(layer.kernel_size) + 2:
        return False
    try:
        own = PrunableWeight("", "weight", layer, "weight")
        expected = columns(layer, given) @ matrix(own, own.value()).T
        bias = layer._parameters.get("bias")
        expected = expected if bias is None else expected + bias
        outputs = channels(layer, output)
    except (IndexError, RuntimeError):  # of shapes that are not those of such a product
        return False
    most = float(expected.abs().max()) if expected.numel() else 0.0
    return outputs.shape == expected.shape and torch.allclose(outputs, expected, TOLERANCE, TOLERANCE * most)


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
