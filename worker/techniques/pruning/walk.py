"""Through a network from front to back with samples, a block at a time: one block's inputs are all that is held.

Networks of transformers are rows of equal blocks. The samples are brought to the first of them, and from there on only
from one block to the next, so that each block sees what those before it, as they are now, have made of them. Layers
that lie in no such row are visited one by one, each with passes of the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.data.batch import Inputs

# What blocks are told to keep for the next token: nothing is generated here, and it would grow with every pass.
CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True)
class Stage:
    """Some of the layers, and how to bring all samples through them, or as far as a hook raises Reached."""

    layers: list[nn.Module]
    run: Callable[[], None]
    held_bytes: int
    """What the samples take that wait in front of it."""


@dataclass
class _Call:
    """How a block is called with one batch."""

    given: tuple[Any, ...]
    named: dict[str, Any]

    def with_hidden(self, hidden: Tensor) -> _Call:
        if self.given:
            return _Call((hidden, *self.given[1:]), self.named)
        return _Call((), self.named | {"hidden_states": hidden})

    @property
    def hidden(self) -> Tensor:
        found: Tensor = self.given[0] if self.given else self.named["hidden_states"]
        return found


class Reached(Exception):
    """The samples are where they were to be brought: a hook ends a batch's pass so."""


def stages(module: nn.Module, batches: Sequence[Inputs], layers: Sequence[nn.Module]) -> Iterator[Stage]:
    """Every one of `layers`, which are in the order of the network, in one stage: those in front of a row of blocks,
    those of the blocks, and the others. Whoever takes a stage may change its weights.

    The module is in eval mode and its device holds the batches.
    """
    blocks = _row(module, batches[0], layers)
    inside = {layer for block in blocks for layer in block.modules()}
    held = sum(tensor.nbytes for batch in batches for tensor in batch)
    first = next((place for place, layer in enumerate(layers) if layer in inside), 0)
    for layer in layers[:first]:
        yield Stage([layer], lambda: _whole(module, batches), held)
    if blocks:
        yield from _blockwise(module, batches, blocks, layers)
    for layer in layers[first:]:
        if layer not in inside:
            yield Stage([layer], lambda: _whole(module, batches), held)


class Shortcut:
    """Passes of a whole network that begin at one of its blocks: what those before it give is kept, as long as nothing
    in them changes. Outputs are those of whole passes; a network that is no row of blocks has none but those.

    The module is in eval mode and its device holds the batches.
    """

    def __init__(self, module: nn.Module, batches: Sequence[Inputs], layers: Sequence[nn.Module]) -> None:
        self._module, self._batches = module, batches
        self._blocks = _row(module, batches[0], layers)
        self._places = {layer: place for place, block in enumerate(self._blocks) for layer in block.modules()}
        self._at, self._kept = 0, [None] * len(batches)

    def begin_at(self, layer: nn.Module) -> None:
        """From now on passes begin at the block that the layer lies in, at the front where it lies in none."""
        place = self._places.get(layer, 0)
        if place == self._at:
            return
        if place < self._at:
            self._at = 0
        if place:
            self._kept = [self._given_by(self._blocks[place - 1], number) for number in range(len(self._batches))]
        self._at = place

    def run(self, number: int) -> Any:
        """What the network gives for a batch."""
        kept = self._kept[number]
        skipped = self._blocks[: self._at]
        try:
            for block in skipped:
                block.forward = lambda *given, **named: kept
            return self._module(*self._batches[number])
        finally:
            for block in skipped:
                del block.forward

    def _given_by(self, block: nn.Module, number: int) -> Any:
        found: list[Any] = []

        def take(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output)
            raise Reached

        hook = block.register_forward_hook(take)
        try:
            self.run(number)
        except Reached:
            pass
        finally:
            hook.remove()
        return found[0]


def _whole(module: nn.Module, batches: Sequence[Inputs]) -> None:
    with torch.no_grad():
        for batch in batches:
            with suppress(Reached):
                module(*batch)


def _blockwise(
    module: nn.Module, batches: Sequence[Inputs], blocks: list[nn.Module], layers: Sequence[nn.Module]
) -> Iterator[Stage]:
    calls = [_call_of(module, blocks[0], batch) for batch in batches]
    for block in blocks:
        own = set(block.modules())
        held = sum(call.hidden.nbytes for call in calls)
        yield Stage([layer for layer in layers if layer in own], lambda: _ask(block, calls), held)  # noqa: B023
        with torch.no_grad():  # as it is now
            calls = [call.with_hidden(_hidden(block(*call.given, **call.named))) for call in calls]


def _ask(block: nn.Module, calls: Sequence[_Call]) -> None:
    with torch.no_grad():
        for call in calls:
            with suppress(Reached):
                block(*call.given, **call.named)


def _call_of(module: nn.Module, block: nn.Module, batch: Inputs) -> _Call:
    """How the network calls a block with a batch."""
    found: list[_Call] = []

    def take(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = {name: None if name in CACHES else value for name, value in named.items()}
        found.append(_Call(given, named))
        raise Reached

    hook = block.register_forward_pre_hook(take, with_kwargs=True)
    try:
        with torch.no_grad():
            module(*batch)
    except Reached:
        pass
    finally:
        hook.remove()
    return found[0]


def _row(module: nn.Module, batch: Inputs, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The longest row of blocks of one class that holds some of the layers and hands its outputs on; empty: none."""
    wanted = set(layers)
    rows = [
        list(row)
        for row in module.modules()
        if isinstance(row, nn.ModuleList)
        and len(row) > 1
        and len({type(block) for block in row}) == 1
        and all(wanted & set(block.modules()) for block in row)
    ]
    rows.sort(key=len, reverse=True)
    return next((row for row in rows if _hands_on(module, batch, row)), [])


def _hands_on(module: nn.Module, batch: Inputs, blocks: list[nn.Module]) -> bool:
    """Whether each block gets what the one before it gave, and nothing else that changes from block to block."""
    inputs: list[_Call] = []
    outputs: list[Tensor | None] = []

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append(_Call(given, named))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(_hidden(output))

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks += [block.register_forward_hook(after) for block in blocks]
    try:
        with torch.no_grad():
            module(*(tensor[:1] for tensor in batch))
    finally:
        for hook in hooks:
            hook.remove()
    if not len(inputs) == len(outputs) == len(blocks):
        return False
    try:
        handed = all(call.hidden is own for call, own in zip(inputs[1:], outputs[:-1], strict=True))
    except (KeyError, IndexError):
        return False
    return handed and all(_same(inputs[0], call) for call in inputs[1:])


def _same(one: _Call, other: _Call) -> bool:
    """Whether two calls have all but their first tensor in common."""
    if len(one.given) != len(other.given) or one.named.keys() != other.named.keys():
        return False
    pairs = [*zip(one.given[1:], other.given[1:], strict=True)]
    pairs += [(one.named[name], other.named[name]) for name in one.named if name not in ("hidden_states", *CACHES)]
    return all(mine is yours or _equal(mine, yours) for mine, yours in pairs)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def _hidden(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
