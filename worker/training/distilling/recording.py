"""What layers give during one forward pass, taken without changing the network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from worker.data.batch import Inputs
from worker.techniques.quantization.qat.lsq import FakeInput
from worker.training.distilling.feature_math import attention_map

Side = Literal["output", "input", "attention", "map"]


@dataclass(frozen=True)
class Tap:
    """Where a tensor is taken from a network: a layer's output, its first input, or its attention.

    That is the probabilities, or the `map` [batch, 1, …] of where its channels are active, a small part of the output.
    """

    layer: str
    side: Side = "output"


@dataclass(frozen=True)
class Point:
    """A layer as it ran on an example: its class, the layer it belongs to, the shapes of what it gave and was fed."""

    name: str
    kind: str
    parent: str
    shape: tuple[int, ...]
    fed: tuple[int, ...]
    leaf: bool
    weighted: bool
    """Whether it is a leaf with a matrix or a kernel of its own."""


@dataclass(frozen=True)
class Survey:
    """The layers of a network in the order in which they ended, and those that show attention probabilities."""

    points: tuple[Point, ...]
    attentions: tuple[Point, ...]
    names: frozenset[str]


@contextlib.contextmanager
def recording(module: nn.Module, taps: Iterable[Tap]) -> Iterator[dict[Tap, Tensor]]:
    """Within the block, each forward pass fills the dictionary; a layer that runs twice leaves what it gave last.

    Attention probabilities only exist where they are computed in the open, so those of transformers are for that long.
    """
    wanted = list(taps)
    found: dict[Tap, Tensor] = {}
    hooks = [_attach(module.get_submodule(tap.layer), tap, found) for tap in wanted]
    try:
        with _eager(module) if any(tap.side == "attention" for tap in wanted) else contextlib.nullcontext():
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def survey(module: nn.Module, example: Inputs) -> Survey:
    """Runs a network once in eval mode and says what its layers gave; draws no random numbers."""
    points: list[Point] = []
    attentions: list[Point] = []
    seen: set[str] = set()

    def noting(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            given, attention = _first(output), _attention(output)
            if name in seen or given is None or len(given) != len(example[0]):
                return
            seen.add(name)
            points.append(_point(name, layer, inputs, given))
            # The innermost layer of those that hand its probabilities on.
            if attention is not None and not any(one.name.startswith(f"{name}.") for one in attentions):
                attentions.append(_point(name, layer, inputs, attention))

        return hook

    layers = {name: layer for name, layer in module.named_modules() if name and not _beside(name, layer)}
    training = module.training
    hooks = [layer.register_forward_hook(noting(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), _eager(module):
            module.eval()(*example)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return Survey(tuple(points), tuple(attentions), frozenset(layers))


def _beside(name: str, layer: nn.Module) -> bool:
    """Whether something that runs is no layer: what constrains a weight (a mask), or rounds what comes into a layer."""
    return "parametrizations" in name or isinstance(layer, FakeInput)


def _point(name: str, layer: nn.Module, inputs: Any, given: Tensor) -> Point:
    fed = _first(inputs)
    parent = name.rpartition(".")[0]
    shapes = tuple(given.shape), () if fed is None else tuple(fed.shape)
    # A layer whose weight is constrained (a mask) is the same layer.
    kind = type(layer).__name__.removeprefix("Parametrized")
    leaf = all(_beside(child, own) for child, own in layer.named_children())
    parametrized = parametrize.is_parametrized(layer)
    weighted = any(parameter.ndim > 1 for parameter in layer.parameters(recurse=parametrized))
    return Point(name, kind, parent, *shapes, leaf, leaf and weighted)


def _attach(layer: nn.Module, tap: Tap, found: dict[Tap, Tensor]) -> Any:
    def after(layer: nn.Module, inputs: Any, output: Any) -> None:
        taken = _attention(output) if tap.side == "attention" else _first(output)
        if taken is not None:
            found[tap] = attention_map(taken) if tap.side == "map" else taken

    def before(layer: nn.Module, inputs: Any) -> None:
        taken = _first(inputs)
        if taken is not None:
            found[tap] = taken

    return layer.register_forward_pre_hook(before) if tap.side == "input" else layer.register_forward_hook(after)


def _first(value: Any) -> Tensor | None:
    """The tensor that a layer is about: the first floating one of a tuple or of what transformers returns."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim > 1 else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((one for one in map(_first, parts) if one is not None), None)


def _attention(output: Any) -> Tensor | None:
    """Probabilities [batch, heads, queries, keys], which layers of transformers give beside their output."""
    if not isinstance(output, tuple) or len(output) < 2:
        return None
    given = output[1]
    return given if isinstance(given, Tensor) and given.ndim == 4 and given.is_floating_point() else None


@contextlib.contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """transformers computes attention in the open: fused kernels keep its probabilities to themselves."""
    configs = {id(layer.config): layer.config for layer in module.modules() if hasattr(layer, "config")}
    before = [(one, one._attn_implementation) for one in configs.values() if hasattr(one, "_attn_implementation")]
    for config, _ in before:
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, kind in before:
            config._attn_implementation = kind
