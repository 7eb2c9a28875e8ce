"""Blocks of a network that may leave it whole: without one, the network computes as if it gave what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from worker.data.batch import Inputs
from worker.loading.layers import Residual
from worker.model import Model
from worker.structure.calls import example_on
from worker.structure.depth import guessed
from worker.structure.dropping import Kept, shortened

EXAMPLES = 2  # samples that a network is looked at with
CLOSE = 1e-5  # of the largest output: what the same sums give where they are taken in another order
_IDS = "input_ids"  # what transformers call tokens
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """An entry of a stack that gives the shape that it takes; `count` is how many entries the stack has, of which
    `least` stay."""

    name: str
    stack: str
    place: int
    count: int
    least: int
    module: nn.Module = field(repr=False, compare=False)


@dataclass(frozen=True)
class Blocks:
    """Those that may go, in the network's order; of others, by name, why they may not."""

    found: list[Block]
    kept: dict[str, str]


@dataclass
class _Calls:
    """Of an entry: the shapes of what came in and went out, each time, and when it was called first."""

    shapes: list[tuple[Shape | None, Shape | None]] = field(default_factory=list)
    first: int = -1


Seen = dict[nn.Module, _Calls]


def blocks(model: Model) -> Blocks:
    """Of an architecture, entries of its sequences that hold layers; of other networks, entries of lists of layers.

    One of each kind is tried, and the first and the last of each stack: a network may read more of a block than what it
    gives.
    """
    module = model.module
    inputs = varied(model)
    if isinstance(module, nn.Sequential):
        seen = _watched(module, inputs, list(_groups(module)))
        found = _of_sequence(module, "", seen)
    else:
        lists = [own for own in module.modules() if isinstance(own, nn.ModuleList)]
        seen = _watched(module, inputs, [entry for own in lists for entry in own])
        found = _of_lists(module, "", seen)
    return _standing(module, inputs, found)


def kept_without(module: nn.Module, gone: Iterable[Block]) -> dict[str, list[int]]:
    """What stays of each stack that loses entries. One that would be empty leaves its own."""
    left: dict[str, list[int]] = {}
    names = [block.name for block in gone]
    while names:
        stack, _, place = names.pop().rpartition(".")
        own = left.setdefault(stack, list(range(len(module.get_submodule(stack)._modules))))
        own.remove(int(place))
        if not own and stack:
            del left[stack]
            names.append(stack)
    return left


