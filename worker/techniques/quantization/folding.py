"""Where a factor a channel can be moved through a network: out of the layer that makes a tensor, into those that read
it. With s for each channel, rows of the one are divided by s and columns of the others multiplied, and the network
gives what it gave.

Which layers allow that is not read off their names. Candidates are those whose shapes fit, and each is tried: the
factors are drawn at random, and the network must give the same. So whatever lies between them (a ReLU, a gate, heads
that attention keeps apart) is allowed if it lets factors through, and anything else that reads the tensor forbids it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from worker.constraints import stored
from worker.data.batch import Inputs

# Powers of two: what they multiply can be divided again without a trace. None is 1, which would try nothing.
TRIED = (0.25, 0.5, 2.0, 4.0)
SAME = 1e-4  # of the largest output, by which outputs may differ
SOURCES = 2  # earlier layers of the right width that are tried, the nearest first


@dataclass(frozen=True)
class Fold:
    """`source` (a Linear layer, or a norm with a weight a channel) makes what all of `targets` (Linear) read: `rows` of
    channels for each sample."""

    source: nn.Module
    targets: tuple[nn.Module, ...]
    rows: int

    @property
    def channels(self) -> int:
        """Of the tensor between them."""
        return stored(self.targets[0], "weight").shape[1]

    def move(self, factors: Tensor) -> None:
        """Multiplies the targets' columns by `factors` [channels] and divides what the source gives by them."""
        with torch.no_grad():
            for name in ("weight", "bias"):
                if getattr(self.source, name, None) is not None:
                    parameter = stored(self.source, name)
                    parameter.div_(factors.to(parameter).view(-1, *[1] * (parameter.ndim - 1)))
            for target in self.targets:
                parameter = stored(target, "weight")
                parameter.mul_(factors.to(parameter))


def folds(module: nn.Module, inputs: Inputs, layers: Sequence[nn.Module]) -> list[Fold]:
    """All folds whose targets are Linear layers of `layers`; `inputs` are a few samples that the network is tried on.

    Equal places of a network's blocks are tried once, and in the end all together.
    """
    names = {layer: name for name, layer in module.named_modules()}
    decided: dict[str, int | None] = {}
    found: list[Fold] = []
    expected = _outputs(module, inputs)
    for choices in _candidates(module, inputs, layers):
        place = _place(names, choices[0].targets)
        if place not in decided:
            fitting = (index for index, fold in enumerate(choices) if _holds(module, inputs, [fold], expected))
            decided[place] = next(fitting, None)
        choice = decided[place]
        if choice is not None and choice < len(choices):
            found.append(choices[choice])
    if found and not _holds(module, inputs, found, expected):
        found = [fold for fold in found if _holds(module, inputs, [fold], expected)]
    return found


def _place(names: dict[nn.Module, str], targets: Sequence[nn.Module]) -> str:
    return " ".join(re.sub(r"\d+", "*", names[target]) for target in targets)


def _holds(module: nn.Module, inputs: Inputs, some: Sequence[Fold], expected: Tensor) -> bool:
    """Whether the network gives the same with factors moved through all of these places; the weights are as before."""
    generator = torch.Generator().manual_seed(0)
    tried = torch.tensor(TRIED)
    factors = [tried[torch.randint(len(tried), (fold.channels,), generator=generator)] for fold in some]
    for fold, own in zip(some, factors, strict=True):
        fold.move(own)
    try:
        got = _outputs(module, inputs)
    finally:
        for fold, own in zip(some, factors, strict=True):
            fold.move(1 / own)
    if got.shape != expected.shape:
        return False
    # A sample at a time: of a language model's outputs there is no room for more copies than these two.
    apart = torch.stack([(mine - own).abs().max() for mine, own in zip(got, expected, strict=True)])
    return bool(apart.max() <= SAME * torch.stack([own.abs().max() for own in expected]).max())


def _outputs(module: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(*inputs)
    return found.float()


_Where = tuple[int, torch.Size]


def _where(tensor: Tensor) -> _Where:
    """What two views of the same numbers have in common."""
    return tensor.data_ptr(), tensor.shape


@dataclass
class _Seen:
    """What came into layers and out of them, in the order of the computation; kept, so that places stay theirs."""

    given: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    makers: dict[_Where, nn.Module] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def hook(self, layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            self.given.setdefault(layer, []).append(given[0])
            self.makers[_where(output)] = layer
            self.order.append(layer)
            self.kept.append(output)


def _candidates(module: nn.Module, inputs: Inputs, layers: Sequence[nn.Module]) -> Iterator[list[Fold]]:
    """For layers that read one tensor, with each layer that may make it."""
    seen = _Seen()
    leaves = [layer for layer in module.modules() if getattr(layer, "weight", None) is not None]
    hooks = [layer.register_forward_hook(seen.hook) for layer in leaves]
    try:
        _outputs(module, tuple(tensor[:1] for tensor in inputs))  # all that layers give is held
    finally:
        for hook in hooks:
            hook.remove()
    readers: dict[_Where, list[nn.Module]] = {}
    for layer in layers:
        if isinstance(layer, nn.Linear) and len(seen.given.get(layer, ())) == 1:
            readers.setdefault(_where(seen.given[layer][0]), []).append(layer)
    for tensor, targets in readers.items():
        width = stored(targets[0], "weight").shape[1]
        own = seen.makers.get(tensor)
        earlier = seen.order[: seen.order.index(targets[0])]
        sources = [layer for layer in reversed(earlier) if isinstance(layer, nn.Linear)] if own is None else [own]
        fitting = [layer for layer in sources if _gives(layer, width) and len(seen.given[layer]) == 1]
        rows = seen.given[targets[0]][0].numel() // width
        if fitting:
            yield [Fold(source, tuple(targets), rows) for source in list(dict.fromkeys(fitting))[:SOURCES]]


def _gives(layer: nn.Module, channels: int) -> bool:
    """Whether a layer's weight has a row, or a number, for each of so many channels."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (isinstance(layer, nn.Linear) and len(weight) == channels) or weight.shape == (channels,)
