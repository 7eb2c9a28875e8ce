"""A network without some of the entries of its stacks: lists of layers, or sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Kept = Mapping[str, Sequence[int]]
"""By a stack's name the places of the entries that stay, in order."""

DROP = "drop"
CONFIG = "config"
# What layers of transformers call their own place in the stack, which their caches go by.
_PLACES = ("layer_idx", "layer_id", "layer_index")


def dropped(kept: Kept, config: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of it, in words; with what a config of transformers says in place of what it said."""
    return {"kind": DROP, "kept": {name: list(places) for name, places in kept.items()}, CONFIG: dict(config)}


def apply_drop(module: nn.Module, edit: Mapping[str, Any]) -> None:
    """Takes the other entries out of the stacks. Raises AttributeError for a stack or an entry that there is not."""
    shorten(module, edit["kept"], edit[CONFIG])


@contextmanager
def shortened(module: nn.Module, kept: Kept, config: Mapping[str, Any]) -> Iterator[None]:
    """Meanwhile the module is without the other entries."""
    undo = shorten(module, kept, config)
    try:
        yield
    finally:
        undo()


def shorten(module: nn.Module, kept: Kept, config: Mapping[str, Any]) -> Callable[[], None]:
    """Takes the other entries out, tells the layers that stay where they are now and the module's config what it has
    come to say; returns what puts all of it back."""
    stacks = {name: module.get_submodule(name) for name in kept}  # before names change
    before = [(stack, dict(stack._modules)) for stack in stacks.values()]
    left = {name: [stack.get_submodule(str(place)) for place in kept[name]] for name, stack in stacks.items()}
    moved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for name, entries in left.items():
        stacks[name]._modules = {str(place): entry for place, entry in enumerate(entries)}
        for place, (old, entry) in enumerate(zip(kept[name], entries, strict=True)):
            moved += [(vars(own), _place(vars(own), old)) for own in entry.modules()]
            _place_at(entry, old, place)
    told = vars(module.config) if config else {}
    said = {name: told[name] for name in config}
    told.update(config)

    def undo() -> None:
        for stack, entries in before:
            stack._modules = entries
        for own, places in moved:
            own.update(places)
        told.update(said)

    return undo


def _place(own: Mapping[str, Any], place: int) -> dict[str, Any]:
    return {name: place for name in _PLACES if own.get(name) == place}


def _place_at(entry: nn.Module, old: int, place: int) -> None:
    for own in map(vars, entry.modules()):
        own.update(dict.fromkeys(_place(own, old), place))


def origin(name: str, kept: Kept) -> str:
    """What was called so before."""
    found: list[str] = []
    for part in name.split("."):
        places = kept.get(".".join(found))
        found.append(part if places is None else str(places[int(part)]))
    return ".".join(found)