@contextmanager
def bypassed(gone: Sequence[Block]) -> Iterator[None]:
    """Meanwhile these blocks give what comes in."""

    def bypass(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        came = first_tensor((*given, *named.values()))
        if isinstance(output, tuple | list):
            place = next(i for i, one in enumerate(output) if isinstance(one, Tensor))
            return type(output)([*output[:place], came, *output[place + 1 :]])
        return came

    hooks = [one.module.register_forward_hook(bypass, with_kwargs=True) for one in gone]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_tensor(values: Any) -> Tensor | None:
    """What a block takes or gives: the first tensor of what it is given or returns."""
    if isinstance(values, Tensor):
        return values
    return next((one for one in values if isinstance(one, Tensor)), None) if isinstance(values, tuple | list) else None


def varied(model: Model) -> Inputs:
    """Inputs where the module lies. Tokens differ, where the network takes them: those of one kind attend to each other
    alike, wherever they stand."""
    plain = example_on(model.module, model, EXAMPLES)
    words = getattr(getattr(model.module, "config", None), "vocab_size", None)
    if not isinstance(words, int):
        return plain
    draw = torch.Generator().manual_seed(0)
    named = zip(model.facts.inputs, plain, strict=True)
    inputs = tuple(
        torch.randint(words, own.shape, generator=draw).to(own) if one.name == _IDS else own for one, own in named
    )
    try:
        passed(model.module, inputs)
    except Exception:  # models raise errors of every class, some for texts without an end
        return plain
    return inputs


def passed(module: nn.Module, inputs: Inputs) -> Tensor:
    """What the module gives in eval mode."""
    training = module.training
    try:
        with torch.no_grad():
            output: Tensor = module.eval()(*inputs)
        return output
    finally:
        module.train(training)


def same(output: Tensor, other: Tensor) -> bool:
    """Whether outputs differ by no more than rounding."""
    if output.shape != other.shape:
        return False
    return bool((output - other.to(output)).abs().max() <= CLOSE * other.abs().max())


def _groups(stack: nn.Sequential) -> Iterator[nn.Module]:
    """Entries of a sequence, and of those in it, that are layers of layers and hold weights."""
    for entry in stack:
        if _is_group(entry):
            yield entry
            if isinstance(entry, nn.Sequential):
                yield from _groups(entry)


def _is_group(entry: nn.Module) -> bool:
    return isinstance(entry, Residual | nn.TransformerEncoderLayer | nn.Sequential) and _holds_layers(entry)


def _holds_layers(entry: nn.Module) -> bool:
    """Whether it is more than a single layer, such as a norm, and has weights."""
    return next(entry.children(), None) is not None and next(entry.parameters(), None) is not None


def _of_sequence(stack: nn.Sequential, path: str, seen: Seen) -> Blocks:
    found = Blocks([], {})
    for place, entry in enumerate(stack):
        name = f"{path}.{place}".lstrip(".")
        if isinstance(entry, nn.Sequential) and next(_groups(entry), None) is not None:
            inner = _of_sequence(entry, name, seen)
            found.found.extend(inner.found)
            found.kept.update(inner.kept)
        elif _is_group(entry):
            _judge(found, Block(name, path, place, len(stack), 0, entry), seen)
    return found


def _of_lists(module: nn.Module, path: str, seen: Seen) -> Blocks:
    """Of the outermost lists. Where entries give other shapes than they take they may be stages, which hold lists."""
    found = Blocks([], {})
    for name, child in module.named_children():
        own = f"{path}.{name}".lstrip(".")
        inner = _of_list(child, own, seen) if isinstance(child, nn.ModuleList) else _of_lists(child, own, seen)
        found.found.extend(inner.found)
        found.kept.update(inner.kept)
    return found


def _of_list(stack: nn.ModuleList, path: str, seen: Seen) -> Blocks:
    entries = [Block(f"{path}.{place}", path, place, len(stack), 1, entry) for place, entry in enumerate(stack)]
    entries = [one for one in entries if _holds_layers(one.module)]
    alike = all(_why_not(one, seen) is None for one in entries)
    found = Blocks([], {})
    for one in entries:
        inner = Blocks([], {}) if alike else _of_lists(one.module, one.name, seen)
        found.found.extend(inner.found)
        found.kept.update(inner.kept)
        if not inner.found and not inner.kept:
            _judge(found, one, seen)
    return found


def _judge(found: Blocks, one: Block, seen: Seen) -> None:
    reason = _why_not(one, seen)
    if reason is None and one.count <= one.least:
        reason = "it is the only one of its stack"
    if reason is None:
        found.found.append(one)
    else:
        found.kept[one.name] = reason


def _why_not(one: Block, seen: Seen) -> str | None:
    calls = seen[one.module]
    if len(calls.shapes) != 1:
        return "the network does not call it" if not calls.shapes else f"it computes {len(calls.shapes)} times"
    ((given, made),) = calls.shapes
    if given is None or made is None:
        return "it takes or gives no tensor of its own"
    return None if given == made else f"it gives {list(made)} where it takes {list(given)}"


def _watched(module: nn.Module, inputs: Inputs, entries: Sequence[nn.Module]) -> Seen:
    seen: Seen = {entry: _Calls() for entry in entries}

    def see(entry: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        came, went = first_tensor((*given, *named.values())), first_tensor(output)
        shapes = None if came is None else tuple(came.shape), None if went is None else tuple(went.shape)
        seen[entry].shapes.append(shapes)

    hooks = [entry.register_forward_hook(see, with_kwargs=True) for entry in seen]
    try:
        passed(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _standing(module: nn.Module, inputs: Inputs, found: Blocks) -> Blocks:
    """Those without which the network is what it is if they give what they take."""
    tried: dict[Any, str | None] = {}
    left = Blocks([], dict(found.kept))
    for one in found.found:
        if (kind := _kind(one)) not in tried:
            tried[kind] = _shares(module, one) or _trouble(module, inputs, one)
        if (trouble := tried[kind]) is None:
            left.found.append(one)
        else:
            left.kept[one.name] = trouble
    return left


def _kind(one: Block) -> Any:
    """The same for blocks of one stack and shape, but for those at its ends."""
    end = one.place if one.place in (0, one.count - 1) else None
    return one.stack, end, type(one.module), tuple((name, own.shape) for name, own in one.module.named_parameters())


def _shares(module: nn.Module, one: Block) -> str | None:
    """What only one of a list of equal layers has is for all of them, as T5's bias of attention: examples may hardly
    show it."""
    own = {name for name, _ in one.module.named_parameters()}
    for other in module.get_submodule(one.stack).children() if one.least else ():
        names = {name for name, _ in other.named_parameters()}
        if type(other) is type(one.module) and names < own:
            return f"it has {min(own - names)}, which others of its kind lack and may read"
    return None


def _trouble(module: nn.Module, inputs: Inputs, one: Block) -> str | None:
    """Why a network without the block is another one than the network in which it gives what it takes."""
    with bypassed([one]):
        wanted = passed(module, inputs)
    kept = kept_without(module, [one])
    if _is_bare(module, kept):
        return "without it the network has no weights"
    try:
        with shortened(module, kept, guessed(module, kept)):
            output = passed(module, inputs)
    except Exception as error:  # models raise errors of every class
        return f"without it the network does not run: {str(error).splitlines()[0][:200] if str(error) else error!r}"
    if not same(output, wanted):
        return "the network reads more of it than what it gives"
    return None


def _is_bare(module: nn.Module, kept: Kept) -> bool:
    with shortened(module, kept, {}):
        return next(module.parameters(), None) is None
