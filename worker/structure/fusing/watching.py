"""One pass of a network, operator by operator: who made a tensor, who read it, and what the output needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker.data.batch import Inputs


@dataclass(frozen=True)
class Operator:
    """`inside` is the watched layer that it ran in; tensors are held, so that their identities stay theirs."""

    name: str
    given: tuple[Tensor, ...]
    made: tuple[Tensor, ...]
    mutates: bool
    inside: nn.Module | None


@dataclass
class Pass:
    """What ran, in order, and by layer what came into it and what it gave, each time that it was called."""

    operators: list[Operator] = field(default_factory=list)
    given: dict[nn.Module, list[Any]] = field(default_factory=dict)
    made: dict[nn.Module, list[Any]] = field(default_factory=dict)
    output: Any = None

    def kinds(self) -> Counter[str]:
        """How many operators of each kind ran."""
        return Counter(one.name for one in self.operators)

    def is_read(self, tensor: Tensor, *but_by: nn.Module) -> bool:
        """Whether anything else than these layers reads a tensor, or the network gives it."""
        if any(one is tensor for one in tree_leaves(self.output)):
            return True
        readers = (one for one in self.operators if one.inside not in but_by)
        return any(any(own is tensor for own in one.given) for one in readers)

    def needed(self) -> set[int]:
        """Where the storages lie that the output is computed of; whatever shares one with it counts."""
        found = {_where(one) for one in tree_leaves(self.output) if isinstance(one, Tensor)}
        for one in reversed(self.operators):
            written = (*one.made, *(one.given if one.mutates else ()))
            if any(_where(own) in found for own in written):
                found.update(map(_where, one.given))
        return found


class _Watch(TorchDispatchMode):
    def __init__(self, found: Pass) -> None:
        super().__init__()
        self._found = found
        self.inside: list[nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        name = func._schema.name.removeprefix("aten::")
        inside = self.inside[-1] if self.inside else None
        self._found.operators.append(Operator(name, given, made, func._schema.is_mutable, inside))
        return out


def watched(module: nn.Module, inputs: Inputs, layers: Sequence[nn.Module] = ()) -> Pass:
    """A pass in eval mode; operators that run in one of `layers` are told as its own."""
    found = Pass()
    watch = _Watch(found)
    training = module.training
    try:
        with _hooked(layers, found, watch), torch.no_grad(), watch:
            found.output = module.eval()(*inputs)
    finally:
        module.train(training)
    return found


@contextmanager
def _hooked(layers: Sequence[nn.Module], found: Pass, watch: _Watch) -> Iterator[None]:
    def enter(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        watch.inside.append(layer)
        found.given.setdefault(layer, []).append(given[0] if len(given) == 1 and not named else None)

    def leave(layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        watch.inside.pop()
        found.made.setdefault(layer, []).append(output)

    hooks: list[Any] = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Any) -> tuple[Tensor, ...]:
    return tuple(one for one in tree_leaves(values) if isinstance(one, Tensor))


def _where(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
